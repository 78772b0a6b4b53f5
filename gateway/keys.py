"""Keys: from the Authorization header to who is calling."""

import hashlib
import hmac
from dataclasses import dataclass

from gateway.errors import InvalidKey


@dataclass(frozen=True, slots=True)
class Key:
    """A caller. `id` names the key in logs: the start of its SHA-256, from which it can't be found."""

    id: str


class Keys:
    """The accepted bearer keys. Only their digests are kept."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._keys = [(digest := hashlib.sha256(key.encode()).digest(), Key(digest.hex()[:8])) for key in keys]

    def authenticate(self, authorization: bytes | None) -> Key:
        """The key of an Authorization header, "Bearer" in any case. Raises InvalidKey.

        Every known key is compared, in constant time, whatever is found: timing tells nothing.
        """
        scheme, _, token = (authorization or b"").partition(b" ")
        if scheme.lower() != b"bearer" or not token.strip():
            raise InvalidKey("No API key was given. Send it as a header: Authorization: Bearer <key>.")
        digest = hashlib.sha256(token.strip()).digest()
        found = None
        for known, key in self._keys:
            if hmac.compare_digest(digest, known):
                found = key
        if found is None:
            raise InvalidKey("The API key is not known here. Ask whoever runs this gateway for one.")
        return found
