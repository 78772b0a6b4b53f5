"""Logs: write one flat JSON object per line to stdout, for the gateway, uvicorn, gunicorn and asyncio alike.

Lines go into a bounded buffer that one daemon thread empties. A blocked reader or a full disk costs lines, which are
counted and reported when there is space again. It never stops the gateway. With a handler that writes directly, a
blocked pipe froze the event loop, and SIGTERM had no effect.
"""

import atexit
import fcntl
import logging
import mmap
import os
import sys
import tempfile
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import IO, Any

import orjson
from pythonjsonlogger.orjson import OrjsonFormatter

from gateway.errors import Level

MAX_BACKLOG = 4 * 1024 * 1024  # bytes that may wait for a slow reader
ATOMIC = 4096  # bytes; PIPE_BUF of Linux: a pipe takes a write up to this size as a whole or not at all
MOST = 16 * ATOMIC  # bytes in one write: the capacity of a pipe of Linux
BATCH = 0.005  # seconds; lines of this time are written together


class Sink:
    """Write to one file descriptor, as its only writer. Any thread may call `write`. Lines stay whole and in order."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._turn: IO[bytes] | None = None
        self._torn = mmap.mmap(-1, 1)  # whether a write of any process ended in the middle of a line
        self._reset()
        os.register_at_fork(after_in_child=self._reset)
        atexit.register(self.flush)

    def share(self) -> None:
        """Take turns from now on with every process that is forked from this one, because a pipe would mix writes that
        are longer than ATOMIC."""
        self._turn = tempfile.TemporaryFile()  # noqa: SIM115  open as long as the process

    def _reset(self) -> None:  # a thread and its locks do not survive a fork
        self._lines: deque[bytes] = deque()
        self._taken_in = self._written = 0  # bytes
        # Lines that `write` dropped; that the thread dropped; that were reported
        self._refused = self._failed = self._told = 0
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self.on_drop: Callable[[], object] | None = None

    def write(self, line: bytes) -> None:
        """Queue one line, newline included. If the backlog is full, drop and count it."""
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
        """Write the data; return whether that was possible. It is not if the reader is gone or the disk is full."""
        if self._turn is not None:
            fcntl.lockf(self._turn, fcntl.LOCK_EX)  # the kernel releases the lock when its holder dies
        torn = self._torn[0]
        data = b"\n" * torn + data
        size = len(data)
        self._torn[0] = torn or size > ATOMIC  # in case the process is killed during the write
        try:
            while data:
                try:
                    data = data[os.write(self._fd, data) :]
                except BlockingIOError:  # another program has made the pipe non-blocking
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
_LEVELS: dict[Level, int] = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def event(name: str, fields: dict[str, Any], level: Level = "info") -> None:
    """Write a line for one of the gateway's own events: `msg` is the event's name. It costs about 3 µs. docs/logs.md
    lists the events and their levels."""
    number, least = _LEVELS[level], _least.get(name)
    if _events.isEnabledFor(number) if least is None else number >= least:
        _sink.write(_line(name, level, fields))


def content(name: str, fields: dict[str, Any]) -> None:
    """Write a prompt or an output, at DEBUG. The caller has checked STACK_LOG_CONTENT."""
    if _events.isEnabledFor(logging.DEBUG):
        _sink.write(_line(name, "debug", fields))


def sampled(request_id: str) -> bool:
    """Return whether the lines of this request are written if it succeeds. The result is the same for all its lines."""
    return _sample.share >= 1.0 or zlib.crc32(request_id.encode()) < _sample.share * 2**32


@dataclass
class _Sample:
    share: float = 1.0  # of requests without a failure


_events = logging.getLogger("stack")
_least: dict[str, int] = {}  # the level of an event, if it is not that of all
_levels: dict[str, int] = {}  # of loggers
_sample = _Sample()


def _line(name: str, level: str, fields: dict[str, Any]) -> bytes:
    return orjson.dumps({"ts": time.time_ns() // 1_000_000, "level": level, "msg": name} | fields, default=str) + b"\n"


_OWN = ("stack", "gunicorn.error", "uvicorn.error")
_RESERVED = [*logging.makeLogRecord({}).__dict__, "message", "asctime", "color_message"]


class _Formatter(OrjsonFormatter):
    """Format the records of other libraries in the same form."""

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


def configure(level: str, levels: Mapping[str, str] = MappingProxyType({}), share: float = 1.0) -> None:
    """Send every logger of the process through the sink. Called before gunicorn or uvicorn make their own handlers.

    `levels` are by the names of events and loggers, and come before `level`. A logger that is not in _OWN is at WARNING
    at least, because some libraries write headers and bodies below that. `share` of the requests without a failure
    have their lines: 0 to 1.
    """
    _sink.share()
    handler = _Handler()
    handler.setFormatter(_Formatter())
    logging.root.handlers = [handler]
    logging.root.setLevel(logging.WARNING)
    numbers = logging.getLevelNamesMapping()
    _levels.update(dict.fromkeys(_OWN, numbers[level]))
    for name, its in levels.items():
        _least[name] = numbers[its]
        _levels[name] = numbers[its] if name in _OWN else max(numbers[its], logging.WARNING)
    restore_levels()
    _sample.share = share
    logging.captureWarnings(True)
    sys.unraisablehook = _unraisable


def _unraisable(it: "sys.UnraisableHookArgs") -> None:
    """Log what was raised where nobody can catch it, such as in a finalizer. A worker's exit may be (master)."""
    if not isinstance(it.exc_value, SystemExit):
        logging.getLogger("stack").error(it.err_msg or "an exception was ignored", exc_info=it.exc_value)


def restore_levels() -> None:
    """Set the loggers' levels as they were configured: a library may have set them anew."""
    for name, level in _levels.items():
        logging.getLogger(name).setLevel(level)


def flush() -> None:
    """Write out what is queued, within two seconds."""
    _sink.flush()


def on_drop(call: Callable[[], object]) -> None:
    """Call `call` for each line that this process drops, from the thread that wrote it."""
    _sink.on_drop = call
