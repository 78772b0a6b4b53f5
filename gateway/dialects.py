"""Dialects: what each engine's endpoints and errors mean, in one table and one function."""

from dataclasses import dataclass, field
from typing import Any

import orjson

from gateway.errors import (
    BadRequest,
    EngineError,
    EngineOverloaded,
    EngineRefused,
    EngineTimeout,
    EngineUnauthorized,
    ModelLoading,
    ModelNotFound,
    StackError,
)


@dataclass(frozen=True, slots=True)
class Dialect:
    """One engine's ways. `health` is a path below the server's root that answers 200 once it can generate; `deaf` says
    that it goes on with a blocking request whose client has hung up (llama.cpp's server: tried).

    `continues` are the fields that have it go on with a last message of the assistant's, where it doesn't do that
    without being told; `trims`: the white space at that message's end may be lost in the model's chat template."""

    name: str
    health: str
    deaf: bool = False
    continues: dict[str, Any] = field(default_factory=dict)
    trims: bool = True


DIALECTS = {
    "ollama": Dialect("ollama", health="/api/version"),
    "vllm": Dialect(
        "vllm",
        health="/health",
        continues={"add_generation_prompt": False, "continue_final_message": True},
    ),
    # It appends that message to the prompt without any template.
    "llamacpp": Dialect("llamacpp", health="/health", deaf=True, trims=False),
}

# Names and phrases by which the engines say that a prompt does not fit (llama.cpp; vLLM; OpenAI's own).
_TOO_LONG = ("exceed_context_size_error", "context_length_exceeded", "maximum context length")
_LOADING = ("loading model", "model is loading")


def refusal(status: int, body: bytes) -> StackError:
    """An engine's answer with any status but 200, as ours. Its text is passed on only if it is about the request."""
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        parsed = None
    return _refusal(status, parsed.get("error", parsed) if isinstance(parsed, dict) else None)


def fault(error: Any) -> StackError:
    """An error inside a stream, as ours. Its integer `code`, where it has one, is the HTTP status it stands for."""
    code = error.get("code") if isinstance(error, dict) else None
    return _refusal(code if isinstance(code, int) and 400 <= code <= 599 else 500, error)


def _refusal(status: int, error: Any) -> StackError:
    detail = error if isinstance(error, dict) else {"message": error}
    message = detail.get("message")
    message = message if isinstance(message, str) and message else ""
    kind = f"{detail.get('type')} {detail.get('code')} {message}".lower()
    if status in (401, 403):
        return EngineUnauthorized(
            "The engine refuses the gateway's own credentials. Whoever runs it must set LLM_API_KEY."
        )
    if status == 404:
        return ModelNotFound(message or "The engine does not have this model.", param="model")
    if status == 503 and any(phrase in kind for phrase in _LOADING):
        return ModelLoading("The engine is still loading its model.")
    if status in (429, 503):
        return EngineOverloaded("The engine has as much to do as it can take. Try again shortly.")
    if status in (408, 504):
        return EngineTimeout("The engine took too long to answer.")
    if status == 501:
        return EngineRefused(message or "This engine does not support this endpoint.", status=400, code="unsupported")
    if status >= 500 or status < 400:
        return EngineError("The engine failed to answer.")
    if any(phrase in kind for phrase in _TOO_LONG):
        return BadRequest(message, code="context_length_exceeded", param="messages")
    param, code = detail.get("param"), detail.get("code")
    return EngineRefused(
        message or "The engine refused the request.",
        status=status,
        param=param if isinstance(param, str) else None,
        code=code if isinstance(code, str) else None,
    )
