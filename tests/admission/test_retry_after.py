"""Promises to rejected requests: each key has its own line, bounded in time and in number."""

import pytest

from gateway.admission.memory import PLACES, Places, Refusal
from gateway.admission.retry_after import ENGINES, LONGEST, PROMISES
from tests.support.clocks import Clock

PACE = 0.05  # seconds a request takes at the one slot


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def places(clock: Clock) -> Places:
    """One engine whose only slot is in use, and whose pace is known."""
    places = Places(clock)
    assert places.engine("engine") == 0
    places.slots[0] = 1
    place, _ = enter(places, "holder")
    places.leave(place)
    places.seconds[0] = PACE
    assert enter(places, "holder") == (place, True)
    return places


def enter(places: Places, key: str, wait: float = 0.0, mark: int = 0, weight: int = 1) -> tuple[int, bool]:
    found = places.enter(0, 0, key, weight, wait, 8, mark=mark)
    assert not isinstance(found, Refusal), found
    return found


def refused(places: Places, key: str, mark: int = 0, weight: int = 1) -> float:
    """Return the Retry-After of a request that would not wait at all, in seconds."""
    found = places.enter(0, 0, key, weight, 0.0, 8, mark=mark)
    assert isinstance(found, Refusal)
    return found.wait


def test_rejections_of_one_key_do_not_move_another_keys_promise(places: Places) -> None:
    own = [refused(places, "floods", mark) for mark in range(300)]
    assert own[-1] > 300 * PACE, "its own line is as long as it made it"
    assert refused(places, "other") < 5 * PACE
    for flooding in range(20):
        for mark in range(50):
            refused(places, f"floods-{flooding}", mark)
    assert refused(places, "another") < 2 * 24 * PACE, "one turn of each key that waits for its own, as a share of all"


def test_queue_timeouts_of_one_key_do_not_move_another_keys_promise(places: Places) -> None:
    for mark in range(300):
        places.again(0, "floods", 1, mark)
    assert places.again(0, "other", 1, 0) < 5 * PACE


def test_a_keys_promises_are_bounded_in_time_whatever_the_pace(places: Places) -> None:
    places.seconds[0] = 30.0
    assert max(refused(places, "floods", mark) for mark in range(1000)) < LONGEST + 3 * 30 * 1.25


def test_a_flood_of_rejections_removes_no_other_keys_promise(places: Places, clock: Clock) -> None:
    places.seconds[0] = 8.0  # so that its line is long
    promised = refused(places, "other", mark=7)
    for mark in range(PROMISES + 1000):
        refused(places, "floods", mark)
    clock.advance(promised)
    places.seconds[0] = PACE
    for number in range(8):  # the queue is full of others meanwhile
        enter(places, f"others-{number}", wait=60)
    assert enter(places, "other", wait=60, mark=7)


def test_a_heavier_keys_promises_are_closer_together(places: Places, clock: Clock) -> None:
    moments: dict[int, list[float]] = {1: [], 4: []}
    for mark in range(20):
        for weight, found in moments.items():
            found.append(clock() + refused(places, f"{weight}", mark, weight))
    light, heavy = (it[-1] - it[1] for it in moments.values())
    assert light == pytest.approx(4 * heavy, rel=0.1)


def test_a_promise_stays_near_with_more_keys_than_there_are_lines(places: Places) -> None:
    for number in range(2000):
        assert refused(places, f"key-{number}") < 2 * 1.25 * PACE * min(number + 3, 520)


def test_a_new_engine_replaces_the_one_that_no_worker_has_known_for_longest() -> None:
    places = Places()
    numbers = {name: places.engine(name) for name in map(str, range(ENGINES))}
    assert len(set(numbers.values())) == ENGINES
    busy = numbers["0"]
    places.slots[busy] = 1
    assert places.enter(busy, 0, "key", 1, 0.0, 8) == (busy * PLACES, True)
    for name in map(str, range(2, ENGINES)):
        places.know(numbers[name])
    assert places.engine("new") == numbers["1"], "the others have a request, or are known since"
    assert places.engine("0") == busy
    for number in range(3 * ENGINES):
        places.engine(f"newer-{number}")
    assert places.engine("0") == busy
