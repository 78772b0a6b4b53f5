"""Master: configure gunicorn and its uvicorn workers from Settings, and stop them in order.

On SIGTERM, /readyz says 503 for the drain delay while the port still accepts requests. Then no new connection is
accepted, and running answers may finish within the grace. The remaining ones get an error event, and the exit status is
0. On SIGHUP, the key file and stack.yaml are read again. A bad file leaves the old one in force. New workers start, and
old ones finish their answers.

The file is long because gunicorn's master, its workers and their configuration call each other back.
"""

import asyncio
import contextlib
import functools
import gc
import logging
import resource
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

from gateway import logs
from gateway.addresses import split_address
from gateway.admission.bell import Bell, vacate
from gateway.admission.memory import Places
from gateway.app import Gateway, create_app, create_views
from gateway.config import Config
from gateway.config import load as load_config
from gateway.console.sessions import Sessions
from gateway.limits.memory import Accounts
from gateway.recent.recent import Memory
from gateway.relay.suspects import Suspects
from gateway.server import protocol
from gateway.server.console import ConsoleProcess
from gateway.server.facts import facts
from gateway.server.scrape import Board, Port
from gateway.settings import MOST_WORKERS, PLACEHOLDER_KEY, Settings, SettingsError, load
from gateway.shared_memory import MAX_SEATS, BusyError, Shared
from gateway.store.store import prepare
from gateway.usage.recorder import recover

log = logging.getLogger("stack")

HEARTBEAT = 30  # seconds without a heartbeat after which gunicorn replaces a worker
COLLECT_AFTER = 20_000  # allocations between two looks for cyclic garbage, instead of 700: a tenth of the relay's cost
MOST_FILES = 65_536  # open files and connections of a process, if the system allows so many
CUT_MARGIN = 2.0  # seconds between the error events and the end of a worker


class GunicornLog(Logger):  # type: ignore[misc]
    """gunicorn's logger without handlers of its own: its records go where all others go (logs.configure)."""

    def setup(self, cfg: GunicornConfig) -> None:
        self.cfg = cfg
        self._access_log_enabled = False
        self.error_log.propagate = True

    def reopen_files(self) -> None:
        pass


def _drop_all(server: UvicornServer) -> None:
    """End every request that still runs, a second before gunicorn kills the worker, so that the app is closed."""
    for task in list(server.server_state.tasks):
        task.cancel()
    for connection in list(server.server_state.connections):
        connection.transport.abort()  # uvicorn closes the app only when all are gone


class Worker(UvicornWorker):  # type: ignore[misc]
    """Run uvicorn, with a heartbeat while it drains, and with an error event for every stream that it ends early."""

    CONFIG_KWARGS: ClassVar[dict[str, Any]] = {
        "loop": "uvloop",
        "ws": "none",
        "lifespan": "on",
        "server_header": False,
        "proxy_headers": False,  # api/middleware.py decides whether X-Forwarded-For is believed
    }

    seat = -1  # Shared.seat
    counted = False  # whether there is room for its metrics (scrape.Board)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.config.access_log = False
        # After a reload nobody waits for this worker, so its answers may take as long as any. Else see _watch.
        self.config.timeout_graceful_shutdown = self.app.longest_answer
        self.config.http = functools.partial(protocol.Protocol, limits=self.app.limits, strangers={})
        for name in ("uvicorn.error", "uvicorn.access"):
            logging.getLogger(name).handlers = []
            logging.getLogger(name).propagate = name == "uvicorn.error"
        logs.restore_levels()  # the base class gave uvicorn's loggers the level of gunicorn's

    def init_signals(self) -> None:
        super().init_signals()
        # uvicorn raises the signal again once it has stopped; with the default action the worker would die of it,
        # skipping atexit and the last log lines.
        self._serving = False
        signal.signal(signal.SIGTERM, self._on_term)
        signal.signal(signal.SIGINT, self._on_term)
        self._told = self.app.draining  # it must stop: nothing handled a signal between the fork and here

    def _on_term(self, *_: object) -> None:
        self._told = True
        if not self._serving:
            sys.exit(0)  # while still starting; where that is lost, as in a finalizer, _watch sees to it

    async def _serve(self) -> None:
        gc.freeze()  # existing objects stay, so the collector need not scan them again
        gc.set_threshold(COLLECT_AFTER)
        self.config.app = self.wsgi
        server = UvicornServer(config=self.config)
        # gunicorn sends this signal to stop a worker at once; uvicorn_worker's own handler has no effect.
        asyncio.get_running_loop().add_signal_handler(signal.SIGQUIT, server.handle_exit, signal.SIGINT, None)
        watch = asyncio.create_task(self._watch(server, self.wsgi))
        sweep = asyncio.create_task(protocol.sweep(server.server_state.connections))
        for listener in self.sockets:
            protocol.bound(listener)
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
                app.retire()
            await asyncio.sleep(0.2)
        while not self.app.draining:
            self.notify()  # uvicorn doesn't while it drains, and gunicorn would take the worker for hung
            await asyncio.sleep(0.2)
        cut_at = time.monotonic() + self.cfg.graceful_timeout - CUT_MARGIN
        cancelled = False
        while True:
            self.notify()
            if time.monotonic() >= cut_at:
                app.cut()
            if time.monotonic() >= cut_at + CUT_MARGIN - 1 and not cancelled:
                cancelled = True
                _drop_all(server)
            await asyncio.sleep(0.2)


class Master(Arbiter):  # type: ignore[misc]
    """Run gunicorn's master, with a drain before SIGTERM and a check of the settings before SIGHUP."""

    app: "Server"
    _reloading = False

    def handle_term(self) -> None:
        """Make /readyz answer 503 for the drain delay while the port still accepts connections. Any further signal ends
        the delay, and so does the death of the last worker, because none is started any more."""
        deadline, further = time.monotonic() + self.app.drain(), None
        while time.monotonic() < deadline and self.WORKERS and further is None:
            for sig in self.wait_for_signals(timeout=0.05):
                if sig == signal.SIGCHLD:
                    self.handle_chld()
                else:
                    further = sig
            self.app.keep_console(self.LISTENERS)
        if further is not None:
            self.SIG_QUEUE.put_nowait(further)  # gunicorn looks at it while it waits for the workers
        super().handle_term()

    def handle_hup(self) -> None:
        """Start new workers with new settings. Invalid settings change nothing. A reload also changes nothing while so
        many old workers still finish their answers that there might be no seat for a new one."""
        if len(self.WORKERS) + MOST_WORKERS > MAX_SEATS:
            log.error("too many old workers are still running: nothing was reloaded, try again in a minute")
        elif self.app.read_again():
            super().handle_hup()

    def reload(self) -> None:
        """Reload as gunicorn does, but without its wait for the old workers. During that wait, a SIGTERM and a dead
        worker would have to wait too, for as long as an answer runs."""
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
        self.app.keep_console(self.LISTENERS)
        if self._reloading:  # the last step before that wait, whose length this sets to zero
            self.cfg.set("graceful_timeout", 0)


class Server(BaseApplication):  # type: ignore[misc]
    """The gunicorn application: it reads settings and makes workers."""

    def __init__(self, settings: Settings, config: Config) -> None:
        self._settings = settings
        self._config = config
        self._shared = Shared(settings.stack_data_dir)
        self._accounts = Accounts()
        self._places = Places()
        self._suspects = Suspects()
        self._recent = Memory()
        self._sessions = Sessions()
        self._bell = Bell(self._shared.sockets)
        self._console = ConsoleProcess(self._shared.sockets)
        self._gone: set[int] = set()  # seats of dead workers whose places are not freed yet
        self._board = Board(functools.partial(facts, settings)) if settings.stack_metrics_bind else None
        self._port: Port | None = None
        if self._board is not None and settings.stack_metrics_bind:
            self._port = Port(*split_address(settings.stack_metrics_bind), self._board.page)
        super().__init__()

    @property
    def graceful_timeout(self) -> int:
        """Seconds for a worker to end, including its error events."""
        return int(self._settings.stack_grace + CUT_MARGIN)

    @property
    def longest_answer(self) -> int:
        """Seconds that an answer may take, including its error event."""
        totals = (it.timeouts.total for it in self._config.models.values())
        return int(max(self._settings.llm_timeout, *(it or 0 for it in totals)) + CUT_MARGIN)

    def drain(self) -> float:
        """Stop being ready. Returns for how many seconds the port stays open."""
        self._shared.draining.set()
        log.info("draining", extra={"seconds": self._settings.stack_drain_delay})
        return self._settings.stack_drain_delay

    @property
    def draining(self) -> bool:
        return bool(self._shared.draining)

    def open_metrics(self) -> None:
        """Serve /metrics, if that has not begun. Called by the master before it forks, and once a second."""
        if self._port is not None:
            self._port.open()

    def clear(self) -> None:
        """Free the slots and places of dead workers. Called by the master once a second too."""
        for seat in sorted(self._gone):
            with contextlib.suppress(BusyError):
                vacate(self._places, self._bell, seat)
                self._gone.discard(seat)

    def keep_console(self, listeners: list[Any]) -> None:
        """Start the console's process, if there is to be one and it does not run. Called by the master once a second,
        with the sockets that belong to the workers alone."""
        if self._settings.admin_keys():
            self._console.keep(lambda: create_views(self._settings, self._recent), listeners)

    def read_again(self) -> bool:
        """Read the settings and stack.yaml again. Returns whether they are valid."""
        try:
            settings = load()
            config = load_config(settings)
        except SettingsError as exc:
            log.error("the new settings have a mistake, so the old ones stay in force: %s", exc)  # noqa: TRY400  no bug of ours
            return False
        except Exception:  # the master must not die of a mistake in a file, whatever it is
            log.exception("the new settings cannot be read, so the old ones stay in force")
            return False
        self._settings, self._config = settings, config
        self._console.retire()
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
            "keepalive": 75,  # seconds that an idle connection stays open; longer than the 60 of a load balancer
            "control_socket_disable": True,  # it needs a writable home, but the root file system is read-only
            "proc_name": "stack",
            "pre_fork": self._pre_fork,
            "post_fork": self._post_fork,
            "child_exit": self._child_exit,
            "on_exit": self._on_exit,
        }
        for name, value in options.items():
            self.cfg.set(name, value)

    @property
    def limits(self) -> protocol.Limits:
        it = self._settings
        return protocol.Limits(it.stack_read_timeout, it.stack_write_timeout, it.stack_connections)

    def load(self) -> Gateway:
        return create_app(
            self._settings,
            self._config,
            self._shared,
            self._accounts,
            self._places,
            self._suspects,
            self._recent,
            self._sessions,
        )

    def run(self) -> None:
        Master(self).run()

    # Each worker gets a seat before its fork. The seat is free again when the worker is gone.

    def _pre_fork(self, arbiter: Arbiter, worker: Worker) -> None:
        taken = {it.seat for it in arbiter.WORKERS.values()} | self._gone
        worker.seat = next(number for number in range(MAX_SEATS) if number not in taken)
        self._accounts.occupy(worker.seat)
        worker.counted = self._board is not None and self._board.reserve(worker.seat)

    def _post_fork(self, _: Arbiter, worker: Worker) -> None:
        self._shared.seat = worker.seat
        self._console.let_go()
        if self._board is not None:
            self._board.take(worker.seat if worker.counted else None)

    def _child_exit(self, _: Arbiter, worker: Worker) -> None:
        self._accounts.vacate(worker.seat)
        self._gone.add(worker.seat)
        self.clear()
        if self._board is not None and worker.counted:
            self._board.vacate(worker.seat)

    def _on_exit(self, _: Arbiter) -> None:
        self._console.end()
        self._shared.remove()
        if self._board is not None:
            self._board.remove()


def _allow_files() -> None:
    """Raise the number of files and connections that each process may have open. Systems give 1,024 at first, and let
    a process raise that to the hard limit by itself. 512 clients and their connections to engines would reach 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def main() -> None:
    """Run until told to stop. Exits 1 with a sentence for each mistake if the settings are invalid."""
    try:
        settings = load()
        config = load_config(settings)
        prepare(settings)
    except SettingsError as exc:
        sys.exit(f"stack cannot start:\n{exc}")
    logs.configure(settings.stack_log_level, settings.stack_log_levels, settings.stack_log_sample)
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
    _allow_files()
    Server(settings, config).run()
