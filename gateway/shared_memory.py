"""Shared memory: own what the workers of one gateway share: memory, the lock over it, and their seats.

gunicorn's master makes it before it forks. The memory outlives any worker and ends with the master. Data that must last
longer is in the store.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

MAX_SEATS = 256  # workers alive at a time: those of STACK_WORKERS, and old ones that finish their answers
PATIENCE = 0.25  # seconds to wait for the lock, which is held for microseconds
_PAUSE = 0.00005  # seconds between two looks at a lock that is held
_MUTEX_SIZE = 64  # bytes, which hold a pthread_mutex_t or its attributes on every architecture
_PROCESS_SHARED = _ROBUST = 1  # PTHREAD_PROCESS_SHARED, PTHREAD_MUTEX_ROBUST

_threads = ctypes.PyDLL(None)  # the C library; no call here waits
_trylock, _unlock = _threads.pthread_mutex_trylock, _threads.pthread_mutex_unlock


class BusyError(Exception):
    """Say that the lock could not be taken in time, because its holder was stopped or the machine stands still."""


class Lock:
    """Exclude all other processes that were forked from here. It is a robust mutex of POSIX threads, which the
    kernel opens when its holder dies. Taking and releasing it needs no system call. `with lock:` raises BusyError
    after PATIENCE seconds, because a stopped holder would otherwise stop every event loop.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _MUTEX_SIZE)
        self._mutex = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(self._memory)))
        attributes = (ctypes.c_char * _MUTEX_SIZE)()
        _threads.pthread_mutexattr_init(attributes)
        _threads.pthread_mutexattr_setpshared(attributes, _PROCESS_SHARED)
        if hasattr(_threads, "pthread_mutexattr_setrobust"):  # macOS lacks it, and `make dev` works without it
            _threads.pthread_mutexattr_setrobust(attributes, _ROBUST)
        if code := _threads.pthread_mutex_init(self._mutex, attributes):
            raise OSError(code, os.strerror(code))

    def __enter__(self) -> None:
        code = _trylock(self._mutex)
        if code == errno.EBUSY:
            code = self._wait()
        if code == errno.EOWNERDEAD:
            _threads.pthread_mutex_consistent(self._mutex)
        elif code:
            raise OSError(code, os.strerror(code))

    def _wait(self) -> Any:
        deadline = time.monotonic() + PATIENCE
        while (code := _trylock(self._mutex)) == errno.EBUSY:
            if time.monotonic() >= deadline:
                raise BusyError("Another process holds the lock over the workers' shared memory for too long.")
            time.sleep(_PAUSE)
        return code

    def __exit__(self, *_: object) -> None:
        _unlock(self._mutex)


class Region:
    """Hold some bytes of memory, zero at first, that every process forked from here sees, and one lock over them.

    A holder of the lock may be killed between any two writes. Each change must therefore be one write, or an incomplete
    change must be recognisable and repairable.
    """

    def __init__(self, size: int) -> None:
        self.memory = mmap.mmap(-1, size)
        self.lock = Lock()


class Flag:
    """Hold one bit that the master sets and every worker reads."""

    def __init__(self) -> None:
        self._byte = mmap.mmap(-1, 1)

    def set(self) -> None:
        self._byte[0] = 1

    def __bool__(self) -> bool:
        return self._byte[0] == 1


class Kept(NamedTuple):
    """Data, its number, and when it was last true (time.monotonic())."""

    data: bytes
    number: int
    at: float


class Keepsake:
    """Keep the newest data that a worker has read, for a worker that starts while the source is unreachable. It is one
    line, and a further line for each change of it. Each state has a number.

    Raises OSError if the file cannot be written, for example on a full disk. Nothing is kept then.
    """

    HEAD = struct.Struct("<dqqq")  # since when it is true, its number, its size in bytes, and that of the first line
    ROOM = 1 << 20  # bytes of changes that are kept, at least

    def __init__(self, directory: Path) -> None:
        self._file = directory / "keepsake"
        self._lock = directory / "keepsake.lock"
        self._seen = memoryview(mmap.mmap(-1, 8)).cast("d")

    def keep(self, data: bytes, number: int, since: float) -> None:
        """Keep one line of data that was true from the moment `since` on (time.monotonic()). Newer data of another
        worker stays."""
        with self._locked():
            head = self._head()
            if head is None or head[0] <= since:
                new = self._file.with_suffix(".new")
                new.write_bytes(self.HEAD.pack(since, number, len(data), len(data)) + data)
                new.replace(self._file)

    def add(self, line: bytes, before: int, number: int, since: float) -> bool:
        """Keep one more line, by which a state after `before` becomes the state `number`. Returns whether the file
        is at that state now, or at a later one. If not, the file is removed, and everything has to be kept anew."""
        with self._locked():
            head = self._head()
            if head is None:
                return False
            at, there, size, first = head
            if at > since or there == number:
                return True
            if not before <= there < number or size + len(line) > 2 * first + self.ROOM:
                self._file.unlink()  # the old data is no longer true
                return False
            with self._file.open("r+b") as file:
                file.seek(self.HEAD.size + size)
                file.write(b"\n" + line)
                file.flush()  # before the head: a worker that is killed in between leaves the file as it was
                file.seek(0)
                file.write(self.HEAD.pack(since, number, size + 1 + len(line), first))
            return True

    def still_true(self, moment: float) -> None:
        """Note that the kept data was true at that moment, by time.monotonic()."""
        self._seen[0] = max(self._seen[0], moment)

    def look(self, after: int) -> Kept | None:
        """Return the kept lines; None if there are none, or if their number is not above `after`."""
        try:
            with self._file.open("rb") as file:
                since, number, size, _ = self.HEAD.unpack(file.read(self.HEAD.size))
                return Kept(file.read(size), number, max(since, self._seen[0])) if number > after else None
        except (FileNotFoundError, struct.error):
            return None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            with self._lock.open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
        except OSError:
            self._file.unlink(missing_ok=True)  # the old data is no longer true
            raise

    def _head(self) -> tuple[float, int, int, int] | None:
        try:
            with self._file.open("rb") as file:
                since, number, size, first = self.HEAD.unpack(file.read(self.HEAD.size))
        except (FileNotFoundError, struct.error):
            return None
        return since, number, size, first


class Shared:
    """Hold everything that the workers of one gateway share, and the seat of this process.

    `seat` is the worker's number, from 0 and below MAX_SEATS. No two living workers have the same. In the master it is
    -1. `answers` is the directory of api/idempotency. `keys` keeps the last keys that were read from the store.
    `sockets` is the directory of the sockets by which workers wake each other.
    """

    def __init__(self, data: Path) -> None:
        """`data` is the gateway's data directory, for what another start of it goes on with."""
        self.draining = Flag()
        self.seat = -1
        # A new directory for each start. In a container it is in memory (tmpfs) and ends with the container.
        self._directory = Path(tempfile.mkdtemp(prefix="stack-"))
        self._answers: int | None = None
        self.answers = self._open_answers(data / "answers")
        self.sockets = self._directory / "sockets"
        self.sockets.mkdir(mode=0o700)
        self.keys = Keepsake(self._directory)

    def _open_answers(self, directory: Path) -> Path:
        """Make the directory of answers. If there can be none in the data directory, they end with this start."""
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory.chmod(0o700)
            self._answers = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._answers, fcntl.LOCK_SH)  # by each gateway that has it
        except OSError:
            directory = self._directory / "answers"
            directory.mkdir(mode=0o700)
        return directory

    def remove(self) -> None:
        """Remove the shared files when the gateway ends. Called in the master. The answers of a gateway that is killed
        stay for its next start."""
        shutil.rmtree(self._directory, ignore_errors=True)
        if self._answers is not None:
            with suppress(OSError):
                fcntl.flock(self._answers, fcntl.LOCK_EX | fcntl.LOCK_NB)  # no other gateway has them
                shutil.rmtree(self.answers, ignore_errors=True)
            os.close(self._answers)
