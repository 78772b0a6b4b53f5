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
from dataclasses import dataclass, field
from types import MappingProxyType, TracebackType
from typing import NamedTuple, Self, TypeVar

from gateway.errors import InvalidKey, StackError, StoreUnavailable
from gateway.keys import keepsake, neighbours, secret
from gateway.keys.book import Keybook
from gateway.keys.configured import defaults, listed_id
from gateway.keys.entries import Contents, Entry
from gateway.keys.limit_fields import Limits
from gateway.settings import PLACEHOLDER_KEY, Settings
from gateway.shared_memory import Keepsake
from gateway.store.store import Store

POLL = 0.4  # seconds between two looks at the store's revision
ASK = 0.5  # seconds between two questions about unknown keys

log = logging.getLogger("stack")
_Result = TypeVar("_Result")

_PLACEHOLDER = PLACEHOLDER_KEY.encode()
# OpenAI's own words: some clients tell a wrong key from a bad request by them alone.
_INCORRECT = "Incorrect API key provided"
_NONE = "You didn't provide an API key. Send it in a header: Authorization: Bearer <key>, or x-api-key: <key>."
_UNKNOWN = f"{_INCORRECT}: this gateway does not know the key. Ask the operator of this gateway for a key."


@dataclass(frozen=True, slots=True)
class Key:
    """A caller. `id` names the key everywhere, and the key itself cannot be found from it."""

    id: str
    name: str = ""
    owner: str = ""
    models: frozenset[str] | None = None  # names it may use, as callers write them; None: all
    limits: Limits = field(default_factory=Limits)
    priority: int = 1  # its weight in the queue in front of a busy engine
    labels: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    digest: bytes = field(default=b"", repr=False)  # of the secret that was shown, of two that a key may have


@dataclass(frozen=True, slots=True)
class _Known:
    key: Key
    ends: float  # seconds since 1970; infinity: never
    disabled: bool = False
    stored: bool = True  # in the store, not in STACK_API_KEYS


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
        self._known = self._listed(defaults(settings))
        self._number = -1  # the store's revision of these keys
        self._looking = asyncio.Lock()
        self._good_at = float("-inf")  # when the store last answered, time.monotonic()
        self._asked_at = float("-inf")
        self._asking: asyncio.Task[None] | None = None  # a look at the store that is due and has not begun
        self.trouble: StoreUnavailable | None = None  # why the store is unavailable; None: it is available
        self.broken: tuple[str, ...] = ()  # invalid rows of the store

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
        known = [hashlib.sha256(it).digest() in self._known for it in tokens]
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
                f"{_INCORRECT}: the placeholder '{PLACEHOLDER_KEY}' works only on this machine, and not for containers "
                "beside the gateway. Set a key of your own (STACK_API_KEYS)."
            )
        digest = hashlib.sha256(token).digest()
        known = self._known.get(digest)
        if known is None:
            if not secret.is_well_formed(token):
                raise InvalidKey(_UNKNOWN)
            known = await self._ask(digest)
        if known.stored:
            _check(known)
            self._check_trust()
        return known.key

    def still(self, key: Key) -> Key:
        """Return the current state of a key. Raises InvalidKey if it was revoked or has expired since its
        request came."""
        known = self._known.get(key.digest)
        if known is None:
            raise InvalidKey(f"{_INCORRECT}: this key was revoked. Ask the operator of this gateway for a new one.")
        _check(known)
        return known.key

    def _check_trust(self) -> None:
        if self.trouble is not None and time.monotonic() - self._good_at > self._grace:
            raise StoreUnavailable(
                "The gateway's store has been unreachable for too long, so it cannot check this key. Try again later."
            )

    async def _ask(self, digest: bytes) -> _Known:
        """Look for a key that may be newer than the last look. The store is asked at most twice a second, however many
        requests wait."""
        if self.trouble is not None:
            raise _untold()
        if self._asking is None:
            self._asking = asyncio.create_task(self._look_soon())
        await asyncio.shield(self._asking)
        if (known := self._known.get(digest)) is not None:
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
        """Check whether the store has changed, and load the keys if so. Never raises, because without this task revoked
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
                self._number, self._known = found

    async def _in_thread(self, call: Callable[[], _Result]) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def _read(self) -> tuple[int, dict[bytes, _Known]] | None:
        """Read the keys, in a thread. None: nothing has changed."""
        if self._number < 0:
            self._store.migrate()
        if self._store.number() == self._number:
            return None
        since = time.monotonic()
        found = self._book.contents(), self._also.read()
        try:
            self._keepsake.keep(keepsake.dump(*found), since)
        except OSError as exc:
            log.warning(
                "the keys cannot be kept for a worker that starts while the store is unreachable: %s", exc.strerror
            )
        return found[0].number, self._take(*found)

    def _remember(self) -> None:
        """Load the keys that another worker has kept, if they are newer. Called in a thread."""
        try:
            if (kept := self._keepsake.look()) is not None:
                found = keepsake.load(kept[0])
                if found[0].number > self._number:
                    self._known, self._good_at = self._take(*found), kept[1]
                    self._number = -1  # the store has to be read again
        except Exception:
            log.exception("the keys of the other workers cannot be read")

    def _take(self, contents: Contents, also: bytes) -> dict[bytes, _Known]:
        self._also.take(also)
        if contents.broken and contents.broken != self.broken:
            some = "; ".join(contents.broken[:5])
            log.error("%d rows of the store are damaged and left out: %s", len(contents.broken), some)
        self.broken = contents.broken
        general = contents.defaults.over(defaults(self._settings))
        known = {}
        for digest, (entry, ends) in contents.secrets.items():
            key = _key(entry, general, digest)
            last = min(float("inf") if it is None else it for it in (ends, entry.expires_at))
            known[digest] = _Known(key, last, disabled=entry.disabled)
        return known | self._listed(general)

    def _listed(self, general: Limits) -> dict[bytes, _Known]:
        """Return the keys of STACK_API_KEYS."""
        digests = [secret.digest(key.encode()) for key in self._settings.accepted_keys()]
        return {it: _Known(Key(listed_id(it), limits=general, digest=it), float("inf"), stored=False) for it in digests}


def _check(known: _Known) -> None:
    """Check that a key is in force. Raises InvalidKey, with a reason that only the holder of the right secret
    can get."""
    if known.disabled:
        raise InvalidKey(f"{_INCORRECT}: this key is disabled. Ask the operator of this gateway.")
    if time.time() >= known.ends:
        raise InvalidKey(f"{_INCORRECT}: this key has expired. Ask the operator of this gateway for a new one.")


def _untold() -> StoreUnavailable:
    return StoreUnavailable("The gateway cannot look up the API key right now. Try again shortly.")


def _key(entry: Entry, limits: Limits, digest: bytes) -> Key:
    return Key(
        id=entry.id,
        name=entry.name,
        owner=entry.owner,
        models=None if entry.models is None else frozenset(entry.models),
        limits=entry.limits.over(limits),
        priority=entry.priority,
        labels=MappingProxyType(entry.labels),
        digest=digest,
    )
