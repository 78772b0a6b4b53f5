"""Trace: one request's place in a trace, as W3C's Trace Context has it (https://www.w3.org/TR/trace-context/)."""

import random
import re
from collections.abc import Callable, Sequence

from gateway import headers

MAX_STATE = 512  # characters of tracestate; what is longer is left out, as the recommendation allows
_PARENT = re.compile(
    rb"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-[\x21-\x7e]*)?"
)
_STATE = re.compile(rb"[\x20-\x7e]*")
_SAMPLED = 1


class Trace:
    """One request's. `about` and `error` are said of its span by whoever knows; what is not said is left out."""

    __slots__ = ("about", "error", "held", "id", "late", "parent", "sampled", "span", "started", "state", "trace")

    def __init__(self, trace: bytes, parent: bytes, state: str, *, sampled: bool, started: float) -> None:
        self.trace = trace  # 16 bytes
        self.parent = parent  # the span of the caller, 8 bytes; empty: there is none
        self.span = new_span()
        self.state = state
        self.sampled = sampled  # otherwise it is handed on, and nothing is told of it
        self.started = started  # time.monotonic(), seconds
        self.about: list[bytes] = []  # attributes of its span
        self.error = ""  # why it has no whole answer, if its status does not say so
        self.held = False  # its answer is made apart from its response, and may end later
        self.late: Callable[[], None] | None = None  # writes its span, whose response was over before its answer

    def release(self) -> None:
        """Note that the answer is over for which it was held."""
        self.held = False
        late, self.late = self.late, None
        if late is not None:
            late()

    def lines(self, span: bytes) -> str:
        """Return the header lines that hand the trace on, for a request that `span` stands for."""
        parent = f"traceparent: 00-{self.trace.hex()}-{span.hex()}-0{self.sampled:d}\r\n"
        return f"{parent}tracestate: {self.state}\r\n" if self.state else parent


def new_span() -> bytes:
    """Return an id for a span. It has to be rare, not secret."""
    return (random.getrandbits(63) + 1).to_bytes(8, "big")


def taken(found: Sequence[tuple[bytes, bytes]], share: float, started: float) -> Trace:
    """Return the place of a request with these headers. A caller's trace goes on if its header is sound, and is sampled
    if the caller's part of it is. Otherwise a trace begins here, and `share` of those are sampled: 0 to 1."""
    parents = [value for name, value in found if name == headers.TRACEPARENT]
    match = _PARENT.fullmatch(parents[0]) if len(parents) == 1 else None
    if match is not None and (match[1] != b"00" or match[5] is None):  # version 0 has nothing behind its flags
        sampled = bool(int(match[4], 16) & _SAMPLED)
        trace, parent = bytes.fromhex(match[2].decode()), bytes.fromhex(match[3].decode())
        return Trace(trace, parent, _state(found), sampled=sampled, started=started)
    number = random.getrandbits(128) or 1
    # By its last 8 bytes, as OpenTelemetry's TraceIdRatioBased: every program comes to the same decision.
    sampled = number & 0xFFFF_FFFF_FFFF_FFFF < share * 2**64
    return Trace(number.to_bytes(16, "big"), b"", "", sampled=sampled, started=started)


def _state(found: Sequence[tuple[bytes, bytes]]) -> str:
    state = b",".join(value for name, value in found if name == headers.TRACESTATE)
    return state.decode() if len(state) <= MAX_STATE and _STATE.fullmatch(state) else ""
