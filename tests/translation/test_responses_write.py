"""The writer of Responses answers: their items and their ends."""

import base64
from typing import Any

import orjson
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from gateway.errors import EngineError, EngineLost
from tests.support.responses_answers import asked, call, chunk, events_of, streamed, types

USAGE = {
    "prompt_tokens": 11,
    "completion_tokens": 7,
    "total_tokens": 18,
    "prompt_tokens_details": {"cached_tokens": 4},
    "completion_tokens_details": {"reasoning_tokens": 3},
}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
TOOLS = [
    {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}, "strict": False},
    {"type": "custom", "name": "patch", "description": "Apply a patch."},
    {"type": "web_search"},
    {
        "type": "namespace",
        "name": "mcp__lab",
        "description": "A lab.",
        "tools": [{"type": "function", "name": "look_up", "parameters": {"type": "object"}, "strict": False}],
    },
]


def _everything() -> list[dict[str, Any]]:
    """One answer with every kind of item, streamed."""
    return [
        chunk(role="assistant", content=""),
        chunk(reasoning_content="Let me "),
        chunk(reasoning="think."),
        chunk(content="Hello"),
        chunk(content=" there"),
        chunk(refusal="No."),
        call(0, "weather", '{"city":', "call_a"),
        call(0, None, '"Bern"}'),
        call(1, "patch", '{"input": "*** Begin', "call_b"),
        call(1, None, ' Patch"}'),
        call(2, "mcp__lab__look_up", "", "call_c"),
        chunk("tool_calls"),
        {"choices": [], "usage": USAGE},
    ]


@pytest.mark.parametrize("reasoning", [None, {"summary": "auto", "effort": "low"}])
def test_the_official_clients_types_accept_every_event(reasoning: dict[str, str] | None) -> None:
    request = asked(tools=TOOLS, reasoning=reasoning, instructions="Be brief.", metadata={"a": "b"})
    events = streamed(request, _everything())
    for event in events:
        EVENT.validate_python(event)
    assert [it["sequence_number"] for it in events] == list(range(len(events)))
    final = events[-1]["response"]
    assert final == orjson.loads(orjson.dumps(request.writer.response()))
    Response.model_validate(final)
    assert final["output"] == [it["item"] for it in events if it["type"] == "response.output_item.done"]
    assert [it["output_index"] for it in events if it["type"] == "response.output_item.added"] == list(range(5))
    assert final["instructions"] == "Be brief."
    assert final["metadata"] == {"a": "b"}
    assert len({it["id"] for it in final["output"]}) == 5


# The specification's required fields (openresponses.org, OpenAPI of 2026-04-24).
REQUIRED = (
    ["id", "object", "created_at", "completed_at", "status", "incomplete_details", "model", "previous_response_id"],
    ["instructions", "output", "error", "tools", "tool_choice", "truncation", "parallel_tool_calls", "text", "top_p"],
    ["presence_penalty", "frequency_penalty", "top_logprobs", "temperature", "reasoning", "user", "usage", "metadata"],
    ["max_output_tokens", "max_tool_calls", "store", "background", "service_tier", "safety_identifier"],
    ["prompt_cache_key"],
)


def test_each_response_object_of_a_stream_has_every_required_field() -> None:
    events = [it for it in streamed(asked(tools=TOOLS), _everything()) if "response" in it]
    assert types(events) == ["response.created", "response.in_progress", "response.completed"]
    for it in events:
        assert it["response"].keys() >= {name for names in REQUIRED for name in names}
    assert [it["response"]["completed_at"] for it in events] == [None, None, 1700000002]
    assert all(type(it["response"]["created_at"]) is int for it in events)


@pytest.mark.parametrize("before", [[], [chunk(reasoning_content="Hm.")]], ids=["nothing", "reasoning alone"])
def test_a_complete_answer_without_text_has_an_empty_message(before: list[dict[str, Any]]) -> None:
    """Clients read the last message, and a stored conversation goes on with an answer."""
    events = streamed(asked(), [chunk(role="assistant", content=""), *before, chunk("stop")])
    for event in events:
        EVENT.validate_python(event)
    final = Response.model_validate(events[-1]["response"])
    assert (final.status, final.output_text) == ("completed", "")
    assert [it.type for it in final.output] == [*(["reasoning"] if before else []), "message"]
    assert events[-1]["response"]["output"][-1]["content"] == [
        {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    ]
    assert [it["item"] for it in events if it["type"] == "response.output_item.done"] == events[-1]["response"][
        "output"
    ]
    told = {"message": {"role": "assistant", "content": None, **(before[0]["choices"][0]["delta"] if before else {})}}
    whole = asked().writer.whole({"choices": [told | {"finish_reason": "stop"}]})
    assert [it["type"] for it in whole["output"]] == [it.type for it in final.output]
    cut = streamed(asked(), [*before, chunk("length")])[-1]["response"]
    assert (cut["status"], [it["type"] for it in cut["output"]]) == ("incomplete", ["reasoning"] if before else [])


def test_the_usage_has_both_details_and_comes_from_a_chunk_without_choices() -> None:
    final = streamed(asked(), _everything())[-1]
    assert final["response"]["usage"] == {
        "input_tokens": 11,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 3},
        "total_tokens": 18,
    }


def test_calls_come_back_under_the_clients_own_names() -> None:
    calls = streamed(asked(tools=TOOLS), _everything())[-1]["response"]["output"][2:]
    told = [
        {name: it.get(name) for name in ("type", "name", "namespace", "call_id", "arguments", "input")} for it in calls
    ]
    assert told == [
        {"type": "function_call", "name": "weather", "namespace": None, "call_id": "call_a"}
        | {"arguments": '{"city":"Bern"}', "input": None},
        {"type": "custom_tool_call", "name": "patch", "namespace": None, "call_id": "call_b"}
        | {"arguments": None, "input": "*** Begin Patch"},
        {"type": "function_call", "name": "look_up", "namespace": "mcp__lab", "call_id": "call_c"}
        | {"arguments": "{}", "input": None},
    ]


def test_the_deltas_of_each_part_add_up_to_its_done_event() -> None:
    events = streamed(asked(tools=TOOLS), _everything())
    for name, field in [
        ("output_text", "text"),
        ("reasoning_text", "text"),
        ("refusal", "refusal"),
        ("function_call_arguments", "arguments"),
        ("custom_tool_call_input", "input"),
    ]:
        deltas: dict[str, str] = {}
        for it in events:
            if it["type"] == f"response.{name}.delta":
                deltas[it["item_id"]] = deltas.get(it["item_id"], "") + it["delta"]
        done = {it["item_id"]: it[field] for it in events if it["type"] == f"response.{name}.done"}
        assert deltas == done
        assert done


def test_a_blocking_answer_is_the_response_of_the_stream() -> None:
    message = {
        "role": "assistant",
        "reasoning_content": "Let me think.",
        "content": "Hello there",
        "refusal": "No.",
        "tool_calls": [
            {"id": "call_a", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Bern"}'}},
            {
                "id": "call_b",
                "type": "function",
                "function": {"name": "patch", "arguments": '{"input": "*** Begin Patch"}'},
            },
            {"id": "call_c", "type": "function", "function": {"name": "mcp__lab__look_up", "arguments": ""}},
        ],
    }
    completion = {"choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}], "usage": USAGE}
    whole = asked(tools=TOOLS).writer.whole(completion)
    assert orjson.loads(orjson.dumps(whole)) == streamed(asked(tools=TOOLS), _everything())[-1]["response"]
    Response.model_validate(orjson.loads(orjson.dumps(whole)))


@pytest.mark.parametrize("completion", [{}, {"choices": []}, {"choices": [{}]}, {"choices": [{"message": "x"}]}])
def test_a_blocking_answer_without_a_message_is_an_engines_error(completion: dict[str, Any]) -> None:
    with pytest.raises(EngineError):
        asked().writer.whole(completion)


def test_a_cut_answer_is_incomplete_and_has_its_usage() -> None:
    events = streamed(asked(), [chunk(content="Hel"), chunk("length"), {"choices": [], "usage": USAGE}])
    final = events[-1]
    EVENT.validate_python(final)
    assert final["type"] == "response.incomplete"
    assert final["response"]["status"] == "incomplete"
    assert final["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert final["response"]["usage"]["output_tokens"] == 7
    assert final["response"]["output"][0]["status"] == "incomplete"
    assert types(events)[-2] == "response.output_item.done"


def test_reasoning_that_uses_the_whole_budget_is_incomplete_without_a_message() -> None:
    final = streamed(asked(), [chunk(reasoning="Hm"), chunk("length")])[-1]["response"]
    assert final["status"] == "incomplete"
    assert [it["type"] for it in final["output"]] == ["reasoning"]


def test_a_filtered_answer_says_so() -> None:
    final = streamed(asked(), [chunk(content="Hel"), chunk("content_filter")])[-1]
    assert final["response"]["incomplete_details"] == {"reason": "content_filter"}


@pytest.mark.parametrize("arguments", ['{"ci', ""])
def test_a_call_that_was_cut_is_never_told_to_be_done(arguments: str) -> None:
    chunks = [call(0, "weather", arguments, "call_a"), call(1, "weather", arguments, "call_b"), chunk("length")]
    events = streamed(asked(tools=TOOLS), chunks)
    assert "response.output_item.done" not in types(events)
    assert "response.function_call_arguments.done" not in types(events)
    assert [it["status"] for it in events[-1]["response"]["output"]] == ["incomplete"] * 2


def test_nothing_is_done_while_a_call_may_go_on() -> None:
    writer = asked(tools=TOOLS).writer
    pieces = [call(0, "weather", "", "a"), call(1, "weather", '{"ci', "b"), chunk(content="Hm."), call(0, None, "{}")]
    stream = writer.head() + b"".join(map(writer.chunk, pieces))
    assert "response.output_item.done" not in types(events_of(stream))
    stream += writer.failed(EngineLost("Lost."))
    assert "response.output_item.done" not in types(events_of(stream))


def test_what_waits_for_the_end_of_a_call_has_a_limit() -> None:
    writer = asked(tools=TOOLS).writer
    writer.chunk(call(0, "weather", "{", "a"))
    for _ in range(3):
        writer.chunk(chunk(content="x" * 1024 * 1024))
    with pytest.raises(EngineError):
        writer.chunk(chunk(content="x" * 1024 * 1024))


def test_an_answer_without_a_finish_reason_has_failed() -> None:
    with pytest.raises(EngineError):
        streamed(asked(), [chunk(content="Hel")])


def test_arguments_in_one_piece_are_told_as_delta_and_done() -> None:
    events = streamed(asked(tools=TOOLS), [call(0, "weather", '{"city":"Bern"}', "call_a"), chunk("tool_calls")])
    told = [it for it in events if "function_call_arguments" in it["type"]]
    assert [it.get("delta", it.get("arguments")) for it in told] == ['{"city":"Bern"}'] * 2


def test_a_call_without_id_gets_one_of_its_own() -> None:
    output = streamed(asked(tools=TOOLS), [call(0, "weather", "{}"), call(1, "weather", "{}"), chunk("tool_calls")])
    ids = [it["call_id"] for it in output[-1]["response"]["output"]]
    assert all(ids)
    assert len(set(ids)) == 2


def test_a_call_whose_name_comes_late_begins_with_it() -> None:
    chunks = [call(0, None, '{"city":', "call_a"), call(0, "weather", '"Bern"}'), chunk("tool_calls")]
    output = streamed(asked(tools=TOOLS), chunks)[-1]["response"]["output"]
    assert [(it["name"], it["call_id"], it["arguments"]) for it in output] == [("weather", "call_a", '{"city":"Bern"}')]


def test_a_call_that_goes_on_after_its_end_is_an_engines_error() -> None:
    writer = asked(tools=TOOLS).writer
    writer.chunk(call(0, "weather", "{}", "call_a"))
    writer.chunk(call(1, "weather", "{}", "call_b"))
    with pytest.raises(EngineError):
        writer.chunk(call(0, None, "x"))


@pytest.mark.parametrize("delta", [{"content": 5}, {"reasoning": ["x"]}, {"refusal": {}, "content": ["a"]}])
def test_a_text_of_another_type_is_an_engines_error(delta: dict[str, Any]) -> None:
    with pytest.raises(EngineError):
        asked().writer.chunk(chunk(**delta))


def test_input_of_a_custom_tool_that_is_not_in_its_form_is_given_as_it_is() -> None:
    output = streamed(asked(tools=TOOLS), [call(0, "patch", "*** Begin", "c"), chunk("tool_calls")])[-1]["response"]
    assert output["output"][0]["input"] == "*** Begin"


def test_a_bare_name_of_a_tool_in_a_namespace_is_mapped_back() -> None:
    output = streamed(asked(tools=TOOLS), [call(0, "look_up", "{}", "c"), chunk("tool_calls")])[-1]["response"][
        "output"
    ]
    assert (output[0]["name"], output[0]["namespace"]) == ("look_up", "mcp__lab")


def test_log_probabilities_are_told_where_they_were_asked_for() -> None:
    token = {"token": "Hi", "bytes": [72, 105], "logprob": -0.5}
    judged = chunk("stop", content="Hi")
    judged["choices"][0]["logprobs"] = {"content": [token | {"top_logprobs": [token]}]}
    events = streamed(asked(include=["message.output_text.logprobs"], top_logprobs=1), [judged])
    for it in events:
        EVENT.validate_python(it)
    assert events[-1]["response"]["output"][0]["content"][0]["logprobs"] == [token | {"top_logprobs": [token]}]


def test_encrypted_reasoning_comes_back_as_the_reasoning_it_was() -> None:
    include = ["reasoning.encrypted_content"]
    output = streamed(asked(include=include), [chunk(reasoning="Let me think."), chunk("stop", content="Hi")])[-1]
    item = output["response"]["output"][0] | {"content": None, "summary": []}
    assert base64.b64decode(item["encrypted_content"].removeprefix("stack.v1.")) == b"Let me think."
    again = asked(input=[item, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "And?"}])
    assert again.chat["messages"][0]["reasoning_content"] == "Let me think."
