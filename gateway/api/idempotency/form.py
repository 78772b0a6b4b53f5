"""Form: the form of the errors that arise while an answer is kept or read, by the API of its request."""

from collections.abc import Callable
from dataclasses import dataclass

from gateway import sse
from gateway.errors import StackError
from gateway.translation.face import Writer

Whole = tuple[int, list[tuple[bytes, bytes]], bytes]  # status, headers, body


@dataclass(frozen=True, slots=True)
class Form:
    """`refusal` writes an error as a whole response. `writer` is that of a translated answer, or None."""

    refusal: Callable[[StackError], Whole]
    writer: Writer | None = None

    def failure(self, error: StackError) -> bytes:
        """Write an error as the end of a stream that the writer has begun."""
        return sse.failure(error) if self.writer is None else self.writer.failed(error)

    def lost(self, error: StackError) -> bytes:
        """Write an error as the end of a stream that another worker's writer has begun."""
        if self.writer is not None:
            self.writer.head()  # the client has it
        return self.failure(error)
