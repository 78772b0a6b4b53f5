"""Scrape: serve `GET /metrics` on a port of its own, and own the files in which the workers count.

The files are prometheus-client's multiprocess mode, by a worker's seat and not by its pid. With pids, 200 SIGKILLs left
325 files and a scrape of 88 ms. With seats, a successor continues in its predecessor's files: 12 files, 8 ms.

One thread of gunicorn's master serves the port. The master is the one process that outlives every worker and answers
during a drain, and it takes no time of a worker's event loop. A fork copies only the forking thread, and the child
closes the two sockets of this one.
"""

import encodings.idna  # noqa: F401  imported before any fork: see Port.open
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from prometheus_client import Metric, values
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

log = logging.getLogger("stack")

RESERVE = 256 * 1024  # bytes of each file; a series of kind and model takes some 15 kB of the largest
PATIENCE = 2.0  # seconds for a scraper to send its request, and to take its answer
MAX_REQUEST = 8192  # bytes
AGAIN = 5.0  # seconds between attempts to get the port


class Board:
    """Own the directory in which all workers count. The master makes it before it forks."""

    def __init__(self, facts: Callable[[], Iterable[Metric]] = tuple) -> None:
        """`facts` are told beside what the workers count."""
        self._facts = facts
        # A fresh one per start; in a container /tmp is a tmpfs.
        self._directory = Path(tempfile.mkdtemp(prefix="stack-metrics-"))

    # -- in the master ------------------------------------------------------------------------------------------------

    def reserve(self, seat: int) -> bool:
        """Make the seat's files for the worker that is about to be forked. Returns False if there is no space for them.

        The files get their whole size first, and their names after that. prometheus-client cannot read an empty file:
        one that a worker left when it was killed between opening it and giving it a size, or one that is being made
        during a scrape. A write into a file without space on the disk would kill the writer (SIGBUS).
        """
        try:
            self.vacate(seat)
            for kind in ("counter", "histogram", "gauge_livesum", "gauge_livemax"):
                file = self._directory / f"{kind}_{seat}.db"
                if not _holds_anything(file):
                    whole = file.with_suffix(".new")
                    whole.write_bytes(bytes(RESERVE))
                    whole.replace(file)
        except OSError as exc:
            log.error("there is no space for metrics, so a worker runs without them: %s", exc)  # noqa: TRY400
            return False
        return True

    def vacate(self, seat: int) -> None:
        """Remove the gauges of a seat whose worker is gone. Its counts stay."""
        mark_process_dead(seat, self._directory)  # type: ignore[no-untyped-call]

    def page(self) -> bytes:
        """Return everything that was counted so far, in Prometheus's text format."""
        return generate_latest(self)

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics for prometheus-client. Empty files are left out, see `reserve`."""
        files = [str(file) for file in self._directory.glob("*.db") if _holds_anything(file)]
        yield from MultiProcessCollector.merge(files)  # type: ignore[no-untyped-call]
        yield from self._facts()

    def remove(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)

    # -- in the worker ------------------------------------------------------------------------------------------------

    def take(self, seat: int | None) -> None:
        """Put this process's metrics into the seat's files. Without a seat they stay in memory, where nothing reads
        them. Call it before any metric exists."""
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(self._directory)
        if seat is None:
            values.ValueClass = values.MutexValue
        else:
            values.ValueClass = _quick(values.MultiProcessValue(lambda: seat))  # type: ignore[no-untyped-call]


def _quick(library: Any) -> type:
    """Return prometheus-client's class of values without its look for a fork at each addition, because a worker takes
    its seat after the fork. README.md has the figures."""
    lock = threading.Lock()

    class Value(library):  # type: ignore[misc]
        _value: float

        def inc(self, amount: float) -> None:
            with lock:
                self._value = value = self._value + amount
                self._file.write_value(self._key, value, 0.0)

    return Value


def _holds_anything(file: Path) -> bool:
    try:
        return file.stat().st_size > 0
    except FileNotFoundError:  # its worker has just died
        return False


class Port:
    """Answer GET /metrics with `page()`, and everything else with 404. It serves one scraper at a time."""

    def __init__(self, host: str, port: int, page: Callable[[], bytes]) -> None:
        self._address = host, port
        self._page = page
        self._listener: socket.socket | None = None
        self._client: socket.socket | None = None
        self._next_try = float("-inf")
        os.register_at_fork(after_in_child=self._let_go)

    def open(self) -> None:
        """Serve until the process ends. If the port is not available yet, call again: an attempt is made at most every
        AGAIN seconds.

        Only the thread that forks the workers may call this. A fork during a name lookup in another thread left a
        worker with a lock that was never released, and the worker's first own lookup hung.
        """
        if self._listener is not None or time.monotonic() < self._next_try:
            return
        try:
            self._listener = self._bind()
        except OSError as exc:
            if self._next_try < 0:
                log.error("/metrics cannot listen on %s port %s yet: %s", *self._address, exc.strerror or exc)  # noqa: TRY400
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
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # the main thread handles signals
        while True:
            try:
                self._client, _ = listener.accept()
            except OSError:  # for example, no file descriptor is left
                time.sleep(0.1)
                continue
            try:
                with self._client as client, _shut(client):
                    self._serve(client)
            except OSError:
                pass  # the scraper disconnected, or was too slow

    def _bind(self) -> socket.socket:
        """Bind to the first available address of the name, and return the socket. Raises the last OSError if there is
        none."""
        trouble = OSError("the name has no address")
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
            answer = self._answer()
        else:
            answer = _response("404 Not Found", "text/plain", b"There is only GET /metrics.\n")
        client.settimeout(PATIENCE)
        client.sendall(answer)

    def _answer(self) -> bytes:
        try:
            return _response("200 OK", CONTENT_TYPE_PLAIN_0_0_4, self._page())
        except Exception:
            log.exception("/metrics could not be answered")
            return _response("500 Internal Server Error", "text/plain", b"The metrics can't be read: see the log.\n")


@contextmanager
def _shut(client: socket.socket) -> Iterator[None]:
    """Shut the connection at the end of the block, even if a fork has just copied the socket and so would
    keep it open."""
    try:
        yield
    finally:
        with suppress(OSError):  # the client has ended the connection
            client.shutdown(socket.SHUT_RDWR)


def _asks_for_metrics(client: socket.socket) -> bool:
    """Read a request's head and return whether it asks for the metrics. Raises OSError if that takes too long."""
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
