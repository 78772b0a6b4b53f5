"""Accounts: count what each key has used, in memory that all workers of a host share. Exact over any number of workers.

An account is a few numbers of eight bytes, and one counter for each worker. Every change is made under one lock, by
single writes, so that a worker can be killed at any moment. The master then clears the worker's counters, which returns
its requests in progress. The tokens that they had reserved stay charged.

There is room for 262,144 keys, and only used pages take memory: 25 MB for all of them. An account takes one of the 64
cells that its key may have. If all are taken (with 100,000 keys the odds are one in thirty million), the account
replaces one that was idle for a while and has full buckets, so that nothing is lost. If there is no such account, the
request is refused. A limit is exact, or nobody passes it.

The file is long because every function reads or writes the same few numbers of an account, by their layout in memory.
"""

import asyncio
import functools
import hashlib
import secrets
import struct
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

from gateway.errors import GatewayBusy, StackError
from gateway.keys.known import Key
from gateway.keys.limit_fields import Limits
from gateway.limits.estimates import Estimate
from gateway.limits.near import Near
from gateway.limits.rules import (
    DAY,
    TURN,
    Buckets,
    Headers,
    Lease,
    Period,
    State,
    charge,
    correct,
    headers,
    needs_tokens,
    refusal,
)
from gateway.shared_memory import MAX_SEATS, BusyError, Region

CELLS = 262_144
WAYS = 64  # cells that a key may have
REMEMBERED = 8192  # keys whose cells a worker knows by heart
LEFT_ALONE = 10.0  # seconds, after which what a key used is in the records
AGAIN = 0.5  # seconds until what could not be settled is tried again
ASK_AGAIN = 2.0  # seconds until records that could not be had are asked for again

# An account's numbers: integers …
# (when it was opened, in milliseconds since 1970; whether it is known what the key had used before that in the day and
# month; the day and the month, each with the tokens since then and before) …
_MET, _KNOWN, _DAY, _DAY_TOKENS, _DAY_BEFORE, _MONTH, _MONTH_TOKENS, _MONTH_BEFORE = range(8)
# … and times by the accounts' clock: of the last change, and when its buckets are full.
_TOUCHED, _REQUESTS, _TOKENS = range(8, 11)
_WIDTH = 11
_ACCOUNT = struct.Struct("8q3d")
_NUMBERS = 8 * CELLS  # where they begin; before them are the keys
_SEATS = _NUMBERS + 8 * _WIDTH * CELLS
_COUNTERS = _SEATS + 8  # of requests in progress: a worker's counters are together, so that unused ones take no memory
_SIZE = _COUNTERS + 2 * MAX_SEATS * CELLS

_LINES = CELLS // WAYS
_NONE = Limits()

# By the records, the tokens of a key's requests that came from a time on and before another. Milliseconds since 1970.
Recorded = Callable[[str, int, int], Awaitable[int]]


class Accounts:
    """Hold the accounts' memory. The master makes it before it forks."""

    def __init__(self) -> None:
        self.region = Region(_SIZE)
        self.name = secrets.token_hex(8)
        self._started = time.monotonic()  # the clock begins here: of small numbers more digits are kept
        view = memoryview(self.region.memory)
        self.keys = view[:_NUMBERS].cast("Q")
        self.integers = view[_NUMBERS:_SEATS].cast("q")
        self.times = view[_NUMBERS:_SEATS].cast("d")
        self.seats = view[_SEATS:_COUNTERS].cast("q")  # one number, above all seats so far
        self.active = view[_COUNTERS:].cast("H")

    def now(self) -> float:
        """Return the time of a clock that nobody can set."""
        return time.monotonic() - self._started

    def occupy(self, seat: int) -> None:
        """Prepare for a worker with this seat. Called in the master, before its fork."""
        self.seats[0] = max(self.seats[0], seat + 1)

    def vacate(self, seat: int) -> None:
        """Remove the running requests of a worker that is gone. Called in the master.

        It takes no lock, because a stopped worker may hold the lock, and no other process writes these counters.
        """
        self.active[seat * CELLS : (seat + 1) * CELLS] = memoryview(bytes(2 * CELLS)).cast("H")


class SharedBook:
    """Use the accounts as one worker. `clock` gives the day, and `recorded` is called once for each key to read its
    usage. `skew`: see rules.refusal.
    """

    def __init__(
        self,
        accounts: Accounts,
        seat: int,
        recorded: Recorded,
        clock: Callable[[], float] = time.time,
        near: Near | None = None,
        skew: float = 0.0,
    ) -> None:
        self.memory = accounts.name
        self._skew = skew
        self._accounts = accounts
        self._seat = seat
        self._recorded = recorded
        self._clock = clock
        self._near = near
        self._keys, self._integers, self._times = accounts.keys, accounts.integers, accounts.times
        self._active, self._seats = accounts.active, accounts.seats
        self._cells: dict[int, int] = {}  # where accounts were last, by their keys
        self._ask_from = float("-inf")  # when the records may be asked again

    async def enter(
        self, key: Key, seconds: float = TURN, *, replay: bool = False, goes_on: bool = False, tokens: bool = True
    ) -> Lease:
        """See limits.Book. Without `tokens`, limits of tokens are not checked."""
        limits = key.limits
        if limits == _NONE:
            return Lease()
        asked = limits if tokens and not (replay or goes_on) else _of_requests(limits, replay=replay)
        known = asked.tokens_per_day is None and asked.tokens_per_month is None
        try:
            found = self._enter(key, asked, seconds, known=known, counted=not replay)
            if found is None:
                await self._look_up(key.id)
                found = self._enter(key, asked, seconds, known=True, counted=not replay)
        except BusyError as exc:
            raise GatewayBusy("The gateway is too busy for this request. Try again shortly.") from exc
        if isinstance(found, SharedLease):
            return found
        raise found or GatewayBusy("The gateway is too busy for this request. Try again shortly.")

    def _enter(
        self, key: Key, asked: Limits, seconds: float, *, known: bool, counted: bool
    ) -> "SharedLease | StackError | None":
        """Return a lease, or the error of a limit in `asked`. None if the key's earlier usage is needed and not known
        yet."""
        digest, wall = _digest(key.id), self._clock()
        with self._accounts.region.lock:
            cell = self._find(digest)
            if cell is None:
                cell = self._open(digest, wall)
            at = cell * _WIDTH
            self._turn_over(at, wall)
            state = self._state(cell)
            now = self._times[at + _TOUCHED] = state.now
            if not (known or self._integers[at + _KNOWN]) and now >= self._ask_from:
                return None
            error = refusal(asked, state, 1, seconds, skew=self._skew)
            if error is None:
                if counted:
                    self._active[self._seat * CELLS + cell] += 1
                self._times[at + _REQUESTS] = charge(asked.requests_per_minute, state.requests_full, 1, now)
            period = self._period(at)
        if self._near is not None:
            self._near.look(key.id, key.limits, state, period)
        if error is not None:
            return error
        return SharedLease(self, cell, key.limits, period, seconds, counted=counted)

    def set_aside(self, lease: "SharedLease", tokens: int) -> None:
        """Reserve this many tokens for an entered request. Raises RateLimited, QuotaSpent or BusyError."""
        cell, limits = lease.cell, lease.limits
        at = cell * _WIDTH
        with self._accounts.region.lock:
            state = self._state(cell)
            error = refusal(limits, state, tokens, lease.seconds, entered=lease.counted, skew=self._skew)
            if error is not None:
                raise error
            self._times[at + _TOKENS] = charge(limits.tokens_per_minute, state.tokens_full, tokens, state.now)
            lease.period = self._period(at)  # the day may have ended while its body was read
            self._add(at, lease.period, tokens)

    def settle(self, lease: "SharedLease", more: int, *, cancels: bool = False) -> None:
        """Settle a request that has ended and took `more` tokens than were reserved. `cancels`: it was charged as a
        request, and is not any more."""
        cell = lease.cell
        at = cell * _WIDTH
        try:
            with self._accounts.region.lock:
                self._times[at + _TOUCHED] = self._accounts.now()
                if more:
                    full = self._times[at + _TOKENS]
                    self._times[at + _TOKENS] = correct(lease.limits.tokens_per_minute, full, more)
                    self._add(at, lease.period, more)
                if cancels:
                    full = self._times[at + _REQUESTS]
                    self._times[at + _REQUESTS] = correct(lease.limits.requests_per_minute, full, -1)
                if lease.counted:
                    # Last, because the account cannot be closed before this
                    self._active[self._seat * CELLS + cell] -= 1
        except BusyError:
            again = functools.partial(self.settle, lease, more, cancels=cancels)
            asyncio.get_running_loop().call_later(AGAIN, again)

    def learn(self, lease: "SharedLease", period: Period, state: State) -> None:
        """Take over what is known elsewhere about the key's usage."""
        at = lease.cell * _WIDTH
        with suppress(BusyError), self._accounts.region.lock:
            for number, now, tokens in (
                (_DAY, period.day, state.day_tokens),
                (_MONTH, period.month, state.month_tokens),
            ):
                if self._integers[at + number] == now:
                    self._integers[at + number + 2] = tokens - self._integers[at + number + 1]
            self._integers[at + _KNOWN] = 1

    def _period(self, at: int) -> Period:
        """The day and month of an account."""
        return Period(self._integers[at + _DAY], self._integers[at + _MONTH])

    def _add(self, at: int, period: Period, tokens: int) -> None:
        """Count tokens of a request that came in that period."""
        if self._integers[at + _DAY] == period.day:
            self._integers[at + _DAY_TOKENS] += tokens
        if self._integers[at + _MONTH] == period.month:
            self._integers[at + _MONTH_TOKENS] += tokens

    def _state(self, cell: int) -> State:
        """Return an account's current state. Without the lock each number is right, but they may be of different
        moments."""
        at = cell * _WIDTH
        of_it = _ACCOUNT.unpack_from(self._accounts.region.memory, _NUMBERS + 8 * at)
        _, _, _, day, day_before, _, month, month_before, _, requests, tokens = of_it
        active = sum(self._active[cell : self._seats[0] * CELLS : CELLS])
        return State(self._accounts.now(), requests, tokens, active, day + day_before, month + month_before)

    def buckets(self, cell: int) -> Buckets:
        """Return what callers see of an account."""
        at = cell * _WIDTH
        return Buckets(self._accounts.now(), self._times[at + _REQUESTS], self._times[at + _TOKENS])

    def _find(self, digest: int) -> int | None:
        cell = self._cells.get(digest, 0)
        if self._keys[cell] == digest:
            return cell
        first = digest % _LINES * WAYS
        line = self._keys[first : first + WAYS].tolist()
        if digest not in line:
            return None
        if len(self._cells) >= REMEMBERED:
            self._cells.clear()
        cell = self._cells[digest] = first + line.index(digest)
        return cell

    def _open(self, digest: int, wall: float) -> int:
        """Open an account, in a free cell or in place of one that can be closed without a loss. Raises GatewayBusy."""
        first = digest % _LINES * WAYS
        line = self._keys[first : first + WAYS].tolist()
        cell = first + line.index(0) if 0 in line else self._make_room(first)
        self._keys[cell] = 0
        at = cell * _WIDTH
        for number in range(_WIDTH):
            self._integers[at + number] = 0
        self._integers[at + _MET] = int(wall * 1000)
        self._keys[cell] = digest
        return cell

    def _make_room(self, first: int) -> int:
        """Return a cell whose account can be closed without a loss: it has no running request, its buckets are full,
        and its usage is in the store. Raises GatewayBusy if there is none."""
        free: tuple[float, int] | None = None
        for cell in range(first, first + WAYS):
            touched, state = self._times[cell * _WIDTH + _TOUCHED], self._state(cell)
            full = max(touched + LEFT_ALONE, state.requests_full, state.tokens_full)
            if not state.active and full <= state.now and (free is None or touched < free[0]):
                free = touched, cell
        if free is None:
            raise GatewayBusy("Too many keys are in use for the gateway to track their limits. Try again in a minute.")
        return free[1]

    def _turn_over(self, at: int, wall: float) -> None:
        """Begin a new day or month, if there is one. A clock that is set back begins none. An account that is more than
        a day ahead had a wrong clock, and begins again by the usage rows."""
        day = self._integers[at + _DAY]
        if (day - 1) * DAY <= wall < (day + 1) * DAY:
            return
        period = Period.of(wall)
        if period.day < day:
            self._integers[at + _DAY] = self._integers[at + _MONTH] = self._integers[at + _KNOWN] = 0
            self._integers[at + _MET] = int(wall * 1000)
        for number, now in ((_DAY, period.day), (_MONTH, period.month)):
            if self._integers[at + number] < now:
                self._integers[at + number + 1] = self._integers[at + number + 2] = 0
                self._integers[at + number] = now

    async def _look_up(self, key_id: str) -> None:
        """Add what the key had used before its account was opened, by the usage rows."""
        digest = _digest(key_id)
        cell = self._find(digest)
        if cell is None:
            return
        at = cell * _WIDTH
        opened = self._integers[at + _MET]
        period = self._period(at)
        try:
            day, month = [await self._recorded(key_id, start * 1000, opened) for start in period.starts()]
        except StackError:
            # Until then, only the usage since the account was opened counts
            self._ask_from = self._accounts.now() + ASK_AGAIN
            return
        with self._accounts.region.lock:
            if self._keys[cell] != digest or self._integers[at + _MET] != opened:
                return
            if self._integers[at + _DAY] == period.day:
                self._integers[at + _DAY_BEFORE] = day
            if self._integers[at + _MONTH] == period.month:
                self._integers[at + _MONTH_BEFORE] = month
            self._integers[at + _KNOWN] = 1


class SharedLease(Lease):
    """The charge of a request whose key has limits."""

    __slots__ = ("_aside", "_book", "cell", "counted", "limits", "period", "seconds")

    def __init__(
        self, book: SharedBook, cell: int, limits: Limits, period: Period, seconds: float, *, counted: bool
    ) -> None:
        super().__init__()
        self._book = book
        self._aside = 0  # tokens
        self.cell = cell
        self.limits = limits
        self.period = period  # in which it is counted
        self.seconds = seconds
        self.counted = counted  # it counts as a running request

    async def set_aside(self, estimate: Estimate) -> None:
        self.estimate = estimate
        if needs_tokens(self.limits):
            try:
                self._book.set_aside(self, estimate.tokens)
            except BusyError as exc:
                raise GatewayBusy("The gateway is too busy for this request. Try again shortly.") from exc
            self._aside = estimate.tokens

    def settle(self, tokens: int) -> None:
        if self.open:
            self.open = False
            self._book.settle(self, tokens - self._aside)

    def cancel(self) -> None:
        """See Lease.cancel."""
        if self.open:
            self.open = False
            self._book.settle(self, -self._aside, cancels=True)

    @property
    def charged(self) -> int:
        """See Lease.charged."""
        return self._aside

    def buckets(self) -> Buckets:
        """Return what is left for the key."""
        return self._book.buckets(self.cell)

    def headers(self) -> Headers:
        limits = self.limits
        if limits.requests_per_minute is None and limits.tokens_per_minute is None:
            return []
        return headers(limits, self.buckets())


@functools.lru_cache(maxsize=256)
def _of_requests(limits: Limits, *, replay: bool) -> Limits:
    return Limits(limits.requests_per_minute, concurrent=None if replay else limits.concurrent)


@functools.lru_cache(maxsize=REMEMBERED)
def _digest(key_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(key_id.encode(), digest_size=8).digest(), "little") or 1
