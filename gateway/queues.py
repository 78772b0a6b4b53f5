"""Queues: slots and queues of engines in PostgreSQL, one over any number of gateways; a round trip for each place.

The functions there (migration 0007) do the arithmetic of places.py, under a lock of the engine's row. Who frees a slot
hands it over in the same transaction, and the database tells that one's worker (NOTIFY). A worker shows every two
seconds that it lives; what one has that is silent for PATIENCE goes to others.

While the database can't be used, each host counts for itself, and afterwards what runs is told to it.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, cast

from gateway.database import AGAIN, BEAT, LOST, PATIENCE, Connection, Database
from gateway.exchange import Exchange
from gateway.places import Reason, Refusal

LOOK = 1.0  # seconds between two looks at who has got a slot meanwhile

_ENTER = "SELECT * FROM stack_enter(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)"
_HELD = """INSERT INTO queue_places (engine, owner, key_id, held, tag, cost, since, until)
    VALUES (%s, %s, %s, true, 0, 0, extract(epoch FROM clock_timestamp()), 0) RETURNING id"""
_STAND = """SELECT id, held, place FROM (
    SELECT id, owner, held, rank() OVER (PARTITION BY engine, held ORDER BY tag, since, id) AS place FROM queue_places
) a WHERE owner = %s"""

log = logging.getLogger("stack")


class LostError(Exception):
    """The database can't be used."""


@dataclass(eq=False, slots=True)
class Spot:
    """A place there."""

    engine: str
    key_id: str
    id: int
    owner: str
    holds: bool


class PostgresQueues:
    """The queues as one worker uses them. Use it with `async with`. `woken` is told which spot has got a slot, `lost`
    that all who wait have to do so elsewhere."""

    def __init__(self, url: str, woken: Callable[[Spot], None], lost: Callable[[], None]) -> None:
        self._database = Database(url, "-c synchronous_commit=off", spare=True)
        self._woken = woken
        self._on_lost = lost
        self._owner = ""  # this worker's name there, another one after each loss; none while it is lost
        self._spots: dict[int, Spot] = {}
        self._entering = 0  # how many are being told where they are
        self._early: set[int] = set()  # were woken before it was known here that they wait
        self._leaving: set[asyncio.Task[None]] = set()
        self.positions: dict[int, int] = {}
        self._trouble = False

    async def __aenter__(self) -> Self:
        await self._attend()
        self._task = asyncio.create_task(self._work())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, *self._leaving, return_exceptions=True)
        if self._owner:
            with contextlib.suppress(*LOST):
                gone = "DELETE FROM account_owners WHERE id = %s", (self._owner,)
                await self._database.ask(self._database.connection().execute(*gone))
        await self._database.close()

    async def enter(
        self, engine: str, slots: int, it: Exchange, wait: float, queue: int, *, ahead: bool
    ) -> Spot | Refusal:
        """See Places.enter. Raises LostError."""
        owner = self._owner
        if not owner:
            raise LostError
        what = (engine, slots, owner, self._database.now(), PATIENCE, it.key_id, f"{it.key_id} {it.mark}", it.priority)
        asked = self._enter((*what, wait, queue, ahead), engine, it.key_id, owner)
        try:
            found = await self._database.ask(asked, late=self._too_late)
        except LOST as exc:
            if owner == self._owner:  # else that is known already
                self._lose(exc)
            raise LostError from exc
        if owner != self._owner and isinstance(found, Spot) and not found.holds:
            raise LostError  # nobody would hand it a slot
        return found

    def leave(self, spot: Spot) -> None:
        """See Places.leave."""
        self._spots.pop(spot.id, None)
        self.positions.pop(spot.id, None)
        if self._owner and spot.owner == self._owner:
            leaving = asyncio.create_task(self._leave(spot))
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)

    async def _enter(self, what: tuple[Any, ...], engine: str, key_id: str, owner: str) -> Spot | Refusal:
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
        spot = Spot(engine, key_id, place, owner, has_slot)
        if owner == self._owner:
            self._spots[place] = spot
        return spot

    async def _leave(self, spot: Spot) -> None:
        try:
            what = (spot.id, self._database.now(), PATIENCE)
            await self._database.ask(self._database.connection().execute("SELECT stack_leave(%s, %s, %s)", what))
        except LOST as exc:
            if spot.owner == self._owner:
                self._lose(exc)

    def _too_late(self, task: asyncio.Task[Spot | Refusal]) -> None:
        """Nobody waits for that place any more."""
        if not task.cancelled() and task.exception() is None and isinstance(spot := task.result(), Spot):
            self.leave(spot)

    # -- the database -------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        looked = 0.0
        while True:
            await asyncio.sleep(LOOK if self._owner else AGAIN)
            if not self._owner or time.monotonic() >= looked + BEAT:
                looked = time.monotonic()
                await self._attend()
            if self._owner and any(not it.holds for it in self._spots.values()):
                await self._look()

    async def _attend(self) -> None:
        owner = self._owner
        try:
            await self._database.ask(self._database.beat(owner) if owner else self._connect())
        except LOST as exc:
            self._lose(exc)
        except Exception as exc:
            log.exception("a bug in the queues")
            self._lose(exc)

    async def _connect(self) -> None:
        """Begin anew, under another name; what runs is told under it."""
        database, owner = self._database, secrets.token_hex(8)
        await database.connect()
        await database.beat(owner)
        held, self._spots = [it for it in self._spots.values() if it.holds], {}
        for it in held:
            cursor = await database.connection().execute(_HELD, (it.engine, owner, it.key_id))
            (it.id,) = await cursor.fetchone() or (0,)
            it.owner = owner
            self._spots[it.id] = it
        await database.spare.execute(f"LISTEN stack_{owner}")
        database.begin(self._listen(database.spare, owner))
        self._owner = owner
        if self._trouble:
            log.info("the queues' database can be used again")
        self._trouble = False

    async def _listen(self, connection: Connection, owner: str) -> None:
        try:
            async for told in connection.notifies():
                self._arrived(int(told.payload))
        except LOST as exc:
            if owner == self._owner:
                self._lose(exc)

    async def _look(self) -> None:
        """What notifications may have missed, and where the others stand."""
        owner = self._owner
        try:
            rows = await self._database.ask(self._stand(owner))
        except LOST as exc:
            if owner == self._owner:
                self._lose(exc)
            return
        self.positions = {number: place for number, holds, place in rows if not holds}
        for number, holds, _ in rows:
            if holds and number in self._spots:
                self._arrived(number)

    async def _stand(self, owner: str) -> list[tuple[Any, ...]]:
        for engine in {it.engine for it in self._spots.values() if not it.holds}:
            what = (engine, self._database.now(), PATIENCE)
            await self._database.connection().execute("SELECT stack_hand_over(%s, %s, %s)", what)
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

    def _lose(self, exc: BaseException) -> None:
        if not self._trouble:
            log.error("the queues' database can't be used, each host counts for itself: %s", exc)
        self._trouble = True
        self._owner = ""
        self._early.clear()
        self.positions.clear()
        self._spots = {number: it for number, it in self._spots.items() if it.holds}
        self._database.give_up()
        self._on_lost()
