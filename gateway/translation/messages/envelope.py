"""Envelope: write what a client of the Messages API reads besides messages: errors, headers, a count of tokens."""

import datetime as dt
import re
from collections.abc import Iterable
from typing import Any

import orjson

from gateway import headers as names
from gateway.errors import (
    BadRequest,
    ContextExceeded,
    IdempotencyConflict,
    InternalError,
    PromptFailed,
    QuotaSpent,
    StackError,
    StoreUnavailable,
)

Headers = list[tuple[bytes, bytes]]

# Anthropic's types by status. Its SDKs choose the exception's class by the status, and Claude Code chooses its words by
# it.
_TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
# Errors whose type does not follow from the status. A quota is `billing_error`, because Claude Code then stops at once
# and shows the gateway's message. The others must not look like an overload.
_BY_CLASS: tuple[tuple[type[StackError], str], ...] = (
    (QuotaSpent, "billing_error"),
    (IdempotencyConflict, "conflict_error"),
    (PromptFailed, "api_error"),
    (StoreUnavailable, "api_error"),
    (InternalError, "api_error"),
)
# Without these details, Anthropic's tool runner fails. With them, it sends the whole conversation itself.
_DETAILS = {"thread": {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}}
_PREFIX, _THEIRS = names.RATE_LIMIT_PREFIX.decode(), b"anthropic-ratelimit-"
_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m(?!s))?(?:([\d.]+)s)?(?:(\d+)ms)?", re.ASCII)


def envelope(
    error: StackError, *, request_id: str | None = None, now: float | None = None, message: str | None = None
) -> tuple[bytes, Headers]:
    """Return an error's body, and headers in addition to the error's own. The status is unchanged. `now` is in seconds
    since 1970; without it, the time of a reset is left out. `message` replaces the error's.

    A 401 forbids a retry: Claude Code would retry ten times in three minutes, and the key would still be wrong. A
    prompt that is too long is reported in Anthropic's words, because Claude Code then shortens its conversation.
    """
    told: dict[str, Any] = {"type": kind(error), "message": _words(error, message or error.message)}
    if isinstance(error, BadRequest) and error.param in _DETAILS:
        told["details"] = _DETAILS[error.param]
    body = orjson.dumps({"type": "error", "error": told, "request_id": request_id})
    extra = headers(((name.encode(), value.encode()) for name, value in error.headers.items()), request_id, now)
    if error.status == 401:
        extra.append((names.SHOULD_RETRY.encode(), b"false"))
    return body, extra


def kind(error: StackError) -> str:
    """Return Anthropic's type of an error."""
    named = next((its for cause, its in _BY_CLASS if isinstance(error, cause)), None)
    return named or _TYPES.get(error.status) or ("invalid_request_error" if error.status < 500 else "api_error")


def headers(own: Iterable[tuple[bytes, bytes]], request_id: str | None, now: float | None) -> Headers:
    """Return the headers that a Messages answer has in addition to the gateway's `own`: `request-id`, and what is left
    for the key as `anthropic-ratelimit-…`. A reset is a time there (RFC 3339, in whole seconds, rounded up). `now` is
    in seconds since 1970; without it, resets are left out."""
    found: Headers = [] if request_id is None else [(b"request-id", request_id.encode())]
    for field, value in own:
        what, _, of = field.decode("latin-1").removeprefix(_PREFIX).partition("-")
        if not field.startswith(_PREFIX.encode()) or of not in ("requests", "tokens"):
            continue
        told = value
        if what == "reset":
            seconds = _seconds(value.decode("latin-1"))
            if now is None or seconds is None:
                continue
            moment = dt.datetime.fromtimestamp(-int(-(now + seconds) // 1), dt.UTC)
            told = moment.strftime("%Y-%m-%dT%H:%M:%SZ").encode()
        found.append((b"%b%b-%b" % (_THEIRS, of.encode(), what.encode()), told))
    return found


def counted(tokens: int) -> dict[str, int]:
    """Return the answer of count_tokens."""
    return {"input_tokens": tokens}


def _words(error: StackError, message: str) -> str:
    if isinstance(error, ContextExceeded):
        if error.tokens is not None and error.limit is not None:
            return f"prompt is too long: {error.tokens} tokens > {error.limit} maximum"
        return f"prompt is too long: {message}"
    if error.param and error.param not in message:  # Anthropic's errors have no field for the name of a parameter
        return f"{error.param}: {message}"
    return message


def _seconds(duration: str) -> float | None:
    """Return a duration in OpenAI's form (12ms, 1.5s, 6m0s, 1h2m3s) in seconds; None if it is malformed."""
    found = _DURATION.fullmatch(duration)
    if found is None or not duration:
        return None
    hours, minutes, seconds, milliseconds = (float(it or 0) for it in found.groups())
    return hours * 3600 + minutes * 60 + seconds + milliseconds / 1000
