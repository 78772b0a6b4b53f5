"""Reader: what a relay needs of an object that reads an engine's stream. A Tap reads a whole answer, and a Seam reads
the rest of one."""

from typing import Any, Protocol

from gateway.exchange import Usage
from gateway.relay.content import Content


class Reader(Protocol):
    """Read one stream. Feed it the bytes that arrive; it returns the bytes to send."""

    @property
    def held(self) -> bytes:
        """The valid events before the one for which `feed` raised an error. They are to be forwarded first."""

    @property
    def head(self) -> dict[str, Any]:
        """The fields that every chunk has, from the first chunk."""

    @property
    def started(self) -> bool:
        """Whether a data event has been seen."""

    @property
    def skipping(self) -> bool:
        """Whether the engine is still making what the client already has."""

    @property
    def done(self) -> bool:
        """Whether the stream's last event has been seen."""

    @property
    def content(self) -> Content:
        """What has come of the answer."""

    @property
    def usage(self) -> Usage | None:
        """The tokens of the whole answer as engines counted them so far, if they have."""

    @property
    def made(self) -> int:
        """The tokens made so far, or a lower bound."""

    def feed(self, data: bytes) -> bytes:
        """Take bytes as they arrived and return the bytes of complete, valid events to forward (maybe none). Raises
        EngineFault for an error event and EngineError for a broken one."""

    def end(self) -> bytes:
        """Return what the client lacks of a stream that the engine closed. Raises EngineError if the answer is
        incomplete."""
