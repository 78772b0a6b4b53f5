"""How many bytes of answers the requests of one key may hold."""

import pytest

from gateway.byte_budget import OVERDRAFT, Budget
from gateway.errors import EngineError

LIMIT = 1000


def test_the_answers_of_one_key_leave_as_much_free_for_others_as_they_hold() -> None:
    budget = Budget(LIMIT)
    its = [budget.charge("key", 10) for _ in range(10)]
    for _ in range(9):
        for one in its:
            one.add_answer(10)
    held = sum(it.size for it in its)
    assert held == OVERDRAFT * LIMIT // 2
    with pytest.raises(EngineError):
        its[0].add_answer(10)
    others = budget.charge("other", 0)
    others.add_answer(OVERDRAFT * LIMIT - held)
    assert budget.held == OVERDRAFT * LIMIT


def test_a_single_answer_may_hold_all_that_is_free() -> None:
    budget = Budget(LIMIT)
    one = budget.charge("key", 10)
    one.add_answer(OVERDRAFT * LIMIT - 10)
    with pytest.raises(EngineError):
        one.add_answer(1)
