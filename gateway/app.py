"""App: builds every object once and hands them to each other."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway import __version__, api, logs
from gateway.health import Drain, Health
from gateway.middleware import Host, RequestLog
from gateway.pipeline import Pipeline
from gateway.progress import Progress
from gateway.routing import Models
from gateway.settings import Settings
from gateway.upstream import Upstream


class Gateway:
    """The whole service as one ASGI app. `cut` ends the streams still running, with an error frame each."""

    def __init__(self, app: ASGIApp, relays: api.Relays) -> None:
        self._app = app
        self._relays = relays

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    def cut(self) -> None:
        for relay in list(self._relays):
            relay.cut()


def create_app(settings: Settings, drain: Drain) -> Gateway:
    """Build the gateway. Connections are opened and closed by the app's lifespan."""
    upstream = Upstream(settings)
    models = Models(settings, upstream)
    progress = Progress(settings)
    health = Health(settings, upstream, models, progress, drain)
    pipeline = Pipeline(settings, upstream, models)
    relays: api.Relays = set()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with upstream:
            yield
        logs.flush()

    fastapi = FastAPIOffline(
        title="stack",
        version=__version__,
        summary="An OpenAI-compatible endpoint in front of your own inference engine.",
        lifespan=lifespan,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url="/docs/oauth2-redirect",
        static_url="/docs/static",
        redirect_slashes=False,
    )
    api.add_routes(fastapi, settings, pipeline, models, health)

    app: ASGIApp = api.RelayRoutes(fastapi, pipeline, progress, relays)
    if settings.stack_cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=settings.stack_cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # authorization and the x-stainless-* family of the official clients
            expose_headers=["x-request-id", "retry-after"],
            max_age=600,
        )
    app = Host(app, settings=settings)
    app = RequestLog(app, log_level=settings.stack_log_level)
    return Gateway(app, relays)
