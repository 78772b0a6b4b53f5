"""Admission: a request has a slot of its engine before that is asked, and waits for one in a fair queue.

Slots and queue are in memory that the workers share (places.py); with PostgreSQL, in the database (queues.py). Who
frees a slot hands it over to the next in the same step, and wakes that one's worker by a datagram. Should that be lost,
each worker looks again by itself.
"""

import asyncio
import contextlib
import logging
import socket
import struct
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from gateway import introspection, logs
from gateway.config import Config
from gateway.errors import EngineError, GatewayBusy, QueueFull, QueueShareFull, QueueTimeout, StackError
from gateway.exchange import Exchange
from gateway.metrics import Metrics
from gateway.places import NOWHERE, PLACES, Places, Reason, Refusal, Woken
from gateway.queues import LostError, PostgresQueues, Spot
from gateway.settings import Settings
from gateway.shared import BusyError
from gateway.upstream import Upstream

LOOK = 0.2  # seconds between two looks at who has got a slot meanwhile
AGAIN = 0.1  # seconds until a slot that could not be given back is tried again
ASK = 1.0  # seconds between questions to an engine that has not said how many slots it has
ASK_AGAIN = 30.0  # and to one that has
FRESH = 0.5  # seconds for which positions in a queue are believed
_DATAGRAM = struct.Struct("<I")

log = logging.getLogger("stack")


class Bell:
    """Wakes workers, by a socket of each in a directory that they share."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def close(self) -> None:
        self._socket.close()

    def listen(self, slot: int) -> None:
        """Be that worker's, whose predecessor may have left its own."""
        path = self._path(slot)
        Path(path).unlink(missing_ok=True)
        self._socket.bind(path)

    def fileno(self) -> int:
        return self._socket.fileno()

    def ring(self, slot: int, place: int) -> None:
        """That worker's place has a slot. It may not hear of it."""
        with contextlib.suppress(OSError):
            self._socket.sendto(_DATAGRAM.pack(place), self._path(slot))

    def heard(self) -> list[int]:
        """The places that were rung for."""
        found = []
        with contextlib.suppress(OSError):
            while data := self._socket.recv(_DATAGRAM.size):
                found.append(_DATAGRAM.unpack(data)[0])
        return found

    def _path(self, slot: int) -> str:
        return f"{self._directory}/{slot}"


def vacate(places: Places, bell: Bell, slot: int) -> None:
    """That worker is gone: what it held is given to others. In the master. Raises BusyError."""
    for worker, place in places.vacate(slot):
        bell.ring(worker, place)


class Admission:
    """One worker's. Use it with `async with`."""

    def __init__(
        self,
        settings: Settings,
        config: Config,
        upstreams: Mapping[str, Upstream],
        places: Places,
        slot: int,
        directory: Path,
        metrics: Metrics,
    ) -> None:
        self._places = places
        self._slot = slot
        self._queue = settings.stack_queue
        self._bell = Bell(directory)
        self._metrics = metrics
        self._waiting: dict[int | Spot, asyncio.Future[bool]] = {}
        url = settings.store_url  # with PostgreSQL there may be other gateways beside this one
        self._far = PostgresQueues(url, self._arrived, self._lost) if url else None
        self._ranks: dict[int, tuple[float, dict[int, int]]] = {}
        self._set = {name: engine.slots for name, engine in config.engines.items()}
        self._upstreams = list(upstreams.values())
        self._held = dict.fromkeys(upstreams, 0)

    async def __aenter__(self) -> Self:
        self._names = {it.name: f"{it.name} {it.base_url}" for it in self._upstreams}
        self._engines = {name: await self._number(known_as) for name, known_as in self._names.items()}
        for upstream in self._upstreams:
            upstream.wait = partial(self._places.wait, self._engines[upstream.name])
            if (number := self._set[upstream.name]) or not self._places.slots[self._engines[upstream.name]]:
                self._has(upstream, number or upstream.dialect.slots)
        try:
            self._bell.listen(self._slot)
        except OSError as exc:  # a path that is too long, as a rule
            log.warning("the workers can't wake each other, and look every %g s instead: %s", LOOK, exc)
        asyncio.get_running_loop().add_reader(self._bell, self._rung)
        if self._far is not None:
            await self._far.__aenter__()
        self._tasks = [asyncio.create_task(self._look())]
        self._tasks += [asyncio.create_task(self._ask(it)) for it in self._upstreams if it.dialect.tells_slots]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._far is not None:
            await self._far.__aexit__(kind, exc, trace)
        asyncio.get_running_loop().remove_reader(self._bell)
        self._bell.close()

    async def _number(self, name: str) -> int:
        while True:
            with contextlib.suppress(BusyError):
                return self._places.engine(name)
            await asyncio.sleep(AGAIN)

    def visit(self, exchange: Exchange) -> "Visit":
        """That request's."""
        return Visit(self, exchange)

    async def enter(self, upstream: Upstream, visit: "Visit", *, ahead: bool) -> None:
        """See Visit.enter."""
        wait = visit.exchange.queue_timeout - (0.0 if ahead else visit.waited)
        if self._far is not None:
            try:
                await self._enter_far(self._far, upstream.name, visit, wait, ahead=ahead)
            except LostError:
                wait -= visit.waited
            else:
                return
        await self._enter_here(upstream.name, visit, wait, ahead=ahead)

    async def _enter_here(self, name: str, visit: "Visit", wait: float, *, ahead: bool) -> None:
        engine, it = self._engines[name], visit.exchange
        what = engine, self._slot, it.key_id, it.priority, wait, self._queue
        try:
            found = self._places.enter(*what, mark=it.mark, ahead=ahead)
        except BusyError as exc:
            raise GatewayBusy("The gateway is too busy to take the request. Try again shortly.") from exc
        if isinstance(found, Refusal):
            raise self._refused(name, found.reason, found.wait)
        visit.place, holds = found
        if not holds:
            await self._wait(name, visit, visit.place, wait)
        self._enters(name, visit)

    async def _enter_far(self, far: PostgresQueues, name: str, visit: "Visit", wait: float, *, ahead: bool) -> None:
        """The same in the database. What has a slot there takes one here too, in case that is lost."""
        engine, what = self._engines[name], (visit.exchange, wait, self._queue)
        found = await far.enter(self._names[name], int(self._places.slots[engine]), *what, ahead=ahead)
        if isinstance(found, Refusal):
            raise self._refused(name, found.reason, found.wait)
        visit.spot = found
        if not found.holds:
            await self._wait(name, visit, found, wait)
        with contextlib.suppress(BusyError):
            visit.place = self._places.hold(engine, self._slot)
        self._enters(name, visit)

    def _enters(self, name: str, visit: "Visit") -> None:
        self._held[name] += 1
        visit.engine = name

    async def _wait(self, name: str, visit: "Visit", place: int | Spot, wait: float) -> None:
        """Return once it has a slot there. Raises QueueTimeout or LostError, and it has no place then."""
        loop, since = asyncio.get_running_loop(), time.monotonic()
        self._waiting[place] = future = loop.create_future()
        timer = loop.call_later(wait, _give_up, future)
        visit.since = since
        try:
            in_time = await future and time.monotonic() <= since + wait
        except BaseException:
            self.leave(visit)
            raise
        finally:
            timer.cancel()
            del self._waiting[place]
            visit.since = None
            waited = time.monotonic() - since
            visit.waited += waited
            self._metrics.queued(name, waited)
        if not in_time:
            self.leave(visit)
            raise self._refused(name, "timeout", self._again(name, visit.exchange, wait))

    def _again(self, name: str, it: Exchange, wait: float) -> float:
        try:
            return self._places.again(self._engines[name], it.key_id, it.mark)
        except BusyError:
            return wait

    def leave(self, visit: "Visit") -> None:
        """See Visit.leave."""
        if visit.engine:
            self._held[visit.engine] -= 1
            visit.engine = ""
        place, visit.place = visit.place, NOWHERE
        if place != NOWHERE:
            self._leave(place)
        spot, visit.spot = visit.spot, None
        if spot is not None and self._far is not None:
            self._far.leave(spot)

    def position(self, visit: "Visit") -> int | None:
        """See Visit.position."""
        if visit.since is None:
            return None
        if visit.spot is not None and self._far is not None:
            return self._far.positions.get(visit.spot.id)
        engine, now = visit.place // PLACES, time.monotonic()
        asked_at, ranks = self._ranks.get(engine, (float("-inf"), {}))
        if now > asked_at + FRESH:
            ranks = self._places.positions(engine)
            self._ranks[engine] = now, ranks
        return ranks.get(visit.place)

    def _leave(self, place: int) -> None:
        try:
            self._wake(self._places.leave(place))
        except BusyError:
            asyncio.get_running_loop().call_later(AGAIN, self._leave, place)

    # -- who has got a slot -------------------------------------------------------------------------------------------

    def _wake(self, woken: Woken) -> None:
        for slot, place in woken:
            if slot == self._slot:
                self._arrived(place)
            else:
                self._bell.ring(slot, place)

    def _rung(self) -> None:
        for place in self._bell.heard():
            self._arrived(place)

    def _arrived(self, place: int | Spot) -> None:
        future = self._waiting.get(place)
        holds = place.holds if isinstance(place, Spot) else self._places.holds(place)
        if future is not None and not future.done() and holds:
            future.set_result(True)

    def _lost(self) -> None:
        """Who waits in the database has to do so here."""
        for place, future in self._waiting.items():
            if isinstance(place, Spot) and not future.done():
                future.set_exception(LostError)

    async def _look(self) -> None:
        """What datagrams may have missed, and what others count."""
        while True:
            for name, engine in self._engines.items():
                self._places.know(engine)
                with contextlib.suppress(BusyError):
                    self._wake(self._places.hand_over(engine))
                waiting = sum(_is_at(place, self._names[name], engine) for place in self._waiting)
                self._metrics.slots(name, int(self._places.slots[engine]), self._held[name], waiting)
            for place in list(self._waiting):
                self._arrived(place)
            await asyncio.sleep(LOOK)

    # -- how many slots there are -------------------------------------------------------------------------------------

    async def _ask(self, upstream: Upstream) -> None:
        while True:
            number = None
            with contextlib.suppress(EngineError):
                number = await introspection.ASK[upstream.dialect.name].slots(upstream)
            if number:
                self._has(upstream, min(number, self._set[upstream.name] or number))
            await asyncio.sleep(ASK_AGAIN if number else ASK)

    def _has(self, upstream: Upstream, slots: int) -> None:
        engine = self._engines[upstream.name]
        if self._places.slots[engine] != slots:
            self._places.slots[engine] = slots
            logs.event("engine_slots", {"engine": upstream.name, "slots": slots})

    # -- who can't have one -------------------------------------------------------------------------------------------

    def _refused(self, engine: str, reason: Reason | Literal["timeout"], wait: float) -> StackError:
        self._metrics.turned_away(engine, reason)
        if reason == "full":
            return QueueFull("The queue for the engine is full. Come back when Retry-After says.", wait)
        if reason == "share":
            return QueueShareFull(
                "As many requests of this key wait for the engine as may. Come back when Retry-After says.", wait
            )
        if reason == "deadline":
            return QueueTimeout("The engine is too busy to begin in time. Come back when Retry-After says.", wait)
        return QueueTimeout("The engine was too busy to begin in time. Come back when Retry-After says.", wait)


class Visit:
    """One request's way through the queues. It has one place at most, at one engine at a time."""

    __slots__ = ("_admission", "engine", "exchange", "place", "since", "spot", "waited")

    def __init__(self, admission: Admission, exchange: Exchange) -> None:
        self._admission = admission
        self.exchange = exchange
        self.waited = 0.0  # seconds, in all queues so far
        self.since: float | None = None  # when it began to wait, where it does
        self.place = NOWHERE
        self.spot: Spot | None = None
        self.engine = ""  # whose slot it has

    async def enter(self, upstream: Upstream, *, ahead: bool) -> None:
        """Return once it has a slot there; `leave` must follow. `ahead`: before all who wait, as it has begun already.

        Raises QueueFull, QueueTimeout, QueueShareFull or GatewayBusy, and has none then.
        """
        await self._admission.enter(upstream, self, ahead=ahead)

    def leave(self) -> None:
        """Give back what it has."""
        self._admission.leave(self)

    @property
    def position(self) -> int | None:
        """How many are served before it, counted from 1; None: it doesn't wait."""
        return self._admission.position(self)

    @property
    def milliseconds(self) -> int:
        """For how long it waited so far."""
        waits = time.monotonic() - self.since if self.since is not None else 0.0
        return round((self.waited + waits) * 1000)


def _is_at(place: int | Spot, name: str, engine: int) -> bool:
    return place.engine == name if isinstance(place, Spot) else place // PLACES == engine


def _give_up(future: "asyncio.Future[bool]") -> None:
    if not future.done():
        future.set_result(False)
