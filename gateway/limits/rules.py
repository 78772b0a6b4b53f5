"""Limits: decide whether a key may have its request now, what the request costs, and what the caller is told.

Limits per minute are token buckets. A bucket holds as much as its limit, and refills evenly within a minute. It is
stored as one number, the time at which it will be full.

A request is charged in two steps. Before its body is read, `Book.enter` charges one request and counts it as
concurrent, or refuses it if no token is left. Once the request is understood, `Lease.set_aside` reserves its tokens, by
an estimate. At the end, the real cost replaces the estimate, as if it had been charged at the start. A bucket may
therefore be in debt, which delays the next request, and unused reserved tokens come back.

A request for more than a whole bucket is admitted when the bucket is full. The last request of a quota may exceed it. A
request that `enter` refuses costs nothing. A request whose body was read stays charged as a request, because otherwise
large wrong bodies would be free.

Two books keep accounts: limits/memory.py for the workers of one host, and limits/postgres.py for many hosts.
"""

import datetime as dt
import functools
import math
import time
from typing import NamedTuple, Protocol

from gateway.errors import QuotaSpent, RateLimited, StackError
from gateway.headers import RATE_LIMITS
from gateway.keys.known import Key
from gateway.keys.limit_fields import Limits
from gateway.limits.estimates import NOTHING, Estimate
from gateway.usage.rows import UsageBook

MINUTE, DAY = 60.0, 86_400  # seconds
TURN = 1.0  # seconds that a request takes, until a key's requests have shown it
GRAIN = 1e-3  # of a request or a token: what the arithmetic of floats may be off by
EPOCH_YEAR = 1970

_REQUESTS, _TOKENS = ([name.encode() for name in RATE_LIMITS if what in name] for what in ("-requests", "-tokens"))


Headers = list[tuple[bytes, bytes]]


class State(NamedTuple):
    """A key's account at one moment. Times are seconds of the book's own clock, which nobody sets."""

    now: float
    requests_full: float  # when the bucket of requests is full again
    tokens_full: float
    active: int  # requests that are admitted and have not ended
    day_tokens: int  # tokens of this calendar day and month in UTC
    month_tokens: int


class Buckets(NamedTuple):
    """The part of a State that callers see."""

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
        """Return when the day and the month began, in seconds since 1970."""
        year, month = divmod(self.month, 12)
        return self.day * DAY, int(dt.datetime(EPOCH_YEAR + year, month + 1, 1, tzinfo=dt.UTC).timestamp())


@functools.lru_cache(maxsize=8)
def _period(day: int) -> Period:
    date = dt.datetime.fromtimestamp(day * DAY, dt.UTC)
    return Period(day, (date.year - EPOCH_YEAR) * 12 + date.month - 1)


class Lease:
    """Hold what a request has been charged, from its head to its end. The lease of a key without limits is empty. The
    holder settles it."""

    __slots__ = ("estimate", "open", "taken")

    def __init__(self) -> None:
        self.open = True  # it is not settled yet
        self.taken = False  # a relay holds it and will settle it
        self.estimate = NOTHING  # the tokens that are reserved for it

    async def set_aside(self, estimate: Estimate) -> None:
        """Reserve the tokens of a request. Raises RateLimited or QuotaSpent, and reserves none then; or another
        StackError if the account is unavailable."""
        self.estimate = estimate

    def go_on(self) -> None:
        """Note that the request continues an answer whose tokens are charged already, so that none are reserved."""

    def settle(self, tokens: int) -> None:
        """Note that the request has ended and took so many tokens. A second call does nothing."""
        del tokens
        self.open = False

    def cancel(self) -> None:
        """Note that the request was refused before its body was read, and costs nothing."""
        self.settle(0)

    async def known(self) -> None:
        """Wait until the settlement is known everywhere, because a client with a complete answer may come again at
        once."""

    def headers(self) -> Headers:
        """Return the headers that show what is left for the key."""
        return []

    @property
    def charged(self) -> int:
        """The tokens that its key stays charged if nobody settles it, because its worker died."""
        return 0


class Inherited(Lease):
    """Hold a request that goes on with an answer whose worker died: `lease`, which has set `aside` tokens, and the
    tokens that its key stays charged for what the dead had of the answer. `estimate` is of the whole answer."""

    __slots__ = ("_already", "_lease")

    def __init__(self, lease: Lease, already: int, estimate: Estimate) -> None:
        super().__init__()
        self._lease = lease
        self._already = already
        self.estimate = estimate
        self.taken = True

    def settle(self, tokens: int) -> None:
        """See Lease.settle. `tokens` are those of the whole answer."""
        self.open = False
        self._lease.settle(tokens - self._already)

    async def known(self) -> None:
        """See Lease.known."""
        await self._lease.known()

    def headers(self) -> Headers:
        """See Lease.headers."""
        return self._lease.headers()

    @property
    def charged(self) -> int:
        """See Lease.charged."""
        return self._already + self._lease.charged


class Book(Protocol):
    """Keep accounts. `memory` names the memory that they are in: another name, and they begin with the records."""

    memory: str

    async def enter(self, key: Key, seconds: float = TURN, *, replay: bool = False, goes_on: bool = False) -> Lease:
        """Charge a request whose body was not read yet. `seconds` is how long the key's requests take.

        `replay`: its answer exists already. It is charged as a request and no tokens, and is not a concurrent request.
        `goes_on`: it continues an answer whose tokens are charged already. Limits of tokens are not checked, and no
        tokens are reserved.

        Raises RateLimited or QuotaSpent, or another StackError if the account is unavailable.
        """


def refusal(
    limits: Limits, state: State, tokens: int, seconds: float = TURN, *, entered: bool = False, skew: float = 0.0
) -> StackError | None:
    """Return why a key in that state cannot have a request of so many tokens; None if it can. `seconds` is how long its
    requests take. `entered`: the request is one of the running ones, and only its tokens are checked. `skew`: by how
    many seconds the clock that will judge a returning client may be behind."""
    active = state.active - entered
    waits: dict[str, tuple[float, str]] = {}  # by the limit: the seconds, and what it is
    if (quota := limits.tokens_per_day) is not None and state.day_tokens >= quota:
        if not active:
            spent = f"{quota} tokens per day. The quota resets at 00:00 UTC."
            return _spent("tokens_per_day", spent, limits, state)
        rest = f"{quota} tokens per day, and all of them are used or reserved for its running requests"
        waits["tokens_per_day"] = seconds / active, rest
    if (quota := limits.tokens_per_month) is not None and state.month_tokens >= quota:
        if not active:
            spent = f"{quota} tokens per month. The quota resets on the first of the month, at 00:00 UTC."
            return _spent("tokens_per_month", spent, limits, state)
        rest = f"{quota} tokens per month, and all of them are used or reserved for its running requests"
        waits["tokens_per_month"] = seconds / active, rest
    if not entered:
        if (limit := limits.concurrent) is not None and active >= limit:
            waits["concurrent"] = seconds / active, f"{limit} concurrent requests"
        if (limit := limits.requests_per_minute) and (wait := _wait(limit, state.requests_full - state.now, 1)):
            waits["requests_per_minute"] = wait, f"{limit} requests per minute"
    if (limit := limits.tokens_per_minute) and (wait := _wait(limit, state.tokens_full - state.now, tokens)):
        # Running requests may need less than is reserved for them, so the wait is a minute at most.
        waits["tokens_per_minute"] = min(wait, MINUTE) if active else wait, f"{limit} tokens per minute"
    if not waits:
        return None
    which = max(waits, key=lambda it: waits[it][0])
    wait, what = waits[which]
    wait += skew
    message = f"This key is limited to {what}. Retry after the time in Retry-After."
    return RateLimited(message, wait, _told(limits, state), which)


def needs_tokens(limits: Limits) -> bool:
    """Return whether any limit is about tokens."""
    return (limits.tokens_per_minute or limits.tokens_per_day or limits.tokens_per_month) is not None


def _spent(which: str, what: str, limits: Limits, state: State) -> QuotaSpent:
    return QuotaSpent(f"This key has used its quota of {what}", _told(limits, state), which)


def _told(limits: Limits, state: State) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in headers(limits, state)}


def _wait(limit: int, empty: float, cost: int) -> float:
    """Return the seconds until a bucket holds `cost`, or is full. It will be full in `empty` seconds."""
    wait = empty - MINUTE + min(cost, limit) * MINUTE / limit
    return wait if wait > GRAIN * MINUTE / limit else 0.0


def charge(limit: int | None, full: float, cost: int, now: float) -> float:
    """Return when a bucket will be full, after `cost` is taken from it now."""
    return full if limit is None else max(full, now) + cost * MINUTE / limit


def correct(limit: int | None, full: float, more: int) -> float:
    """Return when a bucket will be full if a request took `more` than it was charged."""
    return full if limit is None else full + more * MINUTE / limit


def headers(limits: Limits, state: State | Buckets) -> Headers:
    """Return the headers that show what is left for a key, in the form of OpenAI's API."""
    found: Headers = []
    if (limit := limits.requests_per_minute) is not None:
        found += zip(_REQUESTS, _bucket(limit, state.requests_full - state.now), strict=True)
    if (limit := limits.tokens_per_minute) is not None:
        found += zip(_TOKENS, _bucket(limit, state.tokens_full - state.now), strict=True)
    return found


def _bucket(limit: int, empty: float) -> tuple[bytes, bytes, bytes]:
    """Return a bucket's limit, what is left, and how long it takes until it is full. It will be full in `empty`
    seconds."""
    if empty <= 0:
        return b"%d" % limit, b"%d" % limit, b"0ms"
    left = int(limit * (1 - empty / MINUTE) + GRAIN) if empty < MINUTE else 0
    return b"%d" % limit, b"%d" % left, duration(empty).encode()


def quotas_used(usage: UsageBook, key_id: str) -> dict[str, int]:
    """Return what a key has used of its quotas, by its usage rows, which are up to two seconds old."""
    now = time.time()
    begins = [since * 1000 for since in Period.of(now).starts()]
    spent = usage.spent_since(key_id, begins, int(now * 1000) + 1)
    return dict(zip(("tokens_per_day", "tokens_per_month"), spent, strict=True))


def duration(seconds: float) -> str:
    """Write a duration as OpenAI does: 12ms, 1.5s, 6m0s. It is rounded up to milliseconds, or from a minute on to
    seconds."""
    if seconds < MINUTE:
        milliseconds = math.ceil(seconds * 1000 - GRAIN / 2)
        return f"{milliseconds}ms" if milliseconds < 1000 else f"{milliseconds / 1000:g}s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest}s" if hours else f"{minutes}m{rest}s"
