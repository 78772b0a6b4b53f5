"""Swapping: an engine in virtual time that has room for few models, behind the gateway's own queue in memory."""

import heapq
from collections.abc import Callable
from typing import NamedTuple

from gateway.admission.memory import Places, Refusal
from gateway.admission.swaps import Limit
from tests.support.clocks import Clock

LOOK = 0.2  # seconds between two looks of a worker at its queue
FOREVER = 1e6


class Served(NamedTuple):
    """A request that was served: when it came, and when the engine began to work on it."""

    key: str
    model: int
    came: float
    began: float


class Box:
    """Requests take `work` seconds, and loads take `cost` seconds. `again` is called at the end of each request."""

    def __init__(
        self, *, cost: float = 10.0, work: float = 1.0, slots: int = 1, room: int = 1, limit: Limit | None = None
    ) -> None:
        self.clock = Clock()
        self.places = Places(self.clock)
        self.engine = self.places.engine("engine")
        self.places.slots[self.engine] = slots
        self.limit = limit or Limit()
        self.places.models.waits[self.engine], self.places.models.mosts[self.engine] = self.limit
        self.again: Callable[[str, int], None] = lambda *_: None
        self.loads: list[tuple[float, float, int]] = []  # when each began and ended, and of which model
        self.served: list[Served] = []
        self.refused: list[Refusal] = []
        self._cost, self._work, self._room = cost, work, room
        self._memory: list[int] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._asked: dict[int, tuple[str, int, float]] = {}
        self._count = 0
        self._look()

    def ask(self, key: str, model: int) -> None:
        found = self.places.enter(self.engine, 0, key, 1, FOREVER, 4000, model=model)
        if isinstance(found, Refusal):
            self.refused.append(found)
            return
        place, holds = found
        self._asked[place] = key, model, self.clock()
        if holds:
            self._begin(place)

    def run(self, until: float, *, stop: Callable[[], bool] = lambda: False) -> None:
        """Go on for that many seconds."""
        until += self.clock()
        while self._events[0][0] <= until and not stop():
            moment, _, event = heapq.heappop(self._events)
            self.clock.now = moment
            event()
        if not stop():
            self.clock.now = until

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.clock() + seconds, self._count, event))

    @property
    def waiting(self) -> int:
        return self.places.load(self.engine).waiting

    @property
    def loading(self) -> float:
        """The seconds that it spent on loads."""
        return sum(ended - began for began, ended, _ in self.loads)

    def _look(self) -> None:
        self._wake(self.places.hand_over(self.engine))
        self.after(LOOK, self._look)

    def _wake(self, woken: list[tuple[int, int]]) -> None:
        for _, place in woken:
            self._begin(place)

    def _begin(self, place: int) -> None:
        _, model, _ = self._asked[place]
        if not model or (model in self._memory and model in self.places.models.loads(self.engine).loaded):
            self._serve(place)
            return
        there = list(self._memory)
        self._memory = [*(it for it in there if it != model), model][-self._room :]
        took = 0.0 if model in there else self._cost
        if took:
            self.loads.append((self.clock(), self.clock() + took, model))

        def ended() -> None:
            self._wake(self.places.loaded(self.engine, model, there, self._memory, took))
            self._serve(place)

        self.after(took, ended)

    def _serve(self, place: int) -> None:
        key, model, came = self._asked[place]
        self.served.append(Served(key, model, came, self.clock()))

        def ended() -> None:
            del self._asked[place]
            self._wake(self.places.leave(place))
            self.again(key, model)

        self.after(self._work, ended)
