"""Captures: keep the bodies of requests of the keys that an operator names, for a while, in memory alone.

Nothing is captured before that, and then for a bounded time. A body is kept up to a bounded size, in a ring that the
workers share. The memory ends with the gateway, and no file ever holds a body.
"""

import hashlib
import time
from collections.abc import Callable
from typing import NamedTuple

from gateway.shared_memory import BusyError, Region

KEYS = 16  # whose requests may be captured at a time; one more takes the place of the one that ends first
RING = 64  # requests that are kept
BODY = 32 * 1024  # bytes of a request, and as many of its answer
SECONDS = 900  # for which a key's requests are captured

_FRONT = 24  # bytes before the keys
_WATCHED = 16  # bytes of a key's line: its digest, and until when
_HEAD = 24  # bytes of a capture's line before the bodies: the digests of its id and key, and the sizes of the bodies
_LINE = _HEAD + 2 * BODY


class Capture(NamedTuple):
    """The bodies of one request: as the gateway understood it, and as the client got the answer. `whole`: nothing
    was cut off."""

    request: str
    answer: str
    whole: bool


class Copy(list[bytes]):
    """The beginning of an answer: what is beyond its bound is left out."""

    size = 0

    def append(self, data: bytes) -> None:
        if self.size <= BODY:
            super().append(data[: BODY + 1 - self.size])  # one byte more shows that there was more
            self.size += len(self[-1])


class Captures:
    """Hold the ring. The master makes it before it forks. `now` is the clock."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._region = Region(_FRONT + KEYS * _WATCHED + RING * _LINE)
        view = memoryview(self._region.memory)
        self._count = view[:8].cast("Q")  # of all captures
        self._last = view[8:16].cast("d")  # when the last key's capturing ends: for a look that costs nothing
        self._stops = view[16:24].cast("Q")  # how often a capture was stopped
        keys = view[_FRONT : _FRONT + KEYS * _WATCHED]
        self._keys, self._ends = keys[: 8 * KEYS].cast("Q"), keys[8 * KEYS :].cast("d")
        self._lines = view[_FRONT + KEYS * _WATCHED :]

    def start(self, key_id: str) -> None:
        """Capture the requests of that key from now on, for SECONDS. Raises BusyError."""
        with self._region.lock:
            place = self._place(key_id)
            if place is None:
                place = min(range(KEYS), key=lambda it: self._ends[it])
            self._ends[place] = 0.0
            self._keys[place] = _digest(key_id)
            self._ends[place] = self._now() + SECONDS
            self._last[0] = max(self._ends.tolist())

    def stop(self, key_id: str) -> None:
        """End the capture of that key, and delete all captured bodies, also those of other keys. Nothing is kept of the
        requests that are running now. Raises BusyError."""
        with self._region.lock:
            if (place := self._place(key_id)) is not None:
                self._ends[place] = 0.0
            self._last[0] = max(self._ends.tolist())
            self._stops[0] += 1
            self._lines[:] = bytes(len(self._lines))

    def left(self, key_id: str) -> float:
        """Return for how many more seconds the key's requests are captured; 0 if they are not. Needs no lock."""
        now = self._now()
        if self._last[0] <= now:
            return 0.0
        place = self._place(key_id)
        return 0.0 if place is None else max(0.0, self._ends[place] - now)

    def begins(self, key_id: str) -> int | None:
        """Return the number with which the bodies of a request that begins now can be kept, or None if the key's
        requests are not captured. Needs no lock."""
        number = int(self._stops[0])  # read first, so that it is too old after a stop in between
        return number if self.left(key_id) > 0 else None

    def keep(self, request_id: str, key_id: str, number: int, request: bytes, answer: bytes) -> None:
        """Keep the bodies of a request of that key. They are left out if a capture was stopped since `begins` returned
        that number, and while the memory is locked for too long."""
        parts = request[: BODY + 1], answer[: BODY + 1]
        sizes = [len(it) for it in parts]
        kept = [it[:BODY] for it in parts]
        try:
            with self._region.lock:
                if self._stops[0] != number:
                    return
                at = self._count[0] % RING * _LINE
                self._lines[at : at + 8] = bytes(8)
                self._lines[at + _HEAD : at + _HEAD + len(kept[0])] = kept[0]
                self._lines[at + _HEAD + BODY : at + _HEAD + BODY + len(kept[1])] = kept[1]
                self._lines[at + 16 : at + _HEAD] = b"".join(it.to_bytes(4, "little") for it in sizes)
                self._lines[at + 8 : at + 16] = _digest(key_id).to_bytes(8, "little")
                self._lines[at : at + 8] = _digest(request_id).to_bytes(8, "little")
                self._count[0] += 1
        except BusyError:
            return

    def of(self, request_id: str, key_id: str | None) -> Capture | None:
        """Return the newest bodies of a request of that key with that id; callers choose ids, and two keys may have the
        same one. None: of any key. Raises BusyError."""
        wanted = b"".join(_digest(it).to_bytes(8, "little") for it in (request_id, key_id) if it is not None)
        with self._region.lock:
            for back in range(1, RING + 1):
                at = (self._count[0] - back) % RING * _LINE
                if self._lines[at : at + len(wanted)] == wanted:
                    line = bytes(self._lines[at : at + _LINE])
                    break
            else:
                return None
        sizes = [int.from_bytes(line[at : at + 4], "little") for at in (16, 20)]
        request, answer = line[_HEAD : _HEAD + min(BODY, sizes[0])], line[_HEAD + BODY :][: min(BODY, sizes[1])]
        return Capture(request.decode(errors="replace"), answer.decode(errors="replace"), max(sizes) <= BODY)

    def _place(self, key_id: str) -> int | None:
        keys, wanted = self._keys.tolist(), _digest(key_id)
        return keys.index(wanted) if wanted in keys else None


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") or 1
