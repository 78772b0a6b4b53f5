"""The queue in memory, with a clock that a test sets: the order of requests, rejections, and learned slots."""

import pytest

from gateway.admission.memory import LIFT, Places, Refusal
from gateway.admission.retry_after import EARLY, GRACE
from tests.support.clocks import Clock

QUEUE = 16  # requests that may wait


class Scene:
    """Places with one engine, whose requests take a second unless a test says otherwise."""

    def __init__(self, slots: int = 1) -> None:
        self.clock = Clock()
        self.places = Places(self.clock)
        self.engine = self.places.engine("engine")
        self.places.slots[self.engine] = slots
        self.names: dict[int, str] = {}

    def ask(self, key: str, *, weight: int = 1, wait: float = 60.0, worker: int = 0, **more: object) -> object:
        """Enter; returns the place, or the refusal."""
        found = self.places.enter(self.engine, worker, key, weight, wait, QUEUE, **more)  # type: ignore[arg-type]
        if isinstance(found, Refusal):
            return found
        self.names[found[0]] = key
        return found[0]

    def place(self, key: str, **more: object) -> int:
        found = self.ask(key, **more)  # type: ignore[arg-type]
        assert isinstance(found, int), found
        return found

    def refused(self, key: str, **more: object) -> Refusal:
        found = self.ask(key, **more)  # type: ignore[arg-type]
        assert isinstance(found, Refusal), found
        return found

    def served(self, place: int, seconds: float = 0.0) -> list[str]:
        """Let a request take that many seconds. Returns the keys whose requests get a slot by that."""
        self.clock.advance(seconds)
        return [self.names[it] for _, it in self.places.leave(place)]

    def order(self, place: int, count: int) -> str:
        """Return the keys of the next requests in the order in which they are served, from the end of the request at
        `place` on."""
        found = []
        for _ in range(count):
            ((_, place),) = self.places.leave(place)
            found.append(self.names[place])
        return "".join(found)


def test_a_request_waits_only_while_all_slots_are_taken() -> None:
    it = Scene(slots=2)
    first, second, third = it.place("a"), it.place("a"), it.place("b", worker=7)
    assert [it.places.holds(place) for place in (first, second, third)] == [True, True, False]
    assert it.places.leave(first) == [(7, third)], "the worker to wake is told"
    assert it.places.holds(third)
    assert it.places.leave(second) == []


def test_a_new_key_is_served_before_the_second_request_of_one_that_floods() -> None:
    it = Scene()
    holder = it.place("h")
    for _ in range(4):
        it.place("f")
    it.place("n")
    assert it.order(holder, 5) == "fnfff"


def test_turns_go_by_weight() -> None:
    it = Scene()
    holder = it.place("h")
    for _ in range(3):
        it.place("l")
    for _ in range(4):
        it.place("w", weight=4)
    assert it.order(holder, 7) == "lwwwwll"


def test_a_request_whose_engine_was_full_comes_before_all_that_wait_and_past_the_bounds() -> None:
    it = Scene()
    holder = it.place("h")
    while isinstance(it.ask("a"), int) or isinstance(it.ask("b"), int):
        """Fill the queue."""
    it.place("r", ahead=True)
    assert it.served(holder) == ["r"]


def test_a_request_that_waited_too_long_gets_no_slot() -> None:
    it = Scene()
    holder = it.place("h")
    it.place("a", wait=5.0)
    it.place("b", wait=60.0)
    assert it.served(holder, 5.0) == ["b"]


def test_a_request_that_leaves_the_queue_moves_its_keys_later_requests_up() -> None:
    it = Scene()
    holder = it.place("h")
    places = [it.place("a") for _ in range(3)]
    it.place("b")
    it.place("b")
    for gone in places[:2]:
        assert it.places.leave(gone) == []
    assert it.order(holder, 3) == "abb", "the third of its key is its first now"


def test_positions_are_counted_from_one_in_the_order_of_service() -> None:
    it = Scene()
    it.place("h")
    flood = [it.place("f"), it.place("f")]
    new = it.place("n")
    assert it.places.positions(it.engine) == {flood[0]: 1, new: 2, flood[1]: 3}


def test_a_key_may_have_as_many_places_as_it_leaves_free() -> None:
    it = Scene()
    it.place("h")
    own = 0
    while isinstance(found := it.ask("f"), int):
        own += 1
    assert isinstance(found, Refusal)
    assert (own, found.reason) == (QUEUE // 2, "share")
    for number in range(QUEUE // 2):
        it.place(f"n{number}")
    assert it.refused("last").reason == "full"


def test_a_request_that_would_not_be_served_in_time_is_refused_at_once() -> None:
    it = Scene()
    assert it.served(it.place("h"), 10.0) == []
    it.place("h")
    it.place("a", wait=10.0)
    refusal = it.refused("b", wait=19.0)
    assert refusal.reason == "deadline", "two turns of ten seconds"
    assert refusal.wait > 20.0 - 0.7 * 19.0 - 1.0


def test_a_request_that_comes_back_as_promised_is_let_into_a_full_queue() -> None:
    for late, let_in in ((-2 * EARLY, False), (0.0, True), (GRACE - EARLY, True), (GRACE + EARLY, False)):
        it = Scene()
        it.place("h")
        for number in range(QUEUE):
            it.place(f"{number}")
        refusal = it.refused("r", mark=7)
        it.clock.advance(refusal.wait + late)
        assert isinstance(it.ask("r", mark=7), int) is let_in, late
        assert isinstance(it.ask("r", mark=7), Refusal), "a promise is kept once"


def test_the_pace_is_the_mean_of_what_was_served() -> None:
    it = Scene(slots=2)
    assert it.places.wait(it.engine) == 0.0, "a slot is free"
    for seconds in (2.0, 4.0):
        it.served(it.place("a"), seconds)
    it.place("a")
    it.place("a")
    assert it.places.wait(it.engine) == pytest.approx(3.0 / 2), "of two slots one is free every 1.5 s"
    it.place("a")
    assert it.places.wait(it.engine) == pytest.approx(2 * 3.0 / 2)


def test_a_request_that_the_engine_rejected_does_not_count_in_its_pace() -> None:
    it = Scene()
    it.served(it.place("a"), 4.0)
    place = it.place("a")
    it.clock.advance(100.0)
    it.places.leave(place, served=False)
    it.place("a")
    assert it.places.wait(it.engine) == pytest.approx(4.0)


def test_a_rejection_lowers_the_slots_to_the_running_requests_and_they_rise_one_by_one() -> None:
    it = Scene(slots=4)
    held = [it.place("a") for _ in range(4)]
    assert it.places.lower(held[3]) == 3
    assert it.places.slots[it.engine] == 3
    it.places.leave(held.pop(), served=False)
    it.clock.advance(LIFT)
    it.places.lift(it.engine, 4, waiting=False)
    assert it.places.slots[it.engine] == 3, "nobody waits"
    it.place("b")
    it.clock.advance(-0.1)
    it.places.lift(it.engine, 4, waiting=False)
    assert it.places.slots[it.engine] == 3, "it is too early"
    it.clock.advance(0.1)
    it.places.lift(it.engine, 4, waiting=False)
    assert it.places.slots[it.engine] == 4
    assert [it.names[place] for _, place in it.places.hand_over(it.engine)] == ["b"]
    it.clock.advance(LIFT)
    it.places.lift(it.engine, 4, waiting=True)
    assert it.places.slots[it.engine] == 4, "there are no more"


def test_an_engine_that_is_full_of_other_users_requests_keeps_its_slots() -> None:
    it = Scene(slots=4)
    assert it.places.lower(it.place("a")) == 0
    assert it.places.slots[it.engine] == 4


def test_a_dead_workers_slots_and_places_go_to_others() -> None:
    it = Scene()
    it.place("dead", worker=3)
    it.place("dead", worker=3)
    waits = it.place("a", worker=4)
    assert it.places.vacate(3) == [(4, waits)]
    assert it.places.positions(it.engine) == {}
    assert it.served(waits) == []


def test_a_slot_from_the_database_is_held_even_if_none_is_free_here() -> None:
    it = Scene()
    it.place("a")
    place = it.places.hold(it.engine, 0)
    assert it.places.holds(place)
    assert it.places.others(place) == 1
