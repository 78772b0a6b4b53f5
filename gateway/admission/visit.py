"""Visit: own the places that one request has in the queues of the engines."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

from gateway.admission.memory import NOWHERE
from gateway.exchange import Exchange, Wait
from gateway.upstream.client import Upstream


@dataclass(eq=False, slots=True)
class Spot:
    """A place in a queue that is in PostgreSQL. `holds`: it has a slot."""

    engine: str
    key_id: str
    id: int
    owner: str
    holds: bool
    model: int = 0


class Queue(Protocol):
    """The queues behind a Visit: Admission, or a test's own."""

    async def enter(self, upstream: Upstream, model: str, visit: "Visit", *, resumes: bool) -> None:
        """See Visit.enter."""

    async def load(self, upstream: Upstream, model: str, visit: "Visit") -> None:
        """See Visit.load."""

    def loading(self, visit: "Visit") -> float | None:
        """See Visit.loading."""

    def turned_back(self, visit: "Visit", *, teaches: bool) -> None:
        """See Visit.turned_back."""

    def leave(self, visit: "Visit") -> None:
        """See Visit.leave."""

    def position(self, visit: "Visit") -> int | None:
        """See Visit.position."""


class Visit:
    """Hold the place of one request: at most one, at one engine at a time."""

    __slots__ = (
        "_outside",
        "_queue",
        "at",
        "engine",
        "exchange",
        "learned",
        "loads_since",
        "model",
        "others",
        "place",
        "returns",
        "served",
        "since",
        "spot",
        "waited",
        "waits",
    )

    def __init__(self, queue: Queue, exchange: Exchange) -> None:
        self._queue = queue
        self.exchange = exchange
        self.waited = 0.0  # seconds, in all queues so far
        self.waits: list[Wait] = []
        self.since: float | None = None  # when the present wait began; None: it does not wait
        self._outside: Literal["outage", "pause"] | None = None  # what it waits for outside of the queues
        self.place = NOWHERE
        self.spot: Spot | None = None
        self.at = 0  # the number of the engine that it entered last
        self.model = 0  # the number of its model, if the engine may have to load it
        self.loads_since: float | None = None  # since when the engine loads it; None: it does not
        self.engine = ""  # the engine whose slot it has; empty: none
        self.served = True  # the engine has not rejected it, as far as is known
        self.returns = False  # an engine rejected it as full, so it already had its turn
        self.others = 0  # requests that had a slot at that engine then
        self.learned = False  # the engine's slots were set to that number

    async def enter(self, upstream: Upstream, model: str, *, resumes: bool) -> None:
        """Return when the request has a slot of this engine for this model. The caller must call `leave`.

        `resumes`: the answer has begun. The request then comes before all waiting ones, and may wait for the whole
        queue timeout. Raises QueueFull, QueueTimeout, QueueShareFull or GatewayBusy; the request then has no slot.
        """
        await self._queue.enter(upstream, model, self, resumes=resumes)

    async def load(self, upstream: Upstream, model: str) -> None:
        """Return when the engine has loaded the model. The request has a slot there. Raises EngineError."""
        await self._queue.load(upstream, model, self)

    @property
    def loading(self) -> float | None:
        """In about how many seconds its model is loaded, 0 or more, if the request waits for that; otherwise None."""
        return self._queue.loading(self)

    def turned_back(self, *, teaches: bool) -> None:
        """Note that the engine rejected the request as full. Next time it waits before all requests that had no turn
        yet.

        `teaches`: if the engine's slots are learned, it has only as many as the other requests hold.
        """
        self._queue.turned_back(self, teaches=teaches)

    async def pause(self, seconds: float) -> None:
        """Wait outside of the queues. The time counts as a wait."""
        with self.outside("pause"):
            await asyncio.sleep(min(seconds, self.left))

    @contextmanager
    def outside(self, what: Literal["outage", "pause"]) -> Iterator[None]:
        """Count the time in the block as a wait."""
        since = self.since = time.monotonic()
        self._outside = what
        try:
            yield
        finally:
            self._outside = None
            self.has_waited(what, "", since)

    def has_waited(self, what: Literal["queue", "outage", "pause"], engine: str, since: float) -> float:
        """Note that it waited for that engine until now. Returns the seconds."""
        wait = Wait(what, engine, since, time.monotonic())
        self.waits.append(wait)
        self.since = None
        self.waited += wait.ended - since
        return wait.ended - since

    @property
    def left(self) -> float:
        """The seconds that the request may still wait; 0 or less if none are left."""
        return self.exchange.queue_timeout - self.waited

    def leave(self) -> None:
        """Give back the place."""
        self._queue.leave(self)

    @property
    def position(self) -> int | None:
        """The position in the queue, counted from 1; None if the request does not wait."""
        return self._queue.position(self)

    @property
    def waits_for(self) -> Literal["queue", "load", "outage", "pause"] | None:
        """What it waits for now: a slot, its model, an engine that is down, or the end of a pause. None: for none."""
        if self.since is not None:
            return self._outside or "queue"
        return "load" if self.loads_since is not None else None

    @property
    def milliseconds(self) -> int:
        """How long the request has waited so far."""
        waits = time.monotonic() - self.since if self.since is not None else 0.0
        return round((self.waited + waits) * 1000)
