"""Export: hand spans to a collector, by OTLP over HTTP, from a thread of its own.

Nobody waits for the collector. Spans that it has not taken are kept up to MAX_BACKLOG; further ones are dropped and
counted.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from urllib.parse import urlsplit

from gateway import logs
from gateway.traces import otlp

MAX_BACKLOG = 4 * 1024 * 1024  # bytes of spans that may wait for the collector
BATCH = 256 * 1024  # bytes of spans in one request, roughly
EVERY = 1.0  # seconds; spans of that long go out together
TIMEOUT = 10.0  # seconds for each step of a request
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # seconds before a batch is sent again; after the last one it is lost
MAX_ANSWER = 4096  # bytes of the collector's answer that are read
TELL = 60.0  # seconds between log lines about lost spans
PARTING = 2.0  # seconds that the last spans of a worker may take
_AGAIN = frozenset({429, 502, 503, 504})  # OTLP: the collector may take the same batch later


class Exporter:
    """One worker's. Any thread may call `add`. `close` it at the end."""

    def __init__(
        self,
        endpoint: str,
        headers: Mapping[str, str],
        resource: Mapping[str, str],
        version: str,
        dropped: Callable[[int], object],
    ) -> None:
        """`endpoint` is the collector's base URL. `dropped` is called with each number of spans that are lost."""
        url = urlsplit(endpoint)
        kind = HTTPSConnection if url.scheme == "https" else HTTPConnection
        self._connect = partial(kind, url.hostname or "", url.port, timeout=TIMEOUT)
        self._path = url.path.rstrip("/") + "/v1/traces"
        self._headers = {**headers, "content-type": "application/x-protobuf", "user-agent": f"stack/{version}"}
        self._write = partial(otlp.request, resource, "stack", version)
        self._dropped = dropped
        self._spans: deque[bytes] = deque()
        self._taken_in = self._gone = 0  # bytes
        self._refused = self._failed = self._told = 0  # spans: lost by `add`, by the thread; reported
        self._tell_at = 0.0
        self._trouble = ""  # of the batch that is being sent
        self._reason = ""  # why spans were lost last
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, span: bytes) -> None:
        """Queue one span of otlp.span. Lose it if too many wait."""
        if self._taken_in - self._gone + len(span) > MAX_BACKLOG:
            self._reason = self._trouble or "too many spans wait for the collector"
            self._refused += 1
            self._dropped(1)
            return
        self._taken_in += len(span)
        self._spans.append(span)
        if not self._wake.is_set():
            self._wake.set()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="traces", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Hand over what waits. What takes longer than PARTING seconds is lost."""
        self._closing.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(PARTING)

    def _run(self) -> None:
        while not self._closing.is_set():
            self._wake.wait()
            self._closing.wait(EVERY)
            self._wake.clear()
            while self._spans:
                self._hand_over()
                self._tell()

    def _hand_over(self) -> None:
        """Send one batch, more than once if need be."""
        batch: list[bytes] = []
        size = 0
        while self._spans and size < BATCH:
            batch.append(self._spans.popleft())
            size += len(batch[-1])
        body = self._write(batch)
        for pause in (*PAUSES, None):
            status, answer = self._post(body)
            if status is not None and status // 100 == HTTPStatus.OK // 100:
                self._trouble = ""
                if rejected := min(len(batch), otlp.rejected(answer)):
                    self._lose(rejected, "the collector rejected them")
                break
            self._trouble = f"the collector answered {status}" if status else "the collector is unreachable"
            if pause is None or (status and status not in _AGAIN) or self._closing.wait(pause):
                self._lose(len(batch), self._trouble)
                break
        self._gone += size

    def _lose(self, count: int, reason: str) -> None:
        """Count spans that the collector will not get."""
        self._reason = reason
        self._failed += count
        self._dropped(count)

    def _post(self, body: bytes) -> tuple[int | None, bytes]:
        """Return the status of the collector's answer (None: there was none), and the beginning of its body."""
        status: int | None = None
        try:
            with closing(self._connect()) as connection:
                connection.request("POST", self._path, body, self._headers)
                answer = connection.getresponse()
                status = answer.status
                return status, answer.read(MAX_ANSWER)
        except (OSError, HTTPException, ValueError):  # a host name that cannot be looked up is a ValueError
            return status, b""

    def _tell(self) -> None:
        lost, now = self._refused + self._failed - self._told, time.monotonic()
        if lost and (now >= self._tell_at or self._closing.is_set()):
            logs.event("spans_dropped", {"count": lost, "reason": self._reason}, "warning")
            self._told += lost
            self._tell_at = now + TELL
