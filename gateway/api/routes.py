"""API: own the routes. This table is the allow-list: anything else is 404 or 405, and the engine never sees it."""

import re
from typing import Annotated, Any

import orjson
from fastapi import Depends, FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.routing import Match

from gateway import __version__, endpoints
from gateway import headers as names
from gateway.api import openapi
from gateway.api.faces import refusal
from gateway.api.models import add_model_routes
from gateway.api.stored import add_stored_routes
from gateway.byte_budget import Budget
from gateway.errors import (
    BadRequest,
    InternalError,
    MethodNotAllowed,
    NotFound,
    StackError,
)
from gateway.keys import users
from gateway.keys.authenticate import Keys
from gateway.keys.known import Key
from gateway.responses.responses import Responses
from gateway.routing.health import Health
from gateway.routing.listing import Listing
from gateway.routing.routes import Routes

_BASE = "/v1"
_COMPACT = "/v1/responses/compact"  # a call of openai's package, and not a response with this id
_STORED = re.compile("/responses/resp_[^/]+(?:/input_items)?$")
_KEY = "A key from `stack keys create`, POST /admin/keys or STACK_API_KEYS."
# For the schema; Pipeline decides.
_bearer = HTTPBearer(auto_error=False, description=_KEY)
_api_key = APIKeyHeader(name=names.API_KEY.decode(), auto_error=False, description="The same key.")
_TEXTS: dict[int | str, str] = {
    400: "The request is wrong; `param` names the field.",
    401: "The key is missing or unknown.",
    404: "The model does not exist.",
    413: "The body is too large.",
    429: "The key has reached a limit (retry after the time in Retry-After), or has used its quota.",
    502: "The engine's answer cannot be used.",
    503: "The engine is unreachable, loading its model, or overloaded. See Retry-After.",
    504: "The engine was too slow.",
    "default": "Any other error has the same shape.",
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": openapi.ErrorEnvelope, "description": text} for status, text in _TEXTS.items()
}
_ERRORS[429]["headers"] = {
    name: {"description": text, "schema": {"type": "string"}}
    for name, text in {
        names.RETRY_AFTER: "Seconds. Absent if a quota is used up.",
        names.RETRY_AFTER_MS: "The same time in milliseconds.",
        **dict.fromkeys(names.RATE_LIMITS, "What is left for the key, if it has limits per minute."),
    }.items()
}


def add_routes(
    app: FastAPI,
    keys: Keys,
    routes: Routes,
    listing: Listing,
    health: Health,
    responses: Responses,
    memory: Budget,
) -> None:
    """Give the app its routes and make every error leave as an OpenAI envelope."""

    async def caller(
        request: HttpRequest, _: Annotated[Any, Depends(_bearer)], __: Annotated[Any, Depends(_api_key)]
    ) -> Key:
        key = await keys.authenticate(dict(request.scope["headers"]), request.scope["client"])
        request.scope["stack.client"].known = True
        return key

    async def user(request: HttpRequest, key: Annotated[Key, Depends(caller)]) -> Key:
        return users.identified(key, dict(request.scope["headers"]))

    keyed: dict[int | str, dict[str, Any]] = {status: _ERRORS[status] for status in (401, 404)}
    _document_relayed_routes(app)
    add_model_routes(app, listing, caller, keyed)
    add_stored_routes(app, responses, memory, user, keyed)
    _add_health_routes(app, keys, routes, health)
    _add_error_handlers(app)


def _document_relayed_routes(app: FastAPI) -> None:
    """For the schema; Dispatch serves them."""
    for endpoint in endpoints.ROWS:
        schema = openapi.SCHEMAS[endpoint.schema]
        ok: dict[str, Any] = {"model": schema.answer, "description": "The engine's answer."}
        if endpoint.sounds:
            ok["content"] = {"audio/*": {"schema": {"type": "string", "format": "binary"}}}
        if schema.chunk is not None:  # the data of each event; the last event has [DONE]
            ok["content"] = {"text/event-stream": {"schema": {"$ref": f"#/components/schemas/{schema.chunk.__name__}"}}}
        for path in (endpoint.path, *endpoint.also):
            app.add_api_route(
                path,
                schema.document,
                methods=["POST"],
                response_model=None,
                responses={200: ok, **{status: it | {"model": schema.error} for status, it in _ERRORS.items()}},
                dependencies=[Depends(_bearer), Depends(_api_key)],
                tags=[schema.tag],
            )


def _add_health_routes(app: FastAPI, keys: Keys, routes: Routes, health: Health) -> None:
    @app.get("/health", tags=["health"])
    async def get_health() -> dict[str, str]:
        """Describe the gateway. The engine is not asked."""
        first = routes.default()[0]
        engine = first.tiers[0][0].upstream
        return {
            "status": "ok",
            "backend": engine.base_url,
            "engine": engine.dialect.name,
            "model": first.name,
            "version": __version__,
        }

    @app.get("/livez", tags=["health"])
    async def livez() -> dict[str, str]:
        """Say that the process answers. Never asks the engine."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["health"], responses={503: {"model": openapi.ErrorEnvelope}})
    async def readyz() -> Response:
        """Say whether a request for the default model would be answered now. Asks its engines at most once a second.

        `engines` has the state of each engine. For engines of other models, the state is some seconds old.
        """
        trouble, engines = await health.look()
        store = "damaged" if keys.broken else "ok"  # invalid rows are left out
        if keys.trouble is not None:
            store = str(keys.trouble.code)  # known keys work for a while without the store
        if trouble is None:
            return JSONResponse({"status": "ok", "engines": engines, "store": store})
        body = {"status": "unavailable", "engines": engines, "store": store} | orjson.loads(trouble.envelope())
        return JSONResponse(body, 503, _headers(trouble))


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(StackError)
    async def on_stack_error(request: HttpRequest, exc: StackError) -> Response:
        status, headers, body = refusal(exc, request.scope)
        return Response(body, status, {name.decode(): value.decode() for name, value in headers})

    @app.exception_handler(HTTPException)
    async def on_http_error(request: HttpRequest, exc: HTTPException) -> Response:
        path = request.scope["path"]
        where = f"{request.method[:16]} {path[:200]}"
        if exc.status_code == 405 and not _meant(path) and path != _COMPACT:
            return await on_stack_error(request, _not_allowed(request, where))
        if exc.status_code in (404, 405):
            return await on_stack_error(request, NotFound(_nothing_at(request.method, path)))
        return await on_stack_error(request, BadRequest(str(exc.detail)))

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: HttpRequest, exc: RequestValidationError) -> Response:
        first = exc.errors()[0]
        return await on_stack_error(request, BadRequest(str(first["msg"]), param=str(first["loc"][-1])))

    @app.exception_handler(Exception)
    async def on_bug(request: HttpRequest, _: Exception) -> Response:
        return await on_stack_error(
            request, InternalError("The gateway had an internal error. Its log has the details.")
        )


def _not_allowed(request: HttpRequest, where: str) -> MethodNotAllowed:
    """Return the error for a method that the path lacks. A WebSocket is known by its key, because the protocol hides
    Upgrade. Codex offers one at /v1/responses: a 426 makes it post at once, but after a 404 it offers six more."""
    allow = _allowed(request)
    if "sec-websocket-key" in request.headers:
        return MethodNotAllowed(f"{where}: there are no WebSockets here; use {allow}.", allow=allow, websocket=True)
    return MethodNotAllowed(f"{where}: use {allow}.", allow=allow)


def _allowed(request: HttpRequest) -> str:
    """Return the methods of all routes of the path, because Starlette names only those of the first. HEAD is allowed
    with GET."""
    routes = [it for it in request.app.routes if it.matches(request.scope)[0] != Match.NONE]
    methods = {method for it in routes for method in it.methods or ()}
    return ", ".join(sorted(methods | {"HEAD"} if "GET" in methods else methods))


def _nothing_at(method: str, path: str) -> str:
    """Return the message for a path that does not exist. It names the usual mistakes in a base URL, and the right kind
    of client."""
    said = f"{method[:16]} {path[:200]}: this path does not exist."
    if re.match("/(v1/)?api/(?!v1/)", path):
        return f"{said} This is not Ollama's own API: use an OpenAI client, with a base URL that ends in /v1."
    return f"{said} {_meant(path) or '/docs lists all paths.'}"


def _meant(path: str) -> str | None:
    """Return a sentence with the path that was meant, if a slip in a client's base URL explains this one."""
    if path in endpoints.BY_PATH or path == "/v1/models":
        return None
    tail = re.sub("/+", "/", path).removesuffix("/")
    stored = [f"/v1{found[0]}" for found in [_STORED.search(tail)] if found]
    known = next(
        (it for it in (*endpoints.BY_PATH, "/v1/models", *stored) if tail.endswith(it.removeprefix(_BASE))), path
    )
    if known == path:
        return None
    if known.startswith("/v1/messages") and "/v1/" in tail:
        return f"Did you mean {known}? The base URL of Anthropic's clients must end before /v1."
    return f"Did you mean {known}? The base URL must end in a single /v1, with nothing after it."


def _headers(error: StackError) -> dict[str, str]:
    return {**error.headers, "content-type": "application/json"}
