"""Keys: from the Authorization header to who is calling, answered from memory.

Each worker holds every key's digest. One task compares the store's revision with its own twice a second, so that a
change reaches every worker within a second; a request asks the store only for a key nobody knows, and rarely then.
While the store is away, what any worker knew goes on working for a stated time, with all of them, also those that start
meanwhile; what none knew is neither right nor wrong.
"""

import asyncio
import contextlib
import hashlib
import logging
import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple, Self

from gateway import secret
from gateway.errors import InvalidKey, StoreUnavailable
from gateway.keybook import Contents, Entry, Keybook, Limits
from gateway.settings import Settings
from gateway.shared import Keepsake
from gateway.store import Store

POLL = 0.4  # seconds between two looks at the store's revision
ASK = 0.5  # seconds between two questions about unknown keys

log = logging.getLogger("stack")


@dataclass(frozen=True, slots=True)
class Key:
    """A caller. `id` names the key everywhere it is spoken of; the key itself can't be found from it."""

    id: str
    name: str = ""
    owner: str = ""
    models: frozenset[str] | None = None  # names it may use, as callers write them; None: all
    limits: Limits = field(default_factory=Limits)
    priority: int = 1  # its weight in the queue in front of a busy engine
    labels: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class _Known:
    key: Key
    ends: float  # seconds since 1970; infinity: never
    disabled: bool = False
    stored: bool = True  # in the store, not in STACK_API_KEYS


class Also(NamedTuple):
    """What else of the store is held in memory: how it is read, and where it goes. Both in a thread."""

    read: Callable[[], Any]
    take: Callable[[Any], None]


class Keys:
    """Every key in force. Only digests of them are kept. Use it with `async with`."""

    def __init__(self, settings: Settings, store: Store, keepsake: Keepsake, also: Also) -> None:
        self._keepsake = keepsake
        self._also = also
        self._settings = settings
        self._book = Keybook(store)
        self._store = store
        self._grace = settings.stack_store_grace
        self._known = self._listed(defaults(settings))
        self._number = -1  # the revision of the store that this is of
        self._looking = asyncio.Lock()
        self._good_at = float("-inf")  # when the store was last heard of, time.monotonic()
        self._asked_at = float("-inf")
        self._asking: asyncio.Task[None] | None = None  # a look at the store that has not begun
        self.trouble: StoreUnavailable | None = None  # why the store can't be asked, if it can't

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

    async def authenticate(self, authorization: bytes | None) -> Key:
        """The key of an Authorization header, "Bearer" in any case. Raises InvalidKey, or StoreUnavailable where nobody
        can tell.

        Timing tells nothing: what is compared is the SHA-256 of what was sent, of which nobody can choose the start.
        """
        scheme, _, token = (authorization or b"").partition(b" ")
        token = token.strip()
        if scheme.lower() != b"bearer" or not token:
            raise InvalidKey("No API key was given. Send it as a header: Authorization: Bearer <key>.")
        digest = hashlib.sha256(token).digest()
        known = self._known.get(digest)
        if known is None:
            if not secret.is_well_formed(token):
                raise InvalidKey("The API key is not known here. Ask whoever runs this gateway for one.")
            known = await self._ask(digest)
        if known.stored:
            self._check(known)
        return known.key

    def _check(self, known: _Known) -> None:
        """These are told only to who has the right key."""
        if known.disabled:
            raise InvalidKey("This API key is disabled. Ask whoever runs this gateway.")
        if time.time() >= known.ends:
            raise InvalidKey("This API key has expired. Ask whoever runs this gateway for a new one.")
        if self.trouble is not None and time.monotonic() - self._good_at > self._grace:
            raise StoreUnavailable("The gateway's store has been away for too long to trust this key. Try again later.")

    async def _ask(self, digest: bytes) -> _Known:
        """A key may be younger than the last look. However many ask, the store is asked twice a second."""
        if self.trouble is not None:
            raise _untold()
        if self._asking is None:
            self._asking = asyncio.create_task(self._look_soon())
        await asyncio.shield(self._asking)
        if (known := self._known.get(digest)) is not None:
            return known
        if self.trouble is not None:
            raise _untold()
        raise InvalidKey("The API key is not known here. Ask whoever runs this gateway for one.")

    async def _look_soon(self) -> None:
        await asyncio.sleep(self._asked_at + ASK - time.monotonic())
        self._asking = None  # who comes from now on may be too late for this look
        self._asked_at = time.monotonic()
        await self._look()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(POLL)
            await self._look()

    async def _look(self) -> None:
        """See whether the store has changed, and take over what it holds now. Never raises: a watch that ended would
        leave taken-back keys in force."""
        async with self._looking:
            try:
                found = await asyncio.to_thread(self._read)
            except StoreUnavailable as exc:
                if self.trouble is None:
                    log.error("the store can't be used: %s", exc.__cause__)  # noqa: TRY400  no bug of ours
                    await asyncio.to_thread(self._remember)
                self.trouble = exc
                return
            except Exception:
                if self.trouble is None:
                    log.exception("the keys can't be read from the store")
                self.trouble = _untold()
                return
            if self.trouble is not None:
                log.info("the store can be used again")
            self.trouble = None
            self._good_at = time.monotonic()
            self._keepsake.still_true(self._good_at)
            if found is not None:
                self._number, self._known = found

    def _read(self) -> tuple[int, dict[bytes, _Known]] | None:
        """In a thread. None: nothing has changed."""
        if self._number < 0:
            self._store.migrate()
        if self._store.number() == self._number:
            return None
        since = time.monotonic()
        found = self._book.contents(), self._also.read()
        try:
            self._keepsake.keep(pickle.dumps(found), since)
        except OSError as exc:
            log.warning("a worker that starts while the store is away will know no key: %s", exc.strerror)
        return found[0].number, self._take(*found)

    def _remember(self) -> None:
        """Take over what another worker knew last, where that is newer. In a thread."""
        try:
            if (kept := self._keepsake.look()) is not None:
                found = pickle.loads(kept[0])  # noqa: S301  our own, where nobody else may write
                if found[0].number > self._number:
                    self._known, self._good_at = self._take(*found), kept[1]
                    self._number = -1  # it is to be read again
        except Exception:
            log.exception("what other workers knew can't be read")

    def _take(self, contents: Contents, also: Any) -> dict[bytes, _Known]:
        self._also.take(also)
        general = contents.defaults.over(defaults(self._settings))
        made: dict[str, Key] = {}
        known = {}
        for digest, (entry, ends) in contents.secrets.items():
            key = made.setdefault(entry.id, _key(entry, general))
            last = min(float("inf") if it is None else it for it in (ends, entry.expires_at))
            known[digest] = _Known(key, last, disabled=entry.disabled)
        return known | self._listed(general)

    def _listed(self, general: Limits) -> dict[bytes, _Known]:
        """The keys of STACK_API_KEYS."""
        digests = [secret.digest(key.encode()) for key in self._settings.accepted_keys()]
        return {it: _Known(Key(_listed_id(it), limits=general), float("inf"), stored=False) for it in digests}


def listed_ids(settings: Settings) -> frozenset[str]:
    """The ids of the keys of STACK_API_KEYS."""
    return frozenset(_listed_id(secret.digest(key.encode())) for key in settings.accepted_keys())


def _listed_id(digest: bytes) -> str:
    return digest.hex()[:8]


def _untold() -> StoreUnavailable:
    return StoreUnavailable("The API key can't be looked up right now. Try again shortly.")


def defaults(settings: Settings) -> Limits:
    """The limits of keys that have none of their own, as long as the store says nothing else."""
    return Limits(
        requests_per_minute=settings.stack_limit_requests_per_minute,
        tokens_per_minute=settings.stack_limit_tokens_per_minute,
        concurrent=settings.stack_limit_concurrent,
        tokens_per_day=settings.stack_limit_tokens_per_day,
        tokens_per_month=settings.stack_limit_tokens_per_month,
    )


def _key(entry: Entry, limits: Limits) -> Key:
    return Key(
        id=entry.id,
        name=entry.name,
        owner=entry.owner,
        models=None if entry.models is None else frozenset(entry.models),
        limits=entry.limits.over(limits),
        priority=entry.priority,
        labels=MappingProxyType(entry.labels),
    )
