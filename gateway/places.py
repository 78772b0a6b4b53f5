"""Places: the slots of each engine and the queue for them, in memory that all workers of a host share.

A place is a request's at an engine: it waits, or it has a slot. Which, is one byte, written last: so at whatever moment
a worker is killed, each place is free, waiting or held, and the master gives back those of the dead. All other numbers
(who is next, how fast the engine is, what was promised) may be off by one write, and are none the worse for it.

Who is next: each key has a time of its own, which goes on by 1/weight with each of its requests; the smallest is served
first, and a key that comes now begins where those being served are (start-time fair queueing). A flood so waits behind
itself. Times in seconds are time.monotonic()'s, one clock for all processes of a host.
"""

import hashlib
import time
from array import array
from collections.abc import Iterable
from functools import lru_cache
from itertools import compress
from typing import Literal, NamedTuple

from gateway.shared import Region

ENGINES = 64  # twice as many as a gateway may have: after a reload there may be others
PLACES = 4096  # of each engine
NOWHERE = -1
CELLS = 4096  # keys of each engine that are remembered
PROMISES = 8192  # of each engine, to those who were told to come back
WAYS = 8  # cells that a key may have
SLOWER = 1.25  # times the measured pace, when somebody is told to come back: those who did must not pile up
LEEWAY = 0.7  # of the longest wait may be promised; the rest is for those who come back
GRACE = 5.0  # seconds for which a promise outlasts its moment
EARLY = 0.05  # seconds that who comes back may be early
ALIKE = 512  # requests that can't be told apart may be told to come back; more are taken for those again
SAMPLES = 32  # over so many requests the pace is a mean
UNKNOWN = 1.0  # seconds a request takes, for as long as none was seen
FORGET = 60.0  # seconds after which an engine that no worker knows any more makes room

_FREE, _WAITS, _HELD = 0, 1, 2

Reason = Literal["full", "share", "deadline"]
Woken = list[tuple[int, int]]  # workers' slots, and places of theirs that have got one of the engine's


class Refusal(NamedTuple):
    """Why there is no place, and the seconds after which there will be one."""

    reason: Reason
    wait: float


class Places:
    """The memory. The master makes it before it forks. Raises BusyError, wherever the lock is needed."""

    def __init__(self) -> None:
        self.region = Region(ENGINES * (PLACES * 37 + CELLS * 24 + PROMISES * 16 + 64))
        view = memoryview(self.region.memory)
        at = ENGINES * PLACES  # the places' kinds come first

        def take(size: int) -> memoryview:
            nonlocal at
            at += ENGINES * size
            return view[at - ENGINES * size : at]

        def numbers(count: int) -> "memoryview[float]":
            return take(8 * count).cast("d")

        self.tags, self.costs, self.since, self.until = (numbers(PLACES) for _ in range(4))
        self.finish, self.line = (numbers(CELLS) for _ in range(2))
        self.due = numbers(PROMISES)
        self.virtual, self.seconds, self.seen, self.slots, self.known = (numbers(1) for _ in range(5))
        self.made, self.horizon = (numbers(1) for _ in range(2))
        self.keys = take(8 * CELLS).cast("Q")
        self.names = take(8).cast("Q")
        self._marks_at = at
        self.marks = take(8 * PROMISES).cast("Q")
        self.workers = take(2 * PLACES).cast("H")
        self.cells = take(2 * PLACES).cast("H")

    # -- engines ------------------------------------------------------------------------------------------------------

    def engine(self, name: str) -> int:
        """The number of the engine of that name. Raises LookupError when there are too many."""
        digest = _digest(name)
        with self.region.lock:
            names, now = self.names.tolist(), time.monotonic()
            if digest in names:
                return names.index(digest)
            for number, taken in enumerate(names):
                if not taken or (self.known[number] < now - FORGET and not any(self._kinds(number))):
                    self.names[number] = 0
                    for field in (self.virtual, self.seconds, self.seen, self.slots, self.horizon):
                        field[number] = 0.0
                    self.keys[number * CELLS : (number + 1) * CELLS] = array("Q", bytes(8 * CELLS))
                    self.known[number] = now
                    self.names[number] = digest
                    return number
        raise LookupError("There are too many engines.")

    def know(self, engine: int) -> None:
        """It is still an engine of ours. Needs no lock."""
        self.known[engine] = time.monotonic()

    def wait(self, engine: int) -> float:
        """Roughly the seconds until a new request would be served. Needs no lock."""
        kinds = self._kinds(engine)
        waiting = kinds.count(_WAITS)
        free = not waiting and kinds.count(_HELD) < self.slots[engine]
        return 0.0 if free else (waiting + 1) * (self._pace(engine) or UNKNOWN)

    def positions(self, engine: int) -> dict[int, int]:
        """Who waits, by place, and how many are served before, counted from 1. Needs no lock."""
        return {place: number for number, place in enumerate(sorted(self._waiting(engine), key=self._order), 1)}

    # -- coming and going ---------------------------------------------------------------------------------------------

    def enter(
        self,
        engine: int,
        worker: int,
        key: str,
        weight: int,
        wait: float,
        queue: int,
        *,
        mark: int = 0,
        ahead: bool = False,
    ) -> tuple[int, bool] | Refusal:
        """A place, and whether it has a slot; else it waits, for `wait` seconds at most. `queue`: how many may. By its
        `mark` a request is known again. `ahead` of all others, and whatever the queue."""
        with self.region.lock:
            now = time.monotonic()
            kinds = self._kinds(engine)
            free = kinds.find(_FREE)
            if free < 0:
                return Refusal("full", self._pace(engine) or UNKNOWN)
            cell = engine * CELLS + self._cell(engine, key)
            tag, cost = (-1.0, 0.0) if ahead else (max(self.virtual[engine], self.finish[cell]), 1 / weight)
            holds = kinds.count(_HELD) < self.slots[engine] and _WAITS not in kinds
            if not holds and not ahead:
                refusal = self._refusal(engine, cell, tag, weight, now, wait, queue, _digest(f"{key} {mark}"))
                if refusal is not None:
                    return refusal
            place = engine * PLACES + free
            self.workers[place] = worker
            self.cells[place] = cell % CELLS
            self.tags[place] = tag
            self.costs[place] = cost
            self.since[place] = now
            self.until[place] = now + wait
            if cost:
                self.finish[cell] = tag + cost
            if holds and tag > self.virtual[engine]:
                self.virtual[engine] = tag
            self.region.memory[place] = _HELD if holds else _WAITS
            return place, holds

    def hold(self, engine: int, worker: int) -> int:
        """A place with a slot, whether or not one is free: for who was given it elsewhere; NOWHERE if there is none."""
        with self.region.lock:
            free = self._kinds(engine).find(_FREE)
            if free < 0:
                return NOWHERE
            place = engine * PLACES + free
            self.workers[place] = worker
            self.since[place] = time.monotonic()
            self.region.memory[place] = _HELD
            return place

    def leave(self, place: int) -> Woken:
        """Its request is over, or waits no longer. For who has the place, once. Returns who gets a slot by that."""
        engine = place // PLACES
        with self.region.lock:
            if self.region.memory[place] == _WAITS:
                self._withdraw(place)
            else:
                self._learn(engine, time.monotonic() - self.since[place])
            self.region.memory[place] = _FREE
            return self._hand_over(engine)

    def again(self, engine: int, key: str, mark: int) -> float:
        """One that waited in vain is told when to come back: the seconds."""
        with self.region.lock:
            now = time.monotonic()
            due = max(self.horizon[engine], now) + SLOWER * (self._pace(engine) or UNKNOWN)
            self.horizon[engine] = due
            self._promise(engine, _digest(f"{key} {mark}"), due)
            return due - now

    def hand_over(self, engine: int) -> Woken:
        """Give free slots to those who wait: where a worker was killed before it did, or there are more slots now."""
        if _WAITS not in self._kinds(engine):
            return []
        with self.region.lock:
            return self._hand_over(engine)

    def holds(self, place: int) -> bool:
        """Whether it has a slot. Needs no lock."""
        return self.region.memory[place] == _HELD

    def vacate(self, worker: int) -> Woken:
        """That worker is gone. In the master. Returns who gets a slot by that."""
        woken = []
        with self.region.lock:
            for engine in range(ENGINES):
                for place in self._any(engine, self._kinds(engine)):
                    if self.workers[place] == worker:
                        if self.region.memory[place] == _WAITS:
                            self._withdraw(place)
                        self.region.memory[place] = _FREE
                woken += self._hand_over(engine)
        return woken

    # -- under the lock -----------------------------------------------------------------------------------------------

    def _hand_over(self, engine: int) -> Woken:
        woken: Woken = []
        kinds = self._kinds(engine)
        if _WAITS not in kinds:
            return woken
        now = time.monotonic()
        for _ in range(int(self.slots[engine]) - kinds.count(_HELD)):
            ready = [it for it in self._waiting(engine) if self.until[it] > now]
            if not ready:
                break
            place = min(ready, key=self._order)
            self.virtual[engine] = max(self.virtual[engine], self.tags[place])
            self.since[place] = now
            self.region.memory[place] = _HELD
            woken.append((self.workers[place], place))
        return woken

    def _withdraw(self, place: int) -> None:
        """It waits no longer: those of its key behind it move up."""
        engine, cell = place // PLACES, self.cells[place]
        order, cost = self._order(place), self.costs[place]
        for it in self._waiting(engine):
            if self.cells[it] == cell and self.costs[it] and self._order(it) > order:
                self.tags[it] -= cost
        self.finish[engine * CELLS + cell] -= cost

    def _refusal(
        self, engine: int, cell: int, tag: float, weight: int, now: float, wait: float, queue: int, mark: int
    ) -> Refusal | None:
        """Why a request can't be let into the queue; and then it is promised when it can.

        A key may have as many places as it leaves free, so that there is room for others whoever floods. Who comes back
        as promised is let in beyond the bounds by a little: those who came just now can't take its place.
        """
        waiting = self._waiting(engine)
        kept = self._keep(engine, mark, now) and len(waiting) < queue + queue // 2 + 8
        weights = {self.cells[it]: 1 / self.costs[it] for it in waiting if self.costs[it]} | {cell % CELLS: weight}
        own = sum(self.cells[it] == cell % CELLS for it in waiting)
        before = sum(self.tags[it] <= tag for it in waiting)
        # By its key's share, should the others go on sending.
        turns = max(before + 1, (own + 1) * sum(weights.values()) / weight)
        pace = self._pace(engine)
        expected = (before + 1 if kept else turns) * pace
        reason: Reason | None = None
        if len(waiting) >= queue and not kept:
            reason = "full"
        elif own >= queue - len(waiting) and not kept:
            reason = "share"
        elif expected > wait * (1.0 if kept or self.horizon[engine] < now else LEEWAY):
            reason = "deadline"
        if reason is None:
            return None
        if (due := self._promised(engine, mark)) > now:  # it doesn't wait: the line grows no longer by it
            return Refusal(reason, due - now)
        apart = SLOWER * (pace or UNKNOWN / self.slots[engine])
        if reason == "share":
            due = self.line[cell] = max(self.line[cell], now) + apart * turns / (own + 1)
        else:
            fits = now + max(0.0, expected - LEEWAY * wait) if reason == "deadline" else now
            due = self.horizon[engine] = max(self.horizon[engine], fits) + apart
        self._promise(engine, mark, due)
        return Refusal(reason, due - now)

    def _promise(self, engine: int, mark: int, due: float) -> None:
        """A request with that mark may come back then. The oldest promise makes room."""
        number = int(self.made[engine])
        self.made[engine] = number + 1
        self.due[engine * PROMISES + number % PROMISES] = due
        self.marks[engine * PROMISES + number % PROMISES] = mark

    def _promised(self, engine: int, mark: int) -> float:
        """When the last request with that mark may come back, where ALIKE of them may; else 0."""
        first = self._marks_at + 8 * PROMISES * engine
        marks, looked = self.region.memory[first : first + 8 * PROMISES], mark.to_bytes(8, "little")
        if marks.count(looked) < ALIKE:
            return 0.0
        return self.due[engine * PROMISES + marks.rfind(looked) // 8]

    def _keep(self, engine: int, mark: int, now: float) -> bool:
        """Whether such a request was told to come back about now; then it was promised once less."""
        first, last = (self._marks_at + 8 * PROMISES * it for it in (engine, engine + 1))
        looked = mark.to_bytes(8, "little")
        while (found := self.region.memory.find(looked, first, last)) >= 0:
            first = found + 1
            number, rest = divmod(found - self._marks_at, 8)
            if rest:
                continue  # two halves of others
            due = self.due[number]
            if now < due - EARLY:
                break  # so are those after it
            self.marks[number] = 0
            if now < due + GRACE:
                return True
        return False

    def _learn(self, engine: int, seconds: float) -> None:
        seen = self.seen[engine] = min(self.seen[engine] + 1, SAMPLES)
        self.seconds[engine] += (seconds - self.seconds[engine]) / seen

    def _pace(self, engine: int) -> float:
        """The seconds from one request's end to the next one's, when all slots are taken; 0: nobody knows."""
        return self.seconds[engine] / max(1.0, self.slots[engine])

    def _order(self, place: int) -> tuple[float, float]:
        return self.tags[place], self.since[place]

    def _waiting(self, engine: int) -> list[int]:
        kinds = self._kinds(engine)
        return [place for place in self._any(engine, kinds) if kinds[place % PLACES] == _WAITS]

    def _any(self, engine: int, kinds: bytes) -> Iterable[int]:
        """The places that aren't free."""
        return compress(range(engine * PLACES, (engine + 1) * PLACES), kinds.rstrip(b"\0"))

    def _kinds(self, engine: int) -> bytes:
        return self.region.memory[engine * PLACES : (engine + 1) * PLACES]

    def _cell(self, engine: int, key: str) -> int:
        """The key's cell: the one it has, else that of its few which was left behind furthest."""
        digest = _digest(key)
        first = digest % (CELLS // WAYS) * WAYS
        at = engine * CELLS + first
        line = self.keys[at : at + WAYS].tolist()
        if digest in line:
            return first + line.index(digest)
        it = min(range(WAYS), key=lambda it: (line[it] != 0, self.finish[at + it]))
        self.keys[at + it] = 0
        self.finish[at + it] = self.line[at + it] = 0.0
        self.keys[at + it] = digest
        return first + it


@lru_cache(maxsize=CELLS)
def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") or 1
