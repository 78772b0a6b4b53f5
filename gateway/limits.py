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
import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple, Protocol

from gateway.errors import QuotaSpent, RateLimited, StackError
from gateway.estimates import Estimate
from gateway.keybook import Limits
from gateway.keys import Key
from gateway.usage import UsageBook

MINUTE, DAY = 60.0, 86_400  # seconds
GRAIN = 1e-3  # of a request or a token: what the arithmetic of floats may be off by
EPOCH_YEAR = 1970

HEADERS = tuple(
    f"x-ratelimit-{what}-{name}" for name in ("requests", "tokens") for what in ("limit", "remaining", "reset")
)
_REQUESTS, _TOKENS = ([name.encode() for name in HEADERS if what in name] for what in ("-requests", "-tokens"))


Headers = list[tuple[bytes, bytes]]


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

    def headers(self) -> Headers:
        """How the key stands now."""
        if self._limits.requests_per_minute is None and self._limits.tokens_per_minute is None:
            return []
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
    if (quota := limits.tokens_per_day) is not None and state.day_tokens >= quota:
        if not state.active:
            return _spent(f"{quota} tokens of the day. A new one begins at 00:00 UTC.", limits, state)
        waits[f"{quota} tokens per day, of which requests in progress may need what is left"] = _turn(state, estimate)
    if (quota := limits.tokens_per_month) is not None and state.month_tokens >= quota:
        if not state.active:
            return _spent(f"{quota} tokens of the month. A new one begins on the first, at 00:00 UTC.", limits, state)
        waits[f"{quota} tokens per month, of which requests in progress may need what is left"] = _turn(state, estimate)
    if (limit := limits.concurrent) is not None and state.active >= limit:
        waits[f"{limit} requests at a time"] = _turn(state, estimate)
    if (limit := limits.requests_per_minute) and (wait := _wait(limit, state.requests_full - state.now, 1)):
        waits[f"{limit} requests per minute"] = wait
    if (limit := limits.tokens_per_minute) and (wait := _wait(limit, state.tokens_full - state.now, estimate.tokens)):
        waits[f"{limit} tokens per minute"] = wait
    if not waits:
        return None
    which, wait = max(waits.items(), key=operator.itemgetter(1))
    message = f"This key is limited to {which}. Come back when Retry-After says."
    return RateLimited(message, wait, _told(limits, state))


def _spent(which: str, limits: Limits, state: State) -> QuotaSpent:
    return QuotaSpent(f"This key has used its {which}", _told(limits, state))


def _told(limits: Limits, state: State) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in headers(limits, state)}


def _turn(state: State, estimate: Estimate) -> float:
    """Seconds until one of its requests is over, roughly."""
    return estimate.seconds / max(1, state.active)


def _wait(limit: int, empty: float, cost: int) -> float:
    """Seconds until a bucket holds `cost`, or is full; now it is full in `empty` seconds."""
    wait = empty - MINUTE + min(cost, limit) * MINUTE / limit
    return wait if wait > GRAIN * MINUTE / limit else 0.0


def charge(limit: int | None, full: float, cost: int, now: float) -> float:
    """When a bucket will be full, after `cost` is taken from it now."""
    return full if limit is None else max(full, now) + cost * MINUTE / limit


def correct(limit: int | None, full: float, more: int) -> float:
    """The same, when a request took `more` than it was charged."""
    return full if limit is None else full + more * MINUTE / limit


def headers(limits: Limits, state: State | Buckets) -> Headers:
    """How a key stands, in the words of OpenAI's API."""
    found: Headers = []
    if (limit := limits.requests_per_minute) is not None:
        found += zip(_REQUESTS, _bucket(limit, state.requests_full - state.now), strict=True)
    if (limit := limits.tokens_per_minute) is not None:
        found += zip(_TOKENS, _bucket(limit, state.tokens_full - state.now), strict=True)
    return found


def _bucket(limit: int, empty: float) -> tuple[bytes, bytes, bytes]:
    """Its limit, what is left, and how long it takes to be full: for so many seconds' worth it is empty."""
    if empty <= 0:
        return b"%d" % limit, b"%d" % limit, b"0ms"
    left = int(limit * (1 - empty / MINUTE) + GRAIN) if empty < MINUTE else 0
    return b"%d" % limit, b"%d" % left, duration(empty).encode()


def quotas_used(usage: UsageBook, key_id: str) -> dict[str, int]:
    """What a key has used of its quotas, as far as it is in the records: a second or two ago."""
    now = time.time()
    spent = [usage.spent(key_id, since * 1000, int(now * 1000) + 1) for since in Period.of(now).starts()]
    return dict(zip(("tokens_per_day", "tokens_per_month"), spent, strict=True))


def duration(seconds: float) -> str:
    """As OpenAI writes it: 12ms, 1.5s, 6m0s. Rounded up to milliseconds, from a minute on to seconds."""
    if seconds < MINUTE:
        milliseconds = math.ceil(seconds * 1000 - GRAIN / 2)
        return f"{milliseconds}ms" if milliseconds < 1000 else f"{milliseconds / 1000:g}s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest}s" if hours else f"{minutes}m{rest}s"
