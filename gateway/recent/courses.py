"""Courses: keep what happened to each of the last requests, step by step, so that any worker can tell it.

A course is one JSON object of at most ROOM bytes in a ring of memory that the workers share. It holds names, codes,
counts and times, and never a word of a prompt or an answer. It ends with the gateway.
"""

import hashlib
import time
from collections.abc import Mapping
from typing import Any

import orjson

from gateway.errors import StackError
from gateway.exchange import Ending, Exchange
from gateway.shared_memory import BusyError, Region

RING = 4096  # requests
ROOM = 2048  # bytes of one
MAX_STEPS = 24  # of one request; of more, the first and the last ones are kept
NAME = 200  # characters of a model's or an engine's name
SHORT = 40  # characters of a name, if longer ones do not fit
AT_ONCE = 50  # courses that are read while the memory is locked, because every request that ends needs it
_HEAD = 8  # bytes of a digest, by which a request is found


class Course:
    """Note the steps of one request. Times are in milliseconds since it came."""

    __slots__ = ("_cut", "_exchange", "_steps", "row")

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._steps: list[dict[str, Any]] = []
        self._cut = False  # steps were left out
        self.row: str | None = None  # the id of its usage row

    def step(self, what: str, **more: str | int | None) -> None:
        """Note that this happens now."""
        at = round((time.monotonic() - self._exchange.started) * 1000)
        self._steps.append({"at": at, "what": what, **more})
        if len(self._steps) > MAX_STEPS:
            del self._steps[MAX_STEPS // 2]
            self._cut = True

    def told(self, ending: Ending) -> dict[str, Any]:
        """Return the whole course, once it is over."""
        it, first, error, now = ending.exchange, ending.first_token_at, ending.error, time.monotonic()
        return {
            "id": it.request_id,
            "row": self.row,
            "ended_at": time.time_ns() // 1_000_000 - round((now - ending.ended) * 1000),
            "key": it.key_id,
            "kind": it.kind,
            "api": it.api,
            "model": ending.route[:NAME],
            "arm": ending.arm,
            "stream": it.stream,
            "engine": ending.engine[:NAME] if ending.engine else None,
            "outcome": ending.outcome,
            "status": status(error, begun=ending.begun),
            "finish_reason": ending.finish_reason[:NAME] if ending.finish_reason else None,
            "tokens_in": ending.tokens_in,
            "tokens_out": ending.tokens_out,
            "cached": ending.usage.cached if ending.usage else 0,
            "exact": ending.exact,
            "queued_ms": ending.queued_ms,
            "ttft_ms": round((first - it.started) * 1000) if first is not None else None,
            "duration_ms": round((ending.ended - it.started) * 1000),
            "sent_ms": round((now - it.started) * 1000),  # the client may have taken longer than the engine
            "attempts": ending.attempts,
            "resumes": ending.resumes,
            "steps": self._steps,
            "cut": self._cut,
        }


def status(error: StackError | None, *, begun: bool) -> int:
    """Return the HTTP status that the client got."""
    return 200 if error is None or (begun and error.status != 499) else error.status


class Courses:
    """Hold the ring. The master makes it before it forks."""

    def __init__(self, size: int = RING) -> None:
        self._size = size
        self._region = Region(8 + size * (_HEAD + ROOM))
        view = memoryview(self._region.memory)
        self._count = view[:8].cast("Q")  # of all that were ever kept
        self._heads = view[8 : 8 + size * _HEAD].cast("Q")
        self._rooms = view[8 + size * _HEAD :]

    def keep(self, course: Mapping[str, Any]) -> None:
        """Put it in the place of the oldest one. While the memory is locked for too long, it is left out."""
        line = _line(course)
        try:
            with self._region.lock:
                place = self._count[0] % self._size
                self._heads[place] = 0
                at = place * ROOM
                self._rooms[at : at + 2] = len(line).to_bytes(2, "little")
                self._rooms[at + 2 : at + 2 + len(line)] = line
                self._heads[place] = _head(course["id"])
                self._count[0] += 1
        except BusyError:
            return

    def of(self, request_id: str) -> dict[str, Any] | None:
        """Return the newest course of a request with that id. Raises BusyError."""
        head = _head(request_id)
        with self._region.lock:
            heads = self._heads.tolist()
            lines = [(self._age(place), self._read(place)) for place, it in enumerate(heads) if it == head]
        found = [(age, course) for age, line in lines if (course := orjson.loads(line))["id"] == request_id]
        return min(found, key=lambda it: it[0])[1] if found else None

    def latest(self, most: int) -> list[dict[str, Any]]:
        """Return the last ones, the newest first. Raises BusyError."""
        count = self._count[0]
        places = [number % self._size for number in range(count - 1, max(0, count - min(most, self._size)) - 1, -1)]
        lines: list[bytes] = []
        for start in range(0, len(places), AT_ONCE):
            with self._region.lock:
                lines += [self._read(place) for place in places[start : start + AT_ONCE] if self._heads[place]]
        return [orjson.loads(line) for line in lines]

    def _age(self, place: int) -> int:
        return int(self._count[0] - 1 - place) % self._size

    def _read(self, place: int) -> bytes:
        at = place * ROOM
        length = int.from_bytes(self._rooms[at : at + 2], "little")
        return bytes(self._rooms[at + 2 : at + 2 + length])


def _head(request_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=_HEAD).digest(), "little") or 1


def _line(course: Mapping[str, Any]) -> bytes:
    """As it is kept. If it is too long, it loses steps in its middle, and then the ends of its names."""
    line = orjson.dumps(course)
    steps = list(course["steps"])
    while len(line) > ROOM - 2 and steps:
        del steps[len(steps) // 2]
        line = orjson.dumps({**course, "steps": steps, "cut": True})
    if len(line) > ROOM - 2:  # a character may take six bytes
        names = {name: it[:SHORT] for name in ("model", "engine", "finish_reason") if (it := course[name])}
        line = orjson.dumps({**course, **names, "steps": steps, "cut": True})
    return line
