"""Which keys are near a quota: what is told as their use grows, and when a period ends."""

import pytest

from gateway.keys.limit_fields import Limits
from gateway.limits import near
from gateway.limits.near import Near
from gateway.limits.rules import Period, State

DAILY = Limits(tokens_per_day=100)
BOTH = Limits(tokens_per_day=100, tokens_per_month=1000)
TODAY, TOMORROW, NEXT_MONTH = Period(100, 3), Period(101, 3), Period(131, 4)


class Told:
    """What the metric says."""

    def __init__(self) -> None:
        self.keys: dict[tuple[str, int], int] = {}
        self.near = Near(lambda quota, share, keys: self.keys.update({(quota, share): keys}))

    def look(self, key: str, day: int, month: int = 0, limits: Limits = BOTH, period: Period = TODAY) -> None:
        self.near.look(key, limits, State(0.0, 0.0, 0.0, 0, day, month), period)

    def found(self) -> dict[tuple[str, int], int]:
        return {what: keys for what, keys in self.keys.items() if keys}


def test_a_key_is_counted_from_each_share_on() -> None:
    told = Told()
    for used, expected in ((74, {}), (75, {75: 1}), (94, {75: 1}), (95, {75: 1, 95: 1}), (200, {75: 1, 95: 1})):
        told.look("a", used)
        assert told.found() == {("tokens_per_day", share): keys for share, keys in expected.items()}, used


def test_a_key_whose_limit_was_raised_is_counted_no_more() -> None:
    told = Told()
    told.look("a", 99)
    told.look("b", 80)
    assert told.found() == {("tokens_per_day", 75): 2, ("tokens_per_day", 95): 1}
    told.look("a", 99, limits=Limits(tokens_per_day=1000))
    assert told.found() == {("tokens_per_day", 75): 1}
    told.look("b", 80, limits=Limits(requests_per_minute=1))
    assert told.found() == {("tokens_per_day", 75): 1}, "a key without a quota is not looked at"


def test_a_new_day_and_a_new_month_begin_with_nobody() -> None:
    told = Told()
    told.look("a", 99, 990)
    told.look("b", 0, 0, period=TOMORROW)
    assert told.found() == {("tokens_per_month", 75): 1, ("tokens_per_month", 95): 1}
    told.look("b", 0, 0, period=NEXT_MONTH)
    assert told.found() == {}


def test_a_clock_that_was_days_ahead_leaves_nobody() -> None:
    told = Told()
    told.look("a", 99, 990, period=NEXT_MONTH)
    told.look("b", 80, period=TODAY)
    assert told.found() == {("tokens_per_day", 75): 1}


def test_a_request_from_the_day_before_forgets_nobody() -> None:
    told = Told()
    told.look("a", 99, period=TOMORROW)
    told.look("b", 0, period=TODAY)
    assert told.found() == {("tokens_per_day", 75): 1, ("tokens_per_day", 95): 1}


def test_keys_that_send_nothing_more_are_looked_at_again() -> None:
    told = Told()
    for key in ("a", "b", "c"):
        told.look(key, 99, 990)
    limits = {"a": BOTH, "b": Limits(tokens_per_day=1000, tokens_per_month=1000)}
    told.near.recheck(1, limits.get, TODAY)
    assert told.found() == {
        ("tokens_per_day", 75): 1,
        ("tokens_per_day", 95): 1,
        ("tokens_per_month", 75): 2,
        ("tokens_per_month", 95): 2,
    }
    told.near.recheck(1, {}.get, TODAY)  # nothing has changed, so nobody is looked at
    assert told.found()[("tokens_per_day", 75)] == 1
    told.near.recheck(1, limits.get, TOMORROW)
    assert told.found() == {("tokens_per_month", 75): 2, ("tokens_per_month", 95): 2}
    told.near.recheck(2, {}.get, TOMORROW)
    assert told.found() == {}


def test_however_many_keys_there_are_it_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most `MOST`, which is less here, because each key that comes near is a count of all."""
    monkeypatch.setattr(near, "MOST", few := 500)
    told = Told()
    for number in range(few + 100):
        told.look(f"{number}", 80)
    assert told.found() == {("tokens_per_day", 75): few}
