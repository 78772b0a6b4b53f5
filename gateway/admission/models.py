"""Models: what each engine has loaded, in memory that workers share, and which models may be served."""

import mmap
import time
from collections.abc import Callable, Collection, Sequence

import orjson

from gateway.admission.retry_after import ENGINES
from gateway.admission.swaps import EXCLUSIVE, Limit, Loads, Waiting, decide

RECORD = 4096  # bytes for the loads of each engine


class Models:
    """Hold the loads of all engines, under the lock of the caller (Places). `now` is the clock.

    `scarce`: not all models of the engine fit. `asked_at`: when it was last asked which are loaded. `waits` and `mosts`
    are its Limit. `barred`: since when an engine is barred (gpu.py); 0: it is not. `bars_until`: until when a model of
    the engine is barred.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        memory = memoryview(mmap.mmap(-1, ENGINES * (48 + RECORD)))
        self.scarce, self.asked_at, self.waits, self.mosts, self.barred, self.bars_until = (
            memory[it * ENGINES * 8 : (it + 1) * ENGINES * 8].cast("d") for it in range(6)
        )
        self._records = memory[ENGINES * 48 :]

    def loads(self, engine: int) -> Loads:
        """Return what the engine has loaded. Needs no lock."""
        record = bytes(self._records[engine * RECORD : (engine + 1) * RECORD]).rstrip(b"\0")
        try:
            return Loads.parse(orjson.loads(record))
        except (ValueError, KeyError, TypeError):
            return Loads()  # nothing is known, or a worker was killed while it wrote, or writes now

    def keep(self, engine: int, loads: Loads) -> None:
        """Remember what the engine has loaded."""
        self._records[engine * RECORD : (engine + 1) * RECORD] = loads.dump().ljust(RECORD, b"\0")
        self.scarce[engine] = loads.scarce
        self.bars_until[engine] = max(loads.barred.values(), default=0.0)

    def forget_engine(self, engine: int) -> None:
        """Remove what is known of a number that another engine gets now."""
        self.asked_at[engine] = self.barred[engine] = 0.0
        self.keep(engine, Loads())

    def bars(self, engine: int, model: int) -> bool:
        """Return Loads.bars. Needs no lock."""
        now = self._now()
        return now < self.bars_until[engine] and self.loads(engine).bars(model, now)

    def share(self, engine: int) -> None:
        """Note that only one of its models fits at a time."""
        if not self.loads(engine).exclusive:
            self.keep(engine, EXCLUSIVE)

    def limit(self, engine: int) -> Limit:
        return Limit(self.waits[engine], self.mosts[engine])

    def served(
        self, engine: int, waiting: Sequence[Waiting], *, busy: bool, virtual: float, pace: float
    ) -> Collection[int]:
        """Return the models whose requests may get a slot now, if not all models fit: see swaps.decide."""
        loads = self.loads(engine)
        following = decide(loads, waiting, self._now(), busy=busy, virtual=virtual, pace=pace, limit=self.limit(engine))
        if not following:
            return {it.model for it in waiting if not loads.absent(it.model)}
        return () if busy else (following,)

    def begins(self, engine: int, model: int) -> None:
        """Note that a request for the model has got a slot: see Loads.begins."""
        if self.scarce[engine]:
            self.keep(engine, self.loads(engine).begins(model, self._now()))

    def turn(self, engine: int, model: int) -> float:
        """Return Loads.turn for a new request. Needs no lock."""
        now = self._now()
        return self.loads(engine).turn(model, now, self.limit(engine), now) if self.scarce[engine] else 0.0

    def due(self, engine: int, model: int, since: float) -> float:
        """Return Loads.due. Needs no lock."""
        return self.loads(engine).due(model, self._now(), self.limit(engine), since) if self.scarce[engine] else 0.0
