"""Writing Messages answers: streams that every client accepted, blocking as right as streaming, ends and faults."""

import json
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import EngineError, EngineLost, QueueFull
from tests.support.message_answers import chunk, completion, piece, streamed, summed, writer
from tests.support.message_recordings import chunks, events, parsed

USAGE = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
ENDED = chunk("stop", USAGE)

EQUIVALENTS = ("text", "reason", "reasonboth", "tool", "two", "text-minimal", "tool-minimal-one")


def meaning(event: dict[str, Any]) -> dict[str, Any]:
    """An event without what may differ: ids, the model, a signature's value, capitals of a tool's name, counts of
    tokens (whole ones are compared elsewhere), and the empty signature that only some begin a block with."""
    event = json.loads(json.dumps(event))
    kind = event["type"]
    if kind == "message_start":
        assert set(event["message"].pop("usage")) >= {"input_tokens", "output_tokens"}
        for name in ("id", "model", "stop_reason", "stop_sequence"):
            event["message"].pop(name, None)
    elif kind == "content_block_start":
        block = event["content_block"]
        block.pop("id", None)
        block.pop("signature", None)
        block |= {"name": block["name"].lower()} if "name" in block else {}
    elif kind == "content_block_delta" and event["delta"]["type"] == "signature_delta":
        assert event["delta"].pop("signature")
    elif kind == "message_delta":
        event["usage"] = {"output_tokens": event["usage"]["output_tokens"]}
        event["delta"].setdefault("stop_sequence", None)
    return event


@pytest.mark.parametrize("name", EQUIVALENTS)
def test_a_stream_is_event_for_event_one_that_every_client_accepted(name: str) -> None:
    made = [meaning(it) for it in streamed(chunks(f"chat-{name}"))]
    accepted = [meaning(it) for it in events(f"messages-{name}")]
    if "minimal" in name:  # the one without what may be missing
        made = [it for it in made if it["type"] != "ping"]
    assert made == accepted


def test_a_stream_cut_by_its_limit_is_the_one_that_every_client_accepted() -> None:
    *texts, _, usage = chunks("chat-text")
    made = [meaning(it) for it in streamed([*texts, chunk("length"), usage], max_tokens=7)]
    assert made == [meaning(it) for it in events("messages-text-incomplete-max-tokens")]


def test_a_broken_stream_ends_with_the_error_event_and_its_open_block() -> None:
    it = writer()
    sent = it.head() + b"".join(map(it.chunk, chunks("chat-text-error-server-error")[:2]))
    made = parsed(sent + it.failed(EngineLost("The engine was lost.")))
    assert [meaning(it) for it in made[:-1]] == [meaning(it) for it in events("messages-text-error-server-error")[:-1]]
    assert made[-1] == {
        "type": "error",
        "error": {"type": "api_error", "message": "The engine was lost."},
        "request_id": "r1",
    }


def test_an_error_in_a_stream_says_in_words_when_to_come_back() -> None:
    (event,) = parsed(writer().failed(QueueFull("Too many requests wait. Retry after the time in Retry-After.", 3)))
    assert event["error"] == {"type": "overloaded_error", "message": "Too many requests wait. Retry in 3 seconds."}


def test_what_waits_gets_pings() -> None:
    assert parsed(writer().waiting()) == [{"type": "ping"}]


def test_usage_tells_what_the_cache_had_apart() -> None:
    usage = USAGE | {
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 5},
    }
    told = {
        "input_tokens": 7,
        "output_tokens": 7,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 4,
        "output_tokens_details": {"thinking_tokens": 5},
    }
    pieces = [chunk(content="a"), chunk("stop"), {"choices": [], "usage": usage}]
    assert streamed(pieces)[-2]["usage"] == told
    assert writer().whole(completion(pieces))["usage"] == told
    assert streamed([chunk(content="a"), chunk("stop")])[-2]["usage"]["output_tokens"] == 0


REASONS: list[tuple[dict[str, Any], dict[str, Any], str, str | None]] = [
    ({"finish_reason": "stop"}, {}, "end_turn", None),
    ({"finish_reason": None}, {}, "end_turn", None),
    ({"finish_reason": "length"}, {"max_tokens": 7}, "max_tokens", None),
    ({"finish_reason": "length"}, {"max_tokens": 100}, "model_context_window_exceeded", None),
    ({"finish_reason": "length"}, {"max_tokens": None}, "max_tokens", None),
    ({"finish_reason": "content_filter"}, {}, "refusal", None),
    ({"finish_reason": "tool_calls"}, {}, "end_turn", None),
    ({"finish_reason": "stop", "stop_reason": "END"}, {"stops": ("END",)}, "stop_sequence", "END"),
    ({"finish_reason": "stop", "stop_reason": "other"}, {"stops": ("END",)}, "end_turn", None),
    ({"finish_reason": "stop", "stop_reason": 151645}, {"stops": ("END",)}, "end_turn", None),
]


@pytest.mark.parametrize(("choice", "request_", "reason", "sequence"), REASONS)
def test_the_end_of_an_answer_has_anthropics_reason(
    choice: dict[str, Any], request_: dict[str, Any], reason: str, sequence: str | None
) -> None:
    last = chunk(usage=USAGE)
    last["choices"][0] |= choice
    delta = streamed([chunk(content="a"), last], **request_)[-2]["delta"]
    assert delta == {"stop_reason": reason, "stop_sequence": sequence}
    answer = {"choices": [choice | {"message": {"role": "assistant", "content": "a"}}], "usage": USAGE}
    message = writer(**request_).whole(answer)
    assert (message["stop_reason"], message["stop_sequence"]) == (reason, sequence)


def test_a_call_that_was_forced_ends_for_tool_use_although_chat_says_stop() -> None:
    pieces = [piece(0, "{}", id="c1", name="look_up"), ENDED]
    assert streamed(pieces)[-2]["delta"]["stop_reason"] == "tool_use"
    assert writer().whole(completion(pieces))["stop_reason"] == "tool_use"


def test_a_call_that_is_cut_ends_by_its_limit_and_keeps_what_came() -> None:
    pieces = [piece(0, '{"a": ', id="c1", name="look_up"), chunk("length", USAGE)]
    made = streamed(pieces, max_tokens=7)
    assert made[-2]["delta"]["stop_reason"] == "max_tokens"
    assert [it["delta"]["partial_json"] for it in made if it["type"] == "content_block_delta"] == ['{"a": ']
    message = writer(max_tokens=7).whole(completion(pieces))
    assert message["stop_reason"] == "max_tokens"
    assert message["content"][0]["input"] == {"__unparsedToolInput": {"raw": '{"a": ', "len": 6}}


def test_a_refusal_is_text_and_a_reason() -> None:
    made = summed(streamed([chunk(refusal="I won"), chunk(refusal="'t."), ENDED]))
    whole = writer().whole(
        {"choices": [{"message": {"content": None, "refusal": "I won't."}, "finish_reason": "stop"}], "usage": USAGE}
    )
    assert made == whole
    assert (whole["content"], whole["stop_reason"]) == ([{"type": "text", "text": "I won't."}], "refusal")


def test_reasoning_by_its_other_name_is_thinking() -> None:
    made = summed(streamed([chunk(reasoning="hm"), chunk(content="a"), ENDED]))
    assert [it["type"] for it in made["content"]] == ["thinking", "text"]
    whole = writer().whole({"choices": [{"message": {"reasoning": "hm", "content": "a"}}], "usage": USAGE})
    assert whole["content"] == made["content"]


def test_blocks_that_would_be_empty_or_white_space_only_are_not_sent() -> None:
    pieces = [
        chunk(role="assistant", content=""),
        chunk(reasoning_content="\n"),
        chunk(content="\n"),
        chunk(content="\n"),
        piece(0, "", id="c1", name="look_up"),
        chunk("tool_calls", USAGE),
    ]
    made = summed(streamed(pieces))
    assert [it["type"] for it in made["content"]] == ["tool_use"]
    assert writer().whole(completion(pieces))["content"] == made["content"]
    assert summed(streamed([chunk(content="  "), ENDED]))["content"] == []


def test_white_space_that_begins_a_text_belongs_to_it() -> None:
    late = [chunk(content=" "), chunk(reasoning_content="hm"), chunk(content="a"), ENDED]
    assert summed(streamed(late))["content"] == writer().whole(completion(late))["content"]
    made = summed(streamed([chunk(content="\n"), chunk(content="\n"), chunk(content="a"), ENDED]))
    assert made["content"] == [{"type": "text", "text": "\n\na"}]


def test_text_between_calls_keeps_the_first_piece_of_each_block() -> None:
    pieces = [
        chunk(content="One."),
        piece(0, '{"a":1}', id="c1", name="x"),
        piece(1, "", id="c2", name="y"),
        piece(1, '{"b":2}'),
        chunk("tool_calls", USAGE),
    ]
    content = summed(streamed(pieces))["content"]
    assert content == [
        {"type": "text", "text": "One."},
        {"type": "tool_use", "id": "c1", "name": "x", "input": {"a": 1}},
        {"type": "tool_use", "id": "c2", "name": "y", "input": {"b": 2}},
    ]


def test_ids_of_calls_are_the_engines_where_a_client_may_use_them_and_unlike_each_other() -> None:
    pieces = [
        piece(0, "{}", id="c1", name="x"),
        piece(1, "{}", id="functions.x:0", name="x"),
        piece(2, "{}", name="x"),
        chunk("tool_calls", USAGE),
    ]
    ids = [it["id"] for it in summed(streamed(pieces))["content"]]
    assert ids == ["c1", "toolu_r1_1", "toolu_r1_2"]
    assert [it["id"] for it in writer().whole(completion(pieces))["content"]] == ids


def test_a_name_that_comes_late_opens_its_block_with_all_arguments_so_far() -> None:
    pieces = [piece(0, '{"a"', id="c1"), piece(0, ":1", name="x"), piece(0, "}"), chunk("tool_calls", USAGE)]
    assert summed(streamed(pieces))["content"] == [{"type": "tool_use", "id": "c1", "name": "x", "input": {"a": 1}}]


@pytest.mark.parametrize(
    "pieces",
    [
        [piece(0, "{}", id="c1", name="x"), piece(1, "{}", id="c2", name="y"), piece(0, "}")],
        [piece(0, "{}", id="c1"), piece(1, "{}", id="c2", name="y")],
        [piece(0, "{}", id="c1")],
    ],
)
def test_a_call_that_no_event_can_express_is_an_honest_error(pieces: list[dict[str, Any]]) -> None:
    with pytest.raises(EngineError):
        streamed([*pieces, ENDED])


@pytest.mark.parametrize(
    "answer", [{}, {"choices": []}, {"choices": [{"message": None}]}, {"choices": [{"message": {"tool_calls": [{}]}}]}]
)
def test_a_blocking_answer_that_is_none_is_an_honest_error(answer: dict[str, Any]) -> None:
    with pytest.raises(EngineError):
        writer().whole(answer)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
ARGUMENTS = st.dictionaries(TEXT, st.integers() | TEXT, max_size=2).map(json.dumps)


@st.composite
def answers(draw: st.DrawFn) -> list[dict[str, Any]]:
    """An answer as engines write one: thoughts, text, calls, all in pieces, and those of the calls may alternate."""
    pieces = [chunk(reasoning_content=it) for it in draw(st.lists(TEXT, max_size=3))]
    pieces += [chunk(content=it) for it in draw(st.lists(TEXT, max_size=3))]
    begun, rest = [], []
    for index, arguments in enumerate(draw(st.lists(ARGUMENTS, max_size=3))):
        cut = draw(st.integers(0, len(arguments)))
        begun.append(piece(index, arguments[:cut], id=f"c{index}", name="x"))
        rest.append(piece(index, arguments[cut:]))
    pieces += begun + rest if draw(st.booleans()) else [it for both in zip(begun, rest, strict=True) for it in both]
    return [*pieces, chunk("stop"), {"choices": [], "usage": USAGE}]


@settings(deadline=None)
@given(answers())
def test_a_stream_adds_up_to_the_blocking_answer(pieces: list[dict[str, Any]]) -> None:
    made = streamed(pieces)
    assert summed(made) == json.loads(orjson.dumps(writer().whole(completion(pieces))))
    opened = [it["index"] for it in made if it["type"] == "content_block_start"]
    assert opened == [it["index"] for it in made if it["type"] == "content_block_stop"] == list(range(len(opened)))
