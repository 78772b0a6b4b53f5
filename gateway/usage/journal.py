"""Journal: record the beginning and end of exchanges in files that outlive this process, until they are in the store.

The journal is a write-ahead log. A record is a line of JSON. It is written when an exchange begins, and again, with an
`outcome`, when it ends. A written line survives a killed process and a killed container, but not a power failure.

Each process has a directory in a common home, and holds an flock on it while it runs. A process that can take another
directory's lock adopts its journal. If that process is killed, the same records are saved again, so `save` must ignore
an `id` that exists.
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

# Bytes of a file, after which no record may begin in it; two files exist while one is being saved
LIMIT = 32 * 1024 * 1024
ROOM = 256 * 1024  # bytes by which a file grows
BATCH = 1000  # records that are saved at a time
_ENDED = b'"outcome":'  # cannot match inside a string, where the quotes are escaped

Record = dict[str, Any]
Save = Callable[[list[Record]], None]


class Journal:
    """Write one process's own journal. Call `begin` and `end` on the event loop's thread, and everything else on
    another.

    `dropped` counts the records that could not be written, because the disk is full or the limit is reached.
    """

    def __init__(self, home: Path, limit: int = LIMIT) -> None:
        self.dropped = 0
        self.directory: Path | None = None
        self._home = home
        self._limit = limit
        self._holds = -1  # the descriptor of the locked directory
        self._name = secrets.token_hex(6)
        self._count = 0
        self._lock = threading.Lock()  # protects the two fields below; held for microseconds
        self._file: _File | None = None
        self._open: dict[str, bytes] = {}  # lines of records that have begun and not ended, by id
        self._full: list[Path] = []  # earlier files that are not saved yet

    def begin(self, record: Record, first: Callable[[Record], object] = lambda _: None) -> None:
        """Write a record that begins, and give it its `id`. A record that is dropped gets no `id`. `first` is called
        with the record before it is written."""
        self._count += 1
        name = f"{self._name}-{self._count:x}"
        record["id"] = name
        first(record)
        line = orjson.dumps(record) + b"\n"
        with self._lock:
            if self._file is not None and self._file.size < self._limit and self._file.write(line):
                self._open[name] = line
                return
        del record["id"]
        self.dropped += 1

    def end(self, record: Record) -> None:
        """Write a record that has ended: it was begun, and has an `outcome` now. May be called again if the outcome
        changes."""
        if "id" not in record:
            return  # it was dropped and counted in `begin`
        line = orjson.dumps(record) + b"\n"
        with self._lock:
            self._open.pop(record["id"], None)
            if self._file is not None and self._file.write(line):
                self._file.ended = True
                return
        self.dropped += 1

    # -- in another thread --------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Make the files. Until this succeeds, every record is dropped. Raises OSError."""
        self._home.mkdir(mode=0o700, parents=True, exist_ok=True)
        holds = None
        while holds is None:  # an adopting process may take a new directory for an abandoned one, and remove it
            directory = self._home / secrets.token_hex(6)
            directory.mkdir(mode=0o700)
            holds = _lock(directory)
        self.directory, self._holds = directory, holds
        self._swap(directory)

    def drain(self, save: Save) -> None:
        """Pass the records that have ended to `save`, and remove them. If this raises OSError, or what `save` raises,
        nothing is lost: the next call continues."""
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
        """Leave the records that are not saved to the next process. No record may begin or end after this."""
        file, self._file = self._file, None
        if file is not None:
            file.close()
        if self.directory is not None:
            if not (self._open or self._full or (file is not None and file.ended)):
                shutil.rmtree(self.directory, ignore_errors=True)
            os.close(self._holds)

    def _swap(self, directory: Path) -> None:
        """Continue in a new file, which begins with the records that have not ended."""
        try:
            file = _File(directory / secrets.token_hex(6))
        except FileNotFoundError:  # another program has removed the directory
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
    """Append lines to a new file. Raises OSError if the file cannot be made.

    The lines are copied into a memory map of the file, because two calls of `write` took 25 µs of each request. The
    disk space is reserved first. A full disk is therefore an OSError, and not a signal that kills the process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self.ended = False  # it holds a record that has ended
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            _reserve(self._descriptor, ROOM)
            self._memory = mmap.mmap(self._descriptor, ROOM)
        except OSError:
            os.close(self._descriptor)
            path.unlink()
            raise

    def write(self, lines: bytes) -> bool:
        """Write the lines; return whether there was space."""
        end = self.size + len(lines)
        if end > len(self._memory):
            room = -(-end // ROOM) * ROOM
            try:
                _reserve(self._descriptor, room)
                self._memory.resize(room)
            except (OSError, SystemError):  # SystemError: on macOS, with `make dev`, a map cannot grow
                return False
        self._memory[self.size : end] = lines
        self.size = end
        return True

    def close(self) -> None:
        self._memory.close()
        os.close(self._descriptor)


def _reserve(descriptor: int, size: int) -> None:
    """Reserve this many bytes on the disk. Raises OSError."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:  # macOS, with `make dev`
        os.ftruncate(descriptor, size)


def adopt(home: Path, save: Callable[[list[Record], Path], None]) -> None:
    """Pass to `save` the records that dead processes have left, each with its directory, and remove the directory.
    Records that began and never ended have no `outcome`. Raises OSError, or what `save` raises: the next call
    continues."""
    with suppress(FileNotFoundError):  # the home does not exist yet
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
    # Each file repeats the records that were open when it was made, so a record may be in two files.
    begun = {it["id"]: it for path in files for it in _read(path, ended=False) if it["id"] not in ended}
    for records in _batches(begun.values()):
        save(records)


def _lock(directory: Path) -> int | None:
    """Lock a directory and return its descriptor; None if another process holds the lock, or the directory is gone."""
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
    """Yield the records of a file that have ended, or those that begin. An incomplete line is left out: its writer was
    killed, or knows of the failure. After the last line comes reserved space that was not used."""
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
