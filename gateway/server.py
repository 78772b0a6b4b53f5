"""Server: gunicorn and its uvicorn workers, configured from Settings, and how they stop.

SIGTERM: /readyz says 503 for the drain delay while the port still accepts; then no new connections, running
answers may finish within the grace; those that don't get an error frame; exit 0. SIGHUP: settings are read
anew (a bad one leaves the old in force), new workers start, old ones finish their answers.
"""

import asyncio
import logging
import mmap
import signal
import sys
import time
from typing import Any, ClassVar

from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.config import Config
from gunicorn.glogging import Logger
from uvicorn.server import Server as UvicornServer
from uvicorn_worker import UvicornWorker

from gateway import logs
from gateway.app import Gateway, create_app
from gateway.ingress import Protocol
from gateway.scrape import Board, Port
from gateway.settings import PLACEHOLDER_KEY, Settings, SettingsError, load, split_address

log = logging.getLogger("stack")

HEARTBEAT = 30  # seconds without one after which gunicorn replaces a worker
CUT_MARGIN = 2.0  # seconds between the error frames and the end of a worker


class SharedFlag:
    """One bit that the master sets and every worker reads: a byte of anonymous memory, inherited by fork."""

    def __init__(self) -> None:
        self._byte = mmap.mmap(-1, 1)

    def set(self) -> None:
        self._byte[0] = 1

    def __bool__(self) -> bool:
        return self._byte[0] == 1


class GunicornLog(Logger):  # type: ignore[misc]
    """gunicorn's logger without handlers of its own: its records go where all others go (logs.configure)."""

    def setup(self, cfg: Config) -> None:
        self.cfg = cfg
        self._access_log_enabled = False
        self.error_log.propagate = True

    def reopen_files(self) -> None:
        pass


class Worker(UvicornWorker):  # type: ignore[misc]
    """A uvicorn worker that keeps its heartbeat while it drains, and lets no stream end without a word."""

    CONFIG_KWARGS: ClassVar[dict[str, Any]] = {
        "loop": "uvloop",
        "http": Protocol,
        "ws": "none",
        "lifespan": "on",
        "server_header": False,
    }

    slot: int | None = None  # where it counts (scrape.Board)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.config.access_log = False
        self.config.timeout_graceful_shutdown = int(self.cfg.graceful_timeout)
        for name in ("uvicorn.error", "uvicorn.access"):
            logging.getLogger(name).handlers = []
            logging.getLogger(name).propagate = name == "uvicorn.error"

    def init_signals(self) -> None:
        super().init_signals()
        # uvicorn raises SIGTERM again once it has stopped; with the default action the worker would die of it,
        # skipping atexit and the last log lines.
        self._serving = False
        signal.signal(signal.SIGTERM, self._on_term)

    def _on_term(self, *_: object) -> None:
        if not self._serving:
            sys.exit(0)  # told to stop while still starting

    async def _serve(self) -> None:
        self.config.app = self.wsgi
        server = UvicornServer(config=self.config)
        self._install_sigquit_handler()
        watch = asyncio.create_task(self._watch(server, self.wsgi))
        self._serving = True
        try:
            await server.serve(sockets=self.sockets)
        finally:
            watch.cancel()
        if not server.started:
            sys.exit(Arbiter.WORKER_BOOT_ERROR)

    async def _watch(self, server: UvicornServer, app: Gateway) -> None:
        while not server.should_exit:  # noqa: ASYNC110  uvicorn sets it in a signal handler
            await asyncio.sleep(0.2)
        cut_at = time.monotonic() + self.cfg.graceful_timeout - CUT_MARGIN
        while True:
            self.notify()  # uvicorn doesn't while it drains, and gunicorn would take the worker for hung
            if time.monotonic() >= cut_at:
                app.cut()
            await asyncio.sleep(0.2)


class Server(BaseApplication):  # type: ignore[misc]
    """The gunicorn application: settings in, workers out."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._draining = SharedFlag()
        self._board = Board() if settings.stack_metrics_bind else None
        super().__init__()

    def load_config(self) -> None:
        settings = self._settings
        host, port = split_address(settings.stack_bind)
        options = {
            "bind": [f"[{host}]:{port}" if ":" in host else f"{host}:{port}"],
            "workers": settings.stack_workers,
            "worker_class": Worker,
            "logger_class": GunicornLog,
            "timeout": HEARTBEAT,
            "graceful_timeout": int(settings.stack_grace + CUT_MARGIN),
            "keepalive": 75,  # seconds an idle connection stays open: longer than a load balancer's own 60
            "control_socket_disable": True,  # it wants a writable home; the root file system is read-only
            "forwarded_allow_ips": "",  # nothing here trusts X-Forwarded-*
            "proc_name": "stack",
            "when_ready": self._when_ready,
            "pre_fork": self._pre_fork,
            "post_fork": self._post_fork,
            "child_exit": self._child_exit,
            "on_exit": self._on_exit,
        }
        for name, value in options.items():
            self.cfg.set(name, value)

    def load(self) -> Gateway:
        return create_app(self._settings, self._draining)

    def reload(self) -> None:
        try:
            settings = load()
        except SettingsError as exc:
            log.error(  # noqa: TRY400  a mistake of the operator's has no traceback
                "the new settings are refused, the old ones stay in force: %s", exc
            )
            return
        self._settings = settings
        self.callable = None
        super().reload()

    def _when_ready(self, arbiter: Arbiter) -> None:
        """Put the drain delay before gunicorn's own SIGTERM handling; open the port for metrics."""
        if self._board is not None and self._settings.stack_metrics_bind:
            Port(*split_address(self._settings.stack_metrics_bind), self._board.page).open()
        stop = arbiter.handle_term

        def drain() -> None:
            self._draining.set()
            log.info("draining", extra={"seconds": self._settings.stack_drain_delay})
            deadline = time.monotonic() + self._settings.stack_drain_delay
            while time.monotonic() < deadline and arbiter.SIG_QUEUE.empty():
                time.sleep(0.05)
            stop()

        arbiter.handle_term = drain

    # Each worker counts in the slot it was given before its fork, which is free again once it is gone.

    def _pre_fork(self, arbiter: Arbiter, worker: Worker) -> None:
        if self._board is not None:
            worker.slot = self._board.reserve({it.slot for it in arbiter.WORKERS.values()})

    def _post_fork(self, _: Arbiter, worker: Worker) -> None:
        if self._board is not None:
            self._board.take(worker.slot)

    def _child_exit(self, _: Arbiter, worker: Worker) -> None:
        if self._board is not None:
            self._board.vacate(worker.slot)

    def _on_exit(self, _: Arbiter) -> None:
        if self._board is not None:
            self._board.remove()


def main() -> None:
    """Run until told to stop. Exits 1 with a sentence per mistake when the settings can't be used."""
    try:
        settings = load()
    except SettingsError as exc:
        sys.exit(f"stack can't start:\n{exc}")
    logs.configure(settings.stack_log_level)
    if PLACEHOLDER_KEY in settings.accepted_keys():
        log.warning(
            "the placeholder key '%s' is in force; it works only because the port is on loopback", PLACEHOLDER_KEY
        )
    log.info(
        "starting",
        extra={"backend": settings.llm_backend, "base_url": settings.llm_base_url, "model": settings.llm_model},
    )
    Server(settings).run()
