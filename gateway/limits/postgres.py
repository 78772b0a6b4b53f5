"""Replicas: keep accounts in PostgreSQL, exact over any number of gateways, with one round trip per admission.

The round trip is made when a request is understood, with its tokens. Before the body is read, the host's own memory
decides (limits/memory.py). That memory counts the requests of this host, which are never more than those of all hosts.
A key that the database has just found empty is refused for a second.

Functions in the database (store/functions.sql) do the arithmetic, under a lock of the key's row. Time is a clock of the
gateways' own: see stack_beat. Every two seconds a worker shows that it lives. If a worker is silent for PATIENCE, its
requests in progress no longer count, and the tokens that they had reserved stay charged.

While the database is unreachable, each host counts by itself in its memory, with a full bucket of tokens, and with the
quotas that it saw last. Afterwards the usage of that time is added to the quotas.
"""

import asyncio
import contextlib
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, LiteralString, NamedTuple, Self

from gateway.errors import GatewayBusy, StackError
from gateway.keys.known import Key
from gateway.limits.estimates import Estimate
from gateway.limits.memory import Accounts, SharedBook, SharedLease
from gateway.limits.near import Near
from gateway.limits.rules import MINUTE, TURN, Headers, Lease, Period, State, headers, refusal
from gateway.store.postgres import AGAIN, BEAT, PATIENCE, WAIT, Database, LostError, Member

REMEMBERED = 4096  # keys whose state a worker keeps, for headers
SKEW = 0.05  # seconds by which a worker's clock may be behind another one's, because each hears of the other's late
REFUSED = 1.0  # seconds for which a key that has nothing left is refused

_CHARGE = "SELECT * FROM stack_charge(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)"
_SETTLE = "SELECT stack_settle(%s, %s, %s, %s, %s, %s, %s)"

Row = tuple[Any, ...]


class PostgresBook:
    """Use the accounts in PostgreSQL as one worker. Use it with `async with`."""

    memory = "postgresql"  # see limits.Book

    def __init__(self, url: str, accounts: Accounts, seat: int, near: Near | None = None) -> None:
        self._database = Database(url)
        self._local = SharedBook(accounts, seat, _nothing, near=near, skew=SKEW)
        self._member = Member(self._database, "limits", self._joined, self._lost)
        self._beat_at = float("-inf")
        self._active: Counter[str] = Counter()  # running requests by key, as far as the database knows of them
        self._states: OrderedDict[str, State] = OrderedDict()
        # Of keys that had nothing left, with nothing in progress.
        self._exhausted: OrderedDict[str, State] = OrderedDict()
        # What has to be settled, by key, owner, day and month: tokens, seconds, requests. See stack_settle.
        self._pending: dict[tuple[str, str, int, int], tuple[int, float, int]] = {}
        self._wake = asyncio.Event()
        self._told = asyncio.Event()  # set when the database has the pending settlements
        self._telling = asyncio.Event()  # the same, of those that it is told now, or was told last
        self._telling.set()

    async def __aenter__(self) -> Self:
        await self._attend()
        self._task = asyncio.create_task(self._work())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if self._member.owner:
            await self._attend()
        await self._database.close()

    async def enter(self, key: Key, seconds: float = TURN, *, replay: bool = False, goes_on: bool = False) -> Lease:
        """See limits.Book."""
        if self._member.owner and not (replay or goes_on) and (error := self._known_refusal(key)) is not None:
            raise error
        # While the database is available, it decides what is left of the tokens.
        tokens = not (goes_on or self._member.owner)
        lease = await self._local.enter(key, seconds, replay=replay, tokens=tokens)
        return _PostgresLease(self, key, lease) if isinstance(lease, SharedLease) else lease

    def _known_refusal(self, key: Key) -> StackError | None:
        state = self._exhausted.get(key.id)
        if state is None:
            return None
        now = self._database.now()
        error = refusal(key.limits, state._replace(now=now), 1, skew=SKEW) if now < state.now + REFUSED else None
        if error is None:
            del self._exhausted[key.id]
        return error

    async def charge(self, lease: "_PostgresLease", estimate: Estimate) -> "_Charge | None":
        """Charge an entered request in the database; None if the database is unavailable."""
        with contextlib.suppress(LostError):
            return await self._member.ask(self._charge(lease, estimate, self._member.owner), late=_give_back)
        return None

    async def _charge(self, lease: "_PostgresLease", estimate: Estimate, owner: str) -> "_Charge":
        key, period = lease.key, lease.period
        limits = key.limits
        cursor = await self._database.connection().execute(
            _CHARGE,
            (
                *(key.id, owner, self._database.now(), PATIENCE, *period, period.starts()[1] * 1000, estimate.tokens),
                *(limits.requests_per_minute, limits.tokens_per_minute, limits.concurrent),
                *(limits.tokens_per_day, limits.tokens_per_month),
            ),
        )
        admitted, day, month, *numbers = await cursor.fetchone() or ()
        state = State(*numbers)
        counted_in = Period(day, month)
        self._database.heard(state.now)
        self._remember(lease, state)
        if not admitted:
            if not state.active and refusal(limits, state, 1) is not None:
                _keep(self._exhausted, key.id, state)
            raise refusal(limits, state, estimate.tokens, skew=SKEW) or GatewayBusy(
                "The limits could not be read. Try again shortly."
            )
        counted = owner == self._member.owner  # otherwise the database, and with it the owner, was lost meanwhile
        if counted:
            self._active[key.id] += 1

        def settle(tokens: int) -> None:
            more = tokens - estimate.tokens
            delay = more * MINUTE / limits.tokens_per_minute if limits.tokens_per_minute else 0.0
            self.settle(key, counted_in, more, delay, counted=counted)

        return _Charge(settle, partial(self._state, key.id, state))

    def settle(self, key: Key, period: Period, more: int, delay: float, *, counted: bool) -> None:
        """Note that a request has ended, so that the database is told. `counted`: the database counts it as running."""
        if counted:
            self._active[key.id] -= 1
        ended = int(counted and self._member.owner != "")
        what = (key.id, self._member.owner if counted else "", *period)
        tokens, seconds, requests = self._pending.get(what, (0, 0.0, 0))
        self._pending[what] = (tokens + more, seconds + delay, requests + ended)
        if (found := self._states.get(key.id)) is not None:
            self._states[key.id] = found._replace(tokens_full=found.tokens_full + delay)
        self._wake.set()

    async def known(self) -> None:
        """Wait until the database has everything that is pending now, or that it is just told."""
        if self._member.owner:
            told = self._told if self._pending else self._telling
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WAIT):
                    await told.wait()

    # -- what is known here -------------------------------------------------------------------------------------------

    def _remember(self, lease: "_PostgresLease", state: State) -> None:
        _keep(self._states, lease.key.id, state)
        self._local.learn(lease.here, lease.period, state)

    def _state(self, key_id: str, state: State) -> State:
        """Return a key's account, as far as this worker knows it."""
        return self._states.get(key_id, state)._replace(now=self._database.now())

    # -- the database -------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        while True:
            await self._attend()
            pause = BEAT if self._member.owner else AGAIN
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wake.wait()
            if not self._member.owner:
                await asyncio.sleep(AGAIN)

    async def _attend(self) -> None:
        """Tell the database what is to be told."""
        self._wake.clear()
        await self._member.attend(self._tell)

    async def _joined(self, owner: str) -> None:
        self._beat_at = time.monotonic()
        leases = [(key_id, owner, active) for key_id, active in self._active.items() if active]
        self._member.owner = owner  # later settlements are of this owner
        await self._each("INSERT INTO account_leases VALUES (%s, %s, %s)", leases)

    async def _tell(self, owner: str) -> None:
        if time.monotonic() >= self._beat_at + BEAT:
            self._beat_at = time.monotonic()
            await self._database.beat(owner)
        if self._pending:
            # After a failure it is unknown whether it was applied, so it is not sent again
            pending, self._pending = self._pending, {}
            self._telling, self._told = self._told, asyncio.Event()
            try:
                # Sorted by key, so that two workers that lock several rows never wait for each other.
                await self._each(_SETTLE, sorted((*what, *much) for what, much in pending.items()))
            finally:
                self._telling.set()
            self._active = +self._active

    async def _each(self, query: LiteralString, rows: list[Row]) -> None:
        async with self._database.connection().cursor() as cursor:
            await cursor.executemany(query, rows)

    def _lost(self) -> None:
        self._told.set()
        self._told = asyncio.Event()
        self._wake.set()


class _Charge(NamedTuple):
    """What the database has charged for a request."""

    settle: Callable[[int], None]  # takes the number of tokens that the request took
    state: Callable[[], State]


class _PostgresLease(Lease):
    """What a request of a key with limits holds: `here`, in this host's memory, and in the database."""

    __slots__ = ("_book", "_charge", "_counts_here", "_goes_on", "here", "key", "period")

    def __init__(self, book: PostgresBook, key: Key, here: SharedLease) -> None:
        super().__init__()
        self._goes_on = False  # it has reserved nothing, and is settled nevertheless
        self._book = book
        self._charge: _Charge | None = None
        self._counts_here = False  # its tokens count in this host's memory
        self.here = here
        self.key = key
        self.period = here.period

    async def set_aside(self, estimate: Estimate) -> None:
        self.estimate = estimate
        self._charge = await self._book.charge(self, estimate)
        if self._charge is None:
            await self.here.set_aside(estimate)
            self._counts_here = True

    def go_on(self) -> None:
        self._goes_on = True

    def settle(self, tokens: int) -> None:
        if not self.open:
            return
        self.open = False
        self.here.settle(tokens if self._counts_here else 0)
        if self._charge is not None:
            self._charge.settle(tokens)
        elif self._counts_here or self._goes_on:
            self._book.settle(self.key, self.period, tokens, 0, counted=False)

    def cancel(self) -> None:
        """See Lease.cancel. The database was not asked yet."""
        self.open = False
        self.here.cancel()

    @property
    def charged(self) -> int:
        """See Lease.charged."""
        return self.here.charged if self._counts_here else self.estimate.tokens if self._charge is not None else 0

    async def known(self) -> None:
        if self._charge is not None:
            await self._book.known()

    def headers(self) -> Headers:
        return headers(self.key.limits, self._charge.state()) if self._charge is not None else self.here.headers()


def _keep(states: OrderedDict[str, State], key_id: str, state: State) -> None:
    states[key_id] = state
    states.move_to_end(key_id)
    if len(states) > REMEMBERED:
        states.popitem(last=False)


async def _nothing(_key: str, _since: int, _until: int) -> int:
    """Return 0: the usage rows of a key are not read while the database is lost."""
    return 0


def _give_back(asking: asyncio.Task[_Charge]) -> None:
    if not asking.cancelled() and asking.exception() is None:
        asking.result().settle(0)
