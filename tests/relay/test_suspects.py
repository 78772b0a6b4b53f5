"""Suspects: how the blame for an engine's death is weighed. What callers see of it: tests/flows/test_suspects.py."""

from types import SimpleNamespace
from typing import Any

import pytest

from gateway.relay.suspects import BARRED, Suspects

Died = tuple[int, int]  # a request's body, and how many tokens of its answer it had


def request(body: int, copy: int = 0) -> Any:
    return SimpleNamespace(key_id="key", mark=body, request_id=f"{body} {copy}")


def handed_on(suspects: Suspects, engine: str, died: list[Died], *, again: bool = False) -> list[bool]:
    """Have an engine die with these requests: which of them may be handed on."""
    for copy, (body, tokens) in enumerate(died):
        suspects.note(engine, request(body, copy), tokens=tokens)
    return [suspects.judge(engine, request(body), tokens=tokens, again=again) for body, tokens in died]


@pytest.mark.parametrize(
    ("died", "expected"),
    [
        ([(1, 0)], [False]),  # alone, before its first token
        ([(1, 5)], [True]),  # alone, in its midst
        ([(1, 0), (2, 0)], [True, True]),  # either may be the reason
        ([(1, 0), (2, 5)], [False, True]),
        ([(1, 5), (2, 5)], [True, True]),
        ([(1, 5)] * 10, [True] * 10),  # copies of one request, in company of each other
        ([(1, 5), (1, 0), (1, 0)], [True] * 3),  # one of them had a token, so the prompt did not kill it
        ([(1, 0)] * 10, [False] * 10),
    ],
)
def test_a_request_is_handed_on_after_a_death_unless_it_alone_can_be_the_reason(
    died: list[Died], expected: list[bool]
) -> None:
    assert handed_on(Suspects(), "engine", died) == expected


def test_copies_of_a_request_are_blamed_once_for_a_death_and_cleared_by_a_whole_answer() -> None:
    suspects = Suspects()
    assert not any(handed_on(suspects, "one", [(1, 0)] * 4))
    assert 0 < suspects.barred(request(1)) <= BARRED  # of several deaths it would be far longer
    suspects.clear(request(1))
    assert suspects.barred(request(1)) == 0


def test_copies_that_were_answered_when_their_engines_died_are_never_blamed() -> None:
    suspects = Suspects()
    for engine in ("one", "two", "one"):
        assert all(handed_on(suspects, engine, [(1, 5)] * 4))


def test_a_request_that_sees_the_same_engine_die_twice_is_blamed_twice() -> None:
    suspects = Suspects()
    assert handed_on(suspects, "engine", [(1, 5)]) == [True]
    assert handed_on(suspects, "engine", [(1, 5)], again=True) == [False]
