"""Admission: give each request a slot of its engine before the engine is asked. Requests wait in a fair queue.

Slots and queue are in memory that the workers share (memory.py), or in PostgreSQL (postgres.py). A request that frees a
slot gives it to the next one in the same step, and wakes that request's worker by a datagram. If the datagram is lost,
the worker finds the slot when it looks again by itself. This file is long because all that enters or leaves a queue
passes here, whichever of the two it is.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from gateway import logs
from gateway.admission.bell import Bell
from gateway.admission.gpu import gpus
from gateway.admission.loading import Loading, several
from gateway.admission.memory import NOWHERE, PLACES, Places, Reason, Refusal, Woken
from gateway.admission.postgres import PostgresQueues
from gateway.admission.queue_errors import refusal
from gateway.admission.swaps import Limit, Loads
from gateway.admission.visit import Spot, Visit
from gateway.config import Config, names_no_models
from gateway.dialects.asking import AskSlots
from gateway.errors import EngineError, GatewayBusy, StackError, unloadable
from gateway.exchange import Exchange
from gateway.metrics import Metrics
from gateway.settings import Settings
from gateway.shared_memory import BusyError
from gateway.store.postgres import LostError
from gateway.upstream.client import Upstream

LOOK = 0.2  # seconds between two looks for waiting requests that have a slot by now
AGAIN = 0.1  # seconds until the gateway tries again to give back a slot
ASK = 1.0  # seconds between questions to an engine that has not reported its slots
ASK_AGAIN = 30.0  # and to an engine that has reported them
FRESH = 0.5  # seconds for which positions in a queue are taken as current

log = logging.getLogger("stack")


class Admission:
    """Admit the requests of one worker. Use it with `async with`."""

    def __init__(
        self,
        settings: Settings,
        config: Config,
        upstreams: Mapping[str, Upstream],
        places: Places,
        seat: int,
        directory: Path,
        metrics: Metrics,
    ) -> None:
        self._places = places
        self._seat = seat
        self._queue = settings.stack_queue
        self._bell = Bell(directory)
        self._metrics = metrics
        self._waiting: dict[int | Spot, tuple[asyncio.Future[bool], Visit]] = {}
        url = settings.store_url  # with PostgreSQL, other gateways may use the same engines
        self._limit = Limit(settings.stack_swap_wait or 0.0, settings.stack_queue_timeout / 2)
        self._gpus = gpus(config, upstreams, places.models, settings.stack_resume_wait)
        self._names = {name: (self._gpus.get(name) or it).known_as for name, it in upstreams.items()}
        shared = {it.known_as for it in self._gpus.values()}
        self._far = PostgresQueues(url, self._arrived, self._lost, self._limit, shared, self._told) if url else None
        swapping = several(config, any_model=names_no_models(settings))
        self._loading = Loading(places, self._far, swapping, self._gpus, self._wake, metrics)
        self._ranks: dict[int, tuple[float, dict[int, int]]] = {}
        self._set = {name: engine.slots for name, engine in config.engines.items()}
        self._upstreams = list(upstreams.values())
        learning = [it for it in self._upstreams if it.dialect.learns_slots and not self._set[it.name]]
        self._most = {it.name: it.dialect.slots for it in learning}  # the most slots that may be learned
        self._asking: list[asyncio.Task[None]] = []
        self._held = dict.fromkeys(upstreams, 0)
        self._queued = dict.fromkeys(upstreams, 0)

    async def __aenter__(self) -> Self:
        # The number of each engine's queue, which several engines of one GPU share, and its own, which has its slots.
        self._engines = {name: await self._number(known_as) for name, known_as in self._names.items()}
        self._own = {it.name: await self._number(it.known_as) for it in self._upstreams}
        for upstream in self._upstreams:
            engine, own = self._engines[upstream.name], self._own[upstream.name]
            if (gpu := self._gpus.get(upstream.name)) is not None:
                gpu.numbers = self._own
                self._places.models.share(engine)
            upstream.wait = partial(self._loading.wait, upstream, engine)
            upstream.load = partial(self._places.load, engine)
            upstream.gpu_state = partial(self._loading.gpu_state, upstream, engine)
            self._places.models.waits[engine], self._places.models.mosts[engine] = self._limit
            if (number := self._set[upstream.name]) or not self._places.slots[own]:
                self._has(upstream, number or upstream.dialect.slots)
            self._places.slots[engine] = self._places.slots[engine] or self._places.slots[own]
        try:
            self._bell.listen(self._seat)
        except OSError as exc:  # usually the path is too long
            log.warning("the workers cannot wake each other, so each one looks every %g s: %s", LOOK, exc)
        asyncio.get_running_loop().add_reader(self._bell, self._rung)
        if self._far is not None:
            await self._far.__aenter__()
        asking = [self._ask(it, ask) for it in self._upstreams if (ask := it.dialect.ask_slots)]
        self._asking = [asyncio.create_task(it) for it in asking]
        self._tasks = [asyncio.create_task(self._look()), *self._asking]
        return self

    def retire(self) -> None:
        """Ask engines for their slots no more. After a reload, the workers of the old configuration still answer
        requests, and the number of an engine's slots may be another one in the new configuration."""
        for task in self._asking:
            task.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._loading.close()
        if self._far is not None:
            await self._far.__aexit__(kind, exc, trace)
        asyncio.get_running_loop().remove_reader(self._bell)
        self._bell.close()

    async def _number(self, name: str) -> int:
        while True:
            with contextlib.suppress(BusyError):
                return self._places.engine(name)
            await asyncio.sleep(AGAIN)

    @property
    def knows_all(self) -> bool:
        """Whether this host counts all requests that gateways send to the engines."""
        return self._far is None

    def visit(self, exchange: Exchange) -> Visit:
        """Return the visit of this request."""
        return Visit(self, exchange)

    async def load(self, upstream: Upstream, model: str, visit: Visit) -> None:
        """See Visit.load."""
        await self._loading.ready(upstream, model, visit)

    def loading(self, visit: Visit) -> float | None:
        """See Visit.loading."""
        return self._loading.left(visit)

    async def enter(self, upstream: Upstream, model: str, visit: Visit, *, resumes: bool) -> None:
        """See Visit.enter."""
        await self._loading.check(upstream, self._engines[upstream.name], model)
        visit.at, visit.model = self._engines[upstream.name], self._loading.number(upstream, model)
        wait = visit.exchange.queue_timeout if resumes else visit.left
        ahead = resumes or visit.returns
        if self._far is not None:
            before = visit.waited
            try:
                await self._enter_far(self._far, upstream.name, visit, wait, ahead=ahead)
            except LostError:
                wait -= visit.waited - before
            else:
                return
        await self._enter_here(upstream.name, visit, wait, ahead=ahead)

    async def _enter_here(self, name: str, visit: Visit, wait: float, *, ahead: bool) -> None:
        engine, it = self._engines[name], visit.exchange
        what = engine, self._seat, it.account, it.priority, wait, self._queue
        try:
            found = self._places.enter(*what, mark=it.mark, ahead=ahead, model=visit.model)
        except BusyError as exc:
            raise GatewayBusy("The gateway is too busy for this request. Try again shortly.") from exc
        if isinstance(found, Refusal):
            raise self._refused(name, found.reason, found.wait, visit)
        visit.place, holds = found
        if not holds:
            await self._wait(name, visit, visit.place, wait)
        self._enters(name, visit)

    async def _enter_far(self, far: PostgresQueues, name: str, visit: Visit, wait: float, *, ahead: bool) -> None:
        """Enter the queue in the database. A request that has a slot there takes one in the host's memory too, in case
        the database is lost."""
        engine, what = self._engines[name], (visit.exchange, wait, self._queue)
        known_as, slots = self._names[name], int(self._places.slots[engine])
        found = await far.enter(known_as, slots, *what, ahead=ahead, model=visit.model)
        if isinstance(found, Refusal):
            raise self._refused(name, found.reason, found.wait, visit)
        visit.spot = found
        if not found.holds:
            await self._wait(name, visit, found, wait)
        with contextlib.suppress(BusyError):
            visit.place = self._places.hold(engine, self._seat)
        self._enters(name, visit)

    def _enters(self, name: str, visit: Visit) -> None:
        self._held[name] += 1
        visit.engine = name

    async def _wait(self, name: str, visit: Visit, place: int | Spot, wait: float) -> None:
        """Return when the place has a slot. Raises QueueTimeout, LoadFailed or LostError; then the visit has none."""
        loop, since = asyncio.get_running_loop(), time.monotonic()
        future: asyncio.Future[bool] = loop.create_future()
        self._waiting[place] = future, visit
        self._queued[name] += 1
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
            self._queued[name] -= 1
            self._metrics.queued(name, visit.has_waited("queue", name, since))
        if not in_time:
            self.leave(visit)
            raise self._refused(name, "timeout", await self._again(name, visit.exchange, place, wait), visit)

    async def _again(self, name: str, it: Exchange, place: int | Spot, wait: float) -> float:
        with contextlib.suppress(LostError, BusyError):
            if self._far is not None and isinstance(place, Spot):
                return await self._far.again(self._names[name], it)
            return self._places.again(self._engines[name], it.account, it.priority, it.mark)
        return wait

    def leave(self, visit: Visit) -> None:
        """See Visit.leave."""
        if visit.engine:
            self._held[visit.engine] -= 1
            visit.engine = ""
        place, visit.place = visit.place, NOWHERE
        served, visit.served = visit.served, True
        if place != NOWHERE:
            self._leave(place, served=served)
        spot, visit.spot = visit.spot, None
        if spot is not None and self._far is not None:
            self._far.leave(spot, served=served)

    def turned_back(self, visit: Visit, *, teaches: bool) -> None:
        """See Visit.turned_back."""
        visit.returns, visit.served, visit.others, visit.learned = True, False, 0, False
        if visit.place == NOWHERE:
            return
        with contextlib.suppress(BusyError):
            visit.learned = teaches and visit.engine in self._most
            visit.others = self._places.lower(visit.place) if visit.learned else self._places.others(visit.place)
            self._places.slots[self._own[visit.engine]] = self._places.slots[self._engines[visit.engine]]

    def position(self, visit: Visit) -> int | None:
        """See Visit.position."""
        if visit.since is None or (visit.spot is None and visit.place == NOWHERE):
            return None
        if visit.spot is not None and self._far is not None:
            return self._far.positions.get(visit.spot.id)
        engine, now = visit.place // PLACES, time.monotonic()
        asked_at, ranks = self._ranks.get(engine, (float("-inf"), {}))
        if now > asked_at + FRESH:
            ranks = self._places.positions(engine)
            self._ranks[engine] = now, ranks
        return ranks.get(visit.place)

    def _leave(self, place: int, *, served: bool) -> None:
        try:
            self._wake(self._places.leave(place, served=served))
        except BusyError:
            asyncio.get_running_loop().call_later(AGAIN, partial(self._leave, place, served=served))

    # -- slots that were given -----------------------------------------------------------------------------------------

    def _wake(self, woken: Woken) -> None:
        for seat, place in woken:
            if seat == self._seat:
                self._arrived(place)
            else:
                self._bell.ring(seat, place)

    def _rung(self) -> None:
        for place in self._bell.heard():
            self._arrived(place)

    def _arrived(self, place: int | Spot) -> None:
        future, _ = self._waiting.get(place, (None, None))
        holds = place.holds if isinstance(place, Spot) else self._places.holds(place)
        if future is not None and not future.done() and holds:
            future.set_result(True)

    def _turn_away(self) -> None:
        """End the waits for models that could not be loaded."""
        wanted = {(visit.at, visit.model) for _, visit in self._waiting.values() if visit.model}
        barred = {it for it in wanted if self._places.models.bars(*it)}
        for future, visit in self._waiting.values() if barred else ():
            if (visit.at, visit.model) in barred and not future.done():
                future.set_exception(unloadable())

    def _lost(self) -> None:
        """Make the requests that wait in the database wait in the host's memory."""
        for place, (future, _) in self._waiting.items():
            if isinstance(place, Spot) and not future.done():
                future.set_exception(LostError)

    def _told(self, known_as: str, loads: Loads) -> None:
        """Have the host's memory know what the database knows of an engine's models."""
        engine = next(self._engines[name] for name, it in self._names.items() if it == known_as)
        with contextlib.suppress(BusyError):
            self._wake(self._places.tell(engine, loads))

    async def _look(self) -> None:
        """Find slots whose datagram was lost, learn the number of slots, and update the metrics."""
        while True:
            for upstream in self._upstreams:
                name = upstream.name
                engine, own, waiting = self._engines[name], self._own[name], self._queued[name]
                self._places.know(engine)
                self._places.know(own)
                with contextlib.suppress(BusyError):
                    if name in self._most and self._loading.serves(upstream, engine):
                        self._places.lift(engine, self._most[name], waiting=self._far is not None and waiting > 0)
                        self._places.slots[own] = self._places.slots[engine]
                    self._wake(self._places.hand_over(engine))
                self._metrics.slots(name, int(self._places.slots[own]), self._held[name], waiting)
            for place in list(self._waiting):
                self._arrived(place)
            self._turn_away()
            await asyncio.sleep(LOOK)

    # -- how many slots there are -------------------------------------------------------------------------------------

    async def _ask(self, upstream: Upstream, ask: AskSlots) -> None:
        while True:
            number = None
            with contextlib.suppress(EngineError):
                number = await ask(upstream)
            if number:
                self._has(upstream, min(number, self._set[upstream.name] or number))
            await asyncio.sleep(ASK_AGAIN if number else ASK)

    def _has(self, upstream: Upstream, slots: int) -> None:
        own = self._own[upstream.name]
        if self._places.slots[own] != slots:
            self._places.slots[own] = slots
            logs.event("engine_slots", {"engine": upstream.name, "slots": slots})

    def _refused(self, engine: str, reason: Reason | Literal["timeout"], wait: float, visit: Visit) -> StackError:
        self._metrics.turned_away(engine, reason)
        return refusal(reason, wait, absent=self._places.models.due(visit.at, visit.model, time.monotonic()) > 0)


def _give_up(future: "asyncio.Future[bool]") -> None:
    if not future.done():
        future.set_result(False)
