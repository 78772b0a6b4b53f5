"""Replicas: accounts in PostgreSQL, exact over any number of gateways, one round trip for each admission.

The functions there (migration 0004) do the arithmetic, under a lock of the key's row. Time is a clock of the replicas'
own: see stack_beat. A worker shows every two seconds that it lives; of one that is silent for PATIENCE, the requests in
progress no longer count, and the tokens set aside for them stay charged.

While the database can't be used, each host goes on by itself in its shared memory: with full buckets, and with quotas
as this worker last saw them. Afterwards what was used meanwhile is added to the quotas.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections import Counter, OrderedDict
from functools import partial
from types import TracebackType
from typing import Any, LiteralString, Self

from gateway.accounts import Accounts, SharedBook
from gateway.database import AGAIN, BEAT, LOST, PATIENCE, WAIT, Database
from gateway.errors import GatewayBusy
from gateway.estimates import Estimate
from gateway.keybook import Limits
from gateway.keys import Key
from gateway.limits import MINUTE, Lease, Period, State, free, refusal

REMEMBERED = 4096  # keys whose state is kept, for headers and outages

_ADMIT = "SELECT * FROM stack_admit(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)"
_SETTLE = "SELECT stack_settle(%s, %s, %s, %s, %s, %s, %s)"

log = logging.getLogger("stack")

Row = tuple[Any, ...]


class PostgresBook:
    """The accounts as one worker uses them. Use it with `async with`."""

    def __init__(self, url: str, accounts: Accounts, slot: int) -> None:
        self._database = Database(url)
        self._local = SharedBook(accounts, slot, self._last_known, remember=False)
        self._owner = ""  # this worker's name in the database, another one after each loss; none while it is lost
        self._beat_at = float("-inf")
        self._active: Counter[str] = Counter()  # requests in progress by key that the database knows of
        self._states: OrderedDict[str, tuple[Period, State]] = OrderedDict()
        # What is to be settled by key, owner, day and month: tokens, seconds, requests. See stack_settle.
        self._pending: dict[tuple[str, str, int, int], tuple[int, float, int]] = {}
        self._wake = asyncio.Event()
        self._told = asyncio.Event()  # what is pending
        self._trouble = False

    async def __aenter__(self) -> Self:
        await self._attend()
        self._task = asyncio.create_task(self._work())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if self._owner:
            await self._attend()
        await self._database.close()

    async def admit(self, key: Key, estimate: Estimate) -> Lease:
        """See limits.Book."""
        if key.limits == Limits():
            return free(estimate)
        if owner := self._owner:
            try:
                return await self._database.ask(self._admit(key, estimate, owner), late=_give_back)
            except LOST as exc:
                if owner == self._owner:  # else that is known already
                    self._lose(exc)
        period = Period.of(time.time())
        lease = await self._local.admit(key, estimate)

        def settle(more: int) -> None:
            lease.settle(estimate.tokens + more)
            self._settle(key, period, estimate.tokens + more, 0, counted=False)

        return Lease(key.limits, estimate, lease.state, settle)

    async def _admit(self, key: Key, estimate: Estimate, owner: str) -> Lease:
        limits, period = key.limits, Period.of(time.time())
        cursor = await self._database.connection().execute(
            _ADMIT,
            (
                *(key.id, owner, self._database.now(), PATIENCE, *period, period.starts()[1] * 1000, estimate.tokens),
                *(limits.requests_per_minute, limits.tokens_per_minute, limits.concurrent),
                *(limits.tokens_per_day, limits.tokens_per_month),
            ),
        )
        admitted, *numbers = await cursor.fetchone() or ()
        state = State(*numbers)
        self._database.heard(state.now)
        self._remember(key.id, period, state)
        if not admitted:
            raise refusal(limits, state, estimate) or GatewayBusy("The limits could not be read. Try again shortly.")
        counted = owner == self._owner  # else the database was lost meanwhile, and with it the owner
        if counted:
            self._active[key.id] += 1

        def settle(more: int) -> None:
            delay = more * MINUTE / limits.tokens_per_minute if limits.tokens_per_minute else 0.0
            self._settle(key, period, more, delay, counted=counted)

        return Lease(limits, estimate, partial(self._state, key.id, state), settle, self._known)

    def _settle(self, key: Key, period: Period, more: int, delay: float, *, counted: bool) -> None:
        """A request is over: to be told to the database. `counted`: it is one of those in progress there."""
        if counted:
            self._active[key.id] -= 1
        ended = int(counted and self._owner != "")
        what = (key.id, self._owner if counted else "", *period)
        tokens, seconds, requests = self._pending.get(what, (0, 0.0, 0))
        self._pending[what] = (tokens + more, seconds + delay, requests + ended)
        if (found := self._states.get(key.id)) is not None:
            spent = found[1].day_tokens + more, found[1].month_tokens + more
            full = found[1].tokens_full + delay
            known = found[1]._replace(tokens_full=full, day_tokens=spent[0], month_tokens=spent[1])
            self._states[key.id] = (found[0], known)
        self._wake.set()

    async def _known(self) -> None:
        """Wait until the database was told what is to be told by now."""
        if self._owner:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WAIT):
                    await self._told.wait()

    # -- what is known here -------------------------------------------------------------------------------------------

    def _remember(self, key_id: str, period: Period, state: State) -> None:
        self._states[key_id] = (period, state)
        self._states.move_to_end(key_id)
        if len(self._states) > REMEMBERED:
            self._states.popitem(last=False)

    def _state(self, key_id: str, state: State) -> State:
        """A key's account now, as far as this worker knows."""
        _, known = self._states.get(key_id, (None, state))
        return known._replace(now=self._database.now())

    async def _last_known(self, key_id: str, since: int, until: int) -> int:
        """What of the quotas was spent, before the database was lost."""
        del until
        period, state = self._states.get(key_id, (None, None))
        if period is None or state is None:
            return 0
        day, month = (start * 1000 for start in period.starts())
        return {day: state.day_tokens, month: state.month_tokens}.get(since, 0)

    # -- the database -------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        while True:
            await self._attend()
            pause = BEAT if self._owner else AGAIN
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wake.wait()
            if not self._owner:
                await asyncio.sleep(AGAIN)

    async def _attend(self) -> None:
        """Tell the database what is to be told: whatever may have happened to it."""
        self._wake.clear()
        try:
            await self._database.ask(self._tell(self._owner) if self._owner else self._connect())
        except LOST as exc:
            self._lose(exc)
        except Exception as exc:
            log.exception("a bug in the limits")
            self._lose(exc)

    async def _connect(self) -> None:
        """Begin anew, under another name: what was under way as the old one counts no longer, whatever became of it."""
        owner = secrets.token_hex(8)
        await self._database.connect()
        await self._beat(owner)
        leases = [(key_id, owner, active) for key_id, active in self._active.items() if active]
        self._owner = owner  # what is settled from here on is settled of these
        await self._each("INSERT INTO account_leases VALUES (%s, %s, %s)", leases)
        if self._trouble:
            log.info("the limits' database can be used again")
        self._trouble = False

    async def _tell(self, owner: str) -> None:
        if time.monotonic() >= self._beat_at + BEAT:
            await self._beat(owner)
        if self._pending:
            pending, self._pending = self._pending, {}  # if this fails, nobody knows whether it happened
            told, self._told = self._told, asyncio.Event()
            try:
                # In the order of keys: two who lock several rows must not wait for each other.
                await self._each(_SETTLE, sorted((*what, *much) for what, much in pending.items()))
            finally:
                told.set()
            self._active = +self._active

    async def _beat(self, owner: str) -> None:
        self._beat_at = time.monotonic()
        await self._database.beat(owner)

    async def _each(self, query: LiteralString, rows: list[Row]) -> None:
        async with self._database.connection().cursor() as cursor:
            await cursor.executemany(query, rows)

    def _lose(self, exc: BaseException) -> None:
        if not self._trouble:
            log.error("the limits' database can't be used, each host goes on by itself: %s", exc)
        self._trouble = True
        self._owner = ""
        self._told.set()
        self._told = asyncio.Event()
        self._wake.set()
        self._database.give_up()


def _give_back(asking: asyncio.Task[Lease]) -> None:
    if not asking.cancelled() and asking.exception() is None:
        asking.result().settle(0)
