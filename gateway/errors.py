"""Errors: every way a request can fail, and the one envelope they leave in.

The file is long because it has every error. Each class says little more than its line here.

    StackError
    ├── BadRequest           400  the request itself is wrong; `param` names the field
    │   ├── ContextExceeded      400  its prompt is longer than the model can read
    │   └── EndpointMissing      404  no engine of its model has the endpoint
    ├── InvalidKey           401
    │   └── InvalidUser          401  the key's front end did not prove who its user is
    ├── ModelNotFound        404
    ├── NotFound             404  no such path
    ├── MethodNotAllowed     405  or 426, to the offer of a WebSocket
    ├── RequestTimeout       408  it did not arrive in time
    ├── IdempotencyConflict  409  its Idempotency-Key was used for another request
    ├── TooLarge             413
    ├── UnsupportedEncoding  415  its Content-Encoding is neither gzip nor zstd
    ├── UnsupportedMediaType 415  its Content-Type is not JSON
    ├── HeadersTooLarge      431
    ├── RateLimited          429  the key has reached a limit
    ├── QueueShareFull       429  the key has its maximum number of requests waiting
    ├── QuotaSpent           429  the key's tokens of the day or month are used up
    ├── InternalError        500
    ├── EngineError          502  the engine's answer cannot be used
    │   ├── EngineUnauthorized   502  the engine refuses the gateway's own credentials
    │   ├── EngineRefused        4xx  the engine refused this request: its status, our shape
    │   │   └── EngineUnsupported    400  it lacks the endpoint's ability
    │   ├── EngineLost           502  the connection to it ended too early
    │   │   └── EngineDied           502  it reported its own death
    │   ├── EngineFailed         502  the engine died, and this request may be the reason
    │   ├── EngineDisobeyed      502  its model did not make the tool call that was demanded
    │   ├── EngineUnavailable    503
    │   │   ├── EngineUnreachable 503 a connection to it is impossible
    │   │   ├── EngineOverloaded 503  it is overloaded
    │   │   │   ├── EngineFull       503  its own queue is full
    │   │   │   ├── QueueFull        503  the gateway's queue for it is full
    │   │   │   └── QueueTimeout     503  it cannot begin before the request's deadline
    │   │   ├── EngineAsleep     503  it could not get the GPU on which it takes turns
    │   │   ├── LoadFailed       503  it could not load the model
    │   │   └── ModelLoading     503  it isn't ready yet
    │   └── EngineTimeout        504
    │       └── EngineSilent     504  it was silent for too long
    ├── GatewayBusy          503  the gateway itself is overloaded
    ├── PromptFailed         503  a prompt of the operator cannot be rendered
    ├── StoreUnavailable     503  the database of keys is unreachable
    ├── Draining             503  the gateway itself is stopping
    ├── Exhausted            503  the gateway itself has no file descriptor left
    └── ClientLeft           499  the client disconnected

Codes and types are those of OpenAI's API, so that its clients raise the right exception.
"""

import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import orjson

from gateway.headers import RETRY_AFTER, RETRY_AFTER_MS, SHOULD_RETRY

BUG = "The gateway had an internal error. Its log has the details."  # the message of an InternalError
_POINTER = re.compile(r"\s+([^.]*Retry-After[^.]*|Try again [a-z ]+)\.$")  # a last sentence about the time of a retry

# The level of a log line: "warning" if an operator should look, "error" if an answer was lost.
Level = Literal["info", "warning", "error"]


def level_of(status: int) -> Level:
    """Return the level of a log line about a request that ended with this status. After a 503 the caller may retry.
    Below 500 the caller knows what to do."""
    if status < 500:
        return "info"
    return "warning" if status == 503 else "error"


class StackError(Exception):
    """A failure with its HTTP status and OpenAI's shape. `message` is a sentence for the caller, without internals."""

    status = 500
    type = "server_error"
    code: str | None = "internal_error"
    headers: Mapping[str, str] = MappingProxyType({})

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code

    @property
    def outcome(self) -> str:
        """The name of the error in logs and metrics, from a closed set of the gateway's own words."""
        return self.code or "bad_request"

    def envelope(self, message: str | None = None) -> bytes:
        """Return `{"error": {"message", "type", "param", "code"}}` with all four keys, as JSON. `message` replaces the
        error's own."""
        return orjson.dumps(
            {"error": {"message": message or self.message, "type": self.type, "param": self.param, "code": self.code}}
        )

    @property
    def stream_message(self) -> str:
        """The message inside a stream. It names the time of a retry itself, because the headers were sent
        long before."""
        seconds = self.headers.get(RETRY_AFTER)
        if seconds is None:
            return self.message
        when = f"Retry in {seconds} second{'s' * (seconds != '1')}."
        return f"{_POINTER.sub('', self.message)} {when}"


def forget(error: BaseException | None) -> None:
    """Drop the tracebacks of a handled error. They form a reference cycle with the error, and keep everything that the
    request held until the garbage collector runs."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:  # an error may be its own cause, and a worker once hung here
        seen.add(id(error))
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


class BadRequest(StackError):
    status, type = 400, "invalid_request_error"
    code: str | None = None


class EndpointMissing(BadRequest):
    status, code = 404, "unsupported"


class ContextExceeded(BadRequest):
    """Say that a prompt is too long. `tokens` are the prompt's, and `limit` is the model's. Each is None if the
    engine did not report it.
    """

    code = "context_length_exceeded"

    def __init__(self, message: str, *, param: str, tokens: int | None = None, limit: int | None = None) -> None:
        super().__init__(message, param=param)
        self.tokens = tokens
        self.limit = limit


class InvalidKey(StackError):
    status, type, code = 401, "invalid_request_error", "invalid_api_key"
    headers = MappingProxyType({"www-authenticate": "Bearer"})


class InvalidUser(InvalidKey):
    code = "invalid_user"


class ModelNotFound(StackError):
    status, type, code = 404, "invalid_request_error", "model_not_found"


class NotFound(StackError):
    status, type, code = 404, "invalid_request_error", "not_found"


class MethodNotAllowed(StackError):
    status, type, code = 405, "invalid_request_error", "method_not_allowed"

    def __init__(self, message: str, *, allow: str, websocket: bool = False) -> None:
        """`websocket`: the request offers a WebSocket. A 426 names the protocol to use instead (RFC 9110, 15.5.22)."""
        super().__init__(message)
        self.headers = {"allow": allow}
        if websocket:
            self.status = 426
            self.headers |= {"upgrade": "HTTP/1.1", "connection": "upgrade"}


class RequestTimeout(StackError):
    status, type, code = 408, "invalid_request_error", "request_timeout"


class IdempotencyConflict(StackError):
    status, type, code = 409, "invalid_request_error", "idempotency_conflict"
    headers = MappingProxyType({SHOULD_RETRY: "false"})  # OpenAI's clients would repeat a 409


class TooLarge(StackError):
    status, type, code = 413, "invalid_request_error", "request_too_large"


class UnsupportedEncoding(StackError):
    status, type, code = 415, "invalid_request_error", "unsupported_encoding"
    headers = MappingProxyType({"accept-encoding": "gzip, zstd"})  # what a request may use (RFC 9110, 12.5.3)


class UnsupportedMediaType(StackError):
    status, type, code = 415, "invalid_request_error", "unsupported_media_type"


class HeadersTooLarge(StackError):
    status, type, code = 431, "invalid_request_error", "headers_too_large"


class RateLimited(StackError):
    """`wait` is the number of seconds until the request would be admitted. `standing` are headers with what is left
    for the key. `limit` names the limit, as limits.rules.Limits does.
    """

    status, type, code = 429, "rate_limit_error", "rate_limit_exceeded"

    def __init__(self, message: str, wait: float, standing: Mapping[str, str], limit: str = "") -> None:
        super().__init__(message)
        self.limit = limit
        self.headers = MappingProxyType({**standing, **_retry_after(wait)})


class QueueShareFull(StackError):
    """`wait` is the number of seconds until the request would be admitted."""

    status, type, code = 429, "rate_limit_error", "queue_share_full"

    def __init__(self, message: str, wait: float) -> None:
        super().__init__(message)
        self.headers = MappingProxyType(_retry_after(wait))


class QuotaSpent(StackError):
    """See RateLimited."""

    status, type, code = 429, "insufficient_quota", "insufficient_quota"

    def __init__(self, message: str, standing: Mapping[str, str], limit: str = "") -> None:
        super().__init__(message)
        self.limit = limit
        self.headers = MappingProxyType({**standing, SHOULD_RETRY: "false"})  # OpenAI's clients would repeat a 429


class InternalError(StackError):
    pass


class EngineError(StackError):
    status = 502
    code: str | None = "engine_error"


class EngineUnauthorized(EngineError):
    code = "engine_unauthorized"
    headers = MappingProxyType({SHOULD_RETRY: "false"})  # it stays so until the operator sets other credentials


class EngineRefused(EngineError):
    type, code = "invalid_request_error", None

    def __init__(
        self, message: str, *, status: int, param: str | None = None, code: str | None = None, unable: bool = False
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.status = status
        self.unable = unable  # another model may be able to do what the request asks

    @property
    def outcome(self) -> str:
        return "engine_refused"  # the code comes from the engine


class EngineUnsupported(EngineRefused):
    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, status=400, param=param, code="unsupported", unable=True)


class EngineUnavailable(EngineError):
    status, code = 503, "engine_unavailable"
    headers = MappingProxyType({RETRY_AFTER: "5"})


class EngineLost(EngineError):
    pass


class EngineEnded(EngineError):
    """Say that the engine ended a stream, without an answer that is whole."""

    code = "engine_broken_stream"


class EngineDied(EngineLost):
    pass


class EngineFailed(EngineError):
    code = "engine_failed"
    headers = MappingProxyType({SHOULD_RETRY: "false"})  # OpenAI's clients would repeat a 502


class EngineDisobeyed(EngineError):
    code = "engine_broken_tool_call"
    headers = MappingProxyType({SHOULD_RETRY: "false"})  # the engine was asked twice already


class EngineUnreachable(EngineUnavailable):
    pass


class EngineOverloaded(EngineUnavailable):
    code = "server_is_overloaded"
    headers = MappingProxyType({RETRY_AFTER: "2"})


class EngineFull(EngineOverloaded):
    pass


class QueueFull(EngineOverloaded):
    """`wait` is the number of seconds until the request would be admitted."""

    code = "queue_full"

    def __init__(self, message: str, wait: float) -> None:
        super().__init__(message)
        self.headers = MappingProxyType(_retry_after(wait))


class QueueTimeout(QueueFull):
    code = "queue_timeout"


class EngineAsleep(EngineUnavailable):
    code = "engine_asleep"


class LoadFailed(EngineUnavailable):
    """The engine tried to load the model for `took` seconds; 0: it failed before, and is not asked again so soon."""

    code = "model_unavailable"
    took = 0.0


def unloadable() -> LoadFailed:
    """Return the error of a request whose engine cannot load the model."""
    return LoadFailed("The engine could not load this model. Try again later.")


class ModelLoading(EngineUnavailable):
    code = "model_loading"


class EngineTimeout(EngineError):
    status, code = 504, "engine_timeout"


class EngineSilent(EngineTimeout):
    pass


class AnswerTooLong(EngineTimeout):
    """The engine worked during the whole time that an answer may take."""

    headers = MappingProxyType({SHOULD_RETRY: "false"})  # it would take as long once more


class Draining(StackError):
    status, code = 503, "draining"
    headers = MappingProxyType({RETRY_AFTER: "5"})


class GatewayBusy(StackError):
    status, code = 503, "server_is_overloaded"
    headers = MappingProxyType({RETRY_AFTER: "1"})


class PromptFailed(StackError):
    status, code = 503, "prompt_failed"
    headers = MappingProxyType({SHOULD_RETRY: "false"})  # it stays so until the operator corrects the prompt


class StoreUnavailable(StackError):
    status, code = 503, "store_unavailable"
    headers = MappingProxyType({RETRY_AFTER: "5"})


class Exhausted(StackError):
    status, code = 503, "server_is_overloaded"
    headers = MappingProxyType({RETRY_AFTER: "2"})


def _retry_after(wait: float) -> dict[str, str]:
    milliseconds = max(1, math.ceil(wait * 1000))
    return {RETRY_AFTER: str(-(-milliseconds // 1000)), RETRY_AFTER_MS: str(milliseconds)}


class ClientLeft(StackError):
    """The client disconnected. 499 is nginx's status for that, and nobody ever receives it."""

    status, code = 499, "client_left"
