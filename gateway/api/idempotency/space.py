"""Space: limit the bytes of all kept answers and of each key's, and choose which answers to delete."""

import errno
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Container
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from gateway.api.idempotency.file import remove, whose

MAX_ENTRIES = 1024  # answers kept or in the making
MAX_OF_KEY = 256  # of one key


class Kept(NamedTuple):
    """An answer's file, as it is found in the directory."""

    last_read: float
    size: int
    path: Path


class Share:
    """The kept answers of one key. The first one is the one whose last reading is the longest ago. Sizes are bytes."""

    def __init__(self) -> None:
        self.files: deque[Kept] = deque()
        self.size = self.count = 0

    def add(self, file: Kept) -> None:
        self.files.append(file)
        self.size += file.size
        self.count += 1

    def drop(self, *, unless: Container[Path]) -> bool:
        """Delete the key's oldest answer that is not being made, and is not in `unless`. Returns whether there was
        one."""
        while self.files:
            file = self.files.popleft()
            if file.path not in unless and remove(file.path):
                self.size -= file.size
                self.count -= 1
                return True
        return False


class Space:
    """Limit the answers in `directory` to `most` bytes, and those of one key to half of that.

    The free space is counted anew once a second. Complete answers are kept for `ttl` seconds after they were last read.
    The answers in `making` are never deleted."""

    def __init__(self, directory: Path, most: int, ttl: float, making: Container[Path]) -> None:
        self._directory = directory
        self._bytes = most
        self._ttl = ttl
        self._making = making
        self._left = 0
        self._left_to: defaultdict[str, int] = defaultdict(int)

    def take(self, key: str, size: int) -> bool:
        """Take `size` bytes for an answer of that key, or nothing if the space does not suffice. Returns whether it
        does."""
        if size > self._left or size > self._left_to[key]:
            return False
        self._left -= size
        self._left_to[key] -= size
        return True

    def make_room(self, key: str = "") -> None:
        """Delete answers that are too old. Then make space for an answer of `key`.

        The key's own oldest answers are deleted until half of its space is free. After that, keys with more than an
        equal share lose their oldest answers until a quarter of all space is free. Raises OSError if that is not
        enough."""
        shares = self._shares()
        most = self._bytes // 2  # of a key
        if own := shares.get(key):
            while own.count >= MAX_OF_KEY or own.size > most // 2:
                if not own.drop(unless=self._making):
                    break
        self._level(shares, key)
        used = sum(it.size for it in shares.values())
        self._left = self._bytes - used
        self._left_to = defaultdict(lambda: most, {name: most - it.size for name, it in shares.items()})
        if key and (
            sum(it.count for it in shares.values()) >= MAX_ENTRIES
            or self._left <= 0
            or (own is not None and (own.count >= MAX_OF_KEY or own.size >= most))
        ):
            raise OSError(errno.ENOSPC, "no space for another answer")

    def _shares(self) -> dict[str, Share]:
        """What there is, by key, less what is too old."""
        files = []
        for file in os.scandir(self._directory):
            with suppress(FileNotFoundError):
                status = file.stat()
                files.append(Kept(status.st_mtime, status.st_size, Path(file.path)))
        too_old = time.time() - self._ttl
        shares: defaultdict[str, Share] = defaultdict(Share)
        for it in sorted(files):
            if it.last_read >= too_old or it.path in self._making or not remove(it.path):
                shares[whose(it.path)].add(it)
        return shares

    def _level(self, shares: dict[str, Share], key: str) -> None:
        """Take from those that have most, as long as too little is left and they have more than an equal share."""
        keys = len(shares.keys() | {key})
        sizes: tuple[tuple[Callable[[Share], int], int], ...] = (
            (lambda it: it.size, self._bytes - self._bytes // 4),
            (lambda it: it.count, MAX_ENTRIES - 1),
        )
        for size, most in sizes:
            candidates = list(shares.values())
            while candidates and sum(map(size, shares.values())) > most:
                largest = max(candidates, key=size)
                if size(largest) <= most / keys:
                    break
                if not largest.drop(unless=self._making):
                    candidates.remove(largest)
