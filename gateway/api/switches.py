"""Switches: read the headers by which a request chooses how the gateway treats it. Each function raises BadRequest."""

import re

from gateway import headers as names
from gateway.errors import BadRequest


def is_strict(headers: dict[bytes, bytes], *, unless_said: bool) -> bool:
    value = headers.get(names.STRICT)
    if value is None:
        return unless_said
    if value.lower() not in (b"true", b"false"):
        raise BadRequest(f"'{names.STRICT.decode()}' must be true or false.", param=names.STRICT.decode())
    return value.lower() == b"true"


def shortened(headers: dict[bytes, bytes], longest: float) -> float:
    """Return for how many seconds the request may wait in queues. Raises BadRequest."""
    value = headers.get(names.QUEUE_TIMEOUT)
    if value is None:
        return longest
    if not re.fullmatch(rb"[0-9]{1,9}(\.[0-9]{0,9})?", value):
        name = names.QUEUE_TIMEOUT.decode()
        raise BadRequest(f"'{name}' must be a number of seconds.", param=name)
    return min(longest, float(value))


def switch(headers: dict[bytes, bytes], name: bytes) -> bool:
    """Return the value of a header that is `on` or `off`; a missing header means on. Raises BadRequest."""
    value = headers.get(name, b"on").lower()
    if value not in (b"on", b"off"):
        raise BadRequest(f"'{name.decode()}' must be on or off.", param=name.decode())
    return value == b"on"
