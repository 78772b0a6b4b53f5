"""Errors: every way a request can fail, and the one envelope they leave in.

    StackError
    ├── BadRequest           400  the request itself is wrong; `param` names the field
    │   └── ContextExceeded      400  its prompt is longer than the model can read
    ├── InvalidKey           401
    ├── ModelNotFound        404
    ├── NotFound             404  no such path
    ├── MethodNotAllowed     405
    ├── RequestTimeout       408  it did not arrive in time
    ├── IdempotencyConflict  409  its Idempotency-Key was used for another request
    ├── TooLarge             413
    ├── UnsupportedEncoding  415
    ├── HeadersTooLarge      431
    ├── RateLimited          429  more than the key may have right now
    ├── QueueShareFull       429  as many of the key's requests wait as may
    ├── QuotaSpent           429  the key's tokens of the day or month are used up
    ├── InternalError        500
    ├── EngineError          502  the engine's reply can't be used
    │   ├── EngineUnauthorized   502  the engine refuses the gateway's own credentials
    │   ├── EngineRefused        4xx  the engine refused this request: its status, our shape
    │   ├── EngineLost           502  the connection to it ended too early
    │   ├── EngineUnavailable    503
    │   │   ├── EngineUnreachable 503 no connection to it can be made
    │   │   ├── EngineOverloaded 503  it has too much to do
    │   │   │   ├── QueueFull        503  and as many wait for it as may
    │   │   │   └── QueueTimeout     503  and can't begin before the request's deadline
    │   │   └── ModelLoading     503  it isn't ready yet
    │   └── EngineTimeout        504
    │       └── EngineSilent     504  it said nothing for too long
    ├── GatewayBusy          503  the gateway itself has too much to do
    ├── PromptFailed         503  a prompt of the operator's can't be rendered
    ├── StoreUnavailable     503  the database of keys can't be asked
    ├── Draining             503  the gateway itself is stopping
    ├── Exhausted            503  the gateway itself has no file descriptor left
    └── ClientLeft           499  the caller hung up

Codes and types are those of OpenAI's API, so that its clients raise the right exception.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType

import orjson


class StackError(Exception):
    """A failure with its HTTP status and OpenAI shape. `message` is for the caller: a sentence, nothing internal."""

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
        """What logs and metrics call it: one of a closed set, all of them words of ours."""
        return self.code or "bad_request"

    def envelope(self) -> bytes:
        """`{"error": {"message", "type", "param", "code"}}`, all four keys, as JSON."""
        return orjson.dumps(
            {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}
        )


class BadRequest(StackError):
    status, type = 400, "invalid_request_error"
    code: str | None = None


class ContextExceeded(BadRequest):
    """`tokens` are the prompt's, `limit` the model's; None where the engine didn't say."""

    code = "context_length_exceeded"

    def __init__(self, message: str, *, param: str, tokens: int | None = None, limit: int | None = None) -> None:
        super().__init__(message, param=param)
        self.tokens = tokens
        self.limit = limit


class InvalidKey(StackError):
    status, type, code = 401, "invalid_request_error", "invalid_api_key"
    headers = MappingProxyType({"www-authenticate": "Bearer"})


class ModelNotFound(StackError):
    status, type, code = 404, "invalid_request_error", "model_not_found"


class NotFound(StackError):
    status, type, code = 404, "invalid_request_error", "not_found"


class MethodNotAllowed(StackError):
    status, type, code = 405, "invalid_request_error", "method_not_allowed"

    def __init__(self, message: str, *, allow: str) -> None:
        super().__init__(message)
        self.headers = {"allow": allow}


class RequestTimeout(StackError):
    status, type, code = 408, "invalid_request_error", "request_timeout"


class IdempotencyConflict(StackError):
    status, type, code = 409, "invalid_request_error", "idempotency_conflict"
    headers = MappingProxyType({"x-should-retry": "false"})  # OpenAI's clients would repeat a 409


class TooLarge(StackError):
    status, type, code = 413, "invalid_request_error", "request_too_large"


class UnsupportedEncoding(StackError):
    status, type, code = 415, "invalid_request_error", "unsupported_encoding"


class HeadersTooLarge(StackError):
    status, type, code = 431, "invalid_request_error", "headers_too_large"


class RateLimited(StackError):
    """`wait` is the time in seconds after which it would be let in; `standing`, headers that say how the key stands."""

    status, type, code = 429, "rate_limit_error", "rate_limit_exceeded"

    def __init__(self, message: str, wait: float, standing: Mapping[str, str]) -> None:
        super().__init__(message)
        self.headers = MappingProxyType({**standing, **_retry_after(wait)})


class QueueShareFull(StackError):
    """`wait` is the time in seconds after which it would be let in."""

    status, type, code = 429, "rate_limit_error", "queue_share_full"

    def __init__(self, message: str, wait: float) -> None:
        super().__init__(message)
        self.headers = MappingProxyType(_retry_after(wait))


class QuotaSpent(StackError):
    status, type, code = 429, "insufficient_quota", "insufficient_quota"

    def __init__(self, message: str, standing: Mapping[str, str]) -> None:
        super().__init__(message)
        self.headers = MappingProxyType({**standing, "x-should-retry": "false"})  # OpenAI's clients would repeat a 429


class InternalError(StackError):
    pass


class EngineError(StackError):
    status = 502
    code: str | None = "engine_error"


class EngineUnauthorized(EngineError):
    code = "engine_unauthorized"


class EngineRefused(EngineError):
    type, code = "invalid_request_error", None

    def __init__(self, message: str, *, status: int, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param=param, code=code)
        self.status = status

    @property
    def outcome(self) -> str:
        return "engine_refused"  # its code is the engine's own word


class EngineUnavailable(EngineError):
    status, code = 503, "engine_unavailable"
    headers = MappingProxyType({"retry-after": "5"})


class EngineLost(EngineError):
    pass


class EngineUnreachable(EngineUnavailable):
    pass


class EngineOverloaded(EngineUnavailable):
    code = "server_is_overloaded"
    headers = MappingProxyType({"retry-after": "2"})


class QueueFull(EngineOverloaded):
    """`wait` is the time in seconds after which it would be let in."""

    code = "queue_full"

    def __init__(self, message: str, wait: float) -> None:
        super().__init__(message)
        self.headers = MappingProxyType(_retry_after(wait))


class QueueTimeout(QueueFull):
    code = "queue_timeout"


class ModelLoading(EngineUnavailable):
    code = "model_loading"


class EngineTimeout(EngineError):
    status, code = 504, "engine_timeout"


class EngineSilent(EngineTimeout):
    pass


class Draining(StackError):
    status, code = 503, "draining"
    headers = MappingProxyType({"retry-after": "5"})


class GatewayBusy(StackError):
    status, code = 503, "server_is_overloaded"
    headers = MappingProxyType({"retry-after": "1"})


class PromptFailed(StackError):
    status, code = 503, "prompt_failed"


class StoreUnavailable(StackError):
    status, code = 503, "store_unavailable"
    headers = MappingProxyType({"retry-after": "5"})


class Exhausted(StackError):
    status, code = 503, "server_is_overloaded"
    headers = MappingProxyType({"retry-after": "2"})


def _retry_after(wait: float) -> dict[str, str]:
    milliseconds = max(1, math.ceil(wait * 1000))
    return {"retry-after": str(-(-milliseconds // 1000)), "retry-after-ms": str(milliseconds)}


class ClientLeft(StackError):
    """499 is nginx's status for it; nobody ever receives it."""

    status, code = 499, "client_left"
