"""Round writer: how the part of an answer that one of several rounds made goes out."""

from typing import Any, Protocol

from gateway.errors import StackError
from gateway.relay.writer import OPENAI
from gateway.translation.face import Writer


class Round(Protocol):
    """The round that is written: gateway.relay.rounds has it."""

    @property
    def last(self) -> bool:
        """Whether the answer is whole after it."""

    @property
    def failed(self) -> bool:
        """Whether its answer is known to be wrong."""

    def check(self) -> None:
        """Raise EngineDisobeyed if its answer is wrong."""


class RoundWriter:
    """Writes what a round tells, without the stream's end if it is not the last round."""

    def __init__(self, inner: Writer, rounds: Round) -> None:
        self._inner = inner
        self._rounds = rounds

    def head(self) -> bytes:
        """See Writer.head."""
        return self._inner.head()

    def waiting(self) -> bytes:
        """See Writer.waiting."""
        return self._inner.waiting()

    def chunk(self, chunk: dict[str, Any]) -> bytes:
        """See Writer.chunk. Nothing is written of a choice that says nothing, or of an answer that is wrong."""
        if self._rounds.failed or not _says(chunk):
            return b""
        return self._inner.chunk(chunk)

    def end(self) -> bytes:
        """See Writer.end. Raises EngineDisobeyed if the answer is wrong."""
        self._rounds.check()
        return self._inner.end() if self._rounds.last else b""

    def failed(self, error: StackError) -> bytes:
        """See Writer.failed."""
        return self._inner.failed(error)

    def whole(self, completion: dict[str, Any]) -> dict[str, Any]:
        """See Writer.whole."""
        return self._inner.whole(completion)


def plain_writer(writer: Writer | None) -> Writer:
    """Return the writer of an answer, OpenAI's own if it has no other."""
    return writer or OPENAI


def _says(chunk: dict[str, Any]) -> bool:
    """Whether a chunk tells a client anything."""
    choices = chunk.get("choices")
    if not choices or chunk.get("usage"):
        return True
    return any(
        not isinstance(it, dict)
        or it.get("finish_reason")
        or it.get("text")
        or "role" in (delta := it.get("delta") or {})
        or any(delta.values())
        for it in choices
    )
