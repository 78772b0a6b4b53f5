"""Writer: write an answer in OpenAI's own form, which is the engines' form too.

The writers of other APIs are in gateway.translation.
"""

from typing import Any

import orjson

from gateway import sse
from gateway.errors import StackError


class OpenAIWriter:
    """A translation.face.Writer that changes nothing."""

    def head(self) -> bytes:
        """See Writer.head."""
        return b""

    def waiting(self) -> bytes:
        """See Writer.waiting."""
        return sse.PING

    def chunk(self, chunk: dict[str, Any]) -> bytes:
        """See Writer.chunk."""
        return sse.event(orjson.dumps(chunk))

    def end(self) -> bytes:
        """See Writer.end."""
        return sse.DONE

    def failed(self, error: StackError) -> bytes:
        """See Writer.failed."""
        return sse.failure(error)

    def whole(self, completion: dict[str, Any]) -> dict[str, Any]:
        """See Writer.whole."""
        return completion


OPENAI = OpenAIWriter()  # it has no state, so one is enough for all
