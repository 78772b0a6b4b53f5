"""Known: the keys that a worker holds in memory, by the digests of their secrets.

All of them are read once. After that, only the keys that have changed are read and put in place.
"""

import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Self

from gateway.errors import InvalidKey
from gateway.keys import secret
from gateway.keys.configured import defaults, listed_id
from gateway.keys.entries import Changes, Contents, Entry
from gateway.keys.limit_fields import LimitFields, Limits
from gateway.settings import Settings

# OpenAI's own words: some clients tell a wrong key from a bad request by them alone.
INCORRECT = "Incorrect API key provided"
_NONE = LimitFields()


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
    signing: str | None = field(default=None, repr=False)  # proves its users; None: they are not told apart
    user_limits: Limits = field(default_factory=Limits)  # of each user
    user: str = ""  # the user that sends this request, by a pseudonym; empty: they are not told apart

    @property
    def account(self) -> str:
        """The name of the account of its user, or of the key if there is none: `key` or `key/user`."""
        return f"{self.id}/{self.user}" if self.user else self.id


class Known:
    """One secret of a key."""

    __slots__ = ("_disabled", "_ends", "_general", "_key", "_own", "stored")

    def __init__(self, key: Key, own: LimitFields, ends: float, *, disabled: bool = False, stored: bool = True) -> None:
        self._key = key
        self._own = own  # the limits that are its own
        self._ends = ends  # seconds since 1970; infinity: never
        self._disabled = disabled
        self.stored = stored  # in the store, not in STACK_API_KEYS
        self._general: Limits | None = None  # the limits of all keys with which `_key` was made

    def key(self, general: Limits) -> Key:
        """Return the key. `general` are the limits in place of those that it has not. They are put in at its next use,
        because a change of them must not take time for each of 100,000 keys."""
        if self._general is not general:
            self._key, self._general = replace(self._key, limits=self._own.over(general)), general
        return self._key

    def check(self) -> None:
        """Check that the key is in force. Raises InvalidKey, with a reason that only the holder of the right secret
        can get."""
        if self._disabled:
            raise InvalidKey(f"{INCORRECT}: this key is disabled. Ask the operator of this gateway.")
        if time.time() >= self._ends:
            raise InvalidKey(f"{INCORRECT}: this key has expired. Ask the operator of this gateway for a new one.")


class Keyring:
    """Every key of the settings, and of the store as of one revision (`number`, and the `mark` of that revision).
    `broken` are the invalid rows of the store."""

    def __init__(self, settings: Settings, contents: Contents | None = None) -> None:
        """`contents` are those of the store; None: it was not read yet."""
        self._settings = settings
        self.number = -1 if contents is None else contents.number
        self.mark = None if contents is None else contents.mark
        self.broken = () if contents is None else contents.broken
        general = defaults(settings)
        self._general = general if contents is None else contents.defaults.over(general)
        self._known: dict[bytes, Known] = {}
        self._digests: dict[str, tuple[bytes, ...]] = {}  # the secrets of each key, by its id
        if contents is not None:
            self._add(contents.secrets.items())
        for digest in (secret.digest(key.encode()) for key in settings.accepted_keys()):
            listed = listed_id(digest)
            self._known[digest] = Known(Key(listed, digest=digest), _NONE, float("inf"), stored=False)
            self._digests[listed] = (digest,)

    def get(self, digest: bytes) -> Known | None:
        return self._known.get(digest)

    def key(self, known: Known) -> Key:
        return known.key(self._general)

    def limits(self, account: str) -> Limits | None:
        """Return the present limits of an account, by Key.account; None if its key is not in force."""
        key_id, _, user = account.partition("/")
        for known in filter(None, map(self._known.get, self._digests.get(key_id, ()))):
            with suppress(InvalidKey):
                known.check()
                key = self.key(known)
                return key.user_limits if user else key.limits
        return None

    def change(self, changes: Changes) -> Self:
        """Put the changed keys in place."""
        for key_id in changes.ids:
            for digest in self._digests.pop(key_id, ()):
                known = self._known.get(digest)
                if known is not None and known.stored:
                    del self._known[digest]
        self._add((digest, it) for digest, it in changes.secrets.items() if self._is_free(digest))
        general = changes.defaults.over(defaults(self._settings))
        self._general = self._general if general == self._general else general
        self.number, self.mark, self.broken = changes.number, changes.mark, changes.still_broken(self.broken)
        return self

    def _is_free(self, digest: bytes) -> bool:
        known = self._known.get(digest)
        return known is None or known.stored

    def _add(self, secrets: Iterable[tuple[bytes, tuple[Entry, int | None]]]) -> None:
        for digest, (entry, ends) in secrets:
            last = min(float("inf") if it is None else it for it in (ends, entry.expires_at))
            self._known[digest] = Known(_key(entry, digest), entry.limits, last, disabled=entry.disabled)
            self._digests[entry.id] = (*self._digests.get(entry.id, ()), digest)


def _key(entry: Entry, digest: bytes) -> Key:
    return Key(
        id=entry.id,
        name=entry.name,
        owner=entry.owner,
        models=None if entry.models is None else frozenset(entry.models),
        priority=entry.priority,
        labels=MappingProxyType(entry.labels),
        digest=digest,
        signing=entry.signing,
        user_limits=entry.user_limits.over(Limits()) if entry.users else Limits(),
    )
