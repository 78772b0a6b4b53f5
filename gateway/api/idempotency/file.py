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
    """What a frame is. None is 0, which is what a disk may give back after a power failure."""

    START = 1  # the response's status and headers, as JSON
    BODY = 2  # whole events, or all of a blocking answer
    END = 3  # there is no more of the body
    NOTE = 4  # JSON for the next maker
    COUNT = 5  # the tokens so far, as JSON


class Frame(NamedTuple):
    """A part of an answer's file, and the offset behind it."""

    kind: Kind
    data: bytes
    end: int


class Head(NamedTuple):
    """What a file says first."""

    digest: bytes
    state: int


def framed(kind: Kind, data: bytes = b"") -> bytes:
    """Write a frame."""
    return _FRAME.pack(kind, len(data)) + data


class Entry:
    """One answer's file, open. Its maker writes; anybody reads."""

    def __init__(self, descriptor: int) -> None:
        self._fd = descriptor

    @classmethod
    def create(cls, path: Path, digest: bytes, frames: bytes, *, instead: bool = False) -> "Self | None":
        """Begin an answer, locked, with these frames; None if there is one already, unless it comes `instead` of that.
        Raises OSError."""
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
        """Open the answer there, if there is one."""
        try:
            return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except FileNotFoundError:
            return None

    def close(self) -> None:
        """Close it. A maker's lock ends with this."""
        os.close(self._fd)

    def head(self) -> Head | None:
        """What it says first; None if it is no answer, or one of another version."""
        found = os.pread(self._fd, HEAD_SIZE, 0)
        if len(found) < HEAD_SIZE:
            return None
        magic, state, digest, _ = _HEAD.unpack(found)
        return Head(digest, state) if magic == _MAGIC else None

    def state(self) -> int:
        """How it stands."""
        return os.pread(self._fd, 1, _STATE)[0]

    def deserted(self) -> bool:
        """Whether nobody makes it (any more). Only for one who doesn't."""
        if not self.lock():
            return False
        self.unlock()
        return True

    def lock(self) -> bool:
        """Become its maker, unless there is one. Returns whether that was possible."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def unlock(self) -> None:
        """Be its maker no longer."""
        fcntl.flock(self._fd, fcntl.LOCK_UN)

    def stands_at(self, path: Path) -> bool:
        """Whether it is the answer there."""
        with suppress(FileNotFoundError):
            return path.stat().st_ino == os.fstat(self._fd).st_ino
        return False

    def remove(self, path: Path) -> bool:
        """Take it away from `path`, unless somebody makes it; whether it is gone. Another one that has come to stand
        there meanwhile is left alone."""
        if not self.lock():
            return False
        self.drop(path)
        self.unlock()
        return True

    def drop(self, path: Path) -> None:
        """Take it away from `path`. Only for its maker."""
        if self.stands_at(path):
            path.unlink(missing_ok=True)

    def last_seen(self) -> float:
        """When somebody last read it, by time.monotonic()."""
        seen: float = struct.unpack("<d", os.pread(self._fd, 8, _SEEN))[0]
        return seen

    def seen(self) -> None:
        """Somebody reads it."""
        os.pwrite(self._fd, struct.pack("<d", time.monotonic()), _SEEN)

    def frames(self, start: int = 0) -> Iterator[Frame]:
        """Its whole frames from an offset on, or from the first. Ends before half a frame, and before what is none."""
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
                yield Frame(Kind(kind), data[begin:end], offset + end)
                at = end
            if at == 0:  # it begins with a frame that is larger than what was read, or is not whole
                frame = self._large(data, offset)
                if frame is None:
                    return
                yield frame
                offset = frame.end
            offset += at

    def _large(self, data: bytes, offset: int) -> Frame | None:
        """The frame there, which begins with `data`; None if it is not whole."""
        if len(data) < _FRAME.size:
            return None
        kind, size = _FRAME.unpack_from(data)
        end = offset + _FRAME.size + size
        if os.fstat(self._fd).st_size < end:
            return None
        return Frame(Kind(kind), os.pread(self._fd, size, offset + _FRAME.size), end)

    # What its maker writes, the state last.

    def write(self, data: bytes) -> None:
        """Add frames. Raises OSError."""
        os.lseek(self._fd, 0, os.SEEK_END)
        while data:
            data = data[os.write(self._fd, data) :]

    def write_state(self, state: int) -> None:
        """Say how it stands."""
        os.pwrite(self._fd, bytes((state,)), _STATE)

    def cut(self, size: int) -> None:
        """Cut off what is behind that offset: half a frame, that a killed maker left."""
        os.ftruncate(self._fd, size)


def whose(path: Path) -> str:
    """The key that an answer's file is of: a digest of its id."""
    return path.name.partition("-")[0]


def remove(path: Path) -> bool:
    """Remove the answer there, unless somebody makes it. Returns whether it is gone."""
    entry = Entry.open(path)
    if entry is None:
        return True
    try:
        return entry.remove(path)
    finally:
        entry.close()
