"""The fold alone: the sum of a stream's chunks is what the engine would have answered at once."""

import json
from typing import Any

import pytest

from gateway.exchange import Usage
from gateway.relay.fold import Fold, foldable, streamable
from tests.support.processes import ROOT, events

USER = [{"role": "user", "content": "Hello"}]


def delta(index: int = 0, reason: str | None = None, **said: Any) -> dict[str, Any]:
    return {"index": index, "delta": said, "finish_reason": reason}


def chunk(*choices: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"id": "c-1", "object": "chat.completion.chunk", "model": "m", "choices": list(choices)} | more


def folded(*chunks: dict[str, Any], messages: list[dict[str, Any]] | None = None, usage: Any = None) -> dict[str, Any]:
    fold = Fold(USER if messages is None else messages)
    for it in chunks:
        fold.add(it)
    return fold.answer(usage)


def test_texts_are_joined_and_the_role_and_the_reason_are_told_once() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 2}
    answer = folded(
        chunk(delta(role="assistant", content="")),
        chunk(delta(content="Hel")),
        chunk(delta(content="lo", reasoning_content="Think")),
        chunk(delta(reason="stop", reasoning_content="ing")),
        chunk(usage=usage),
    )
    message = {"role": "assistant", "content": "Hello", "reasoning_content": "Thinking"}
    assert answer == {
        "id": "c-1",
        "object": "chat.completion",
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": usage,
    }


def test_a_tool_calls_pieces_are_one_call_and_an_answer_of_calls_has_no_content() -> None:
    def call(index: int, arguments: str, **more: Any) -> dict[str, Any]:
        function = {"arguments": arguments} | ({"name": more.pop("name")} if "name" in more else {})
        return {"index": index, "function": function} | more

    first, second = {"id": "a", "type": "function"}, {"id": "b", "type": "function"}
    answer = folded(
        chunk(delta(tool_calls=[call(0, "", name="f", **first)])),
        chunk(delta(tool_calls=[call(0, '{"x"')])),
        chunk(delta(tool_calls=[call(0, ":1}"), call(1, "{}", name="g", **second)])),
        chunk(delta(reason="tool_calls")),
    )
    message = answer["choices"][0]["message"]
    assert message["content"] is None
    assert message["tool_calls"] == [
        first | {"function": {"name": "f", "arguments": '{"x":1}'}},
        second | {"function": {"name": "g", "arguments": "{}"}},
    ]


def test_a_calls_index_is_its_name_and_no_position() -> None:
    def piece(index: int, arguments: str, **more: Any) -> dict[str, Any]:
        return delta(tool_calls=[{"index": index, "function": {"arguments": arguments} | more}])

    answer = folded(
        chunk(piece(7, '{"x"', name="f")), chunk(piece(0, "{}", name="g")), chunk(piece(7, ":1}")), chunk(delta())
    )
    assert answer["choices"][0]["message"]["tool_calls"] == [
        {"function": {"name": "f", "arguments": '{"x":1}'}},
        {"function": {"name": "g", "arguments": "{}"}},
    ]


def test_choices_come_in_their_order_and_the_usage_is_that_of_all() -> None:
    parts = chunk(delta(1, content="b")), chunk(delta(0, content="a")), chunk(usage={"prompt_tokens": 1}, timings={})
    answer = folded(*parts, usage=Usage(3, 4))
    assert [(it["index"], it["message"]["content"]) for it in answer["choices"]] == [(0, "a"), (1, "b")]
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert "timings" not in answer, "they are of one choice"


def test_a_completions_texts_are_joined() -> None:
    parts = ({"object": "text_completion", "choices": [{"index": 0, "text": text}]} for text in ("Once ", "upon"))
    answer = folded(*parts, messages=[])
    assert (answer["object"], answer["choices"][0]["text"]) == ("text_completion", "Once upon")


def test_logprobs_are_appended() -> None:
    pieces = [{"index": 0, "delta": {}, "logprobs": {"content": [{"token": token}]}} for token in "ab"]
    answer = folded(chunk(pieces[0]), chunk(pieces[1]), chunk({"index": 0, "delta": {}, "logprobs": None}))
    assert answer["choices"][0]["logprobs"] == {"content": [{"token": "a"}, {"token": "b"}]}


@pytest.mark.parametrize("beginning", ["Dear ", [{"type": "text", "text": "Dear"}, {"type": "text", "text": ""}]])
def test_an_answer_that_goes_on_with_the_callers_words_repeats_them(beginning: Any) -> None:
    answer = folded(chunk(delta(content="Sir")), messages=[*USER, {"role": "assistant", "content": beginning}])
    said = "Dear Sir" if isinstance(beginning, str) else "Dear\n\nSir"
    assert answer["choices"][0]["message"]["content"] == said


@pytest.mark.parametrize(
    ("fields", "whole"),
    [
        ({}, True),
        ({"response_format": {"type": "text"}}, True),
        ({"response_format": {"type": "json_object"}}, False),
        ({"json_schema": {}}, False),
        ({"stop": ["", ""]}, True),
        ({"stop": ["end"]}, False),
    ],
)
def test_a_blocking_request_is_streamed_only_if_the_stream_holds_the_whole_answer(
    fields: dict[str, Any], *, whole: bool
) -> None:
    assert foldable(fields) is whole


def test_beside_tools_logprobs_are_asked_for_by_the_engines_own_name() -> None:
    tools: dict[str, Any] = {"tools": [{}], "logprobs": True}
    assert streamable(tools) == {"tools": [{}], "n_probs": 20}
    assert streamable(tools | {"top_logprobs": 3}) == {"tools": [{}], "n_probs": 3}
    assert streamable({"logprobs": True}) == {"logprobs": True}


RECORDED = json.loads((ROOT / "tests/recordings/ollama/streams-of-blocking-answers.json").read_text())


@pytest.mark.parametrize("row", RECORDED, ids=[row["name"] for row in RECORDED])
def test_a_recorded_stream_of_an_ollama_adds_up_to_its_recorded_blocking_answer(row: dict[str, Any]) -> None:
    fold = Fold(USER)
    fold.exact = True
    for event in events(row["stream"])[:-1]:
        fold.add(event)
    answer, whole = fold.answer(None), row["answer"]
    for name in ("id", "created"):
        del answer[name], whole[name]
    if "usage" not in answer:  # the stream was not asked for it
        del whole["usage"]
    assert answer == whole


def test_a_tool_call_of_an_ollama_keeps_its_index_and_an_empty_content() -> None:
    function = {"name": "get_weather", "arguments": '{"city":"Paris"}'}
    calls = [{"id": f"call_{number}", "index": number, "type": "function", "function": function} for number in (0, 1)]
    fold = Fold([*USER, {"role": "assistant", "content": "not repeated"}])
    fold.exact = True
    fold.add(chunk(delta(role="assistant", content="", tool_calls=calls[:1])))
    fold.add(chunk(delta(content="", tool_calls=calls[1:])))
    fold.add(chunk(delta(reason="tool_calls")))
    message = fold.answer(None)["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "", "tool_calls": calls}
