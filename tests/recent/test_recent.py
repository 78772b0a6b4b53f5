"""What is remembered of the last requests: bounded in number and size, and told by any process."""

import multiprocessing
import time
from dataclasses import replace
from typing import Any

import orjson

from gateway.errors import ClientLeft, EngineTimeout, StackError
from gateway.exchange import Ending, Usage
from gateway.recent.captures import BODY, KEYS, RING, SECONDS, Captures, Copy
from gateway.recent.courses import MAX_STEPS, ROOM, Course, Courses
from gateway.recent.pace import CELL, CELLS, Pace
from tests.support.clocks import Clock
from tests.support.relays import exchange

_fork = multiprocessing.get_context("fork")


def ending(request_id: str = "r", error: StackError | None = None, **more: Any) -> Ending:
    it = replace(exchange(started=time.monotonic() - 2.0), request_id=request_id)
    made = Ending(
        exchange=it,
        route="model",
        arm=None,
        engine="engine",
        attempts=1,
        resumes=0,
        error=error,
        begun=error is None,
        usage=Usage(3, 4),
        estimated=3,
        counted=4,
        first_token_at=it.started + 0.5,
        finish_reason="stop",
        ended=it.started + 2.0,
    )
    return replace(made, **more)


def told(request_id: str, steps: int = 1, **more: Any) -> dict[str, Any]:
    it = ending(request_id, **more)
    course = Course(it.exchange)
    for number in range(steps):
        course.step(f"step {number}", engine="engine")
    return course.told(it)


def test_a_finished_request_is_found_by_its_id_with_its_steps() -> None:
    courses = Courses()
    for number in range(10):
        courses.keep(told(f"r{number}"))
    found = courses.of("r3")
    assert found
    assert (found["id"], found["outcome"], found["tokens_out"], found["ttft_ms"], found["duration_ms"]) == (
        "r3",
        "finished",
        4,
        500,
        2000,
    )
    assert [it["what"] for it in found["steps"]] == ["step 0"]
    assert courses.of("r99") is None
    assert [it["id"] for it in courses.latest(3)] == ["r9", "r8", "r7"]


def test_a_request_ended_when_its_answer_was_complete_and_not_when_its_client_had_it() -> None:
    before, it = time.time_ns() // 1_000_000, exchange(started=time.monotonic() - 60.0)
    found = Course(it).told(ending(exchange=it, ended=it.started + 2.0))
    assert found["duration_ms"] == 2000
    assert found["sent_ms"] >= 60_000
    assert found["ended_at"] <= before - 30_000


def test_the_oldest_request_is_dropped_when_the_memory_is_full() -> None:
    courses = Courses(4)
    for number in range(6):
        courses.keep(told(f"r{number}"))
    assert [it["id"] for it in courses.latest(100)] == ["r5", "r4", "r3", "r2"]
    assert courses.of("r1") is None


def test_of_two_requests_with_one_id_the_newer_is_told() -> None:
    courses = Courses(4)
    for tokens in range(6):
        courses.keep(told("same", usage=Usage(1, tokens), counted=0))
    found = courses.of("same")
    assert found
    assert found["tokens_out"] == 5


def test_a_request_with_many_steps_keeps_the_first_and_the_last_in_bounded_space() -> None:
    courses = Courses(4)
    courses.keep(told("long", steps=200, route="m" * 5000, engine="e" * 5000))
    found = courses.of("long")
    assert found
    assert len(orjson.dumps(found)) <= ROOM
    assert len(found["steps"]) <= MAX_STEPS
    assert found["cut"]
    assert (found["steps"][0]["what"], found["steps"][-1]["what"]) == ("step 0", "step 199")


def test_a_record_with_the_longest_names_harms_no_other_record() -> None:
    courses = Courses(2)
    for number in range(4):  # also in the last place
        courses.keep(told(f"r{number}"))
        courses.keep(told("i" * 64, route="\1" * 200, engine="\1" * 200, arm="a" * 64, finish_reason="\1" * 200))
        assert [it["id"] for it in courses.latest(9)] == ["i" * 64, f"r{number}"]
        courses.keep(told("one more"))


def test_a_request_of_one_process_is_found_by_another() -> None:
    courses = Courses(4)
    process = _fork.Process(target=lambda: courses.keep(told("theirs")), daemon=True)
    process.start()
    process.join()
    assert courses.of("theirs")


def test_the_pace_adds_up_all_workers_and_forgets() -> None:
    clock = Clock()
    pace = Pace(clock)
    for seat in range(3):
        pace.ended(seat, ending())
    pace.ended(1, ending(error=EngineTimeout("slow"), first_token_at=None))
    pace.ended(1, ending(error=ClientLeft("left"), first_token_at=None))
    found = pace.told(60)
    assert (found.requests, found.failed, found.left, found.tokens) == (5, 1, 1, 20)
    assert (found.first_token, found.duration) == (0.5, 2.0)
    clock.now += 61 + CELL
    assert pace.told(60).requests == 0
    assert pace.told(300).requests == 5
    clock.now += CELL * CELLS
    assert pace.told(300).requests == 0
    pace.ended(0, ending())
    assert pace.told(300).requests == 1


def test_a_key_is_captured_until_its_time_is_over() -> None:
    clock = Clock()
    captures = Captures(clock)
    assert captures.left("key") == 0
    captures.start("key")
    assert (captures.left("key"), captures.left("other")) == (SECONDS, 0)
    clock.now += SECONDS
    assert captures.left("key") == 0


def test_beyond_the_most_keys_the_one_that_ends_first_makes_room() -> None:
    clock = Clock()
    captures = Captures(clock)
    for number in range(KEYS + 1):
        captures.start(f"k{number}")
        clock.now += 1
    assert [captures.left(f"k{number}") > 0 for number in range(KEYS + 1)] == [False] + [True] * KEYS


def test_captured_bodies_are_bounded_in_size_and_number() -> None:
    captures = Captures()
    for number in range(RING + 1):
        captures.keep(f"r{number}", "key", 0, b"asked %d" % number, b"x" * (BODY + number - 1))
    assert captures.of("r0", "key") is None
    first = captures.of("r1", "key")
    assert first
    assert (first.request, len(first.answer), first.whole) == ("asked 1", BODY, True)
    last = captures.of(f"r{RING}", "key")
    assert last
    assert (len(last.answer), last.whole) == (BODY, False)
    captures.stop("key")
    assert captures.of("r1", "key") is None


def test_captured_bodies_are_told_apart_by_their_key_too() -> None:
    captures = Captures()
    for key in ("a", "b"):
        captures.keep("same", key, 0, b"asked by " + key.encode(), b"")
    assert [it and it.request for it in (captures.of("same", key) for key in ("a", "b", "c", None))] == [
        "asked by a",
        "asked by b",
        None,
        "asked by b",
    ]


def test_the_copy_of_a_long_answer_stays_small() -> None:
    copy = Copy()
    for _ in range(100):
        copy.append(b"x" * 1000)
    assert len(b"".join(copy)) == BODY + 1
    assert len(copy) == 33
