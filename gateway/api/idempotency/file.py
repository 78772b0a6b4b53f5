"""File: one answer as it is kept: a fixed head, then frames: the response's start, pieces of its body, its end, and
notes for a maker that goes on with it.

A maker that is killed may leave half a frame behind the last whole one. Readers never hand that on, and the next maker
cuts it off.
"""

import fcntl
import os
import struct
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple, Self

CHUNK = 64 * 1024  # bytes read at once

# What a file begins with: what it is, how it stands, the digest of the request, and when somebody last read
# (time.monotonic(), one clock for all processes).
_HEAD = struct.Struct("<7sB32sd")
_MAGIC = b"answer2"
RUNNING, WHOLE, FAILED = range(3)
_STATE, _SEEN = 7, 40  # offsets
HEAD_SIZE = _HEAD.size

_FRAME = struct.Struct("<BI")  # what it is, and how many bytes follow


class Kind(IntEnum):
    """The kind of a frame. No kind is 0, because a disk may return zeros after a power failure."""

    START = 1  # the response's status and headers, as JSON
    BODY = 2  # whole events, or all of a blocking answer
    END = 3  # there is no more of the body
    NOTE = 4  # JSON for the next maker
    COUNT = 5  # the tokens so far, as JSON


class Frame(NamedTuple):
    """A part of an answer's file. `begin` is the offset of its data and `end` that of the next frame, in bytes."""

    kind: Kind
    data: bytes
    begin: int
    end: int


class Head(NamedTuple):
    """The beginning of a file: the digest of the request, and the state of the answer."""

    digest: bytes
    state: int


def framed(kind: Kind, data: bytes = b"") -> bytes:
    """Return the bytes of a frame."""
    return _FRAME.pack(kind, len(data)) + data


class Entry:
    """The open file of one answer. Only its maker, which holds the lock, writes. Every process may read."""

    def __init__(self, descriptor: int) -> None:
        self._fd = descriptor

    @classmethod
    def create(cls, path: Path, digest: bytes, frames: bytes, *, instead: bool = False) -> "Self | None":
        """Create the file with these frames, and lock it. Returns None if `path` has an answer already; with `instead`,
        the new file replaces that answer. Raises OSError."""
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix="new-")
        entry = cls(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            entry.write(_HEAD.pack(_MAGIC, RUNNING, digest, time.monotonic()) + frames)
            (os.replace if instead else os.link)(name, path)  # whole and locked at once, and only one can
        except FileExistsError:
            entry.close()
            return None
        except BaseException:
            entry.close()
            raise
        finally:
            Path(name).unlink(missing_ok=True)
        return entry

    @classmethod
    def open(cls, path: Path) -> "Self | None":
        """Open the answer at `path`. Returns None if there is none. Raises OSError."""
        try:
            return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except FileNotFoundError:
            return None

    def close(self) -> None:
        """Close the file. This releases the maker's lock."""
        os.close(self._fd)

    def head(self) -> Head | None:
        """Return the beginning of the file; None if the file is not an answer, or has another version."""
        found = os.pread(self._fd, HEAD_SIZE, 0)
        if len(found) < HEAD_SIZE:
            return None
        magic, state, digest, _ = _HEAD.unpack(found)
        return Head(digest, state) if magic == _MAGIC else None

    def state(self) -> int:
        """Return the state of the answer: RUNNING, WHOLE or FAILED."""
        return os.pread(self._fd, 1, _STATE)[0]

    def ended(self) -> bool:
        """Return whether the file ends as a whole answer does. After a power failure, its last blocks may be missing,
        although its head is there."""
        end = framed(Kind.END)
        return os.pread(self._fd, len(end), max(HEAD_SIZE, os.fstat(self._fd).st_size - len(end))) == end

    def reaches_end(self, position: int) -> bool:
        """Return whether all frames from the offset `position` on are there (0: all frames)."""
        return any(frame.kind == Kind.END for frame in self.frames(position, bodies=False))

    def deserted(self) -> bool:
        """Return whether no process makes the answer. The maker itself must not call this."""
        if not self.lock():
            return False
        self.unlock()
        return True

    def lock(self) -> bool:
        """Become the maker of the answer. Returns False if another process is."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def unlock(self) -> None:
        """Stop being the maker of the answer."""
        fcntl.flock(self._fd, fcntl.LOCK_UN)

    def stands_at(self, path: Path) -> bool:
        """Return whether `path` still leads to this file."""
        with suppress(FileNotFoundError):
            return path.stat().st_ino == os.fstat(self._fd).st_ino
        return False

    def remove(self, path: Path) -> bool:
        """Delete the file at `path`, unless a process makes the answer. Returns whether it is deleted. If `path` leads
        to another file by now, that file stays."""
        if not self.lock():
            return False
        self.drop(path)
        self.unlock()
        return True

    def drop(self, path: Path) -> None:
        """Delete the file at `path`. Only the maker may call this."""
        if self.stands_at(path):
            path.unlink(missing_ok=True)

    def last_seen(self) -> float:
        """Return when the answer was last read, by time.monotonic()."""
        seen: float = struct.unpack("<d", os.pread(self._fd, 8, _SEEN))[0]
        return seen

    def seen(self) -> None:
        """Note that the answer is being read now."""
        os.pwrite(self._fd, struct.pack("<d", time.monotonic()), _SEEN)

    def read(self, offset: int, size: int) -> bytes:
        """Return what the file has there, `size` bytes at most."""
        return os.pread(self._fd, size, offset)

    def frames(self, start: int = 0, *, bodies: bool = True) -> Iterator[Frame]:
        """Yield the complete frames from the offset `start` on (0: all). Ends at an incomplete or invalid frame.

        Without `bodies`, a BODY frame that is larger than a chunk comes without its data."""
        offset = start or HEAD_SIZE
        while data := os.pread(self._fd, CHUNK, offset):
            at = 0
            while len(data) - at >= _FRAME.size:
                kind, size = _FRAME.unpack_from(data, at)
                begin, end = at + _FRAME.size, at + _FRAME.size + size
                if not Kind.START <= kind <= Kind.COUNT:
                    return
                if end > len(data):
                    break
                yield Frame(Kind(kind), data[begin:end], offset + begin, offset + end)
                at = end
            if at == 0:  # it begins with a frame that is larger than what was read, or is not whole
                frame = self._large(data, offset, bodies=bodies)
                if frame is None:
                    return
                yield frame
                offset = frame.end
            offset += at

    def _large(self, data: bytes, offset: int, *, bodies: bool) -> Frame | None:
        """The frame there, which begins with `data`; None if it is not whole."""
        if len(data) < _FRAME.size:
            return None
        kind, size = _FRAME.unpack_from(data)
        begin = offset + _FRAME.size
        end = begin + size
        if os.fstat(self._fd).st_size < end:
            return None
        return Frame(Kind(kind), self.read(begin, size) if bodies or kind != Kind.BODY else b"", begin, end)

    # What its maker writes, the state last.

    def write(self, data: bytes) -> None:
        """Append the bytes of frames, all or nothing, so that no frame follows half of another. Raises OSError."""
        end = os.lseek(self._fd, 0, os.SEEK_END)
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError:
            os.ftruncate(self._fd, end)
            raise

    def write_state(self, state: int) -> None:
        """Set the state of the answer."""
        os.pwrite(self._fd, bytes((state,)), _STATE)

    def make_whole(self, size: int) -> None:
        """Set the state WHOLE. If the killed maker did not write the end, write it behind the first `size` bytes."""
        if not self.ended():
            self.cut(size)
            self.write(framed(Kind.END))
        self.write_state(WHOLE)

    def cut(self, size: int) -> None:
        """Cut the file to `size` bytes, which removes half a frame that a killed maker left."""
        os.ftruncate(self._fd, size)


def whose(path: Path) -> str:
    """Return the digest of the id of the key to which the file at `path` belongs."""
    return path.name.partition("-")[0]


def remove(path: Path) -> bool:
    """Delete the answer at `path`, unless a process makes it. Returns whether it is deleted."""
    entry = Entry.open(path)
    if entry is None:
        return True
    try:
        return entry.remove(path)
    finally:
        entry.close()
