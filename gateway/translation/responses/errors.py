"""Errors: write a failure as the Responses API does, before an answer and within it.

The behaviour of clients was seen with Codex 0.171.0, which uses only this API. It retries 30 times after a lasting 5xx,
and stops at a 400. In a broken stream it reads `response.failed`, and there the code.
"""

from gateway.errors import AnswerTooLong, EngineDisobeyed, EngineFailed, EngineUnauthorized, PromptFailed, StackError
from gateway.headers import RETRY_AFTER

# Errors after which a retry is useless or harmful: the request may have killed the engine, or would take as long again.
_FINAL = (EngineFailed, EngineUnauthorized, EngineDisobeyed, PromptFailed)
# Codes in `response.failed` at which Codex stops. They are sent unchanged.
_KNOWN = frozenset({"context_length_exceeded", "insufficient_quota", "model_not_found", "rate_limit_exceeded"})


def envelope(error: StackError) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """Return the body of an error and its extra headers: OpenAI's envelope, as for chat completions."""
    return error.envelope(), []


def status_of(error: StackError) -> int:
    """Return the HTTP status of an error: its own, or 400 for an error after which a retry is useless or harmful. After
    a 502, Codex would retry 30 times, and it ignores `x-should-retry`."""
    return 400 if isinstance(error, _FINAL) else error.status


def failure(error: StackError) -> dict[str, str]:
    """Return the `error` of a failed response.

    An error with a time to retry becomes `rate_limit_exceeded` with the words "try again in 5s", after which Codex
    waits. An error that is the request's own fault, or final, becomes `invalid_prompt`: Codex stops and shows the
    message. Any other becomes `server_error`, after which Codex retries five times.
    """
    if error.code in _KNOWN and error.code != "rate_limit_exceeded":
        return {"code": str(error.code), "message": error.stream_message}
    seconds = error.headers.get(RETRY_AFTER)
    if seconds is not None:
        base = error.stream_message.rpartition(" Retry in ")[0]
        return {"code": "rate_limit_exceeded", "message": f"{base} Please try again in {seconds}s."}
    if isinstance(error, (*_FINAL, AnswerTooLong)) or error.status < 500:
        return {"code": "invalid_prompt", "message": error.stream_message}
    return {"code": "server_error", "message": error.stream_message}
