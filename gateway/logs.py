"""Logs: one flat JSON object per line on stdout; ours, uvicorn's, gunicorn's and asyncio's alike.

Lines go into a bounded buffer that one daemon thread empties. A reader that stalls, or a full disk, costs lines, which
are counted and reported once there is room again; it never stalls the gateway (with a handler that writes directly, a
blocked pipe froze the event loop and SIGTERM had no effect).
"""

import atexit
import fcntl
import logging
import mmap
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import IO, Any

import orjson
from pythonjsonlogger.orjson import OrjsonFormatter

MAX_BACKLOG = 4 * 1024 * 1024  # bytes that may wait for a slow reader
ATOMIC = 4096  # bytes; POSIX PIPE_BUF on Linux: a write up to this size is done as a whole or not at all
MOST = 16 * ATOMIC  # bytes in one write; what a pipe of Linux holds
BATCH = 0.005  # seconds; lines of that long go out together


class Sink:
    """The only writer of a file descriptor. Any thread may call `write`; whole lines only, in order."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._turn: IO[bytes] | None = None
        self._torn = mmap.mmap(-1, 1)  # whether a write ended in the midst of a line, whichever process's it was
        self._reset()
        os.register_at_fork(after_in_child=self._reset)
        atexit.register(self.flush)

    def share(self) -> None:
        """From now on take turns with every process that is forked from this one: a pipe would mix writes that are
        longer than ATOMIC."""
        self._turn = tempfile.TemporaryFile()  # noqa: SIM115  open as long as the process

    def _reset(self) -> None:  # a thread and its locks don't survive a fork
        self._lines: deque[bytes] = deque()
        self._taken_in = self._written = 0  # bytes
        self._refused = self._failed = self._told = 0  # lines: dropped by `write`, by the thread; reported
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self.on_drop: Callable[[], object] | None = None

    def write(self, line: bytes) -> None:
        """Queue one line, newline included; drop and count it when the backlog is full."""
        if self._taken_in - self._written > MAX_BACKLOG:
            self._refused += 1
            if self.on_drop is not None:
                self.on_drop()
            return
        self._taken_in += len(line)
        self._lines.append(line)
        if not self._wake.is_set():
            self._wake.set()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="logs", daemon=True)
                self._thread.start()

    def flush(self, timeout: float = 2.0) -> None:
        """Wait until everything queued is written, at most `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while self._written < self._taken_in and time.monotonic() < deadline:
            time.sleep(BATCH)

    def _run(self) -> None:
        while True:
            self._wake.wait()
            time.sleep(BATCH)
            self._wake.clear()
            while self._lines:
                dropped = self._refused + self._failed - self._told
                if dropped and self._put(_line("log_lines_dropped", "warning", {"count": dropped})):
                    self._told += dropped
                batch = [self._lines.popleft()]
                size = len(batch[0])
                while self._lines and size + len(self._lines[0]) <= MOST:
                    batch.append(self._lines.popleft())
                    size += len(batch[-1])
                if not self._put(b"".join(batch)):
                    self._failed += len(batch)
                    if self.on_drop is not None:
                        for _ in batch:
                            self.on_drop()
                self._written += size

    def _put(self, data: bytes) -> bool:
        """Whether it could be written: not when the reader is gone, or the disk full."""
        if self._turn is not None:
            fcntl.lockf(self._turn, fcntl.LOCK_EX)  # the kernel lets go of it when its holder dies
        torn = self._torn[0]
        data = b"\n" * torn + data
        size = len(data)
        self._torn[0] = torn or size > ATOMIC  # if it is killed now
        try:
            while data:
                try:
                    data = data[os.write(self._fd, data) :]
                except BlockingIOError:  # somebody made the pipe non-blocking
                    time.sleep(BATCH)
        except OSError:
            self._torn[0] = torn or len(data) < size
        else:
            self._torn[0] = False
        finally:
            if self._turn is not None:
                fcntl.lockf(self._turn, fcntl.LOCK_UN)
        return not data


_sink = Sink(1)


def event(name: str, fields: dict[str, Any]) -> None:
    """Write one line of our own at INFO: `msg` is the event's name. Costs some 3 µs."""
    if _events.isEnabledFor(logging.INFO):
        _sink.write(_line(name, "info", fields))


def content(name: str, fields: dict[str, Any]) -> None:
    """Write prompts or outputs, at DEBUG. The caller has checked STACK_LOG_CONTENT."""
    if _events.isEnabledFor(logging.DEBUG):
        _sink.write(_line(name, "debug", fields))


_events = logging.getLogger("stack")


def _line(name: str, level: str, fields: dict[str, Any]) -> bytes:
    return orjson.dumps({"ts": time.time_ns() // 1_000_000, "level": level, "msg": name} | fields, default=str) + b"\n"


_RESERVED = [*logging.makeLogRecord({}).__dict__, "message", "asctime", "color_message"]


class _Formatter(OrjsonFormatter):
    """Everybody else's records, in the same form."""

    def __init__(self) -> None:
        super().__init__([], rename_fields={"exc_info": "error"}, reserved_attrs=_RESERVED)

    def add_fields(self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]) -> None:
        log_data |= {
            "ts": int(record.created * 1000),
            "level": record.levelname.lower(),
            "msg": record.getMessage().strip(),
            "logger": record.name,
        }
        super().add_fields(log_data, record, message_dict)


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _sink.write(self.format(record).encode() + b"\n")


def configure(level: str) -> None:
    """Send every logger of the process through the sink. Called before gunicorn or uvicorn make their own handlers."""
    _sink.share()
    handler = _Handler()
    handler.setFormatter(_Formatter())
    logging.root.handlers = [handler]
    logging.root.setLevel(logging.WARNING)
    for name in ("stack", "gunicorn.error", "uvicorn.error"):
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(True)


def flush() -> None:
    """Write out what is queued, within two seconds."""
    _sink.flush()


def on_drop(call: Callable[[], object]) -> None:
    """Have `call` called for each line this process drops, from whichever thread wrote it."""
    _sink.on_drop = call
