"""Errors: every way a request can fail, and the one envelope they leave in.

    StackError
    ├── BadRequest           400  the request itself is wrong; `param` names the field
    ├── InvalidKey           401
    ├── ModelNotFound        404
    ├── NotFound             404  no such path
    ├── MethodNotAllowed     405
    ├── TooLarge             413
    ├── UnsupportedEncoding  415
    ├── InternalError        500
    ├── EngineError          502  the engine's reply can't be used
    │   ├── EngineUnauthorized   502  the engine refuses the gateway's own credentials
    │   ├── EngineRefused        4xx  the engine refused this request: its status, our shape
    │   ├── EngineLost           502  the connection to it ended too early
    │   ├── EngineUnavailable    503
    │   │   ├── EngineUnreachable 503 no connection to it can be made
    │   │   ├── EngineOverloaded 503  it has too much to do
    │   │   └── ModelLoading     503  it isn't ready yet
    │   └── EngineTimeout        504
    │       └── EngineSilent     504  it said nothing for too long
    └── Draining             503  the gateway itself is stopping

Codes and types are those of OpenAI's API, so that its clients raise the right exception.
"""

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

    def envelope(self) -> bytes:
        """`{"error": {"message", "type", "param", "code"}}`, all four keys, as JSON."""
        return orjson.dumps(
            {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}
        )


class BadRequest(StackError):
    status, type, code = 400, "invalid_request_error", None


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


class TooLarge(StackError):
    status, type, code = 413, "invalid_request_error", "request_too_large"


class UnsupportedEncoding(StackError):
    status, type, code = 415, "invalid_request_error", "unsupported_encoding"


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


class ModelLoading(EngineUnavailable):
    code = "model_loading"


class EngineTimeout(EngineError):
    status, code = 504, "engine_timeout"


class EngineSilent(EngineTimeout):
    pass


class Draining(StackError):
    status, code = 503, "draining"
    headers = MappingProxyType({"retry-after": "5"})
