"""The console's bounds: time for pages, sessions of a key, and attempts of an address, over several processes."""

import multiprocessing
from contextlib import suppress

import pytest

from gateway.console.allowances import KEPT, LEAST, Allowance, Allowances
from gateway.console.door import TooOften
from gateway.console.sessions import FORMS, OF_ONE_KEY, SESSIONS, Sessions
from tests.support.clocks import Clock

_fork = multiprocessing.get_context("fork")
KEY, OTHER = b"k" * 32, b"o" * 32


def test_pages_take_a_bounded_part_of_the_time() -> None:
    clock = Clock()
    allowance = Allowance(0.1, 1.0, clock)
    allowance.take()
    allowance.charge(2.0)
    with pytest.raises(TooOften) as caught:
        allowance.take()
    wait = int(caught.value.headers["retry-after"])
    assert 10 <= wait <= 12
    clock.now += wait
    allowance.take()


def test_what_is_not_used_is_kept_up_to_a_reserve() -> None:
    clock = Clock()
    allowance = Allowance(0.1, 1.0, clock)
    clock.now += 1000
    allowance.take()
    allowance.charge(1.0 - 2 * LEAST)
    allowance.take()
    with pytest.raises(TooOften):
        allowance.take()


def test_one_visitor_leaves_others_their_part_of_the_time() -> None:
    clock = Clock()
    allowances = Allowances(0.1, 1.0, clock)
    for _ in range(100):
        clock.now += 1
        with suppress(TooOften):
            allowances.of("greedy").take()
            allowances.of("greedy").charge(0.5)
        allowances.of("modest").take()
        allowances.of("modest").charge(0.01)


def test_visitors_together_are_bounded_and_only_so_many_are_remembered() -> None:
    allowances = Allowances(0.1, 1.0, Clock())
    first = allowances.of("0")
    for number in range(3):
        allowances.of(str(number)).take()
        allowances.of(str(number)).charge(0.4)
    with pytest.raises(TooOften):
        allowances.of("4").take()
    assert allowances.of("0") is first
    for number in range(KEPT):
        allowances.of(f"other {number}")
    assert allowances.of("0") is not first


def test_a_session_ends_by_itself() -> None:
    clock = Clock()
    sessions = Sessions(clock)
    token = sessions.begin(KEY, 60)
    assert sessions.find(token) == KEY
    clock.now += 61
    assert sessions.find(token) is None


def test_a_session_that_was_ended_is_none_and_the_others_go_on() -> None:
    sessions = Sessions()
    tokens = [sessions.begin(KEY, 60) for _ in range(3)]
    sessions.end(tokens[1])
    sessions.end("no token")
    assert [sessions.find(it) for it in tokens] == [KEY, None, KEY]


def test_one_key_displaces_its_own_sessions_alone() -> None:
    clock = Clock()
    sessions = Sessions(clock)
    other = sessions.begin(OTHER, 60)
    tokens = []
    for _ in range(OF_ONE_KEY + 2):
        clock.now += 1
        tokens.append(sessions.begin(KEY, 60))
    assert [sessions.find(it) is None for it in tokens] == [True] * 2 + [False] * OF_ONE_KEY
    assert sessions.find(other) == OTHER


def test_beyond_all_sessions_the_one_that_ends_first_makes_room() -> None:
    clock = Clock()
    sessions = Sessions(clock)
    first = sessions.begin(KEY, 60)
    for number in range(SESSIONS - 1):
        sessions.begin(number.to_bytes(32, "little"), 120)
    assert sessions.find(first) == KEY
    sessions.begin(OTHER, 120)
    assert sessions.find(first) is None


def test_attempts_of_an_address_are_bounded_and_come_back() -> None:
    clock = Clock()
    sessions = Sessions(clock)
    assert [sessions.try_in("10.0.0.1") for _ in range(10)] == [0.0] * 10
    wait = sessions.try_in("10.0.0.1")
    assert 0 < wait <= 6
    assert sessions.try_in("10.0.0.2") == 0
    clock.now += wait
    assert sessions.try_in("10.0.0.1") == 0
    assert sessions.try_in("10.0.0.1") > 0


def test_a_right_attempt_is_not_charged() -> None:
    sessions = Sessions(Clock())
    for _ in range(50):
        assert sessions.try_in("10.0.0.1") == 0
        sessions.was_right("10.0.0.1")


def test_addresses_of_one_ipv6_network_count_together() -> None:
    sessions = Sessions(Clock())
    for number in range(10):
        assert sessions.try_in(f"2001:db8::{number:x}") == 0
    assert sessions.try_in("2001:db8::ffff") > 0
    assert sessions.try_in("2001:db8:0:1::1") == 0


def test_a_form_is_remembered_until_so_many_others_were_sent() -> None:
    sessions = Sessions()
    assert [sessions.use("first"), sessions.use("first")] == [True, False]
    sessions.give_back("first")
    assert sessions.use("first")
    assert all(sessions.use(str(number)) for number in range(FORMS - 2))
    assert not sessions.use("first")
    assert all(sessions.use(f"another {number}") for number in range(2))
    assert sessions.use("first")


def test_a_session_of_one_process_is_known_in_another() -> None:
    sessions = Sessions()
    token = sessions.begin(KEY, 60)
    known = _fork.SimpleQueue()

    def visit() -> None:
        known.put(sessions.find(token) == KEY)
        sessions.end(token)

    process = _fork.Process(target=visit, daemon=True)
    process.start()
    process.join()
    assert known.get()
    assert sessions.find(token) is None
