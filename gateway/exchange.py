"""Exchange: the facts of one request, fixed once it is understood; Usage: what it cost."""

from dataclasses import dataclass
from typing import Any, Literal

import orjson

from gateway.errors import BadRequest

Kind = Literal["chat", "completion", "embedding"]


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request on its way to an engine. It is whole and checked; nothing here changes any more."""

    request_id: str
    kind: Kind
    key_id: str  # names the key in logs without giving it away
    stream: bool
    wants_usage: bool  # the caller asked for a usage chunk; the gateway asks the engine for one in any case
    size: int  # messages, prompts or inputs in the request
    choices: int  # answers asked for
    fields: dict[str, Any]  # the body
    started: float  # time.monotonic(), seconds

    def encode(self, model: str, *, stream: bool) -> bytes:
        """The body for an engine: under its own name for the model, and with its count of tokens asked for.

        Raises BadRequest where it is nested more than some 250 levels deep, which is all that orjson writes.
        """
        fields = self.fields | {"model": model}
        if stream:
            options = self.fields.get("stream_options") or {}
            fields |= {"stream": True, "stream_options": options | {"include_usage": True}}
        try:
            return orjson.dumps(fields)
        except TypeError:
            raise BadRequest("The body is nested too deeply.") from None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens as the engine counted them."""

    tokens_in: int
    tokens_out: int

    @classmethod
    def of(cls, value: object) -> "Usage | None":
        """Read OpenAI's `usage` object; None where it isn't one."""
        if not isinstance(value, dict):
            return None
        tokens_in, tokens_out = value.get("prompt_tokens"), value.get("completion_tokens", 0)
        if not isinstance(tokens_in, int) or not isinstance(tokens_out, int):
            return None
        return cls(tokens_in, tokens_out)
