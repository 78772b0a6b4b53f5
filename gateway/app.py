"""App: builds every object once and hands them to each other."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway import __version__, api, logs
from gateway.accounts import Accounts, SharedBook
from gateway.admin import add_admin_routes
from gateway.admission import Admission
from gateway.breaker import Breaker, State
from gateway.config import Config
from gateway.context import Contexts
from gateway.estimates import Estimates
from gateway.health import Health, Probes
from gateway.idempotency import Answers
from gateway.keybook import Keybook
from gateway.keys import Also, Keys, listed_ids
from gateway.limits import HEADERS
from gateway.metrics import Metrics
from gateway.middleware import Host, RequestLog
from gateway.pipeline import Pipeline
from gateway.places import Places
from gateway.progress import Progress
from gateway.promptbook import Promptbook
from gateway.prompts import Prompts
from gateway.recorder import Recorder
from gateway.relay import Rules
from gateway.replicas import PostgresBook
from gateway.retry import Budget
from gateway.routing import Routes
from gateway.settings import Settings
from gateway.shared import Shared
from gateway.store import open_store
from gateway.upstream import Upstream
from gateway.usage import UsageBook

OWN_HEADERS = ("x-request-id", "x-stack-arm", "x-stack-ignored-params", "x-stack-queue-ms", "x-stack-resumes")


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


def create_app(settings: Settings, config: Config, shared: Shared, accounts: Accounts, places: Places) -> Gateway:
    """Build the gateway. Connections are opened and closed by the app's lifespan."""
    metrics = Metrics([name for name, model in config.models.items() if not model.split])
    logs.on_drop(metrics.log_line_dropped)
    upstreams = {name: _upstream(name, config, metrics) for name in config.engines}
    routes = Routes(config, settings, upstreams)
    progress = Progress(settings)
    health = Health(routes, upstreams, progress, shared.draining)
    log_content = settings.stack_log_content and settings.stack_log_level == "DEBUG"
    store = open_store(settings)
    listed = listed_ids(settings)
    usage = UsageBook(store, listed)
    relays: api.Relays = set()
    recorder = Recorder(settings, usage, metrics, lambda: [it.running() for it in relays])
    budget = Budget(config.retries.budget, settings.stack_workers)
    admission = Admission(settings, config, upstreams, places, shared.slot, shared.sockets, metrics)
    rules = Rules(config.retries, budget, metrics, recorder, Estimates(), Contexts(), admission, log_content)
    prompts, promptbook = Prompts(), Promptbook(store)
    keys = Keys(settings, store, shared.keys, Also(promptbook.in_force, lambda it: prompts.take(*it)))
    book = _book(settings, accounts, shared.slot, usage)
    pipeline = Pipeline(settings, keys, routes, prompts, book, rules)
    answers = Answers(settings, shared.answers)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            stack.callback(store.close)
            await stack.enter_async_context(recorder)
            await stack.enter_async_context(keys)
            if isinstance(book, PostgresBook):
                await stack.enter_async_context(book)
            for upstream in upstreams.values():
                await stack.enter_async_context(upstream)
            await stack.enter_async_context(admission)
            await stack.enter_async_context(Probes(config.breaker, upstreams))
            await stack.enter_async_context(answers)
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
    api.add_routes(fastapi, keys, routes, health)
    add_admin_routes(fastapi, settings, Keybook(store, listed), promptbook, usage)

    app: ASGIApp = api.RelayRoutes(fastapi, pipeline, answers, progress, relays, metrics)
    if settings.stack_cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=settings.stack_cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # authorization and the x-stainless-* family of the official clients
            expose_headers=[*OWN_HEADERS, "retry-after", "retry-after-ms", *HEADERS],
            max_age=600,
        )
    app = Host(app, settings=settings)
    app = RequestLog(app, log_level=settings.stack_log_level, metrics=metrics)
    return Gateway(app, relays)


def _book(settings: Settings, accounts: Accounts, slot: int, usage: UsageBook) -> SharedBook | PostgresBook:
    """Where the keys' accounts are: with PostgreSQL there may be other gateways beside this one."""
    if settings.store_url.startswith("postgresql:"):
        return PostgresBook(settings.store_url, accounts, slot)

    async def recorded(key_id: str, since: int, until: int) -> int:
        return await asyncio.to_thread(usage.spent, key_id, since, until)

    return SharedBook(accounts, slot, recorded)


def _upstream(name: str, config: Config, metrics: Metrics) -> Upstream:
    def tell(state: State, reason: str) -> None:
        metrics.upstream_state(name, state)
        logs.event("engine_state", {"engine": name, "state": state, "reason": reason})
        upstream.changed.set()

    metrics.upstream_state(name, "closed")
    upstream = Upstream(name, config.engines[name], Breaker(config.breaker.failures, config.breaker.open_for, tell))
    return upstream
