"""Server: gunicorn and its uvicorn workers, configured from Settings, and how they stop.

SIGTERM: /readyz says 503 for the drain delay while the port still accepts; then no new connections, running
answers may finish within the grace; those that don't get an error frame; exit 0. SIGHUP: the key
file and stack.yaml are read anew (a bad one leaves the old in force), new workers start, old ones finish their answers.
"""

import asyncio
import contextlib
import functools
import gc
import logging
import signal
import sys
import time
from typing import Any, ClassVar

from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.config import Config as GunicornConfig
from gunicorn.glogging import Logger
from uvicorn.server import Server as UvicornServer
from uvicorn_worker import UvicornWorker

from gateway import ingress, logs
from gateway.accounts import Accounts
from gateway.admission import Bell, vacate
from gateway.app import Gateway, create_app
from gateway.config import Config
from gateway.config import load as load_config
from gateway.places import Places
from gateway.recorder import recover
from gateway.scrape import Board, Port
from gateway.settings import PLACEHOLDER_KEY, Settings, SettingsError, load, split_address
from gateway.shared import MAX_SLOTS, BusyError, Shared
from gateway.store import prepare

log = logging.getLogger("stack")

HEARTBEAT = 30  # seconds without one after which gunicorn replaces a worker
COLLECT_AFTER = 20_000  # allocations between two looks for cyclic garbage, instead of 700: a tenth of the relay's cost
CUT_MARGIN = 2.0  # seconds between the error frames and the end of a worker


class GunicornLog(Logger):  # type: ignore[misc]
    """gunicorn's logger without handlers of its own: its records go where all others go (logs.configure)."""

    def setup(self, cfg: GunicornConfig) -> None:
        self.cfg = cfg
        self._access_log_enabled = False
        self.error_log.propagate = True

    def reopen_files(self) -> None:
        pass


class Worker(UvicornWorker):  # type: ignore[misc]
    """A uvicorn worker that keeps its heartbeat while it drains, and lets no stream end without a word."""

    CONFIG_KWARGS: ClassVar[dict[str, Any]] = {
        "loop": "uvloop",
        "ws": "none",
        "lifespan": "on",
        "server_header": False,
        "proxy_headers": False,  # nothing here trusts X-Forwarded-*
    }

    slot = -1  # Shared.slot
    counted = False  # whether there is room for its metrics (scrape.Board)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.config.access_log = False
        self.config.timeout_graceful_shutdown = int(self.cfg.graceful_timeout) - 1  # below gunicorn's, which kills
        self.config.http = functools.partial(ingress.Protocol, limits=self.app.limits)
        for name in ("uvicorn.error", "uvicorn.access"):
            logging.getLogger(name).handlers = []
            logging.getLogger(name).propagate = name == "uvicorn.error"

    def init_signals(self) -> None:
        super().init_signals()
        # uvicorn raises the signal again once it has stopped; with the default action the worker would die of it,
        # skipping atexit and the last log lines.
        self._serving = False
        signal.signal(signal.SIGTERM, self._on_term)
        signal.signal(signal.SIGINT, self._on_term)
        self._told = self.app.draining  # to stop; a signal between the fork and here was nobody's

    def _on_term(self, *_: object) -> None:
        self._told = True
        if not self._serving:
            sys.exit(0)  # while still starting; where that is lost, as in a finalizer, _watch sees to it

    async def _serve(self) -> None:
        gc.freeze()  # what is there now stays, and need not be looked through again
        gc.set_threshold(COLLECT_AFTER)
        self.config.app = self.wsgi
        server = UvicornServer(config=self.config)
        # gunicorn's way to say "stop now"; uvicorn_worker's own handler for it has no effect.
        asyncio.get_running_loop().add_signal_handler(signal.SIGQUIT, server.handle_exit, signal.SIGINT, None)
        watch = asyncio.create_task(self._watch(server, self.wsgi))
        sweep = asyncio.create_task(ingress.sweep(server.server_state.connections))
        self._serving = True
        try:
            await server.serve(sockets=self.sockets)
        finally:
            watch.cancel()
            sweep.cancel()
        if not server.started:
            sys.exit(Arbiter.WORKER_BOOT_ERROR)

    async def _watch(self, server: UvicornServer, app: Gateway) -> None:
        while not server.should_exit:
            if self._told:
                server.should_exit = True
            await asyncio.sleep(0.2)
        cut_at = time.monotonic() + self.cfg.graceful_timeout - CUT_MARGIN
        while True:
            self.notify()  # uvicorn doesn't while it drains, and gunicorn would take the worker for hung
            if time.monotonic() >= cut_at:
                app.cut()
            await asyncio.sleep(0.2)


class Master(Arbiter):  # type: ignore[misc]
    """gunicorn's master, with a drain before SIGTERM and a look at the settings before SIGHUP."""

    app: "Server"
    _reloading = False

    def handle_term(self) -> None:
        """Say 503 on /readyz for the drain delay while the port still accepts; any further signal ends the delay."""
        delay = self.app.drain()
        deadline = time.monotonic() + delay
        while time.monotonic() < deadline and self.SIG_QUEUE.empty():
            time.sleep(0.05)
        super().handle_term()

    def handle_hup(self) -> None:
        """New workers for new settings; settings that can't be used change nothing."""
        if self.app.read_again():
            super().handle_hup()

    def reload(self) -> None:
        """gunicorn's own, but for its wait until the old workers are gone: for as long as an answer runs, a SIGTERM
        and a dead worker would have to wait too."""
        self._reloading = True
        try:
            super().reload()
        finally:
            self._reloading = False
            self.cfg.set("graceful_timeout", self.app.graceful_timeout)

    def manage_workers(self) -> None:
        self.app.open_metrics()
        self.app.clear()
        super().manage_workers()
        if self._reloading:  # the last step before the wait, whose length this is
            self.cfg.set("graceful_timeout", 0)


class Server(BaseApplication):  # type: ignore[misc]
    """The gunicorn application: settings in, workers out."""

    def __init__(self, settings: Settings, config: Config) -> None:
        self._settings = settings
        self._config = config
        self._shared = Shared()
        self._accounts = Accounts()
        self._places = Places()
        self._bell = Bell(self._shared.sockets)
        self._gone: set[int] = set()  # slots whose workers are gone, and have something still
        self._board = Board() if settings.stack_metrics_bind else None
        self._port: Port | None = None
        if self._board is not None and settings.stack_metrics_bind:
            self._port = Port(*split_address(settings.stack_metrics_bind), self._board.page)
        super().__init__()

    @property
    def graceful_timeout(self) -> int:
        """Seconds that a worker gets to end, error frames included."""
        return int(self._settings.stack_grace + CUT_MARGIN)

    def drain(self) -> float:
        """Be not ready from now on; returns for how many seconds the port stays open."""
        self._shared.draining.set()
        log.info("draining", extra={"seconds": self._settings.stack_drain_delay})
        return self._settings.stack_drain_delay

    @property
    def draining(self) -> bool:
        return bool(self._shared.draining)

    def open_metrics(self) -> None:
        """Serve /metrics, if it isn't served yet. Called by the master before it forks, and once a second."""
        if self._port is not None:
            self._port.open()

    def clear(self) -> None:
        """Give away what workers that are gone had at the engines. Called by the master, once a second too."""
        for slot in sorted(self._gone):
            with contextlib.suppress(BusyError):
                vacate(self._places, self._bell, slot)
                self._gone.discard(slot)

    def read_again(self) -> bool:
        """Read settings and stack.yaml anew; whether they can be used."""
        try:
            settings = load()
            config = load_config(settings)
        except SettingsError as exc:
            log.error("the new settings are refused, the old ones stay in force: %s", exc)  # noqa: TRY400  no bug of ours
            return False
        self._settings, self._config = settings, config
        self.callable = None
        return True

    def load_config(self) -> None:
        settings = self._settings
        host, port = split_address(settings.stack_bind)
        options = {
            "bind": [f"[{host}]:{port}" if ":" in host else f"{host}:{port}"],
            "workers": settings.stack_workers,
            "worker_class": Worker,
            "logger_class": GunicornLog,
            "timeout": HEARTBEAT,
            "graceful_timeout": self.graceful_timeout,
            "keepalive": 75,  # seconds an idle connection stays open: longer than a load balancer's own 60
            "control_socket_disable": True,  # it wants a writable home; the root file system is read-only
            "proc_name": "stack",
            "pre_fork": self._pre_fork,
            "post_fork": self._post_fork,
            "child_exit": self._child_exit,
            "on_exit": self._on_exit,
        }
        for name, value in options.items():
            self.cfg.set(name, value)

    @property
    def limits(self) -> ingress.Limits:
        return ingress.Limits(read=self._settings.stack_read_timeout, write=self._settings.stack_write_timeout)

    def load(self) -> Gateway:
        return create_app(self._settings, self._config, self._shared, self._accounts, self._places)

    def run(self) -> None:
        Master(self).run()

    # Each worker has a slot, given before its fork, which is free again once it is gone.

    def _pre_fork(self, arbiter: Arbiter, worker: Worker) -> None:
        taken = {it.slot for it in arbiter.WORKERS.values()} | self._gone
        worker.slot = next(number for number in range(MAX_SLOTS) if number not in taken)
        self._accounts.occupy(worker.slot)
        worker.counted = self._board is not None and self._board.reserve(worker.slot)

    def _post_fork(self, _: Arbiter, worker: Worker) -> None:
        self._shared.slot = worker.slot
        if self._board is not None:
            self._board.take(worker.slot if worker.counted else None)

    def _child_exit(self, _: Arbiter, worker: Worker) -> None:
        self._shared.vacate(worker.slot)
        self._accounts.vacate(worker.slot)
        self._gone.add(worker.slot)
        self.clear()
        if self._board is not None and worker.counted:
            self._board.vacate(worker.slot)

    def _on_exit(self, _: Arbiter) -> None:
        self._shared.remove()
        if self._board is not None:
            self._board.remove()


def main() -> None:
    """Run until told to stop. Exits 1 with a sentence per mistake when the settings can't be used."""
    try:
        settings = load()
        config = load_config(settings)
        prepare(settings)
    except SettingsError as exc:
        sys.exit(f"stack can't start:\n{exc}")
    logs.configure(settings.stack_log_level)
    if PLACEHOLDER_KEY in settings.accepted_keys():
        log.warning(
            "the placeholder key '%s' is in force; it works only because the port is on loopback", PLACEHOLDER_KEY
        )
    log.info(
        "starting",
        extra={
            "engines": ", ".join(f"{name}={it.base_url}" for name, it in config.engines.items()),
            "model": config.default_model,
        },
    )
    recover(settings)
    Server(settings, config).run()
