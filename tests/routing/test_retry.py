"""What may be tried again, where, after how long; and how much of that a bad moment may bring."""

import pytest

from gateway.config import Retries
from gateway.errors import (
    BadRequest,
    ClientLeft,
    EngineAsleep,
    EngineDied,
    EngineError,
    EngineFailed,
    EngineFull,
    EngineLost,
    EngineOverloaded,
    EngineRefused,
    EngineSilent,
    EngineTimeout,
    EngineUnauthorized,
    EngineUnreachable,
    EngineUnsupported,
    LoadFailed,
    ModelLoading,
    StackError,
)
from gateway.routing.retry import RESERVE, Budget, backoff, blames_the_engine, worthwhile

# Each error: whether the same engine may be asked again, another one, and whether it counts against the engine.
CASES: list[tuple[StackError, bool, bool, bool]] = [
    (BadRequest("x"), False, False, False),
    (ClientLeft("x"), False, False, False),
    (EngineRefused("x", status=400), False, False, False),
    (EngineFailed("x"), False, False, False),
    (EngineUnsupported("x"), False, True, False),
    (EngineUnauthorized("x"), False, True, False),
    (EngineOverloaded("x"), False, True, False),
    (EngineFull("x"), False, True, False),
    (ModelLoading("x"), False, True, False),
    (EngineAsleep("x"), False, True, False),
    (LoadFailed("x"), False, True, False),
    (EngineTimeout("x"), False, True, False),
    (EngineSilent("x"), False, True, True),
    (EngineError("x"), True, True, False),
    (EngineUnreachable("x"), True, True, True),
    (EngineLost("x"), True, True, True),
    (EngineDied("x"), True, True, True),
]


@pytest.mark.parametrize(("error", "same", "other", "blamed"), CASES, ids=lambda it: type(it).__name__)
def test_each_error_is_retried_at_the_same_engine_at_another_or_nowhere(
    error: StackError, same: bool, other: bool, blamed: bool
) -> None:
    assert worthwhile(error, same_engine=True) is same
    assert worthwhile(error, same_engine=False) is other
    assert blames_the_engine(error) is blamed


def test_a_pause_doubles_with_each_attempt_up_to_the_longest_and_is_between_half_and_all_of_it() -> None:
    retries = Retries(backoff=0.1, backoff_max=0.5)
    for attempt, longest in ((2, 0.1), (3, 0.2), (4, 0.4), (5, 0.5), (50, 0.5)):
        pauses = [backoff(attempt, retries) for _ in range(200)]
        assert longest / 2 <= min(pauses) < 0.6 * longest
        assert 0.9 * longest < max(pauses) <= longest


def test_a_quiet_gateway_may_retry_its_reserve_at_once_and_then_its_share_of_the_traffic() -> None:
    budget = Budget(0.25, workers=1)
    assert [budget.take() for _ in range(int(RESERVE) + 2)] == [True] * int(RESERVE) + [False] * 2
    taken = 0
    for _ in range(40):
        budget.request()
        taken += budget.take()
    assert taken == 10


def test_traffic_without_retries_adds_nothing_beyond_the_reserve() -> None:
    budget = Budget(0.5, workers=1)
    for _ in range(1000):
        budget.request()
    assert sum(budget.take() for _ in range(100)) == RESERVE


def test_workers_share_the_reserve_and_each_has_one_at_least() -> None:
    for workers, reserve in ((2, 5), (10, 1), (64, 1)):
        budget = Budget(0.1, workers)
        assert sum(budget.take() for _ in range(100)) == reserve


def test_without_a_share_nothing_is_retried() -> None:
    budget = Budget(0.0, workers=1)
    budget.request()
    assert not budget.take()
