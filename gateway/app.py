"""App: build every object once, and pass the objects to each other."""

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING
from urllib.parse import unquote

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway import __version__, byte_budget, logs
from gateway.admission.memory import Places
from gateway.admission.queue import Admission
from gateway.api import docs
from gateway.api.admin.routes import add_admin_routes
from gateway.api.body import Workshop
from gateway.api.dispatch import Dispatch, Relays
from gateway.api.idempotency.answers import Answers
from gateway.api.middleware import Cors, Forwarded, Head, Host
from gateway.api.pipeline import Pipeline
from gateway.api.request_log import RequestLog
from gateway.api.routes import add_routes
from gateway.config import Config
from gateway.console.console import Console
from gateway.console.door import Door
from gateway.console.keys import KeyPages
from gateway.console.now import Engines, NowPages
from gateway.console.pages import Pages
from gateway.console.process import Client
from gateway.console.requests import RequestPages
from gateway.console.sessions import Sessions
from gateway.console.usage import UsagePages
from gateway.console.views import Views
from gateway.headers import EXPOSED
from gateway.keys.authenticate import Also, Keys
from gateway.keys.book import Keybook
from gateway.keys.configured import listed_ids
from gateway.limits.estimates import Estimates
from gateway.limits.memory import Accounts, SharedBook
from gateway.limits.near import Near
from gateway.limits.postgres import PostgresBook
from gateway.limits.rules import Period
from gateway.metrics import Metrics
from gateway.prompts.book import InForce, Promptbook
from gateway.prompts.render import Prompts
from gateway.recent.recent import Memory, Recent
from gateway.relay.resume.trials import Continuations
from gateway.relay.services import Services
from gateway.relay.suspects import Suspects
from gateway.responses.responses import Responses
from gateway.routing.health import Health, Probes
from gateway.routing.listing import Listing
from gateway.routing.retry import Budget
from gateway.routing.routes import Routes
from gateway.settings import Settings
from gateway.shared_memory import Shared
from gateway.store.store import open_store
from gateway.upstream.breaker import Breaker, State
from gateway.upstream.client import Upstream
from gateway.upstream.context_window import Contexts
from gateway.upstream.progress import Progress
from gateway.usage.recorder import Recorder
from gateway.usage.rows import UsageBook
from gateway.usage.sums import Sums

if TYPE_CHECKING:
    from gateway.traces.spans import Traces


class Gateway:
    """Hold the whole service as one ASGI app. `cut` ends each running stream with an error event. `retire` is called
    when this worker takes no further connection."""

    def __init__(self, app: ASGIApp, relays: Relays, retire: Callable[[], None]) -> None:
        self._app = app
        self._relays = relays
        self.retire = retire

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    def cut(self) -> None:
        for relay in list(self._relays):
            relay.cut()


def create_app(
    settings: Settings,
    config: Config,
    shared: Shared,
    accounts: Accounts,
    places: Places,
    suspects: Suspects,
    memory: Memory,
    sessions: Sessions,
) -> Gateway:
    """Build the gateway. Connections are opened and closed by the app's lifespan."""
    metrics = Metrics([name for name, model in config.models.items() if not model.split])
    logs.on_drop(metrics.log_line_dropped)
    upstreams = {name: _upstream(name, config, metrics) for name in config.engines}
    routes, progress = Routes(config, settings, upstreams), Progress(settings)
    store, listed = open_store(settings), listed_ids(settings)
    usage, promptbook = UsageBook(store, listed), Promptbook(store)
    relays: Relays = set()
    recorder = Recorder(settings, usage, metrics, lambda: [it.running() for it in relays])
    admission = Admission(settings, config, upstreams, places, shared.seat, shared.sockets, metrics)
    recent, near = Recent(memory, shared.seat), Near(metrics.near_quota)
    services = _services(settings, config, metrics, recorder, recent, admission, suspects, progress)
    prompts = Prompts()
    also = Also(lambda: promptbook.in_force().dump(), lambda it: prompts.take(*InForce.load(it)))
    keys = Keys(settings, store, shared.keys, also, lambda: _look_after(keys, pipeline, relays, near))
    book = _book(settings, accounts, shared.seat, usage, near)
    held = byte_budget.per_worker(settings.stack_body_budget_bytes, settings.stack_workers)
    bodies, answers, responses = Workshop(), Answers(settings, shared.answers), Responses(settings, store)
    pipeline = Pipeline(settings, keys, routes, prompts, book, answers, services, held, bodies, responses)
    health, keybook = Health(routes, upstreams, progress, shared.draining), Keybook(store, listed)
    engines, process = Engines(config, keys, health, upstreams, progress), Client(shared.sockets)
    console = Console(Door(settings, keys, sessions), engines, routes, Pages(), process)

    opened: list[AbstractAsyncContextManager[object]] = [recorder, keys]
    if services.traces is not None:
        opened.insert(0, services.traces)  # the last to be closed: every request has ended then
    if isinstance(book, PostgresBook):
        opened.append(book)
    opened += [*upstreams.values(), admission, Probes(config.breaker, upstreams), answers, responses]
    fastapi = docs.documented_app(_lifespan(opened, [store.close, bodies.close]))
    add_routes(fastapi, keys, routes, Listing(routes), health, responses, held)
    add_admin_routes(fastapi, settings, keybook, promptbook, usage, routes)
    fastapi.router.routes.extend(console.paths())
    relayed = Dispatch(fastapi, pipeline, answers, progress, relays, metrics)
    return Gateway(_middleware(relayed, settings, metrics, services.traces), relays, admission.retire)


def create_views(settings: Settings, memory: Memory) -> Views:
    """Build the pages at /console, in the process that makes them."""
    store, listed, pages = open_store(settings), listed_ids(settings), Pages()
    usage, book = UsageBook(store, listed), Keybook(store, listed)
    return Views(
        NowPages(settings, book, memory, listed, pages),
        KeyPages(settings, book, Promptbook(store), usage, memory.captures, pages),
        UsagePages(Sums(store), usage, listed, pages),
        RequestPages(settings, memory, usage, book, pages),
        pages,
    )


def _look_after(keys: Keys, pipeline: Pipeline, relays: Relays, near: Near) -> None:
    """Do what is due after a look at the store. Keys also end by the clock, so `near` looks once a minute in any
    case."""
    pipeline.look_after(list(relays))
    near.recheck((keys.number, time.monotonic() // 60), keys.limits, Period.of(time.time()))


def _services(
    settings: Settings,
    config: Config,
    metrics: Metrics,
    recorder: Recorder,
    recent: Recent,
    admission: Admission,
    suspects: Suspects,
    progress: Progress,
) -> Services:
    """What all relays of this worker share."""
    return Services(
        config.retries,
        Budget(config.retries.budget, settings.stack_workers),
        metrics,
        recorder,
        recent,
        Estimates(),
        Contexts(),
        Continuations(),
        admission,
        suspects,
        progress,
        _traces(settings, config, metrics),
        settings.stack_log_content and settings.stack_log_level == "DEBUG",
        settings.stack_max_answer_bytes,
    )


def _lifespan(
    opened: Sequence[AbstractAsyncContextManager[object]], closed: Sequence[Callable[[], None]]
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """Open what is to be `opened`, in this order; in the end close it in the reverse order, and then what is to be
    `closed`."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for close in closed:
                stack.callback(close)
            for it in opened:
                await stack.enter_async_context(it)
            yield
        logs.flush()

    return lifespan


def _middleware(app: ASGIApp, settings: Settings, metrics: Metrics, traces: "Traces | None") -> ASGIApp:
    """What every request passes through, the innermost first."""
    app = Host(Head(app), settings=settings)
    if settings.stack_proxy_network:
        app = Forwarded(app, own=settings.stack_proxy_network)
    if settings.stack_cors_origins:
        app = Cors(
            app,
            allow_origins=settings.stack_cors_origins,
            allow_methods=["DELETE", "GET", "HEAD", "POST"],
            allow_headers=["*"],  # authorization, and the x-stainless-* headers of the official clients
            # A listed page may be public while this gateway is on the visitor's own network
            allow_private_network=True,
            expose_headers=EXPOSED,
            max_age=600,
        )
    return RequestLog(app, log_level=settings.stack_log_level, metrics=metrics, traces=traces)


def _book(settings: Settings, accounts: Accounts, seat: int, usage: UsageBook, near: Near) -> SharedBook | PostgresBook:
    """Return the book of the keys' accounts: in PostgreSQL if it is configured, because other gateways may share it;
    otherwise in memory."""
    if settings.store_url.startswith("postgresql:"):
        return PostgresBook(settings.store_url, accounts, seat, near)

    async def recorded(key_id: str, since: int, until: int) -> int:
        return await asyncio.to_thread(usage.spent, key_id, since, until)

    return SharedBook(accounts, seat, recorded, near=near)


def _traces(settings: Settings, config: Config, metrics: Metrics) -> "Traces | None":
    if settings.otel_exporter_otlp_endpoint is None:
        return None
    # Not even imported by a gateway that has no collector.
    from gateway.traces import names  # noqa: PLC0415
    from gateway.traces.attributes import Reached  # noqa: PLC0415
    from gateway.traces.export import Exporter  # noqa: PLC0415
    from gateway.traces.spans import Traces  # noqa: PLC0415

    # Docker's command adds attributes of its own to this variable, which Compose would pass on from there.
    resource = {
        name: unquote(value)
        for name, value in settings.otel_resource_attributes.items()
        if not name.startswith("docker.cli.")
    } | {
        names.SERVICE: settings.otel_service_name,
        names.VERSION: __version__,
        names.INSTANCE: f"{socket.gethostname()}-{os.getpid()}",
    }
    headers = settings.collector_headers()
    exporter = Exporter(settings.otel_exporter_otlp_endpoint, headers, resource, __version__, metrics.spans_dropped)
    engines = {name: Reached(it.dialect, it.base_url) for name, it in config.engines.items()}
    return Traces(exporter, settings.otel_traces_sampler_arg, engines, content=settings.stack_trace_content)


def _upstream(name: str, config: Config, metrics: Metrics) -> Upstream:
    def tell(state: State, reason: str) -> None:
        metrics.upstream_state(name, state)
        fields = {"engine": name, "state": state, "reason": reason}
        logs.event("engine_state", fields, "info" if state == "closed" else "warning")
        upstream.changed.set()

    metrics.upstream_state(name, "closed")
    upstream = Upstream(name, config.engines[name], Breaker(config.breaker.failures, config.breaker.open_for, tell))
    return upstream
