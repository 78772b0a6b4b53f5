"""Secret: define the form of a key, `sk-stack-<id>-<256 random bits><checksum>`.

The id names the key in lists and logs, and is not secret. The checksum lets the gateway refuse garbage without a
database. The store keeps the SHA-256 of the whole key. A slower hash is not needed, because 256 random bits cannot be
guessed.
"""

import hashlib
import re
import secrets
import string
import zlib
from collections.abc import Mapping

from gateway import headers as names

# Base 62, because a double click selects the whole key
_DIGITS = string.digits + string.ascii_uppercase + string.ascii_lowercase
ID, _BITS, _SUM = 10, 43, 6  # digits; 62^43 > 2^256, 62^6 > 2^32
_FORM = re.compile(rb"sk-stack-([0-9A-Za-z]{%d})-[0-9A-Za-z]{%d}" % (ID, _BITS + _SUM))


def presented(headers: Mapping[bytes, bytes]) -> list[bytes]:
    """Return what a request's headers hold that may be a key, in the order of preference, each once."""
    scheme, _, token = headers.get(names.AUTHORIZATION, b"").partition(b" ")
    found = [token.strip() if scheme.lower() == b"bearer" else b"", headers.get(names.API_KEY, b"").strip()]
    return list(dict.fromkeys(filter(None, found)))


def new_id() -> str:
    return "".join(secrets.choice(_DIGITS) for _ in range(ID))


def new_secret(key_id: str) -> str:
    """Return a new secret for that key. It is shown once, and only its `digest` is stored."""
    text = f"sk-stack-{key_id}-{_base62(secrets.randbits(256), _BITS)}"
    return text + _checksum(text.encode())


def new_signing_secret() -> str:
    """Return a new secret with which a front end signs the names of its users."""
    return f"sign-stack-{_base62(secrets.randbits(256), _BITS)}"


def digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()


def is_well_formed(secret: bytes) -> bool:
    """Return whether this has the form and the checksum of one of the gateway's secrets."""
    return _FORM.fullmatch(secret) is not None and _checksum(secret[:-_SUM]).encode() == secret[-_SUM:]


def _checksum(text: bytes) -> str:
    return _base62(zlib.crc32(text), _SUM)


def _base62(number: int, length: int) -> str:
    digits = []
    for _ in range(length):
        number, digit = divmod(number, 62)
        digits.append(_DIGITS[digit])
    return "".join(reversed(digits))


def pseudonym(key_id: str, name: str) -> str:
    """Return what a user is called in the usage and in logs: 16 hexadecimal digits."""
    return hashlib.blake2b(name.encode(errors="replace"), digest_size=8, key=key_id.encode()).hexdigest()
