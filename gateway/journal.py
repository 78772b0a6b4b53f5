"""Journal: what this process began and what came of it, in files that outlive it, until it is saved elsewhere.

A record is a line of JSON: written when it begins, and once more when it ends, then with an `outcome`. What is written
outlives a killed process and a killed container, though not a power failure.

Each process has a directory in a common home and holds an flock on it for as long as it lives; whoever can take that
lock adopts the journal. After a kill in the midst of it the same records are saved again, so `save` must do nothing for
an `id` that is there.
"""

import errno
import fcntl
import mmap
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

LIMIT = 32 * 1024 * 1024  # bytes of a file in which records may begin; with the one being saved there are two
ROOM = 256 * 1024  # bytes by which a file grows
BATCH = 1000  # records that are saved at a time
_ENDED = b'"outcome":'  # within a string the quotes would be escaped

Record = dict[str, Any]
Save = Callable[[list[Record]], None]


class Journal:
    """One process's own. `begin` and `end` are for the thread of the event loop, everything else for another.

    `dropped` counts the records that could not be written down: the disk has no room, or the limit is reached.
    """

    def __init__(self, home: Path, limit: int = LIMIT) -> None:
        self.dropped = 0
        self.directory: Path | None = None
        self._home = home
        self._limit = limit
        self._holds = -1  # the directory, locked
        self._name = secrets.token_hex(6)
        self._count = 0
        self._lock = threading.Lock()  # over these two, for microseconds
        self._file: _File | None = None
        self._open: dict[str, bytes] = {}  # begun and not ended: lines by id
        self._full: list[Path] = []  # the files before this one

    def begin(self, record: Record) -> None:
        """Write down what begins, and give it its `id`; one that is dropped gets none."""
        self._count += 1
        name = f"{self._name}-{self._count:x}"
        record["id"] = name
        line = orjson.dumps(record) + b"\n"
        with self._lock:
            if self._file is not None and self._file.size < self._limit and self._file.write(line):
                self._open[name] = line
                return
        del record["id"]
        self.dropped += 1

    def end(self, record: Record) -> None:
        """Write down how it ended: the record that was begun, which has an `outcome` now; again, if that changes."""
        if "id" not in record:
            return  # dropped, and counted
        line = orjson.dumps(record) + b"\n"
        with self._lock:
            self._open.pop(record["id"], None)
            if self._file is not None and self._file.write(line):
                self._file.ended = True
                return
        self.dropped += 1

    # -- in another thread --------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Make the files. Without them everything is dropped. Raises OSError."""
        self._home.mkdir(mode=0o700, parents=True, exist_ok=True)
        holds = None
        while holds is None:  # whoever adopts may take a new directory for one that is left over, and remove it
            directory = self._home / secrets.token_hex(6)
            directory.mkdir(mode=0o700)
            holds = _lock(directory)
        self.directory, self._holds = directory, holds
        self._swap(directory)

    def drain(self, save: Save) -> None:
        """Hand what has ended to `save`, and forget it. Where this raises OSError, or whatever `save` does, nothing is
        lost: the next call goes on."""
        if self.directory is None:
            self.open()
        elif self._file is not None and self._file.ended and not self._full:
            self._swap(self.directory)
        while self._full:
            with suppress(FileNotFoundError):
                for records in _batches(_read(self._full[0], ended=True)):
                    save(records)
                self._full[0].unlink()
            del self._full[0]

    def close(self) -> None:
        """Leave what is not saved to whoever comes. Nothing more may begin or end."""
        file, self._file = self._file, None
        if file is not None:
            file.close()
        if self.directory is not None:
            if not (self._open or self._full or (file is not None and file.ended)):
                shutil.rmtree(self.directory, ignore_errors=True)
            os.close(self._holds)

    def _swap(self, directory: Path) -> None:
        """Go on in a new file, which begins with what is still open."""
        try:
            file = _File(directory / secrets.token_hex(6))
        except FileNotFoundError:  # somebody removed the directory under our hands
            self.directory = None
            os.close(self._holds)
            raise
        with self._lock:
            if not file.write(b"".join(self._open.values())):
                file.close()
                file.path.unlink()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            before, self._file = self._file, file
        if before is not None:
            before.close()
            self._full.append(before.path)


class _File:
    """Lines, appended. Raises OSError where it can't be made.

    They are copied into the kernel's memory of the file, with no call of the kernel (two calls of `write` took 25 µs of
    a request). The room for them is reserved before: on a full disk it can't be had, which is no signal that kills.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self.ended = False  # something has ended in it
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            _reserve(self._descriptor, ROOM)
            self._memory = mmap.mmap(self._descriptor, ROOM)
        except OSError:
            os.close(self._descriptor)
            path.unlink()
            raise

    def write(self, lines: bytes) -> bool:
        """Whether there was room."""
        end = self.size + len(lines)
        if end > len(self._memory):
            room = -(-end // ROOM) * ROOM
            try:
                _reserve(self._descriptor, room)
                self._memory.resize(room)
            except OSError:
                return False
        self._memory[self.size : end] = lines
        self.size = end
        return True

    def close(self) -> None:
        self._memory.close()
        os.close(self._descriptor)


def _reserve(descriptor: int, size: int) -> None:
    """Make sure of so many bytes on the disk. Raises OSError."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:  # macOS, for `make dev`
        os.ftruncate(descriptor, size)


def adopt(home: Path, save: Callable[[list[Record], Path], None]) -> None:
    """Hand to `save` what dead processes have left, each with its directory, and remove that. What had begun and not
    ended has no `outcome`. Raises OSError, or whatever `save` does: the next call goes on."""
    with suppress(FileNotFoundError):  # there is no home yet
        for directory in home.iterdir():
            holds = _lock(directory)
            if holds is not None:
                try:
                    _save_all(directory, lambda records: save(records, directory))  # noqa: B023  called at once
                    shutil.rmtree(directory)
                finally:
                    os.close(holds)


def _save_all(directory: Path, save: Save) -> None:
    files = [path for path in directory.iterdir() if not path.suffix]
    ended: set[str] = set()
    for path in files:
        for records in _batches(_read(path, ended=True)):
            save(records)
            ended.update(it["id"] for it in records)
    # Each file repeats what was open when it was made; so does one that had just been swapped for it.
    begun = {it["id"]: it for path in files for it in _read(path, ended=False) if it["id"] not in ended}
    for records in _batches(begun.values()):
        save(records)


def _lock(directory: Path) -> int | None:
    """A descriptor of the directory, locked; None where another process holds it, or it is no more."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    with suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), directory.stat()):
            return descriptor
    os.close(descriptor)
    return None


def _read(path: Path, *, ended: bool) -> Iterator[Record]:
    """Those records of a file that have ended, or those that begin. A line cut off is none: its writer was told, or
    killed. Behind the last one is what was reserved and not used."""
    with path.open("rb") as lines:
        for line in lines:
            if line.startswith(b"\0"):
                return
            if (_ENDED in line) == ended:
                try:
                    record = orjson.loads(line.rstrip(b"\0"))
                except orjson.JSONDecodeError:
                    continue
                yield record


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    rest = iter(records)
    while batch := list(islice(rest, BATCH)):
        yield batch
