"""Dialects: what each engine's endpoints and errors mean, in one table and one function."""

import re
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import orjson

from gateway.errors import (
    ContextExceeded,
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
    that it goes on with a blocking request whose client has hung up (llama.cpp's server: tried); `cuts` that it makes
    a prompt fit by shortening it, and doesn't say so.

    `continues` are the fields that have it go on with a last message of the assistant's, where it doesn't do that
    without being told; `trims`: the white space at that message's end may be lost in the model's chat template.

    `slots`: how many requests it works on at a time, where nobody says; `tells_slots`: it does, when asked."""

    name: str
    health: str
    deaf: bool = False
    cuts: bool = False
    continues: dict[str, Any] = field(default_factory=dict)
    trims: bool = True
    slots: int = 1
    tells_slots: bool = False


DIALECTS = {
    "ollama": Dialect("ollama", health="/api/version", cuts=True),
    "vllm": Dialect(
        "vllm",
        health="/health",
        slots=256,
        continues={"add_generation_prompt": False, "continue_final_message": True},
    ),
    # It appends that message to the prompt without any template.
    "llamacpp": Dialect("llamacpp", health="/health", deaf=True, trims=False, tells_slots=True),
}

# Names and phrases by which the engines say that a prompt does not fit.
_TOO_LONG = (
    "exceed_context_size_error",  # llama.cpp
    "too large to process",  # llama.cpp, of embeddings, with a 500
    "maximum context length",  # vLLM; Ollama's runner for Apple's chips
    "the model's context length is only",  # vLLM, older
    "exceeds the context length",  # Ollama before 0.30
    "longer than the context length",  # Ollama from 0.30 on, where it may not cut
    "context_length_exceeded",  # OpenAI's own
)
# "request (9031 tokens) exceeds the available context size (4096 tokens)", and others of llama.cpp's and Ollama's.
_BOTH_NUMBERS = re.compile(r"\((\d+) tokens\).*\((?:current batch size: )?(\d+)")
_LIMIT = re.compile(r"context length is (?:only )?(\d+) tokens")  # vLLM; it says "at least" about the prompt's
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
    detail = _inner(error if isinstance(error, dict) else {"message": error})
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
    if any(phrase in kind for phrase in _TOO_LONG):
        tokens, limit = _numbers(detail, message)
        return ContextExceeded(message, param="messages", tokens=tokens, limit=limit)
    if status >= 500 or status < 400:
        return EngineError("The engine failed to answer.")
    param, code = detail.get("param"), detail.get("code")
    return EngineRefused(
        message or "The engine refused the request.",
        status=status,
        param=param if isinstance(param, str) else None,
        code=code if isinstance(code, str) else None,
    )


def _inner(detail: dict[str, Any]) -> dict[str, Any]:
    """Ollama passes on what its own llama.cpp said as a string: an envelope within an envelope's message."""
    message = detail.get("message")
    if isinstance(message, str) and message.startswith('{"error":{'):
        with suppress(orjson.JSONDecodeError, TypeError):
            return dict(orjson.loads(message)["error"])
    return detail


def _numbers(detail: dict[str, Any], message: str) -> tuple[int | None, int | None]:
    """The prompt's tokens and the model's limit, as far as a refusal tells them."""
    tokens, limit = detail.get("n_prompt_tokens"), detail.get("n_ctx")
    if isinstance(tokens, int) and isinstance(limit, int):
        return tokens, limit
    if found := _BOTH_NUMBERS.search(message):
        return int(found[1]), int(found[2])
    found = _LIMIT.search(message)
    return None, int(found[1]) if found else None
