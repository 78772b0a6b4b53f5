"""Keys: turn the headers of a request into a caller, from memory.

Each worker holds every key's digest. One task compares the store's revision with the worker's own twice a second. A
change therefore reaches every worker within a second, and the running requests of a revoked key end. A request makes a
worker ask the store only if its key is unknown, and rarely even then. While the store is unreachable, the keys that any
worker knows continue to work for a stated time, on all workers, including those that start meanwhile. An unknown key
gets a 503, because it is neither right nor wrong.
"""

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

from gateway.errors import InvalidKey, StackError, StoreUnavailable
from gateway.keys import keepsake, neighbours, secret
from gateway.keys.book import Keybook
from gateway.keys.entries import Changes
from gateway.keys.known import INCORRECT, Key, Keyring, Known
from gateway.keys.limit_fields import Limits
from gateway.settings import PLACEHOLDER_KEY, Settings
from gateway.shared_memory import Keepsake
from gateway.store.store import Store

POLL = 0.4  # seconds between two looks at the store's revision
ASK = 0.5  # seconds between two questions about unknown keys
RENEW = 60.0  # seconds, at least, between two readings of all keys because the file of them is missing

log = logging.getLogger("stack")
_Result = TypeVar("_Result")

_PLACEHOLDER = PLACEHOLDER_KEY.encode()
_NONE = "You didn't provide an API key. Send it in a header: Authorization: Bearer <key>, or x-api-key: <key>."
_UNKNOWN = f"{INCORRECT}: this gateway does not know the key. Ask the operator of this gateway for a key."


class Also(NamedTuple):
    """Say what else of the store is kept in memory: how it is read, as bytes, and where these go. Both happen in a
    thread. `take` raises ValueError for bytes that `read` did not make."""

    read: Callable[[], bytes]
    take: Callable[[bytes], None]


class Keys:
    """Hold every valid key, as digests only. Use it with `async with`. `looked` is called on the event loop after
    each regular look at the store, because keys may have ended.
    """

    def __init__(
        self, settings: Settings, store: Store, kept: Keepsake, also: Also, looked: Callable[[], None]
    ) -> None:
        self._keepsake = kept
        self._looked = looked
        # A thread of its own, so that no other work in threads can delay a revocation.
        self._thread = ThreadPoolExecutor(1, "keys")
        self._also = also
        self._settings = settings
        self._book = Keybook(store)
        self._store = store
        self._grace = settings.stack_store_grace
        self._keyring = Keyring(settings)
        self._whole = True  # the next look reads everything
        self._renew_at = float("inf")  # when everything is read again to keep it in a file, time.monotonic()
        self._read_at = float("-inf")  # when everything was last read
        self._looking = asyncio.Lock()
        self._good_at = float("-inf")  # when the store last answered, time.monotonic()
        self._asked_at = float("-inf")
        self._asking: asyncio.Task[None] | None = None  # a look at the store that is due and has not begun
        self.trouble: StoreUnavailable | None = None  # why the store is unavailable; None: it is available

    async def __aenter__(self) -> Self:
        await self._look()
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def authenticate(self, headers: Mapping[bytes, bytes], peer: tuple[str, int] | None) -> Key:
        """Return the key that a request's headers hold: Authorization with "Bearer" in any case, or x-api-key, which
        clients of Anthropic's API send. If both are sent, one valid key is enough, and Authorization is preferred.

        Raises InvalidKey, or StoreUnavailable if the key cannot be checked. `peer` is the address and port of the
        client (None: the connection is gone). The placeholder key is not valid for a container beside this one.

        The comparison reveals nothing by its duration, because SHA-256 digests are compared, and a caller cannot choose
        the beginning of a digest.
        """
        tokens = secret.presented(headers)
        if not tokens:
            raise InvalidKey(_NONE)
        if len(tokens) == 1:
            return await self._key(tokens[0], peer)
        # A key in memory is tried first, because a look at the store may take half a second.
        known = [self._keyring.get(hashlib.sha256(it).digest()) is not None for it in tokens]
        refusals: list[StackError] = []
        for token in tokens if known[0] or not known[1] else reversed(tokens):
            try:
                return await self._key(token, peer)
            except (InvalidKey, StoreUnavailable) as exc:
                refusals.append(exc)
        raise next((it for it in refusals if isinstance(it, StoreUnavailable)), refusals[0])

    async def _key(self, token: bytes, peer: tuple[str, int] | None) -> Key:
        if token == _PLACEHOLDER and (peer is None or not neighbours.is_outside(peer[0])):
            raise InvalidKey(
                f"{INCORRECT}: the placeholder '{PLACEHOLDER_KEY}' works only on this machine, and not for containers "
                "beside the gateway. Set a key of your own (STACK_API_KEYS)."
            )
        digest = hashlib.sha256(token).digest()
        if self._keyring.get(digest) is None and not secret.is_well_formed(token):
            raise InvalidKey(_UNKNOWN)
        return await self.find(digest)

    async def find(self, digest: bytes) -> Key:
        """Return the key with this digest. Raises InvalidKey, or StoreUnavailable if the key cannot be checked."""
        known = self._keyring.get(digest) or await self._ask(digest)
        if known.stored:
            known.check()
            self._check_trust()
        return self._keyring.key(known)

    def still(self, key: Key) -> Key:
        """Return the current state of a key, with the user of its request. Raises InvalidKey if it was revoked or has
        expired since its request came."""
        known = self._keyring.get(key.digest)
        if known is None:
            raise InvalidKey(f"{INCORRECT}: this key was revoked. Ask the operator of this gateway for a new one.")
        known.check()
        now = self._keyring.key(known)
        return replace(now, user=key.user) if key.user else now

    @property
    def number(self) -> int:
        """The revision of the store that is in force."""
        return self._keyring.number

    def limits(self, account: str) -> Limits | None:
        """See Keyring.limits."""
        return self._keyring.limits(account)

    @property
    def broken(self) -> tuple[str, ...]:
        """The invalid rows of the store."""
        return self._keyring.broken

    def _check_trust(self) -> None:
        if self.trouble is not None and time.monotonic() - self._good_at > self._grace:
            raise StoreUnavailable(
                "The gateway's store has been unreachable for too long, so it cannot check this key. Try again later."
            )

    async def _ask(self, digest: bytes) -> Known:
        """Look for a key that may be newer than the last look. The store is asked at most twice a second, however many
        requests wait."""
        if self.trouble is not None:
            raise _untold()
        if self._asking is None:
            self._asking = asyncio.create_task(self._look_soon())
        await asyncio.shield(self._asking)
        if (known := self._keyring.get(digest)) is not None:
            return known
        if self.trouble is not None:
            raise _untold()
        raise InvalidKey(_UNKNOWN)

    async def _look_soon(self) -> None:
        await asyncio.sleep(self._asked_at + ASK - time.monotonic())
        self._asking = None  # later requests may be too late for this look
        self._asked_at = time.monotonic()
        await self._look()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(POLL)
            await self._look()
            self._looked()

    async def _look(self) -> None:
        """Check whether the store has changed, and take over what has. Never raises, because without this task revoked
        keys would stay in force."""
        async with self._looking:
            try:
                found = await self._in_thread(self._read)
            except StoreUnavailable as exc:
                if self.trouble is None:
                    log.error("the store is unreachable: %s", exc.__cause__)  # noqa: TRY400  no bug of ours
                    await self._in_thread(self._remember)
                self.trouble = exc
                return
            except Exception:
                if self.trouble is None:
                    log.exception("the keys cannot be read from the store")
                self.trouble = _untold()
                return
            if self.trouble is not None:
                log.info("the store is reachable again")
            self.trouble = None
            self._good_at = time.monotonic()
            self._keepsake.still_true(self._good_at)
            if found is not None:
                self._take(found)

    async def _in_thread(self, call: Callable[[], _Result]) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def _read(self) -> Keyring | Changes | None:
        """Read what has changed, or everything. None: nothing has changed. Called in a thread."""
        if self._whole:
            self._store.migrate()
        since, there = time.monotonic(), self._keyring
        if not self._whole and since < self._renew_at:
            if self._store.number() == there.number:
                return None
            if (changes := self._book.changes(there.number, there.mark)) is not None:
                also = self._also.read() if changes.prompts else None
                self._keep(keepsake.dump_changes(changes, also), changes.number, since, there.number)
                if also is not None:
                    self._also.take(also)
                return changes
        contents, all_also = self._book.contents(), self._also.read()
        self._whole, self._renew_at, self._read_at = False, float("inf"), since
        self._keep(keepsake.dump(contents, all_also), contents.number, since)
        self._also.take(all_also)
        return Keyring(self._settings, contents)

    def _keep(self, line: bytes, number: int, since: float, before: int | None = None) -> None:
        """Keep the keys in a file: all of them, or the changes after the revision `before`. If changes can be added to
        no file, all keys are read again later."""
        try:
            if before is None:
                self._keepsake.keep(line, number, since)
            elif not self._keepsake.add(line, before, number, since):
                self._renew_at = self._read_at + RENEW
        except OSError as exc:
            if before is not None:
                self._renew_at = self._read_at + RENEW
            log.warning(
                "the keys cannot be kept for a worker that starts while the store is unreachable: %s", exc.strerror
            )

    def _remember(self) -> None:
        """Load the keys that another worker has kept, if they are newer. Called in a thread."""
        try:
            if (kept := self._keepsake.look(self._keyring.number)) is not None:
                contents, also = keepsake.load(kept.data)
                self._also.take(also)
                self._take(Keyring(self._settings, contents))
                self._good_at = kept.at
                self._whole = True  # the store has to be read again
        except Exception:
            log.exception("the keys of the other workers cannot be read")

    def _take(self, found: Keyring | Changes) -> None:
        before = self._keyring.broken
        if isinstance(found, Keyring):
            self._keyring = found
        else:
            self._keyring.change(found)
        broken = self._keyring.broken
        if broken and broken != before:
            log.error("%d rows of the store are damaged and left out: %s", len(broken), "; ".join(broken[:5]))


def _untold() -> StoreUnavailable:
    return StoreUnavailable("The gateway cannot look up the API key right now. Try again shortly.")
