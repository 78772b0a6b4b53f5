"""Exchange: the facts of one request, fixed once it is understood; Usage: what it cost."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["chat", "completion", "embedding"]


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request on its way to the engine. The body is whole and checked; nothing here changes any more."""

    request_id: str
    kind: Kind
    key_id: str  # names the key in logs without giving it away
    model: str  # the engine's own name for it, aliases resolved
    stream: bool
    wants_usage: bool  # the caller asked for a usage chunk; the gateway asks the engine for one in any case
    size: int  # messages, prompts or inputs in the request
    body: bytes  # JSON for the engine
    started: float  # time.monotonic(), seconds


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
