"""The breaker alone, with a clock that a test sets: when an engine gets no requests, and what ends that."""

import pytest

from gateway.upstream.breaker import LONGEST, Breaker
from tests.support.clocks import Clock

OPEN_FOR = 2.0  # seconds, give or take a fifth


class Scene:
    def __init__(self, failures: int = 3) -> None:
        self.clock = Clock()
        self.changes: list[str] = []
        self.breaker = Breaker(failures, OPEN_FOR, lambda state, _: self.changes.append(state), self.clock)

    def fail(self, times: int = 1, *, silent: bool = False) -> None:
        for _ in range(times):
            self.breaker.began()
            self.breaker.failed("away", silent=silent)

    def pause(self) -> float:
        """For how long it is open from now on."""
        waited = 0.0
        while not self.breaker.allows():
            waited += 0.01
            self.clock.advance(0.01)
        return waited


def test_only_failures_in_a_row_open_it() -> None:
    it = Scene()
    for _ in range(5):
        it.fail(2)
        it.breaker.succeeded()
    assert (it.breaker.state, it.changes) == ("closed", [])
    it.fail(3)
    assert (it.breaker.state, it.breaker.allows(), it.changes) == ("open", False, ["open"])


def test_it_is_half_open_after_its_pause_for_one_request_at_a_time() -> None:
    it = Scene()
    it.fail(3)
    assert it.pause() == pytest.approx(OPEN_FOR, rel=0.21)
    assert it.breaker.state == "half-open"
    assert it.breaker.began(), "it is the trial request"
    assert not it.breaker.allows()
    it.breaker.gave_up(trial=False)
    assert not it.breaker.allows(), "a request that began before the breaker opened has ended"
    it.breaker.gave_up(trial=True)
    assert it.breaker.allows(), "a client that left says nothing about the engine"
    it.breaker.began()
    it.breaker.succeeded()
    assert (it.breaker.state, it.breaker.allows()) == ("closed", True)


def test_each_opening_is_twice_as_long_as_the_one_before_up_to_the_longest() -> None:
    it = Scene()
    it.fail(3)
    pauses = [it.pause()]
    for _ in range(7):
        it.fail()
        pauses.append(it.pause())
    for number, pause in enumerate(pauses):
        assert pause == pytest.approx(min(LONGEST, OPEN_FOR * 2**number), rel=0.21)
    it.breaker.began()
    it.breaker.succeeded()
    it.fail(3)
    assert it.pause() == pytest.approx(OPEN_FOR, rel=0.21), "an answer begins the count anew"


@pytest.mark.parametrize(("silent", "state"), [(False, "closed"), (True, "half-open")])
def test_a_good_probe_closes_the_breaker_of_an_unreachable_engine_and_half_opens_that_of_a_silent_one(
    state: str, *, silent: bool
) -> None:
    it = Scene()
    it.fail(3, silent=silent)
    assert it.breaker.away is not silent
    it.breaker.probed(None, silent=False)
    assert it.breaker.state == state


def test_bad_probes_open_it_as_failures_do_and_change_nothing_of_an_open_one() -> None:
    it = Scene(failures=2)
    it.breaker.probed("loading", silent=False)
    assert it.breaker.allows()
    it.breaker.probed("loading", silent=False)
    it.clock.advance(OPEN_FOR / 2)
    it.breaker.probed("loading", silent=False)
    assert it.changes == ["open"]
    assert it.pause() < 0.75 * OPEN_FOR, "its pause did not begin anew"


def test_a_good_probe_of_a_working_engine_changes_nothing() -> None:
    it = Scene()
    it.fail(2)
    it.breaker.probed(None, silent=False)
    it.fail()
    assert it.breaker.state == "open", "it does not count as an answer"
