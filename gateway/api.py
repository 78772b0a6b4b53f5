"""API: the routes. This table is the allow-list: what is not in it is 404 or 405, and the engine never sees it."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, NamedTuple

import orjson
from fastapi import Depends, FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway import __version__, schema
from gateway.errors import BadRequest, ClientLeft, InternalError, MethodNotAllowed, ModelNotFound, NotFound, StackError
from gateway.exchange import Kind
from gateway.health import Health
from gateway.idempotency import Answers
from gateway.keys import Key, Keys
from gateway.limits import HEADERS
from gateway.metrics import Metrics
from gateway.middleware import respond
from gateway.pipeline import Pipeline, Request
from gateway.progress import Progress
from gateway.relay import Relay
from gateway.response import Client
from gateway.routing import Routes

Relays = set[Relay]  # those running now
log = logging.getLogger("stack")

_KEY = "A key made with `stack keys create` or POST /admin/keys, or one of STACK_API_KEYS."
_bearer = HTTPBearer(auto_error=False, description=_KEY)  # for the schema; Pipeline decides
_TEXTS: dict[int | str, str] = {
    400: "The request is wrong; `param` names the field.",
    401: "No key, or one that isn't known.",
    404: "No such model.",
    413: "The body is too large.",
    429: "More than the key may have right now: come back when Retry-After says. Or its quota is spent.",
    502: "The engine's reply can't be used.",
    503: "The engine can't be reached, is loading its model, or has too much to do. See Retry-After.",
    504: "The engine was too slow.",
    "default": "Any other error has the same shape.",
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schema.ErrorEnvelope, "description": text} for status, text in _TEXTS.items()
}
_ERRORS[429]["headers"] = {
    name: {"description": text, "schema": {"type": "string"}}
    for name, text in {
        "retry-after": "Seconds; not where a quota is spent.",
        "retry-after-ms": "The same in milliseconds.",
        **dict.fromkeys(HEADERS, "How the key stands, where it has limits per minute."),
    }.items()
}


def add_routes(app: FastAPI, keys: Keys, routes: Routes, health: Health) -> None:
    """Give the app its routes and make every error leave as an OpenAI envelope."""

    for path, (_, document, answer, streams) in RELAYED.items():
        ok: dict[str, Any] = {"model": answer, "description": "The answer, the engine's own."}
        if streams:
            ok["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
        app.add_api_route(
            path,
            document,
            methods=["POST"],
            response_model=None,
            responses={200: ok, **_ERRORS},
            dependencies=[Depends(_bearer)],
            tags=["OpenAI"],
        )

    async def caller(request: HttpRequest, _: Annotated[Any, Depends(_bearer)]) -> Key:
        return await keys.authenticate(dict(request.scope["headers"]).get(b"authorization"))

    Caller = Annotated[Key, Depends(caller)]  # noqa: N806  a type
    keyed: dict[str, Any] = {"tags": ["OpenAI"]}

    @app.get("/v1/models", responses={401: _ERRORS[401]}, **keyed)
    async def list_models(key: Caller) -> schema.ModelList:
        """Every model name that can be used here, aliases included."""
        return schema.ModelList(data=[schema.Model(**entry) for entry in await routes.entries(key)])

    @app.get("/v1/models/{model:path}", responses={401: _ERRORS[401], 404: _ERRORS[404]}, **keyed)
    async def get_model(model: str, key: Caller) -> schema.Model:
        """One model. Its name may hold slashes and colons, escaped (`org%2Fname`) or not."""
        for entry in await routes.entries(key):
            if entry["id"] == model:
                return schema.Model(**entry)
        raise ModelNotFound(f"The model '{model[:200]}' does not exist here.", param="model")

    @app.get("/health", tags=["health"])
    async def get_health() -> dict[str, str]:
        """What this is. Cheap: the engine is not asked."""
        first = routes.default()[0]
        engine = first.tiers[0][0].upstream
        return {
            "status": "ok",
            "backend": engine.base_url,
            "engine": engine.dialect.name,
            "model": first.name,
            "version": __version__,
        }

    @app.head("/livez", include_in_schema=False)
    @app.get("/livez", tags=["health"])
    async def livez() -> dict[str, str]:
        """The process answers. Never asks the engine."""
        return {"status": "ok"}

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", tags=["health"], responses={503: {"model": schema.ErrorEnvelope}})
    async def readyz() -> Response:
        """A request for the default model would be answered now. Asks its engines, at most once a second.

        `engines` says of each engine how it is; of those that the default model doesn't use, how they were seconds ago.
        """
        trouble, engines = await health.look()
        store = "ok" if keys.trouble is None else keys.trouble.code  # without it known keys go on for a while
        if trouble is None:
            return JSONResponse({"status": "ok", "engines": engines, "store": store})
        body = {"status": "unavailable", "engines": engines, "store": store} | orjson.loads(trouble.envelope())
        return JSONResponse(body, 503, _headers(trouble))

    @app.exception_handler(StackError)
    async def on_stack_error(_: HttpRequest, exc: StackError) -> Response:
        return Response(exc.envelope(), exc.status, _headers(exc))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: HttpRequest, exc: HTTPException) -> Response:
        where = f"{request.method[:16]} {request.scope['path'][:200]}"
        if exc.status_code == 405:
            allow = _allowed(request)
            return await on_stack_error(request, MethodNotAllowed(f"{where}: use {allow}.", allow=allow))
        if exc.status_code == 404:
            return await on_stack_error(request, NotFound(f"{where}: there is nothing here. See /docs."))
        return await on_stack_error(request, BadRequest(str(exc.detail)))

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: HttpRequest, exc: RequestValidationError) -> Response:
        first = exc.errors()[0]
        return await on_stack_error(request, BadRequest(str(first["msg"]), param=str(first["loc"][-1])))

    @app.exception_handler(Exception)
    async def on_bug(request: HttpRequest, _: Exception) -> Response:
        return await on_stack_error(request, InternalError("Something went wrong in the gateway. Its log says what."))


def _allowed(request: HttpRequest) -> str:
    """The methods of all routes of its path: Starlette names those of the first."""
    routes = [it for it in request.app.routes if it.matches(request.scope)[0] != Match.NONE]
    return ", ".join(sorted({method for it in routes for method in it.methods or ()}))


def _headers(error: StackError) -> dict[str, str]:
    return {**error.headers, "content-type": "application/json"}


class RelayRoutes:
    """Serves POST to the relayed paths as bare ASGI, everything else by FastAPI.

    FastAPI's handling of a request would cost a quarter of the whole relay (ARCHITECTURE.md, "Decisions"); the routes
    are registered with it all the same, for the schema and the 405s.
    """

    def __init__(
        self,
        app: ASGIApp,
        pipeline: Pipeline,
        answers: Answers,
        progress: Progress,
        relays: Relays,
        metrics: Metrics,
    ) -> None:
        self._app = app
        self._pipeline = pipeline
        self._answers = answers
        self._progress = progress
        self._metrics = metrics
        self._relays = relays

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in RELAYED:
            await self._app(scope, receive, send)
            return
        kind = RELAYED[scope["path"]].kind
        try:
            try:
                request = await self._pipeline.understand(kind, scope, receive)
            except StackError as exc:
                self._metrics.refused(kind, exc)
                raise
            name = request.headers.get(b"idempotency-key")
            if name is None:
                await self._relay(request, scope["stack.client"], send)
            else:
                same = kind.encode() + b"\n" + request.raw
                run = partial(self._relay, request)
                it = request.exchange
                await self._answers.answer(name, request.key.id, same, it.request_id, run, receive, send)
        except ClientLeft:
            pass  # nobody is there to be told
        except StackError as exc:
            await respond(send, exc)
        except Exception:
            log.exception("a bug in the gateway")
            await respond(send, InternalError("Something went wrong in the gateway. Its log says what."))

    async def _relay(self, request: Request, client: Client, send: Send) -> bool:
        """Have an engine answer; whether the answer is whole. Every error but a bug is told to the client here."""
        relay: Relay | None = None
        try:
            try:
                relay = await self._pipeline.admit(request)
            except StackError as exc:
                self._metrics.refused(request.exchange.kind, exc)
                raise
            self._relays.add(relay)
            try:
                return await relay.run(client, send)
            finally:
                self._relays.discard(relay)
        except ClientLeft:
            return False
        except StackError as exc:
            if relay is None:
                await respond(send, self._progress.explain(exc))
            else:
                await respond(send, self._progress.explain(exc, *relay.models), relay.standing)
            return False


# These three exist for their signatures and texts: the OpenAPI schema is made from them. RelayRoutes does the work.


def chat_completions(body: schema.ChatRequest) -> None:
    """Answer a conversation; with `stream`, token by token as server-sent events that end with `[DONE]`.

    Unknown fields go to the engine untouched. A stream that can't be finished ends with an error event. The header
    `x-stack-ignored-params` names what the engine ignored; with `x-stack-strict: true` that is a 400.
    """


def completions(body: schema.CompletionRequest) -> None:
    """Continue a text."""


def embeddings(body: schema.EmbeddingRequest) -> None:
    """Turn texts into vectors. Whether a model can is the engine's matter."""


class Relayed(NamedTuple):
    kind: Kind
    document: Callable[..., None]
    answer: type
    streams: bool


RELAYED = {
    "/v1/chat/completions": Relayed("chat", chat_completions, schema.ChatCompletion, streams=True),
    "/v1/completions": Relayed("completion", completions, schema.Completion, streams=True),
    "/v1/embeddings": Relayed("embedding", embeddings, schema.Embeddings, streams=False),
}
