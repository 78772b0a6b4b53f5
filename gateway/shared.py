"""Shared: what the workers of one gateway have in common: memory that all of them see, the lock over it, their slots.

gunicorn's master makes it before it forks. What is kept here outlives any worker and ends with the master: what must
last is the store's.
"""

import fcntl
import mmap
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MAX_SLOTS = 256  # workers alive at a time: those of STACK_WORKERS, and old ones that still finish their answers
PATIENCE = 0.25  # seconds to wait for the lock; a section is held for microseconds
_PAUSE = 0.00005  # seconds between two looks at a lock that is held


class BusyError(Exception):
    """The lock could not be had in time: its holder was stopped, or the machine stands still."""


class Region:
    """Some bytes of memory, zero at first, that every process forked from here sees; and one lock over them.

    The lock is a POSIX record lock: the kernel lets go of it when its holder dies. It is one per process, so only the
    thread of the event loop may take it. A holder may be killed between any two writes: whoever keeps records here
    has to make each change one write, or to be able to tell and mend one that was cut short.
    """

    def __init__(self, size: int) -> None:
        self.memory = mmap.mmap(-1, size)
        self._file = tempfile.TemporaryFile(prefix="stack-lock-")  # noqa: SIM115  open as long as the process

    def close(self) -> None:
        """Nobody may lock it any more."""
        self._file.close()

    @contextmanager
    def locked(self, patience: float = PATIENCE) -> Iterator[mmap.mmap]:
        """Hold the lock. Raises BusyError after `patience` seconds; a stopped holder would stop every loop else."""
        descriptor = self._file.fileno()
        deadline = 0.0
        while True:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, as POSIX leaves open
                now = time.monotonic()
                deadline = deadline or now + patience
                if now >= deadline:
                    raise BusyError("The lock over the workers' shared memory is held for too long.") from None
                time.sleep(_PAUSE)
        try:
            yield self.memory
        finally:
            fcntl.lockf(descriptor, fcntl.LOCK_UN)


class Flag:
    """One bit that the master sets and every worker reads."""

    def __init__(self) -> None:
        self._byte = mmap.mmap(-1, 1)

    def set(self) -> None:
        self._byte[0] = 1

    def __bool__(self) -> bool:
        return self._byte[0] == 1


class Shared:
    """Everything that the workers of one gateway share, and which of them this process is.

    `slot` is the worker's number, from 0, below MAX_SLOTS: no two that live have the same. In the master it is -1.
    `directory` is for files they share, readable by this user alone.
    """

    def __init__(self) -> None:
        self.draining = Flag()
        self.slot = -1
        # Of this start: in a container it is in memory (tmpfs), and nothing of it outlives the container.
        self.directory = Path(tempfile.mkdtemp(prefix="stack-answers-"))

    def remove(self) -> None:
        """The gateway ends. Called in the master."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def vacate(self, slot: int) -> None:
        """The slot's worker is gone: what it held is given back. In the master, before the slot is used again."""
