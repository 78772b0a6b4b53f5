"""Accounts: what each key has used, in memory that all workers of a host share. Exact over any number of workers.

An account is some numbers of eight bytes and one counter for each worker. Whatever is changed is changed under one lock
by single writes, so that a worker killed at any moment leaves accounts that hold together: its requests in progress are
given back by the master, who clears its counters; the tokens set aside for them stay charged.

There is room for thousands of keys. An account takes one of the few cells that its key may have; where all of those are
taken, the one that was left alone for longest makes room. With full buckets nothing is lost by that.
"""

import asyncio
import functools
import hashlib
import struct
import time
from collections.abc import Awaitable, Callable

from gateway.errors import GatewayBusy, StackError
from gateway.estimates import Estimate
from gateway.keybook import Limits
from gateway.keys import Key
from gateway.limits import DAY, Buckets, Lease, Period, State, charge, correct, free, refusal
from gateway.shared import MAX_SLOTS, BusyError, Region

CELLS = 8192
WAYS = 16  # cells that a key may have
AGAIN = 0.5  # seconds until what could not be settled is tried again
ASK_AGAIN = 2.0  # seconds until records that could not be had are asked for again

# An account's numbers: integers …
# (when it was opened, in milliseconds since 1970; whether it is known what the key had used before that in the day and
# month; the day and the month, each with the tokens since then and before) …
_MET, _KNOWN, _DAY, _DAY_TOKENS, _DAY_BEFORE, _MONTH, _MONTH_TOKENS, _MONTH_BEFORE = range(8)
# … and times by the accounts' clock: of the last request, and when its buckets are full.
_TOUCHED, _REQUESTS, _TOKENS = range(8, 11)
_WIDTH = 16  # with room for more
_ACCOUNT = struct.Struct("8q3d")
_NUMBERS = 8 * CELLS  # where they begin; before them are the keys
_SLOTS = _NUMBERS + 8 * _WIDTH * CELLS
_COUNTERS = _SLOTS + 8
_SIZE = _COUNTERS + 2 * MAX_SLOTS * CELLS

_LINES = CELLS // WAYS
_NONE = Limits()

# By the records, the tokens of a key's requests that came from a time on and before another. Milliseconds since 1970.
Recorded = Callable[[str, int, int], Awaitable[int]]


class Accounts:
    """The memory. The master makes it before it forks."""

    def __init__(self) -> None:
        self.region = Region(_SIZE)
        self._started = time.monotonic()  # the clock begins here: of small numbers more digits are kept
        view = memoryview(self.region.memory)
        self.keys = view[:_NUMBERS].cast("Q")
        self.integers = view[_NUMBERS:_SLOTS].cast("q")
        self.times = view[_NUMBERS:_SLOTS].cast("d")
        self.slots = view[_SLOTS:_COUNTERS].cast("q")  # one number, above all slots so far
        self.active = view[_COUNTERS:].cast("H")

    def now(self) -> float:
        """The time by a clock that nobody sets."""
        return time.monotonic() - self._started

    def occupy(self, slot: int) -> None:
        """A worker is about to come. In the master, before its fork."""
        self.slots[0] = max(self.slots[0], slot + 1)

    def vacate(self, slot: int) -> None:
        """That worker is gone, and with it the requests it had. In the master.

        It takes no lock, which a stopped worker may hold: nobody else writes these counters.
        """
        for cell, key in enumerate(self.keys):
            if key:
                self.active[cell * MAX_SLOTS + slot] = 0


class SharedBook:
    """The accounts as one worker uses them. `clock` says what day it is; what is `recorded` is asked for once for each
    key, unless it may not be remembered."""

    def __init__(
        self,
        accounts: Accounts,
        slot: int,
        recorded: Recorded,
        clock: Callable[[], float] = time.time,
        *,
        remember: bool = True,
    ) -> None:
        self._accounts = accounts
        self._slot = slot
        self._recorded = recorded
        self._clock = clock
        self._remember = remember
        self._keys, self._integers, self._times = accounts.keys, accounts.integers, accounts.times
        self._active, self._slots = accounts.active, accounts.slots
        self._cells: dict[int, int] = {}  # where accounts were last, by their keys
        self._ask_from = float("-inf")  # when the records may be asked again

    async def admit(self, key: Key, estimate: Estimate) -> Lease:
        """See limits.Book."""
        limits = key.limits
        if limits == _NONE:
            return free(estimate)
        known = limits.tokens_per_day is None and limits.tokens_per_month is None
        try:
            found = self._admit(key.id, limits, estimate, known=known)
            if found is None:
                await self._look_up(key.id)
                found = self._admit(key.id, limits, estimate, known=True)
        except BusyError as exc:
            raise GatewayBusy("The gateway is too busy to take the request. Try again shortly.") from exc
        if isinstance(found, Lease):
            return found
        raise found or GatewayBusy("The gateway is too busy to take the request. Try again shortly.")

    def _admit(self, key_id: str, limits: Limits, estimate: Estimate, *, known: bool) -> Lease | StackError | None:
        """A lease, or why not; None where it isn't known what the key used before, and has to be."""
        digest, wall = _digest(key_id), self._clock()
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
            error = refusal(limits, state, estimate)
            if error is not None:
                return error
            self._active[cell * MAX_SLOTS + self._slot] += 1
            full = charge(limits.requests_per_minute, state.requests_full, 1, now)
            self._times[at + _REQUESTS] = full
            self._times[at + _TOKENS] = charge(limits.tokens_per_minute, state.tokens_full, estimate.tokens, now)
            self._integers[at + _DAY_TOKENS] += estimate.tokens
            self._integers[at + _MONTH_TOKENS] += estimate.tokens
            period = Period(self._integers[at + _DAY], self._integers[at + _MONTH])
        settle = functools.partial(self._settle, cell, limits, period)
        return Lease(limits, estimate, functools.partial(self._buckets, cell), settle)

    def _settle(self, cell: int, limits: Limits, period: Period, more: int) -> None:
        """A request is over that took `more` than it was charged, in that period."""
        try:
            with self._accounts.region.lock:
                at = cell * _WIDTH
                self._times[at + _TOKENS] = correct(limits.tokens_per_minute, self._times[at + _TOKENS], more)
                if self._integers[at + _DAY] == period.day:
                    self._integers[at + _DAY_TOKENS] += more
                if self._integers[at + _MONTH] == period.month:
                    self._integers[at + _MONTH_TOKENS] += more
                self._active[cell * MAX_SLOTS + self._slot] -= 1  # last: until here the account can't be closed
        except BusyError:
            asyncio.get_running_loop().call_later(AGAIN, self._settle, cell, limits, period, more)

    def _state(self, cell: int) -> State:
        """An account as it is now. Without the lock each number is right, if not all of one moment."""
        at, counters = cell * _WIDTH, cell * MAX_SLOTS
        of_it = _ACCOUNT.unpack_from(self._accounts.region.memory, _NUMBERS + 8 * at)
        _, _, _, day, day_before, _, month, month_before, _, requests, tokens = of_it
        active = sum(self._active[counters : counters + self._slots[0]])
        return State(self._accounts.now(), requests, tokens, active, day + day_before, month + month_before)

    def _buckets(self, cell: int) -> Buckets:
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
        if len(self._cells) >= CELLS:
            self._cells.clear()
        cell = self._cells[digest] = first + line.index(digest)
        return cell

    def _open(self, digest: int, wall: float) -> int:
        """A new account, in a free cell or the one that was left alone for longest. Raises GatewayBusy."""
        first = digest % _LINES * WAYS
        cells = [cell for cell in range(first, first + WAYS) if not self._keys[cell] or not self._state(cell).active]
        if not cells:
            raise GatewayBusy("Too many keys are in use at once. Try again shortly.")
        cell = min(cells, key=lambda it: self._times[it * _WIDTH + _TOUCHED] if self._keys[it] else -1.0)
        self._keys[cell] = 0
        at = cell * _WIDTH
        for number in range(_WIDTH):
            self._integers[at + number] = 0
        self._integers[at + _MET] = int(wall * 1000)
        self._keys[cell] = digest
        return cell

    def _turn_over(self, at: int, wall: float) -> None:
        """Begin a new day or month, if there is one. A clock that is set back begins none."""
        if wall < (self._integers[at + _DAY] + 1) * DAY:
            return
        period = Period.of(wall)
        for number, now in ((_DAY, period.day), (_MONTH, period.month)):
            if self._integers[at + number] < now:
                self._integers[at + number + 1] = self._integers[at + number + 2] = 0
                self._integers[at + number] = now

    async def _look_up(self, key_id: str) -> None:
        """Add what the key had used before its account was opened, by the records."""
        digest = _digest(key_id)
        cell = self._find(digest)
        if cell is None:
            return
        at = cell * _WIDTH
        opened = self._integers[at + _MET]
        period = Period(self._integers[at + _DAY], self._integers[at + _MONTH])
        try:
            day, month = [await self._recorded(key_id, start * 1000, opened) for start in period.starts()]
        except StackError:
            self._ask_from = self._accounts.now() + ASK_AGAIN  # until then, only what it used since counts
            return
        with self._accounts.region.lock:
            if self._keys[cell] != digest or self._integers[at + _MET] != opened:
                return
            if self._integers[at + _DAY] == period.day:
                self._integers[at + _DAY_BEFORE] = day
            if self._integers[at + _MONTH] == period.month:
                self._integers[at + _MONTH_BEFORE] = month
            self._integers[at + _KNOWN] = self._remember


@functools.lru_cache(maxsize=CELLS)
def _digest(key_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(key_id.encode(), digest_size=8).digest(), "little") or 1
