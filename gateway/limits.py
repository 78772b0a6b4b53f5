"""Limits: whether a key may have its request now, what that costs it, and what it is told.

Per minute there are token buckets: one holds as much as its limit, and is refilled evenly within a minute. A bucket is
one number, the time at which it will be full. A request is charged when it is admitted, with an estimate; once it is
over, what it really took is put in the estimate's place, as if it had been charged then. So a bucket may be in debt,
which delays the next request, and what was set aside too much is there again when the request is over.

A request that asks for more than a whole bucket is admitted when the bucket is full. A quota's last request may go
beyond it. Who is refused is charged nothing.

Where a key's account is kept, two books know: accounts.py for the workers of one host, replicas.py for many hosts.
"""

import datetime as dt
import functools
import math
import operator
from collections.abc import Awaitable, Callable
from typing import NamedTuple, Protocol

from gateway.errors import QuotaSpent, RateLimited, StackError
from gateway.estimates import Estimate
from gateway.keybook import Limits
from gateway.keys import Key

MINUTE, DAY = 60.0, 86_400  # seconds
GRAIN = 1e-3  # of a request or a token: what the arithmetic of floats may be off by
EPOCH_YEAR = 1970

HEADERS = tuple(
    f"x-ratelimit-{what}-{name}" for name in ("requests", "tokens") for what in ("limit", "remaining", "reset")
)
_REQUESTS, _TOKENS = HEADERS[:3], HEADERS[3:]


class State(NamedTuple):
    """A key's account at a moment. Times are seconds of the clock that its book goes by, which nobody sets."""

    now: float
    requests_full: float  # when its bucket is full again
    tokens_full: float
    active: int  # requests that are admitted and not over
    day_tokens: int  # of this calendar day and month in UTC
    month_tokens: int


class Buckets(NamedTuple):
    """Of a State, what callers are told."""

    now: float
    requests_full: float
    tokens_full: float


class Period(NamedTuple):
    """A calendar day and its month in UTC, counted since 1970."""

    day: int
    month: int

    @staticmethod
    def of(timestamp: float) -> "Period":
        return _period(int(timestamp // DAY))

    def starts(self) -> tuple[int, int]:
        """When the day and the month began, in seconds since 1970."""
        year, month = divmod(self.month, 12)
        return self.day * DAY, int(dt.datetime(EPOCH_YEAR + year, month + 1, 1, tzinfo=dt.UTC).timestamp())


@functools.lru_cache(maxsize=8)
def _period(day: int) -> Period:
    date = dt.datetime.fromtimestamp(day * DAY, dt.UTC)
    return Period(day, (date.year - EPOCH_YEAR) * 12 + date.month - 1)


class Lease:
    """What an admitted request holds until it is over."""

    __slots__ = ("_known", "_limits", "_open", "_settle", "estimate", "state")

    def __init__(
        self,
        limits: Limits,
        estimate: Estimate,
        state: Callable[[], State | Buckets],
        settle: Callable[[int], None],
        known: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._limits = limits
        self._settle = settle  # is told how much more it took than was charged
        self._known = known  # waits until that is known everywhere
        self._open = True
        self.estimate = estimate
        self.state = state  # the account as it is now

    def settle(self, tokens: int) -> None:
        """It is over and took so many. Once for every lease; a second time does nothing."""
        if self._open:
            self._open = False
            self._settle(tokens - self.estimate.tokens)

    async def known(self) -> None:
        """Wait until what was settled is known everywhere: whoever has the whole answer may come again at once."""
        if self._known is not None:
            await self._known()

    def headers(self) -> dict[str, str]:
        """How the key stands now."""
        if self._limits.requests_per_minute is None and self._limits.tokens_per_minute is None:
            return {}
        return headers(self._limits, self.state())


def free(estimate: Estimate) -> Lease:
    """The lease of a key without limits."""
    return Lease(Limits(), estimate, lambda: State(0.0, 0.0, 0.0, 0, 0, 0), lambda _: None)


class Book(Protocol):
    """Where accounts are kept."""

    async def admit(self, key: Key, estimate: Estimate) -> Lease:
        """Charge a request. Raises RateLimited or QuotaSpent; another StackError where nobody can tell."""


def refusal(limits: Limits, state: State, estimate: Estimate) -> StackError | None:
    """Why a key in that state can't have the request; None if it can."""
    waits: dict[str, float] = {}
    turn = estimate.seconds / max(1, state.active)  # until one of its requests is over, roughly
    for quota, spent, period, end in (
        (limits.tokens_per_day, state.day_tokens, "day", "A new one begins at 00:00 UTC."),
        (limits.tokens_per_month, state.month_tokens, "month", "A new one begins on the first, at 00:00 UTC."),
    ):
        if quota is not None and spent >= quota:
            if spent - state.active * estimate.tokens >= quota:
                message = f"This key has used its {quota} tokens of the {period}. {end}"
                return QuotaSpent(message, headers(limits, state))
            waits[f"{quota} tokens per {period}, of which requests in progress may need what is left"] = turn
    if limits.concurrent is not None and state.active >= limits.concurrent:
        waits[f"{limits.concurrent} requests at a time"] = turn
    for limit, full, cost, what in (
        (limits.requests_per_minute, state.requests_full, 1, "requests"),
        (limits.tokens_per_minute, state.tokens_full, estimate.tokens, "tokens"),
    ):
        if limit is not None and (wait := _wait(limit, full, cost, state.now)):
            waits[f"{limit} {what} per minute"] = wait
    if not waits:
        return None
    which, wait = max(waits.items(), key=operator.itemgetter(1))
    message = f"This key is limited to {which}. Come back when Retry-After says."
    return RateLimited(message, wait, headers(limits, state))


def _wait(limit: int, full: float, cost: int, now: float) -> float:
    """Seconds until a bucket holds `cost`, or is full."""
    wait = full - now - MINUTE + min(cost, limit) * MINUTE / limit
    return wait if wait > GRAIN * MINUTE / limit else 0.0


def charge(limit: int | None, full: float, cost: int, now: float) -> float:
    """When a bucket will be full, after `cost` is taken from it now."""
    return full if limit is None else max(full, now) + cost * MINUTE / limit


def correct(limit: int | None, full: float, more: int) -> float:
    """The same, when a request took `more` than it was charged."""
    return full if limit is None else full + more * MINUTE / limit


def headers(limits: Limits, state: State | Buckets) -> dict[str, str]:
    """How a key stands, in the words of OpenAI's API."""
    found: dict[str, str] = {}
    for names, limit, full in (
        (_REQUESTS, limits.requests_per_minute, state.requests_full),
        (_TOKENS, limits.tokens_per_minute, state.tokens_full),
    ):
        if limit is not None:
            empty = full - state.now if full > state.now else 0.0
            left = int(limit * (1 - empty / MINUTE) + GRAIN) if empty < MINUTE else 0
            found |= zip(names, (str(limit), str(left), duration(empty)), strict=True)
    return found


def duration(seconds: float) -> str:
    """As OpenAI writes it: 12ms, 1.5s, 6m0s. Rounded up to milliseconds, from a minute on to seconds."""
    if seconds < MINUTE:
        milliseconds = math.ceil(seconds * 1000 - GRAIN / 2)
        return f"{milliseconds}ms" if milliseconds < 1000 else f"{milliseconds / 1000:g}s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest}s" if hours else f"{minutes}m{rest}s"
