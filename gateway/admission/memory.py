"""Places: the slots of each engine and the queue for them, in memory that all workers of a host share.

A place is a request's at an engine: it waits, or it has a slot. Which, is one byte, written last: so at whatever moment
a worker is killed, each place is free, waiting or held, and the master gives back those of the dead. All other numbers
(who is next, how fast the engine is, what was promised) may be off by one write, and are none the worse for it.

Who is next: each key has a time of its own, which goes on by 1/weight with each of its requests; the smallest is served
first, and a key that comes now begins where those being served are (start-time fair queueing). A flood so waits behind
itself. A request that can't be let in is promised when it can (`retry_after`).

If the models of an engine do not all fit into its memory, only requests for the loaded models get slots. `swaps`
decides when another model is loaded. The first request for that model has the engine for itself, and loads the model.

A key's users share its turns in the same way. Each request has a `turn` among those of its key, and the key's tags are
given out in the order of the turns. When a request comes before others of its key, it takes the tag of the first of
these, and each of them the tag of the next.

Times in seconds are time.monotonic()'s, one clock for all processes of a host. The file is long because all of it works
on the same record: whatever comes, goes or dies changes a place, its key's time and its engine's pace under one lock.
"""

import hashlib
import time
from array import array
from collections.abc import Callable, Collection, Iterable
from functools import lru_cache
from itertools import compress
from typing import Literal, NamedTuple

from gateway.admission.models import Models
from gateway.admission.retry_after import CELLS, ENGINES, Promises, shares
from gateway.admission.swaps import Loads, Waiting
from gateway.shared_memory import Region
from gateway.upstream.load import Load

PLACES = 4096  # places of each engine
NOWHERE = -1
WAYS = 8  # cells that a key may have
LEEWAY = 0.7  # the part of the longest wait that new requests may fill; the rest is for returning requests
SAMPLES = 32  # requests over which the pace is a mean
UNKNOWN = 1.0  # seconds that a request takes, until one was measured
LIFT = 3.0  # seconds without a rejection after which one more slot is tried

_FREE, _WAITS, _HELD = 0, 1, 2

Reason = Literal["full", "share", "deadline"]
Woken = list[tuple[int, int]]  # workers' seats, and their places that have got a slot


class Refusal(NamedTuple):
    """Why there is no place, and the seconds until there may be one."""

    reason: Reason
    wait: float


class _Asked(NamedTuple):
    """A request for a place. `behind`: how many waiting requests of its key it comes before."""

    cell: int
    tag: float
    weight: int
    wait: float
    mark: int
    person: int
    behind: int
    model: int


class Places:
    """The memory. The master makes it before it forks. Raises BusyError, wherever the lock is needed. `now` is the
    clock."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._promises = Promises()
        self.models = Models(now)
        self.region = Region(ENGINES * (PLACES * 61 + CELLS * 16 + 56))
        view = memoryview(self.region.memory)
        at = ENGINES * PLACES  # the states of the places come first

        def take(size: int) -> memoryview:
            nonlocal at
            at += ENGINES * size
            return view[at - ENGINES * size : at]

        def numbers(count: int) -> "memoryview[float]":
            return take(8 * count).cast("d")

        self.tags, self.costs, self.since, self.until, self.turns = (numbers(PLACES) for _ in range(5))
        self.finish = numbers(CELLS)
        self.virtual, self.seconds, self.seen, self.slots, self.known, self.learned_at = (numbers(1) for _ in range(6))
        self.keys = take(8 * CELLS).cast("Q")
        self.wanted = take(8 * PLACES).cast("Q")
        self.users = take(8 * PLACES).cast("Q")  # 0: its key does not tell its users apart
        self.names = take(8).cast("Q")
        self.workers = take(2 * PLACES).cast("H")
        self.cells = take(2 * PLACES).cast("H")

    # -- engines ------------------------------------------------------------------------------------------------------

    def engine(self, name: str) -> int:
        """Return the number of the engine with this name. If there is no space, the new engine replaces one without
        requests that no worker has known for longest. If all have requests, two engines share a number for a while."""
        digest = _digest(name)
        with self.region.lock:
            names, now = self.names.tolist(), self._now()
            if digest in names:
                return names.index(digest)
            if 0 in names:
                number = names.index(0)
            else:
                number = min(range(ENGINES), key=lambda it: (any(self._kinds(it)), self.known[it]))
            self.names[number] = 0
            for field in (self.virtual, self.seconds, self.seen, self.slots, self.learned_at):
                field[number] = 0.0
            self.models.forget_engine(number)
            self._promises.forget_engine(number)
            self.keys[number * CELLS : (number + 1) * CELLS] = array("Q", bytes(8 * CELLS))
            self.known[number] = now
            self.names[number] = digest
            return number

    def know(self, engine: int) -> None:
        """Note that this engine is still configured. Needs no lock."""
        self.known[engine] = self._now()

    def wait(self, engine: int, model: int = 0) -> float:
        """Return about how many seconds a new request for the model would wait. Needs no lock."""
        due = self.models.due(engine, model, self._now())
        kinds = self._kinds(engine)
        waiting = kinds.count(_WAITS)
        free = not waiting and kinds.count(_HELD) < self.slots[engine]
        return due + (0.0 if free else (waiting + 1) * (self._pace(engine) or UNKNOWN))

    def load(self, engine: int) -> Load:
        """Return the numbers of the engine's slots, its taken slots, and its waiting requests. Needs no lock."""
        kinds = self._kinds(engine)
        return Load(int(self.slots[engine]), kinds.count(_HELD), kinds.count(_WAITS))

    def positions(self, engine: int) -> dict[int, int]:
        """Return the position of each waiting request, by place, counted from 1. Needs no lock."""
        return {place: number for number, place in enumerate(sorted(self._waiting(engine), key=self._order), 1)}

    # -- slots that are learned ---------------------------------------------------------------------------------------

    def others(self, place: int) -> int:
        """Return how many other requests have a slot of this place's engine. Needs no lock."""
        kinds = self._kinds(place // PLACES)
        return kinds.count(_HELD) - (kinds[place % PLACES] == _HELD)

    def lower(self, place: int) -> int:
        """Note that the engine rejected this place's request beside the others that have a slot. It then has as many
        slots as there are others, or one. Returns the number of others."""
        engine = place // PLACES
        with self.region.lock:
            others = self.others(place)
            if others:
                self.slots[engine] = min(self.slots[engine], others)
                self.learned_at[engine] = self._now()
            return others

    def lift(self, engine: int, most: int, *, waiting: bool) -> None:
        """Try one more slot than was learned, if all are in use while others wait, and no request was rejected for LIFT
        seconds. `waiting`: some wait in the database."""
        now = self._now()
        if self.slots[engine] >= most or now < self.learned_at[engine] + LIFT:
            return
        with self.region.lock:
            kinds = self._kinds(engine)
            full = _WAITS in kinds and kinds.count(_HELD) >= self.slots[engine]
            if (full or waiting) and self.slots[engine] < most and now >= self.learned_at[engine] + LIFT:
                self.slots[engine] += 1
                self.learned_at[engine] = now

    # -- models that are loaded ---------------------------------------------------------------------------------------

    def loaded(
        self,
        engine: int,
        model: int,
        there: Collection[int],
        after: Collection[int],
        took: float,
        *,
        failed: bool = False,
    ) -> Woken:
        """Note that a load has ended: see Loads.ended. Returns the places that get a slot by that."""
        with self.region.lock:
            loads = self.models.loads(engine).ended(model, there, after, self._now(), took, failed=failed)
            self.models.keep(engine, loads)
            return self._hand_over(engine)

    def looked(self, engine: int, seen: Loads, after: Collection[int]) -> Woken:
        """Note which models are loaded, unless that has changed since `seen`. Returns the places that get a slot."""
        with self.region.lock:
            if self.models.loads(engine) == seen:
                self.models.keep(engine, seen.seen(after))
            return self._hand_over(engine)

    def tell(self, engine: int, loads: Loads) -> Woken:
        """Note what the database knows of the engine's models, by this clock. Returns the places that get a slot."""
        with self.region.lock:
            self.models.keep(engine, loads)
            return self._hand_over(engine)

    # -- coming and going ---------------------------------------------------------------------------------------------

    def enter(
        self,
        engine: int,
        worker: int,
        account: str,
        weight: int,
        wait: float,
        queue: int,
        *,
        mark: int = 0,
        ahead: bool = False,
        model: int = 0,
    ) -> tuple[int, bool] | Refusal:
        """Return a place, and whether it has a slot. Without a slot, it waits for `wait` seconds at most. `account`:
        keys.known.Key.account. `queue`: how many may wait. `mark` recognises a request that returns. `ahead` puts it
        before all others, beyond the bounds. `model`: Loading.number."""
        with self.region.lock:
            now = self._now()
            kinds = self._kinds(engine)
            if (free := kinds.find(_FREE)) < 0:
                return Refusal("full", self._pace(engine) or UNKNOWN)
            key, _, user = account.partition("/")
            cell = engine * CELLS + self._cell(engine, key)
            last, cost = (-1.0, 0.0) if ahead else (max(self.virtual[engine], self.finish[cell]), 1 / weight)
            person = _digest(account) if user and not ahead else 0
            turn, behind = self._turn(engine, cell, person) if person else (0.0, [])
            tag, *tags = [*(self.tags[it] for it in behind), last]
            holds = self._admits(engine, kinds, Waiting(model, tag, now))
            if not holds and not ahead:
                it = _Asked(cell, tag, weight, wait, _digest(f"{account} {mark}"), person, len(behind), model)
                if (refusal := self._refusal(engine, it, now, queue)) is not None:
                    return refusal
            place = engine * PLACES + free
            for at, value in zip((*behind, place), (*tags, tag), strict=True):
                self.tags[at] = value
            self.workers[place], self.cells[place] = worker, cell % CELLS
            self.users[place], self.turns[place], self.wanted[place] = person, turn, model
            self.costs[place], self.since[place], self.until[place] = cost, now, now + wait
            if cost:
                self.finish[cell] = last + cost
            if holds:
                self.virtual[engine] = max(self.virtual[engine], tag)
                self.models.begins(engine, model)
            self.region.memory[place] = _HELD if holds else _WAITS
            return place, holds

    def hold(self, engine: int, worker: int) -> int:
        """Return a place with a slot, even if none is free, for a request that got a slot in the database. NOWHERE if
        there is no place."""
        with self.region.lock:
            free = self._kinds(engine).find(_FREE)
            if free < 0:
                return NOWHERE
            place = engine * PLACES + free
            self.workers[place] = worker
            self.costs[place] = 0.0  # it is none of a key's turns
            self.since[place] = self._now()
            self.region.memory[place] = _HELD
            return place

    def leave(self, place: int, *, served: bool = True) -> Woken:
        """Free a place, once. Returns the places that get a slot by that. A request that was not `served` does not
        count in the engine's pace."""
        engine = place // PLACES
        with self.region.lock:
            if self.region.memory[place] == _WAITS:
                self._withdraw(place)
            elif served:
                self._learn(engine, self._now() - self.since[place])
            self.region.memory[place] = _FREE
            return self._hand_over(engine)

    def again(self, engine: int, account: str, weight: int, mark: int) -> float:
        """Return after how many seconds a request that waited in vain may return."""
        with self.region.lock:
            now, cell = self._now(), engine * CELLS + self._cell(engine, account.partition("/")[0])
            weights = self._waiting_weights(self._waiting(engine))
            return self._promise(engine, cell, weight, weights, now, now, _digest(f"{account} {mark}")) - now

    def hand_over(self, engine: int) -> Woken:
        """Give free slots to waiting requests: after a worker was killed before it did so, or if there are more slots
        now."""
        if _WAITS not in self._kinds(engine):
            return []
        with self.region.lock:
            return self._hand_over(engine)

    def holds(self, place: int) -> bool:
        """Return whether the place has a slot. Needs no lock."""
        return self.region.memory[place] == _HELD

    def vacate(self, worker: int) -> Woken:
        """Free the places of a dead worker. Called in the master. Returns the places that get a slot by that."""
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
        now = self._now()
        for _ in range(int(self.slots[engine]) - kinds.count(_HELD)):
            ready = [it for it in self._waiting(engine) if self.until[it] > now]
            if self.models.scarce[engine]:
                served = self._served(engine, self._wanted(engine))
                ready = [it for it in ready if self.wanted[it] in served]
            if not ready:
                break
            place = min(ready, key=self._order)
            self.virtual[engine] = max(self.virtual[engine], self.tags[place])
            self.since[place] = now
            self.models.begins(engine, self.wanted[place])
            self.region.memory[place] = _HELD
            woken.append((self.workers[place], place))
        return woken

    def _wanted(self, engine: int) -> list[Waiting]:
        now = self._now()
        return [
            Waiting(self.wanted[it], self.tags[it], self.since[it])
            for it in self._waiting(engine)
            if self.until[it] > now
        ]

    def _served(self, engine: int, waiting: list[Waiting]) -> Collection[int]:
        """Return the models whose requests may get a slot of an engine whose models do not all fit."""
        busy, pace = _HELD in self._kinds(engine), self._pace(engine) or UNKNOWN
        return self.models.served(engine, waiting, busy=busy, virtual=self.virtual[engine], pace=pace)

    def _admits(self, engine: int, kinds: bytes, it: Waiting) -> bool:
        """Return whether a new request gets a slot at once: one is free, and none that waits may have it."""
        if kinds.count(_HELD) >= self.slots[engine]:
            return False
        if not self.models.scarce[engine]:
            return _WAITS not in kinds
        waiting = self._wanted(engine)
        served = self._served(engine, [*waiting, it])
        return it.model in served and not any(other.model in served for other in waiting)

    def _withdraw(self, place: int) -> None:
        """Stop a place's wait. The later requests of its key move up."""
        engine, cell = place // PLACES, self.cells[place]
        order, cost = self._order(place), self.costs[place]
        for it in self._waiting(engine):
            if self.cells[it] == cell and self.costs[it] and self._order(it) > order:
                self.tags[it] -= cost
        self.finish[engine * CELLS + cell] -= cost

    def _turn(self, engine: int, cell: int, person: int) -> tuple[float, list[int]]:
        """Return a new request's turn among those of its key, and the waiting requests of its key that come after it,
        the first one first. A user's turns are one apart. A user who begins now starts at the turn that is served."""
        kinds = self._kinds(engine)
        its = [it for it in self._any(engine, kinds) if self.cells[it] == cell % CELLS and self.costs[it]]
        waiting = [it for it in its if kinds[it % PLACES] == _WAITS]
        served = max((self.turns[it] for it in its if kinds[it % PLACES] == _HELD), default=None)
        if served is None:
            served = min((self.turns[it] for it in waiting), default=0.0)
        turn = max(served, max((self.turns[it] + 1 for it in its if self.users[it] == person), default=0.0))
        return turn, sorted((it for it in waiting if self.turns[it] > turn), key=self._order)

    def _refusal(self, engine: int, it: "_Asked", now: float, queue: int) -> Refusal | None:
        """Return why a request cannot enter the queue, with a promise of when it can; None if it can.

        A key may have as many places as it leaves free, so that there is space for other keys during a flood, and a
        user as many as its key could still have. A request that returns as promised may exceed the bounds a little, so
        that new requests cannot take its place.
        """
        cell, weight, wait = it.cell, it.weight, it.wait
        waiting = self._waiting(engine)
        kept = self._promises.keep(engine, it.mark, now) and len(waiting) < queue + queue // 2 + 8
        weights = self._waiting_weights(waiting)
        own = sum(self.cells[place] == cell % CELLS for place in waiting)
        users = sum(self.users[place] == it.person for place in waiting) if it.person else 0
        before = sum(self.tags[place] <= it.tag for place in waiting) - bool(it.behind)
        # By its key's share, in case the other keys continue to send.
        turns = max(before + 1, (own - it.behind + 1) * shares(weights, cell, weight))
        pace, due = self._pace(engine), self.models.turn(engine, it.model)
        expected = due + (before + 1 if kept else turns) * pace
        reason: Reason | None = None
        if len(waiting) >= queue and not kept:
            reason = "full"
        elif own + users >= queue - len(waiting) and not kept:
            reason = "share"
        elif expected > wait * (1.0 if kept or not self._promises.lined(engine, now) else LEEWAY):
            reason = "deadline"
        if reason is None:
            return None
        fits = now + (max(0.0, expected - LEEWAY * wait) if reason == "deadline" else due)
        return Refusal(reason, self._promise(engine, cell, weight, weights, now, fits, it.mark) - now)

    def _promise(
        self, engine: int, cell: int, weight: int, weights: dict[int, float], now: float, fits: float, mark: int
    ) -> float:
        apart = self._pace(engine) or UNKNOWN / self.slots[engine]
        return self._promises.promise(cell, weight, weights, apart, now, fits, mark)

    def _waiting_weights(self, waiting: list[int]) -> dict[int, float]:
        """The weights of keys that wait, by cell. If a key's weight was changed meanwhile, one of its weights."""
        return {self.cells[it]: 1 / self.costs[it] for it in waiting if self.costs[it]}

    def _learn(self, engine: int, seconds: float) -> None:
        seen = self.seen[engine] = min(self.seen[engine] + 1, SAMPLES)
        self.seconds[engine] += (seconds - self.seconds[engine]) / seen

    def _pace(self, engine: int) -> float:
        """Return the seconds between the ends of two requests if all slots are in use; 0 if it is not known."""
        return self.seconds[engine] / max(1.0, self.slots[engine])

    def _order(self, place: int) -> tuple[float, float]:
        return self.tags[place], self.since[place]

    def _waiting(self, engine: int) -> list[int]:
        kinds = self._kinds(engine)
        return [place for place in self._any(engine, kinds) if kinds[place % PLACES] == _WAITS]

    def _any(self, engine: int, kinds: bytes) -> Iterable[int]:
        """Return the places that are not free."""
        return compress(range(engine * PLACES, (engine + 1) * PLACES), kinds.rstrip(b"\0"))

    def _kinds(self, engine: int) -> bytes:
        return self.region.memory[engine * PLACES : (engine + 1) * PLACES]

    def _cell(self, engine: int, key: str) -> int:
        """Return the key's cell: its own, or else the one of its few cells that is furthest behind."""
        digest = _digest(key)
        first = digest % (CELLS // WAYS) * WAYS
        at = engine * CELLS + first
        line = self.keys[at : at + WAYS].tolist()
        if digest in line:
            return first + line.index(digest)
        it = min(range(WAYS), key=lambda it: (line[it] != 0, self.finish[at + it]))
        self.keys[at + it] = 0
        self.finish[at + it] = 0.0
        self._promises.forget_key(at + it)
        self.keys[at + it] = digest
        return first + it


@lru_cache(maxsize=CELLS)
def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") or 1
