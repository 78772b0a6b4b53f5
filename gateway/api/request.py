"""Request: a request as the pipeline hands it on: understood, checked, and charged."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from gateway.api.faces import Asked, Face, Setting
from gateway.endpoints import Endpoint
from gateway.exchange import Exchange
from gateway.keys.known import Key
from gateway.limits.rules import Lease
from gateway.relay.relay import Keep
from gateway.routing.routes import Route
from gateway.translation.face import Writer

Reading = tuple[int, Callable[[Setting], Asked]]


@dataclass(frozen=True, slots=True)
class Request:
    """A request that is understood: its key, its content, and its route. With a `face`, `writer` writes its answer."""

    endpoint: Endpoint
    key: Key
    exchange: Exchange
    route: Route
    headers: dict[bytes, bytes]
    digest: bytes  # of its kind and body, if it has an Idempotency-Key; else empty
    lease: Lease  # what it has been charged so far; whoever has the request settles it, unless a relay took it
    replay: bool  # there was an answer to it when it came
    face: Face | None = None
    its: Setting | None = None  # what it was read with
    reading: Reading | None = None  # and how: the memory in bytes that this takes, and the function
    writer: Writer | None = None
    keep: Keep | None = None  # stores the finished answer

    @property
    def setting(self) -> dict[str, Any]:
        """What `Pipeline.as_begun` needs of it: JSON; empty for a request that is not translated."""
        return {} if self.its is None else {name: getattr(self.its, name) for name in ("request_id", "now", "unique")}


class Count(NamedTuple):
    """The tokens of a prompt. `exact`: the engine counted them; otherwise they are estimated."""

    tokens: int
    exact: bool
