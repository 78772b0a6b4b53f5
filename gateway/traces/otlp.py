"""OTLP: write spans in the form of opentelemetry/proto/trace/v1/trace.proto, by hand.

The package's README.md says why no library does that. Tests read everything with OpenTelemetry's own classes.
"""

import re
import struct
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Literal

Value = str | bool | int | float | list[str]

Kind = Literal["server", "client", "internal"]  # who asked for what a span stands for: a caller, the gateway, nobody
_KINDS: Mapping[Kind, bytes] = {"internal": b"\x30\x01", "server": b"\x30\x02", "client": b"\x30\x03"}
_FAILED = b"\x7a\x02\x18\x02"  # status: error
_REMOTE, _LOCAL = 0x300, 0x100  # flags: the parent is, or is not, another program's
_TRACE, _SPAN, _PARENT = b"\x0a\x10", b"\x12\x08", b"\x22\x08"
_START, _END, _FLAGS, _TIME = b"\x39", b"\x41", b"\x85\x01", b"\x09"
_REJECTED = re.compile(rb"\x0a[\x80-\xff]{0,4}[\x00-\x7f]\x08([\x80-\xff]{0,8}[\x00-\x7f])")
_fixed64 = struct.Struct("<Q").pack
_fixed32 = struct.Struct("<I").pack
_double = struct.Struct("<d").pack


def span(
    *,
    trace: bytes,
    id: bytes,  # noqa: A002  what OpenTelemetry calls it
    parent: bytes,
    remote: bool = False,
    state: str = "",
    name: str,
    kind: Kind,
    began: int,
    ended: int,
    attributes: Iterable[bytes],
    events: bytes = b"",
    failed: bool,
) -> bytes:
    """Write one span as an entry of `scope`. `began` and `ended` are nanoseconds since 1970. `attributes` come from
    `constant` and `attribute`, `events` from `event`; `parent` may be empty."""
    body = b"".join(
        (
            _TRACE,
            trace,
            _SPAN,
            id,
            _text(3, state) if state else b"",
            _PARENT + parent if parent else b"",
            _name(name),
            _KINDS[kind],
            _START,
            _fixed64(began),
            _END,
            _fixed64(ended),
            *attributes,
            events,
            _FAILED if failed else b"",
            _FLAGS,
            _fixed32((_REMOTE if remote else _LOCAL) | 1),
        )
    )
    return b"\x12" + _varint(len(body)) + body


def event(name: str, at: int) -> bytes:
    """Write an event of a span, `at` nanoseconds since 1970."""
    return _field(11, _TIME + _fixed64(at) + _text(2, name))


def attribute(name: str, value: Value) -> bytes:
    """Write an attribute of a span."""
    return b"\x4a" + _sized(_pair(name, value))


@lru_cache(maxsize=16_384, typed=True)  # typed, because True is 1
def constant(name: str, value: str | bool | float) -> bytes:
    """Write an attribute whose value comes again and again."""
    return attribute(name, value)


def text(name: str, value: str) -> bytes:
    """Write an attribute whose value hardly ever comes again."""
    data = value.encode(errors="replace")
    return _before_text(name, len(data)) + data


def seconds(name: str, value: float) -> bytes:
    """Write a duration as an attribute."""
    return _before_double(name) + _double(value)


@lru_cache(maxsize=4096)
def _before_text(name: str, size: int) -> bytes:
    return attribute(name, "x" * size)[:-size] if size else attribute(name, "")


@lru_cache(maxsize=64)
def _before_double(name: str) -> bytes:
    return attribute(name, 0.0)[:-8]


def request(resource: Mapping[str, str], scope: str, version: str, spans: Iterable[bytes]) -> bytes:
    """Write an ExportTraceServiceRequest with these spans of one resource."""
    about = b"".join(_field(1, _pair(name, value)) for name, value in resource.items())
    of_scope = _field(1, _text(1, scope) + _text(2, version)) + b"".join(spans)
    return _field(1, _field(1, about) + _field(2, of_scope))


def rejected(answer: bytes) -> int:
    """Return how many spans an ExportTraceServiceResponse says were rejected: the field 1 of the message in its field
    1. Whatever else it is counts as 0."""
    found = _REJECTED.match(answer)
    return sum((it & 0x7F) << 7 * place for place, it in enumerate(found[1])) if found else 0


@lru_cache(maxsize=1024)
def _name(name: str) -> bytes:
    return _text(5, name)


def _pair(name: str, value: Value) -> bytes:
    return _text(1, name) + _field(2, _any(value))


def _any(value: Value) -> bytes:
    if isinstance(value, str):
        return _text(1, value)
    if isinstance(value, bool):
        return b"\x10\x01" if value else b"\x10\x00"
    if isinstance(value, int):
        return b"\x18" + _varint(value & 0xFFFF_FFFF_FFFF_FFFF)
    if isinstance(value, float):
        return b"\x21" + _double(value)
    return _field(5, b"".join(_field(1, _text(1, it)) for it in value))


def _text(number: int, value: str) -> bytes:
    return _field(number, value.encode(errors="replace"))


def _field(number: int, content: bytes) -> bytes:
    return bytes((number << 3 | 2,)) + _sized(content)  # every number here is below 16


def _sized(content: bytes) -> bytes:
    return _varint(len(content)) + content


def _varint(number: int) -> bytes:
    if number < 0x80:
        return _SMALL[number]
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    parts.append(number)
    return bytes(parts)


_SMALL = [bytes((number,)) for number in range(0x80)]
