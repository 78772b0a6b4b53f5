"""The arithmetic of buckets against a model in exact fractions; headers; quotas over days, months and clocks set."""

import datetime as dt
from collections import defaultdict
from dataclasses import fields
from fractions import Fraction
from itertools import count
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import GatewayBusy, QuotaSpent, RateLimited
from gateway.keys.configured import defaults
from gateway.keys.known import Key
from gateway.keys.limit_fields import LimitFields, LimitName, Limits
from gateway.limits.estimates import Estimate
from gateway.limits.memory import CELLS, WAYS, Accounts, SharedBook, _digest
from gateway.limits.rules import GRAIN, Lease, Period, State, charge, correct, duration, headers, refusal
from gateway.settings import Settings
from tests.support.books import admit

pytestmark = pytest.mark.anyio
MINUTE = Fraction(60)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def ask(tokens: int = 1) -> Estimate:
    return Estimate(size=10, prompt=tokens)


NAMES: tuple[LimitName, ...] = get_args(LimitName)


@pytest.mark.parametrize("name", NAMES)
def test_a_key_far_over_a_limit_is_refused_whichever_limit_it_is(name: LimitName) -> None:
    over = State(*[10**9] * len(State._fields))._replace(now=0.0)
    assert refusal(Limits(**{name: 1}), over, 1) is not None


def test_every_limit_is_a_field_of_keys_and_a_setting() -> None:
    assert set(NAMES) == {it.name for it in fields(Limits)} == LimitFields.model_fields.keys()
    told: dict[str, Any] = {f"stack_limit_{name}": 7 for name in NAMES}
    assert defaults(Settings(**told)) == Limits(*[7] * len(NAMES))


class Model:
    """A token bucket as it stands in books."""

    def __init__(self, limit: int) -> None:
        self.limit, self.level, self.at = limit, Fraction(limit), Fraction(0)

    def take(self, cost: int, now: Fraction) -> bool:
        self.level = min(Fraction(self.limit), self.level + (now - self.at) * self.limit / MINUTE)
        self.at = now
        if self.level < min(cost, self.limit):
            return False
        self.level -= cost
        return True


# Milliseconds that pass before each request, and its tokens.
STEPS = st.lists(st.tuples(st.integers(0, 40_000), st.integers(1, 300)), max_size=60)


@settings(deadline=None)
@given(st.integers(1, 1000), STEPS)
def test_a_token_bucket_admits_what_an_exact_simulation_admits(limit: int, steps: list[tuple[int, int]]) -> None:
    model, full, now = Model(limit), 0.0, Fraction(0)
    limits = Limits(tokens_per_minute=limit)
    for pause, cost in steps:
        now += Fraction(pause, 1000)
        state = State(float(now), 0.0, full, 0, 0, 0)
        error = refusal(limits, state, cost)
        assert (error is None) == model.take(cost, now)
        if error is None:
            full = charge(limit, full, cost, float(now))
            assert limit * (1 - max(0.0, full - float(now)) / 60) == pytest.approx(float(model.level), abs=1e-6)
        else:
            assert isinstance(error, RateLimited)
            wait = int(error.headers["retry-after-ms"]) / 1000
            early = 0.01 + GRAIN * 60 / limit
            after, before = state._replace(now=state.now + wait), state._replace(now=state.now + wait - early)
            assert refusal(limits, after, cost) is None, "it is let in when it was told to come back"
            assert wait < early + 0.002 or refusal(limits, before, cost) is not None, "and not much earlier"


@settings(deadline=None)
@given(st.integers(1, 1000), st.lists(st.tuples(st.integers(0, 30_000), st.integers(1, 300), st.integers(0, 900))))
def test_tokens_are_never_more_than_the_bucket_and_what_flowed_back_but_for_the_last_debt(
    limit: int, steps: list[tuple[int, int, int]]
) -> None:
    limits, full, now, took, last = Limits(tokens_per_minute=limit), 0.0, 0.0, 0, 0
    for pause, estimate, truth in steps:  # each is over before the next one comes
        now += pause / 1000
        if refusal(limits, State(now, 0.0, full, 0, 0, 0), estimate) is None:
            assert took <= limit + now * limit / 60 + 0.01, "a debt was not paid before the next request"
            full = correct(limit, charge(limit, full, estimate, now), truth - estimate)
            took += truth
            last = max(truth, last)
    assert took <= limit + now * limit / 60 + last + 0.01


def test_a_burst_gets_exactly_the_capacity() -> None:
    for limit in (1, 3, 7, 100, 10_000):
        limits, full, now, admitted = Limits(requests_per_minute=limit), 0.0, 123_456.789, 0
        while refusal(limits, State(now, full, 0.0, 0, 0, 0), 1) is None:
            full = charge(limit, full, 1, now)
            admitted += 1
        assert admitted == limit


def test_a_changed_limit_keeps_how_full_the_bucket_is() -> None:
    full = charge(100, 0.0, 50, 0.0)
    for limit in (10, 1000):
        assert headers(Limits(tokens_per_minute=limit), State(0.0, 0.0, full, 0, 0, 0)) == [
            (b"x-ratelimit-limit-tokens", b"%d" % limit),
            (b"x-ratelimit-remaining-tokens", b"%d" % (limit // 2)),
            (b"x-ratelimit-reset-tokens", b"30s"),
        ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.0121, "13ms"), (1, "1s"), (8.64, "8.64s"), (59.9999, "60s"), (360, "6m0s"), (3725.2, "1h2m6s")],
)
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_months_and_days_begin_in_utc() -> None:
    end = dt.datetime(2024, 2, 29, 23, 59, 59, 999_999, tzinfo=dt.UTC).timestamp()
    before, after = Period.of(end), Period.of(end + 1)
    assert (after.day, after.month) == (before.day + 1, before.month + 1)
    month = dt.datetime(2024, 2, 1, tzinfo=dt.UTC).timestamp()
    assert before.starts() == (dt.datetime(2024, 2, 29, tzinfo=dt.UTC).timestamp(), month)


# -- one worker's book ------------------------------------------------------------------------------------------------


class Clock:
    """A wall clock that tests set; and records, of nobody."""

    def __init__(self) -> None:
        self.time = dt.datetime(2026, 11, 30, 12, tzinfo=dt.UTC).timestamp()
        self.asked: list[tuple[str, int, int]] = []
        self.recorded = 0

    def __call__(self) -> float:
        return self.time

    async def records(self, key_id: str, since: int, until: int) -> int:
        self.asked.append((key_id, since, until))
        return self.recorded


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def accounts() -> Accounts:
    accounts = Accounts()
    accounts.occupy(0)
    return accounts


@pytest.fixture
def book(accounts: Accounts, clock: Clock) -> SharedBook:
    return SharedBook(accounts, 0, clock.records, clock)


async def test_unused_reserved_tokens_come_back_and_a_debt_delays_the_next_request(book: SharedBook) -> None:
    key = Key("k", limits=Limits(tokens_per_minute=1000))
    lease = await admit(book, key, ask(600))
    with pytest.raises(RateLimited):
        await admit(book, key, ask(600))
    assert int(dict(lease.headers())[b"x-ratelimit-remaining-tokens"]) in range(400, 420)
    lease.settle(100)
    lease.settle(100)
    assert int(dict(lease.headers())[b"x-ratelimit-remaining-tokens"]) in range(900, 920)
    (await admit(book, key, ask(600))).settle(2900)
    with pytest.raises(RateLimited) as refused:
        await admit(book, key, ask(1))
    assert 115 <= int(refused.value.headers["retry-after"]) <= 121
    assert refused.value.headers["x-ratelimit-remaining-tokens"] == "0"


async def test_a_request_for_more_than_a_bucket_is_admitted_when_the_bucket_is_full(book: SharedBook) -> None:
    key = Key("k", limits=Limits(tokens_per_minute=100))
    lease = await admit(book, key, ask(5000))
    lease.settle(300)
    with pytest.raises(RateLimited) as refused:
        await admit(book, key, ask(5000))
    assert 115 <= int(refused.value.headers["retry-after"]) <= 121, (
        "until there is a token: nobody knows how many it asks"
    )


async def test_refused_requests_cost_nothing(book: SharedBook) -> None:
    key = Key("k", limits=Limits(requests_per_minute=10, tokens_per_minute=100, concurrent=1))
    lease = await admit(book, key, ask(60))
    before = dict(lease.headers())
    for _ in range(100):
        with pytest.raises(RateLimited):
            await admit(book, key, ask(60))
    for name in ("requests", "tokens"):
        left = f"x-ratelimit-remaining-{name}".encode()
        assert int(before[left]) <= int(dict(lease.headers())[left]) <= int(before[left]) + 1


async def test_the_clock_on_the_wall_changes_no_minute_limit(book: SharedBook, clock: Clock) -> None:
    key = Key("k", limits=Limits(requests_per_minute=1, tokens_per_minute=10))
    await admit(book, key, ask(10))
    for jump in (3600, -7200, 365 * 86_400, -365 * 86_400):
        clock.time += jump
        with pytest.raises(RateLimited):
            await admit(book, key, ask(10))


async def test_quotas_end_with_their_day_and_month(book: SharedBook, clock: Clock) -> None:
    key = Key("k", limits=Limits(tokens_per_day=100, tokens_per_month=150))
    lease = await admit(book, key, ask(10))
    lease.settle(99)
    (await admit(book, key, ask(30))).settle(31)
    with pytest.raises(QuotaSpent, match="per day") as refused:
        await admit(book, key, ask(1))
    assert refused.value.headers["x-should-retry"] == "false"
    clock.time += 86_400  # the first of December
    last = await admit(book, key, ask(200))
    with pytest.raises(RateLimited, match="all of them are used or reserved"):  # maybe it needs less
        await admit(book, key, ask(1))
    clock.time += 86_400
    last.settle(1000)  # it was of the day before
    with pytest.raises(QuotaSpent, match="per month"):
        await admit(book, key, ask(1))
    clock.time -= 86_400  # a clock that is set back: what is used stays used
    with pytest.raises(QuotaSpent, match="per month"):
        await admit(book, key, ask(1))
    clock.time -= 86_400 * 3  # it was days ahead, and is in November again: what counts is in the usage rows
    clock.recorded = 40
    lease = await admit(book, key, ask(60))
    with pytest.raises(RateLimited, match="all of them are used or reserved"):
        await admit(book, key, ask(1))
    lease.settle(60)


async def test_quotas_count_what_was_used_before_the_gateway_started(book: SharedBook, clock: Clock) -> None:
    clock.recorded = 95
    key = Key("k", limits=Limits(tokens_per_day=100))
    (await admit(book, key, ask(10))).settle(5)
    now = int(clock.time * 1000)
    assert clock.asked == [("k", since * 1000, now) for since in Period.of(clock.time).starts()]
    with pytest.raises(QuotaSpent):
        await admit(book, key, ask(1))
    assert len(clock.asked) == 2, "it was asked for once"


async def test_limits_may_change_while_a_key_is_in_use(book: SharedBook) -> None:
    lease = await admit(book, Key("k", limits=Limits(requests_per_minute=1)), ask())
    with pytest.raises(RateLimited):
        await admit(book, Key("k", limits=Limits(requests_per_minute=1)), ask())
    # Also without a limit it is still the same account, whose requests in progress count.
    with pytest.raises(RateLimited):
        await admit(book, Key("k", limits=Limits(concurrent=1)), ask())
    lease.settle(1)
    await admit(book, Key("k", limits=Limits(concurrent=1)), ask())


async def test_a_minutes_limit_is_exact_for_a_hundred_thousand_keys_in_use(book: SharedBook) -> None:
    limits = Limits(requests_per_minute=1, tokens_per_minute=100)
    keys = [Key(f"key-{number}", limits=limits) for number in range(100_000)]
    leases = [await admit(book, key, ask(50)) for key in keys]
    for lease in leases[::1000]:
        lease.settle(50)
    for key in keys[::7]:
        with pytest.raises(RateLimited):
            await admit(book, key, ask(50))


async def test_a_key_that_cannot_be_counted_is_refused(book: SharedBook) -> None:
    """Keys that want the same place in memory, and have used something of their limits."""
    lines: dict[int, list[str]] = defaultdict(list)
    for number in count():
        line = lines[_digest(name := f"key-{number}") % (CELLS // WAYS)]
        line.append(name)
        if len(line) > WAYS:
            break
    limits = Limits(tokens_per_minute=100)
    *known, last = (Key(name, limits=limits) for name in line)
    for key in known:
        (await admit(book, key, ask(50))).settle(90)
    with pytest.raises(GatewayBusy, match="Too many keys are in use"):
        await admit(book, last, ask(50))
    for key in known:
        with pytest.raises(RateLimited):
            await admit(book, key, ask(50))


async def test_many_new_keys_do_not_displace_accounts_in_use(book: SharedBook) -> None:
    limits = Limits(concurrent=1)
    kept = [Key(f"kept-{number}", limits=limits) for number in range(100)]
    leases: list[Lease] = [await admit(book, key, ask()) for key in kept]
    for number in range(20_000):
        (await admit(book, Key(f"idle-{number}", limits=limits), ask())).settle(1)
    for key in kept:
        with pytest.raises(RateLimited):
            await admit(book, key, ask())
    for lease in leases:
        lease.settle(1)
    for key in kept:
        await admit(book, key, ask())
