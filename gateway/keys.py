"""Keys: from the Authorization header to who is calling."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from gateway.errors import InvalidKey


@dataclass(frozen=True, slots=True)
class Limits:
    """What a key may use; None is no limit. Per minute: token buckets. Quotas: calendar days and
    months in UTC."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None


@dataclass(frozen=True, slots=True)
class Key:
    """A caller. `id` names the key everywhere it is spoken of; the key itself can't be found from it."""

    id: str
    name: str = ""
    owner: str = ""
    models: frozenset[str] | None = None  # names it may use, as callers write them; None: all
    limits: Limits = Limits()
    priority: int = 1  # its weight in the queue in front of a busy engine
    labels: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


class Keys:
    """The accepted bearer keys. Only their digests are kept."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._keys = {digest: Key(digest.hex()[:8]) for digest in digests}

    def authenticate(self, authorization: bytes | None) -> Key:
        """The key of an Authorization header, "Bearer" in any case. Raises InvalidKey.

        Timing tells nothing: what is compared is the SHA-256 of what was sent, of which nobody can choose the start.
        """
        scheme, _, token = (authorization or b"").partition(b" ")
        if scheme.lower() != b"bearer" or not token.strip():
            raise InvalidKey("No API key was given. Send it as a header: Authorization: Bearer <key>.")
        key = self._keys.get(hashlib.sha256(token.strip()).digest())
        if key is None:
            raise InvalidKey("The API key is not known here. Ask whoever runs this gateway for one.")
        return key
