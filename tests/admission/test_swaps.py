"""One engine, more models than fit: which is loaded next. By counts and order, in virtual time."""

from collections import Counter
from functools import partial
from itertools import pairwise

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.admission.swaps import BARRED, LATE, Limit, Loads, Waiting, decide, number
from tests.support.swapping import LOOK, Box

A, B, C = 1, 2, 3
COST = 10.0
SMALL = 1e-6


def closed(box: Box, clients: list[tuple[str, int]]) -> None:
    """Clients, with their keys and models, that ask again at once whenever they were served."""
    box.again = box.ask
    for key, model in clients:
        box.ask(key, model)


def known(box: Box) -> None:
    """The engine has loaded both models once, so the gateway knows what that costs, and that they do not fit."""
    box.ask("first", A)
    box.run(20)
    box.ask("first", B)
    box.run(100)
    assert box.places.models.scarce[box.engine]
    box.loads.clear()
    box.served.clear()


def test_requests_for_two_models_are_served_in_batches() -> None:
    box = Box(cost=COST)
    closed(box, [(f"{model}-{it}", model) for it in range(20) for model in (A, B)])
    box.run(2000)
    shares = Counter(it.model for it in box.served)
    assert len(box.loads) * 20 < len(box.served)
    assert abs(shares[A] - shares[B]) < 0.1 * len(box.served)
    assert {it.key for it in box.served[-600:]} == {it.key for it in box.served}, "nobody starves"


def test_a_flood_of_one_model_does_not_starve_one_request_for_another() -> None:
    box = Box(cost=COST)
    known(box)
    closed(box, [(f"a{it}", A) for it in range(100)])
    box.run(60)
    box.ask("b", B)
    came = len(box.served)
    box.run(200, stop=lambda: box.served[-1].model == B)
    between = sum(it.model == A for it in box.served[came:])
    bound = box.places.models.loads(box.engine).bound(B, box.limit)
    assert 0 < between <= bound + 1 + 1  # a request takes a second, and one runs while the engine drains


def test_the_operators_bound_is_kept() -> None:
    box = Box(cost=1.0, limit=Limit(5.0))
    known(box)
    closed(box, [(f"a{it}", A) for it in range(100)])
    box.run(60)
    box.ask("b", B)
    came = len(box.served)
    box.run(200, stop=lambda: box.served[-1].model == B)
    assert 4 <= sum(it.model == A for it in box.served[came:]) <= 7


def test_one_key_gets_no_more_of_the_engine_by_using_a_model_of_its_own() -> None:
    box = Box(cost=2.0, limit=Limit(0, 60))
    closed(box, [("b", B), *((f"a{it}", A) for it in range(4))] * 10)
    box.run(600)
    share = sum(it.key == "b" for it in box.served) / len(box.served)
    assert 0.1 < share < 0.3  # a fifth is fair


def test_two_clients_that_cannot_be_batched_spend_half_of_the_time_on_loads_at_most() -> None:
    box = Box(cost=COST)
    closed(box, [("a", A), ("b", B)])
    box.run(3000)
    assert box.loading <= 0.52 * 3000
    assert len(box.loads) < len(box.served) / 4


def test_the_first_request_after_a_long_rest_does_not_wait_for_its_swap() -> None:
    box = Box(cost=COST)
    known(box)
    for model in (A, B):  # the way back is not delayed either
        came = box.clock()
        box.ask("a", model)
        box.run(LOOK + COST + 1.1)
        assert box.served[-1].began <= came + LOOK + COST


def test_requests_of_a_gateway_that_has_only_one_model_left_are_served() -> None:
    box = Box()
    known(box)
    for _ in range(3):
        box.ask("a", 0)
    box.run(10)
    assert len(box.served) == 3


@pytest.mark.parametrize("slots", [1, 3])
def test_nothing_changes_if_all_models_fit(slots: int) -> None:
    def order(models: int) -> list[str]:
        box = Box(cost=0.5, slots=slots, room=2)
        for model in range(1, models + 1):
            box.ask("first", model)
            box.run(10)
        box.served.clear()
        closed(box, [(f"k{it}", 1 + it % models) for it in range(12)])
        box.run(60)
        assert len(box.loads) == models
        return [it.key for it in box.served]

    assert order(2) == order(1)


def test_a_model_that_the_engine_unloads_by_itself_was_not_displaced() -> None:
    box = Box(room=2)
    for model in (A, B):
        box.ask("a", model)
        box.run(20)
    seen = box.places.models.loads(box.engine)
    assert seen.loaded == {A, B}
    box.places.looked(box.engine, seen, [B])
    assert box.places.models.loads(box.engine).loaded == {B}
    assert not box.places.models.scarce[box.engine]


def test_one_displaced_model_is_enough_to_know_that_not_all_fit() -> None:
    """It may have been loaded before the gateway was started."""
    loads = Loads().ended(B, [A], [B], 100.0, 10.0)
    assert loads.scarce
    assert not loads.begins(A, 200.0).ended(A, [B], [A, B], 210.0, 10.0).scarce, "by now there is more memory"


def test_three_models_take_turns() -> None:
    box = Box(cost=COST)
    closed(box, [(f"{model}-{it}", model) for it in range(10) for model in (A, B, C)])
    box.run(3000)
    order = [model for _, _, model in box.loads[3:]]
    assert all(set(order[at : at + 3]) == {A, B, C} for at in range(len(order) - 3))
    assert len(box.loads) * 10 < len(box.served)


def test_a_load_goes_on_if_its_request_leaves() -> None:
    """Otherwise requests that are cancelled could have a model loaded again and again."""
    box = Box()
    known(box)
    enter = box.places.enter
    place, holds = enter(box.engine, 0, "a", 1, 60, 10, model=A)  # type: ignore[misc]
    assert holds
    box.places.leave(place)
    assert enter(box.engine, 0, "b", 1, 60, 10, model=B)[1] is False, "the engine is loading A"
    assert enter(box.engine, 0, "a", 1, 60, 10, model=A)[1] is True
    box.places.loaded(box.engine, A, [B], [A], 10.0)
    assert box.places.models.loads(box.engine).loaded == {A}


def test_a_load_whose_worker_died_is_given_up_after_a_while() -> None:
    box = Box(cost=COST)
    known(box)
    assert box.places.enter(box.engine, 7, "a", 1, 60, 10, model=A)[1] is True  # type: ignore[index]
    other = box.places.enter(box.engine, 0, "b", 1, 600, 10, model=B)[0]  # type: ignore[index]
    assert box.places.vacate(7) == []
    box.clock.advance(2 * COST + LATE - 0.1)
    assert box.places.hand_over(box.engine) == []
    box.clock.advance(0.2)
    assert box.places.hand_over(box.engine) == [(0, other)]


def test_a_request_is_told_when_its_model_is_loaded() -> None:
    box = Box(cost=COST, limit=Limit(0, 30))
    known(box)

    def due() -> float:
        return box.places.models.due(box.engine, A, box.clock())

    assert due() == 30 + COST  # after B's turn, which lasts 30 s at most
    assert box.places.models.due(box.engine, B, box.clock()) == 0
    box.ask("a", A)
    assert due() == COST
    box.run(4)
    assert due() == pytest.approx(COST - 4)


def test_a_record_that_a_killed_worker_left_unfinished_says_nothing() -> None:
    box = Box()
    known(box)
    box.places.models._records[:4096] = b'{"loaded": [1'.ljust(4096, b"\0")
    assert box.places.models.loads(box.engine) == Loads()
    box.ask("a", A)
    box.run(30)
    assert box.served[-1].model == A


def test_what_is_kept_fits_its_space_and_is_read_as_it_was() -> None:
    loads = Loads(scarce=True)
    for it in range(100):
        model, moment = number(str(it)), 2e9 + it
        loads = loads.begins(model, 1e9 + it).ended(model, [], [model], moment, 123.456)
        loads = loads.ended(number(f"large {it}"), [], [model], moment, 123.456, failed=True)
    assert len(loads.dump()) < 4096
    assert Loads.parse(orjson.loads(loads.dump())) == loads
    # Gateways of another version may read it: an older one knows no `barred`, and a later one may tell more.
    assert b"barred" not in Loads().dump()
    assert Loads.parse(orjson.loads(loads.dump()) | {"later": 1}) == loads


def test_a_model_that_could_not_be_loaded_is_barred_for_a_while_and_its_load_counts() -> None:
    before = Loads(frozenset({A}), {A: 4.0}, {A: 90.0}, scarce=True, last=A).begins(B, 100.0)
    loads = before.ended(B, [A], [], 110.0, 10.0, failed=True)
    assert not loads.loaded
    assert not loads.loading(110.0), "others need not wait for it"
    assert loads.cost(B) == 10.0
    assert [loads.bars(B, 110.0 + it) for it in (0.0, BARRED - 0.1, BARRED)] == [True, True, False]
    assert loads.moved(50.0).bars(B, 150.0 + BARRED)
    assert not loads.bars(A, 110.0)
    slow = before.ended(B, [A], [], 150.0, 50.0, failed=True)
    assert [slow.bars(B, 150.0 + it) for it in (99.0, 100.0)] == [True, False]
    assert not loads.seen([B]).bars(B, 110.0), "somebody else has loaded it"
    assert not loads.ended(B, [], [B], 120.0, 9.0).bars(B, 120.0)
    assert loads.ended(A, [], [A], 120.0, 4.0).bars(B, 120.0)


def test_a_measured_cost_moves_slowly() -> None:
    loads = Loads().ended(A, [], [A], 100.0, 10.0)
    assert (loads.cost(A), loads.cost(B)) == (10.0, 10.0)
    assert loads.ended(A, [A], [A], 200.0, 20.0).cost(A) == 15.0


def test_the_model_that_waits_for_longest_is_next_once_it_has_waited_for_as_long_as_it_may() -> None:
    """Whatever its tag is: its key may have asked for very much else."""
    loads = Loads(frozenset({A}), {A: 4.0, B: 4.0, C: 4.0}, {}, scarce=True, last=A, since=0.0, before=100.0)
    waiting = [Waiting(B, 0.0, 5.0), Waiting(C, 99.0, 0.0)]
    following = [
        decide(loads, waiting, now, busy=False, virtual=0.0, pace=1.0, limit=Limit(10.0)) for now in (9.9, 10.0)
    ]
    assert following == [B, C]


def test_a_swap_is_made_when_fairness_is_worth_more() -> None:
    loads = Loads(frozenset({A}), {A: 4.0, B: 6.0}, {}, scarce=True, last=A, since=0.0, before=100.0)
    how = {"busy": True, "virtual": 0.0, "pace": 2.0, "limit": Limit(1000.0)}

    def swaps(behind: float) -> bool:
        return bool(decide(loads, [Waiting(B, 0.0, 0.0), Waiting(A, behind, 0.0)], 1.0, **how))

    assert [swaps(it) for it in (0.0, 4.9, 5.0)] == [False, False, True]  # 5 requests of 2 s; 4 + 6 s of loads


ARRIVALS = st.lists(
    st.tuples(st.floats(0, 3), st.sampled_from("kmn"), st.sampled_from([A, B, C])), min_size=1, max_size=40
)
LIMITS = st.builds(Limit, st.one_of(st.just(0.0), st.floats(1, 20)), st.floats(1, 20))


@settings(max_examples=60)
@given(ARRIVALS, st.floats(0.5, 10), st.floats(0.1, 3), st.integers(1, 4), LIMITS)
def test_nobody_starves_and_swaps_are_bounded(
    arrivals: list[tuple[float, str, int]], cost: float, work: float, slots: int, limit: Limit
) -> None:
    box = Box(cost=cost, work=work, slots=slots, limit=limit)
    known(box)
    moment = 0.0
    for later, key, model in arrivals:
        moment += later
        box.after(moment, partial(box.ask, key, model))
    box.run(10_000, stop=lambda: len(box.served) == len(arrivals))
    assert len(box.served) == len(arrivals)
    for one, two, three in zip(box.loads, box.loads[1:], box.loads[2:], strict=False):
        assert two[0] - one[1] + three[0] - two[1] >= 2 * cost - SMALL, "two stays are shorter than their loads"
    bound = limit.wait or min(4 * cost, limit.most)
    turn = max(bound, 2 * cost) + work + LOOK + cost  # a stay, the requests that run at its end, and a load
    for began, _, model in box.loads:
        came = min(it.came for it in box.served if it.model == model and it.came <= began <= it.began)
        stays = [two[0] for one, two in pairwise(box.loads) if one[2] == model and two[0] <= began]
        assert began - max([came, *stays]) <= bound + 2 * turn + SMALL, "every other model has one turn at most"
