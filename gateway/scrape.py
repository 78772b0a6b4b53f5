"""Scrape: `GET /metrics` on a port of its own, and the files behind it, which the workers count in.

prometheus-client's multiprocess mode, keyed by a worker's slot and not by its pid: with pids, 200 SIGKILLs left
325 files and a scrape of 88 ms; with slots the successor goes on in its predecessor's files (12 of them, 8 ms).

The port is served by one thread of gunicorn's master: the one process that outlives every worker and answers through
a drain, without a moment of any worker's loop. A fork copies only the thread that forks; what this one holds (two
sockets) is closed in the child.
"""

import encodings.idna  # noqa: F401  loaded before any fork: see Port.open
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from prometheus_client import Metric, values
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

log = logging.getLogger("stack")

RESERVE = 256 * 1024  # bytes of each file; a series of kind and model takes some 15 kB of the largest
PATIENCE = 2.0  # seconds a scraper may take to ask, and to take its answer
MAX_REQUEST = 8192  # bytes
AGAIN = 5.0  # seconds between attempts to get the port


class Board:
    """The directory that all workers count in. Made by the master, before it forks."""

    def __init__(self) -> None:
        # A fresh one per start; in a container /tmp is a tmpfs.
        self._directory = Path(tempfile.mkdtemp(prefix="stack-metrics-"))

    # -- in the master ------------------------------------------------------------------------------------------------

    def reserve(self, slot: int) -> bool:
        """Make the slot's files for the worker about to be forked; False when there is no room to count in.

        The files are given their whole size here. A worker killed between opening a file and giving it a size would
        leave an empty one, which prometheus-client can't read; and writing into a file that the disk has no room
        for kills the writer (SIGBUS).
        """
        try:
            self.vacate(slot)
            for kind in ("counter", "histogram", "gauge_livesum", "gauge_livemax"):
                with (self._directory / f"{kind}_{slot}.db").open("ab") as file:
                    file.write(bytes(max(0, RESERVE - file.tell())))
        except OSError as exc:
            log.error("there is no room for metrics, a worker goes without: %s", exc)  # noqa: TRY400
            return False
        return True

    def vacate(self, slot: int) -> None:
        """The slot's worker is gone, and so are its gauges; its counts stay."""
        mark_process_dead(slot, self._directory)  # type: ignore[no-untyped-call]

    def page(self) -> bytes:
        """Everything counted so far, in Prometheus's text form."""
        return generate_latest(self)

    def collect(self) -> Iterable[Metric]:
        """As prometheus-client calls it. Empty files are passed over, see `reserve`."""
        files = [str(file) for file in self._directory.glob("*.db") if _holds_anything(file)]
        return MultiProcessCollector.merge(files)  # type: ignore[no-any-return, no-untyped-call]

    def remove(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)

    # -- in the worker ------------------------------------------------------------------------------------------------

    def take(self, slot: int | None) -> None:
        """Have this process's metrics, none of which may exist yet, live in the slot's files (or, without one, in
        memory, where nobody reads them)."""
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(self._directory)
        if slot is None:
            values.ValueClass = values.MutexValue
        else:
            values.ValueClass = values.MultiProcessValue(lambda: slot)  # type: ignore[no-untyped-call]


def _holds_anything(file: Path) -> bool:
    try:
        return file.stat().st_size > 0
    except FileNotFoundError:  # its worker died just now
        return False


class Port:
    """A port on which GET /metrics gives `page()`, and everything else is 404. One scraper at a time."""

    def __init__(self, host: str, port: int, page: Callable[[], bytes]) -> None:
        self._address = host, port
        self._page = page
        self._listener: socket.socket | None = None
        self._client: socket.socket | None = None
        self._next_try = float("-inf")
        os.register_at_fork(after_in_child=self._let_go)

    def open(self) -> None:
        """Serve from now on until the process ends. Where the port can't be had yet, call again: any number of calls
        make an attempt every AGAIN seconds.

        For the one thread that forks the workers. A fork in the middle of another thread's look-up of the name left the
        worker with a lock that nobody would ever release, and hung it at its first own one.
        """
        if self._listener is not None or time.monotonic() < self._next_try:
            return
        try:
            self._listener = self._bind()
        except OSError as exc:
            if self._next_try < 0:
                log.error("the metrics can't listen on %s port %s yet: %s", *self._address, exc.strerror or exc)  # noqa: TRY400
            self._next_try = time.monotonic() + AGAIN
            return
        host, port = self._listener.getsockname()[:2]
        log.info("metrics", extra={"host": host, "port": port})
        threading.Thread(target=self._run, args=(self._listener,), name="metrics", daemon=True).start()

    def _let_go(self) -> None:
        for each in (self._listener, self._client):
            if each is not None:
                each.close()

    def _run(self, listener: socket.socket) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # signals are the main thread's
        while True:
            try:
                self._client, _ = listener.accept()
            except OSError:  # no file descriptor to be had, for one
                time.sleep(0.1)
                continue
            try:
                with self._client as client:
                    self._serve(client)
            except OSError:
                pass  # it left, or was too slow
            except Exception:
                log.exception("the metrics could not be given out")

    def _bind(self) -> socket.socket:
        """Raises the last OSError when none of the name's addresses can be had."""
        trouble = OSError("it has no address")
        for family, kind, _, _, address in socket.getaddrinfo(*self._address, type=socket.SOCK_STREAM):
            listener = socket.socket(family, kind)
            try:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(address)
                listener.listen(16)
            except OSError as exc:
                listener.close()
                trouble = exc
            else:
                return listener
        raise trouble

    def _serve(self, client: socket.socket) -> None:
        if _asks_for_metrics(client):
            answer = _response("200 OK", CONTENT_TYPE_PLAIN_0_0_4, self._page())
        else:
            answer = _response("404 Not Found", "text/plain", b"There is only GET /metrics.\n")
        client.settimeout(PATIENCE)
        client.sendall(answer)
        client.shutdown(socket.SHUT_RDWR)  # a fork just now may have copied the socket


def _asks_for_metrics(client: socket.socket) -> bool:
    """Read a request's head. Raises OSError when that takes too long."""
    deadline = time.monotonic() + PATIENCE
    head = b""
    while b"\r\n\r\n" not in head and len(head) < MAX_REQUEST:
        client.settimeout(max(0.001, deadline - time.monotonic()))
        data = client.recv(4096)
        if not data:
            break
        head += data
    method, _, target = head.partition(b"\r\n")[0].partition(b" ")
    return method == b"GET" and target.partition(b" ")[0].partition(b"?")[0] == b"/metrics"


def _response(status: str, content_type: str, body: bytes) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n"
        "x-content-type-options: nosniff\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body
