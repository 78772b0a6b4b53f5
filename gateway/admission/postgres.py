"""Queues: slots and queues of engines in PostgreSQL, one over any number of gateways; a round trip for each place.

The functions there (store/functions.sql) do the arithmetic of memory.py, under a lock of the engine's row. Who frees a
slot hands it over in the same transaction, and the database tells that one's worker (NOTIFY). A worker shows every two
seconds that it lives; what one has that is silent for PATIENCE goes to others.

While the database can't be used, each host counts for itself, and afterwards what runs is told to it.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Coroutine
from functools import partial
from types import TracebackType
from typing import Any, LiteralString, Self, cast

import orjson

from gateway.admission import swaps
from gateway.admission.memory import UNKNOWN, Reason, Refusal
from gateway.admission.swaps import EXCLUSIVE, UNSET, Limit, Loads, Waiting
from gateway.admission.visit import Spot
from gateway.exchange import Exchange
from gateway.store.postgres import AGAIN, BEAT, LOST, PATIENCE, Connection, Database, LostError, Member

LOOK = 1.0  # seconds between two looks for waiting requests that have a slot by now

_ENTER = "SELECT * FROM stack_enter(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)"
_HELD = """INSERT INTO queue_places (engine, owner, key_id, held, tag, cost, since, until)
    VALUES (%s, %s, %s, true, 0, 0, extract(epoch FROM clock_timestamp()), 0) RETURNING id"""
_STAND = """SELECT id, held, place FROM (
    SELECT id, owner, held, rank() OVER (PARTITION BY engine, held ORDER BY tag, since, id) AS place FROM queue_places
) a WHERE owner = %s"""

_LOADS = "SELECT loads::text, extract(epoch FROM clock_timestamp()) FROM queue_engines WHERE name = %s"
_KEEP = """INSERT INTO queue_engines (name, loads) VALUES (%s, %s::jsonb)
    ON CONFLICT (name) DO UPDATE SET loads = excluded.loads, target = 0
        WHERE queue_engines.loads::text IS NOT DISTINCT FROM %s"""
_EXCLUSIVE = """INSERT INTO queue_engines (name, loads) VALUES (%s, %s::jsonb)
    ON CONFLICT (name) DO UPDATE SET loads = excluded.loads
        WHERE NOT coalesce((queue_engines.loads->>'exclusive')::boolean, false)"""
_TARGET = "UPDATE queue_engines SET target = %s WHERE name = %s AND loads::text = %s AND target <> %s"
_WANTED = """SELECT loads::text, extract(epoch FROM clock_timestamp()), virtual, seconds / slots,
    EXISTS (SELECT FROM queue_places WHERE engine = name AND held),
    (SELECT coalesce(json_agg(json_build_array(model, tag, since)), '[]') FROM queue_places
        WHERE engine = name AND NOT held AND until > extract(epoch FROM clock_timestamp()))
    FROM queue_engines WHERE name = %s AND (loads->>'scarce')::boolean"""
_HAND_OVER = "SELECT stack_hand_over(%s, %s, %s)"
_AGAIN = "SELECT stack_again(%s, %s, %s, %s)"
_LEAVE = "SELECT stack_leave(%s, %s, %s, %s)"


class PostgresQueues:
    """Use the queues on behalf of one worker. Use it with `async with`.

    `woken` is called with each spot that gets a slot. `lost` is called when all waiting requests must wait elsewhere,
    because the database is lost. `exclusive`: the queues whose models never fit together. `told` is called with what an
    engine has loaded, by the host's clock (time.monotonic), whenever the database was asked for that.
    """

    def __init__(
        self,
        url: str,
        woken: Callable[[Spot], None],
        lost: Callable[[], None],
        limit: Limit = UNSET,
        exclusive: Collection[str] = (),
        told: Callable[[str, Loads], None] = lambda _, __: None,
    ) -> None:
        self._database = Database(url, "-c synchronous_commit=off", spare=True)
        self._woken = woken
        self._on_lost = lost
        self._limit = limit
        self._exclusive = exclusive
        self._told = told
        self._member = Member(self._database, "queues", self._joined, self._lost)
        self._spots: dict[int, Spot] = {}
        self._entering = 0  # requests that are entering: the database has not answered them yet
        self._early: set[int] = set()  # spots that got a slot before this worker knew that they wait
        self._background: set[asyncio.Task[None]] = set()
        self.positions: dict[int, int] = {}

    async def __aenter__(self) -> Self:
        await self._attend()
        self._task = asyncio.create_task(self._work())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, *self._background, return_exceptions=True)
        if self._member.owner:
            with contextlib.suppress(*LOST):
                await self._database.ask(self._database.forget(self._member.owner))
        await self._database.close()

    async def enter(
        self, engine: str, slots: int, it: Exchange, wait: float, queue: int, *, ahead: bool, model: int = 0
    ) -> Spot | Refusal:
        """See Places.enter. Raises LostError."""
        owner = self._member.owner
        whose = it.account, f"{it.account} {it.mark}", it.priority
        what = (engine, slots, owner, self._database.now(), PATIENCE, *whose, wait, queue, ahead, model, *self._limit)
        spot = Spot(engine, it.key_id, 0, owner, holds=False, model=model)
        refused = await self._member.ask(self._enter(what, spot), late=lambda task: self._too_late(task, spot))
        if refused:
            if model:
                await self.loads(engine)
            return refused
        if not spot.holds:
            if owner != self._member.owner:
                raise LostError  # the spot waits under an owner that is gone, so it would never get a slot
            if model:
                self._soon(self._decide(engine))
        return spot

    async def again(self, engine: str, it: Exchange) -> float:
        """See Places.again. Raises LostError."""
        return await self._member.ask(self._again((engine, it.key_id, f"{it.account} {it.mark}", it.priority)))

    async def _again(self, what: tuple[Any, ...]) -> float:
        cursor = await self._database.connection().execute(_AGAIN, what)
        (after,) = await cursor.fetchone() or (AGAIN,)
        return float(after)

    def leave(self, spot: Spot, *, served: bool = True) -> None:
        """See Places.leave."""
        self._spots.pop(spot.id, None)
        self.positions.pop(spot.id, None)
        if self._member.owner and spot.owner == self._member.owner:
            self._soon(self._leave(spot, served=served))

    def _soon(self, what: Coroutine[Any, Any, None]) -> None:
        """Do something for which no request waits, because a request that is cancelled meanwhile would not leave."""
        task = asyncio.create_task(what)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _enter(self, what: tuple[Any, ...], spot: Spot) -> Refusal | None:
        self._entering += 1
        try:
            cursor = await self._database.connection().execute(_ENTER, what)
            place, has_slot, reason, after = await cursor.fetchone() or (None, False, "full", AGAIN)
            has_slot = has_slot or place in self._early
        finally:
            self._entering -= 1
            if not self._entering:
                self._early.clear()
        if place is None:
            return Refusal(cast("Reason", reason), after)
        spot.id, spot.holds = place, has_slot
        if spot.owner == self._member.owner:
            self._spots[place] = spot
        return None

    async def _leave(self, spot: Spot, *, served: bool) -> None:
        what = (spot.id, self._database.now(), PATIENCE, served)
        with contextlib.suppress(LostError):
            await self._member.ask(self._run(_LEAVE, what))
        if spot.model and any(it.engine == spot.engine and not it.holds for it in self._spots.values()):
            await self._decide(spot.engine)

    async def _run(self, query: LiteralString, what: tuple[Any, ...]) -> None:
        await self._database.connection().execute(query, what)

    def _too_late(self, task: asyncio.Task[Refusal | None], spot: Spot) -> None:
        """Give back a spot for which the request no longer waits."""
        if not task.cancelled() and task.exception() is None and task.result() is None:
            self.leave(spot)

    # -- models that are loaded ---------------------------------------------------------------------------------------

    async def loads(self, engine: str) -> Loads:
        """Return what the engine has loaded. Raises LostError."""
        loads, now, _ = await self._member.ask(self._loads(engine))
        self._tell(engine, loads, now)
        return loads

    async def loaded(
        self, engine: str, model: int, there: Collection[int], after: Collection[int], took: float, *, failed: bool
    ) -> None:
        """See Places.loaded. Raises LostError."""
        change = partial(Loads.ended, model=model, there=there, after=after, took=took, failed=failed)
        await self._member.ask(self._keep(engine, lambda it, now: change(it, now=now)))

    async def looked(self, engine: str, seen: Loads, after: Collection[int]) -> None:
        """See Places.looked. Raises LostError."""
        await self._member.ask(self._keep(engine, lambda it, _: it.seen(after) if it == seen else it))

    async def _loads(self, engine: str) -> tuple[Loads, float, str | None]:
        """Return what the engine has loaded, the database's time, and what is stored."""
        cursor = await self._database.connection().execute(_LOADS, (engine,))
        stored, now = await cursor.fetchone() or (None, 0.0)
        return Loads.parse(orjson.loads(stored)) if stored else Loads(), float(now), stored

    async def _keep(self, engine: str, change: Callable[[Loads, float], Loads]) -> None:
        """Store what `change` makes of the engine's loads. Another worker may change them between the two queries, and
        then this one begins again."""
        changed = 0
        while not changed:
            loads, now, stored = await self._loads(engine)
            what = engine, change(loads, now).dump().decode(), stored
            changed = (await self._database.connection().execute(_KEEP, what)).rowcount
        await self._hand_over(engine)

    def _tell(self, engine: str, loads: Loads, now: float) -> None:
        self._told(engine, loads.moved(time.monotonic() - now))

    async def _decide(self, engine: str) -> None:
        with contextlib.suppress(LostError):
            await self._member.ask(self._hand_over(engine))

    async def _hand_over(self, engine: str) -> None:
        """Give free slots to waiting requests. If not all models of the engine fit, decide first which is next."""
        cursor = await self._database.connection().execute(_WANTED, (engine,))
        if (row := await cursor.fetchone()) is not None:
            stored, now, virtual, pace, busy, wanted = row
            loads, waiting = Loads.parse(orjson.loads(stored)), [Waiting(*it) for it in wanted]
            how = {"busy": busy, "virtual": virtual, "pace": pace or UNKNOWN, "limit": self._limit}
            self._tell(engine, loads, float(now))
            target = swaps.decide(loads, waiting, float(now), **how)
            await self._database.connection().execute(_TARGET, (target, engine, stored, target))
        await self._database.connection().execute(_HAND_OVER, (engine, self._database.now(), PATIENCE))

    # -- the database -------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        looked = 0.0
        while True:
            await asyncio.sleep(LOOK if self._member.owner else AGAIN)
            if not self._member.owner or time.monotonic() >= looked + BEAT:
                looked = time.monotonic()
                await self._attend()
            if self._member.owner and any(not it.holds for it in self._spots.values()):
                await self._look()

    async def _attend(self) -> None:
        await self._member.attend(self._database.beat)

    async def _joined(self, owner: str) -> None:
        """Tell the database what runs, under the new name. What ends meanwhile leaves afterwards."""
        database = self._database
        for name in self._exclusive:
            await database.connection().execute(_EXCLUSIVE, (name, EXCLUSIVE.dump().decode()))
        held, numbers = [it for it in self._spots.values() if it.holds], list[int]()
        for it in held:
            cursor = await database.connection().execute(_HELD, (it.engine, owner, it.key_id))
            numbers += await cursor.fetchone() or (0,)
        await database.spare.execute(f"LISTEN stack_{owner}")
        database.begin(self._listen(database.spare, owner))
        # Nothing waits from here on. After a failure before, the next attempt finds the spots as they were.
        self._member.owner = owner
        ended = [it for it in held if it.id not in self._spots]
        self._spots = {}
        for it, number in zip(held, numbers, strict=True):
            it.id, it.owner = number, owner
            self._spots[number] = it
        for it in ended:
            self.leave(it, served=False)

    async def _listen(self, connection: Connection, owner: str) -> None:
        try:
            async for told in connection.notifies():
                self._arrived(int(told.payload))
        except LOST as exc:
            self._member.lose(exc, owner)

    async def _look(self) -> None:
        """Find the slots whose notification was lost, and the positions of the waiting requests."""
        try:
            rows = await self._member.ask(self._stand(self._member.owner))
        except LostError:
            return
        self.positions = {number: place for number, holds, place in rows if not holds}
        for number, holds, _ in rows:
            if holds and number in self._spots:
                self._arrived(number)

    async def _stand(self, owner: str) -> list[tuple[Any, ...]]:
        for engine in {it.engine for it in self._spots.values() if not it.holds}:
            await self._hand_over(engine)
        return await (await self._database.connection().execute(_STAND, (owner,))).fetchall()

    def _arrived(self, number: int) -> None:
        spot = self._spots.get(number)
        if spot is None:
            if self._entering:
                self._early.add(number)
        elif not spot.holds:
            spot.holds = True
            self.positions.pop(number, None)
            self._woken(spot)

    def _lost(self) -> None:
        self._early.clear()
        self.positions.clear()
        self._spots = {number: it for number, it in self._spots.items() if it.holds}
        self._on_lost()
