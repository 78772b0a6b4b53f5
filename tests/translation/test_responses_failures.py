"""Responses answers that are waited for, and those that fail."""

from typing import Any

import orjson
import pytest
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from gateway.errors import (
    AnswerTooLong,
    BadRequest,
    EngineFailed,
    EngineLost,
    EngineOverloaded,
    EngineUnauthorized,
    QueueTimeout,
    QuotaSpent,
    RateLimited,
    StackError,
)
from gateway.translation.responses import envelope, input_tokens, status_of
from tests.support.responses_answers import asked, call, chunk, events_of, types

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
TOOLS = [{"type": "function", "name": "weather", "parameters": {"type": "object"}}]


def test_a_waiting_client_gets_the_response_in_progress_again() -> None:
    writer = asked().writer
    events = events_of(writer.head() + writer.waiting() + writer.waiting())
    assert types(events) == ["response.created"] + ["response.in_progress"] * 3
    assert [it["sequence_number"] for it in events] == [0, 1, 2, 3]


@pytest.mark.parametrize("begun", [chunk(content="Hel"), chunk(reasoning="Hm"), call(0, "weather", "{", "c")])
def test_a_client_that_waits_within_an_item_gets_an_empty_delta_of_it(begun: dict[str, Any]) -> None:
    writer = asked(tools=TOOLS).writer
    before = events_of(writer.head() + writer.chunk(begun))
    (event,) = events_of(writer.waiting())
    EVENT.validate_python(event)
    assert event["type"] == before[-1]["type"]
    assert event["delta"] == ""
    assert event["item_id"] == before[-1]["item_id"]


# What Codex does with each: it reads the code of `response.failed` and nothing else.
FAILURES: list[tuple[StackError, str, str]] = [
    (EngineLost("The connection to the engine was lost."), "server_error", "The connection to the engine was lost."),
    (EngineOverloaded("Too much to do. Come back when Retry-After says."), "rate_limit_exceeded", "try again in 2s."),
    (QueueTimeout("It could not begin in time.", 9.0), "rate_limit_exceeded", "Please try again in 9s."),
    (RateLimited("Too many requests.", 1.5, {}), "rate_limit_exceeded", "Please try again in 2s."),
    (QuotaSpent("The tokens of the day are used up.", {}), "insufficient_quota", "used up."),
    (EngineFailed("The engine died."), "invalid_prompt", "The engine died."),
    (AnswerTooLong("The answer took too long."), "invalid_prompt", "The answer took too long."),
    (BadRequest("'x' is wrong.", param="x"), "invalid_prompt", "'x' is wrong."),
]


@pytest.mark.parametrize(("error", "code", "end"), FAILURES, ids=[type(it[0]).__name__ for it in FAILURES])
def test_a_failed_stream_has_the_code_by_which_codex_stops_waits_or_tries_again(
    error: StackError, code: str, end: str
) -> None:
    writer = asked(tools=TOOLS).writer
    events = events_of(writer.head() + writer.chunk(chunk(content="Hel")) + writer.failed(error))
    told, failed = events[-2:]
    assert types(events)[-2:] == ["error", "response.failed"]
    assert told["code"] == error.code
    assert failed["response"]["error"]["code"] == code
    assert failed["response"]["error"]["message"].endswith(end)
    assert failed["response"]["output"][0]["status"] == "incomplete"
    assert [it["sequence_number"] for it in events] == list(range(len(events)))
    EVENT.validate_python(told)


def test_a_failed_stream_leaves_out_the_call_that_was_open() -> None:
    writer = asked(tools=TOOLS).writer
    stream = writer.head() + writer.chunk(call(0, "weather", "{}", "c")) + writer.failed(EngineLost("Lost."))
    events = events_of(stream)
    assert "response.output_item.done" not in types(events)
    assert events[-1]["response"]["output"] == []


def test_a_failure_before_the_head_brings_the_head_with_it() -> None:
    events = events_of(asked().writer.failed(EngineLost("Lost.")))
    assert types(events) == ["response.created", "response.in_progress", "error", "response.failed"]


def test_an_error_that_codex_must_not_repeat_thirty_times_is_a_400() -> None:
    assert status_of(EngineFailed("It died.")) == status_of(EngineUnauthorized("No.")) == 400
    assert status_of(EngineLost("Lost.")) == 502
    body, headers = envelope(BadRequest("'x' is wrong.", param="x"))
    assert orjson.loads(body)["error"]["param"] == "x"
    assert headers == []


def test_counted_tokens_have_the_answer_of_their_own_endpoint() -> None:
    assert input_tokens(12) == {"object": "response.input_tokens", "input_tokens": 12}
