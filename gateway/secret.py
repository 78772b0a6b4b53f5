"""Secret: what a key that the gateway makes looks like, `sk-stack-<id>-<256 random bits><checksum>`.

Its id names it in lists and logs and is no secret. The checksum lets garbage be refused without asking any database.
What is kept is the SHA-256 of the whole: of 256 random bits nothing slower is needed, there is nothing to guess.
"""

import hashlib
import re
import secrets
import string
import zlib

_DIGITS = string.digits + string.ascii_uppercase + string.ascii_lowercase  # base 62: a double click selects all of it
_ID, _BITS, _SUM = 10, 43, 6  # digits; 62^43 > 2^256, 62^6 > 2^32
_FORM = re.compile(rb"sk-stack-([0-9A-Za-z]{%d})-[0-9A-Za-z]{%d}" % (_ID, _BITS + _SUM))


def new_id() -> str:
    return "".join(secrets.choice(_DIGITS) for _ in range(_ID))


def new_secret(key_id: str) -> str:
    """A new secret for that key. It is shown once; `digest` of it is what is kept."""
    text = f"sk-stack-{key_id}-{_base62(secrets.randbits(256), _BITS)}"
    return text + _checksum(text.encode())


def digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()


def is_well_formed(secret: bytes) -> bool:
    """Whether this may be a secret of ours: its form and its checksum are right."""
    return _FORM.fullmatch(secret) is not None and _checksum(secret[:-_SUM]).encode() == secret[-_SUM:]


def _checksum(text: bytes) -> str:
    return _base62(zlib.crc32(text), _SUM)


def _base62(number: int, length: int) -> str:
    digits = []
    for _ in range(length):
        number, digit = divmod(number, 62)
        digits.append(_DIGITS[digit])
    return "".join(reversed(digits))
