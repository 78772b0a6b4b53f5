"""Shared: what the workers of one gateway have in common: memory that all of them see, the lock over it, their slots.

gunicorn's master makes it before it forks. What is kept here outlives any worker and ends with the master: what must
last is the store's.
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
from pathlib import Path
from typing import Any

MAX_SLOTS = 256  # workers alive at a time: those of STACK_WORKERS, and old ones that still finish their answers
PATIENCE = 0.25  # seconds to wait for the lock; a section is held for microseconds
_PAUSE = 0.00005  # seconds between two looks at a lock that is held
_MUTEX_SIZE = 64  # bytes, which hold a pthread_mutex_t or its attributes on every architecture
_PROCESS_SHARED = _ROBUST = 1  # PTHREAD_PROCESS_SHARED, PTHREAD_MUTEX_ROBUST

_threads = ctypes.PyDLL(None)  # the C library's; nothing that is called here waits
_trylock, _unlock = _threads.pthread_mutex_trylock, _threads.pthread_mutex_unlock


class BusyError(Exception):
    """The lock could not be had in time: its holder was stopped, or the machine stands still."""


class Lock:
    """A lock of all processes forked from here, which the kernel opens when its holder dies: a robust mutex of POSIX
    threads. Taking and giving back needs no call of the kernel. `with lock:` raises BusyError after PATIENCE seconds;
    a stopped holder would stop every event loop else.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _MUTEX_SIZE)
        self._mutex = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(self._memory)))
        attributes = (ctypes.c_char * _MUTEX_SIZE)()
        _threads.pthread_mutexattr_init(attributes)
        _threads.pthread_mutexattr_setpshared(attributes, _PROCESS_SHARED)
        if hasattr(_threads, "pthread_mutexattr_setrobust"):  # macOS, for `make dev`, does without
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
                raise BusyError("The lock over the workers' shared memory is held for too long.")
            time.sleep(_PAUSE)
        return code

    def __exit__(self, *_: object) -> None:
        _unlock(self._mutex)


class Region:
    """Some bytes of memory, zero at first, that every process forked from here sees; and one lock over them.

    A holder of the lock may be killed between any two writes: whoever keeps records here has to make each change one
    write, or to be able to tell and mend one that was cut short.
    """

    def __init__(self, size: int) -> None:
        self.memory = mmap.mmap(-1, size)
        self.lock = Lock()


class Flag:
    """One bit that the master sets and every worker reads."""

    def __init__(self) -> None:
        self._byte = mmap.mmap(-1, 1)

    def set(self) -> None:
        self._byte[0] = 1

    def __bool__(self) -> bool:
        return self._byte[0] == 1


class Keepsake:
    """The newest of what workers read somewhere: for one that starts while there is nothing to be read.

    Raises OSError where there is no room, or the like; nothing is kept then.
    """

    def __init__(self, directory: Path) -> None:
        self._file = directory / "keepsake"
        self._lock = directory / "keepsake.lock"
        self._seen = memoryview(mmap.mmap(-1, 8)).cast("d")

    def keep(self, data: bytes, since: float) -> None:
        """What was read from that moment on, by time.monotonic(). What another worker read later stays."""
        try:
            with self._lock.open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                found = self._read()
                if found is None or found[0] <= since:
                    new = self._file.with_suffix(".new")
                    new.write_bytes(struct.pack("<d", since) + data)
                    new.replace(self._file)
        except OSError:
            self._file.unlink(missing_ok=True)  # it is no longer true
            raise

    def still_true(self, moment: float) -> None:
        """It was at that moment, by time.monotonic()."""
        self._seen[0] = max(self._seen[0], moment)

    def look(self) -> tuple[bytes, float] | None:
        """What is kept, and when it was last true; None if nothing is."""
        found = self._read()
        return None if found is None else (found[1], max(found[0], self._seen[0]))

    def _read(self) -> tuple[float, bytes] | None:
        try:
            found = self._file.read_bytes()
        except FileNotFoundError:
            return None
        return struct.unpack_from("<d", found)[0], found[8:]


class Shared:
    """Everything that the workers of one gateway share, and which of them this process is.

    `slot` is the worker's number, from 0, below MAX_SLOTS: no two that live have the same. In the master it is -1.
    `answers` is for the files of idempotency.py; of the store's `keys` the last that was read is kept; in `sockets` are
    those by which the workers wake each other.
    """

    def __init__(self) -> None:
        self.draining = Flag()
        self.slot = -1
        # Of this start: in a container it is in memory (tmpfs), and nothing of it outlives the container.
        self._directory = Path(tempfile.mkdtemp(prefix="stack-"))
        self.answers = self._directory / "answers"
        self.answers.mkdir(mode=0o700)
        self.sockets = self._directory / "sockets"
        self.sockets.mkdir(mode=0o700)
        self.keys = Keepsake(self._directory)

    def remove(self) -> None:
        """The gateway ends. Called in the master."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def vacate(self, slot: int) -> None:
        """The slot's worker is gone: what it held is given back. In the master, before the slot is used again."""
