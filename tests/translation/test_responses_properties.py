"""What holds for any Responses request: it is read or refused, and a conversation that grows keeps its first bytes."""

from collections.abc import Callable
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import BadRequest, EngineError
from gateway.translation.responses import read
from gateway.translation.responses.fields import KNOWN
from tests.support.responses_answers import events_of

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
ITEM_KINDS = ("message", "reasoning", "function_call", "function_call_output", "custom_tool_call", "item_reference")
PART_KINDS = ("input_text", "input_image", "input_audio", "input_file", "output_text", "refusal", "text")
TOOL_KINDS = ("function", "custom", "namespace", "web_search", "allowed_tools", "json_schema", "grammar")
KINDS = st.sampled_from((*ITEM_KINDS, "custom_tool_call_output", "web_search_call", *PART_KINDS, *TOOL_KINDS))
ITEM_NAMES = ("type", "role", "content", "text", "call_id", "name", "namespace", "arguments", "output", "input", "id")
MORE_NAMES = ("summary", "encrypted_content", "image_url", "file_id", "detail", "input_audio", "data", "refusal")
TOOL_NAMES = (
    "tools",
    "format",
    "parameters",
    "strict",
    "description",
    "schema",
    "effort",
    "definition",
    "syntax",
    "mode",
)
NAMES = st.sampled_from((*ITEM_NAMES, *MORE_NAMES, *TOOL_NAMES))
LEAF = st.none() | st.booleans() | st.integers(-5, 2**60) | st.floats(allow_nan=False) | TEXT | KINDS
LEAVES = LEAF | st.sampled_from(["user", "assistant", "system", "auto", "required", "data:,", "stack.v1.!"])


def _grow(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inner, max_size=4) | st.dictionaries(NAMES | TEXT, inner, max_size=6)


JSON = st.recursive(LEAVES, _grow, max_leaves=12)
BODIES = st.dictionaries(st.sampled_from(sorted(KNOWN)) | TEXT, JSON, max_size=8)
ITEMS = st.lists(
    st.fixed_dictionaries({"type": KINDS}, optional={"role": LEAVES}) | st.dictionaries(NAMES, JSON), max_size=5
)


def _read_or_refused(body: dict[str, Any]) -> None:
    """Read it, and write all that an answer to it writes."""
    try:
        request = read(body, request_id="r1", now=1, stores=True)
    except BadRequest:
        return
    request.writer.head()
    request.writer.chunk({"choices": [{"delta": {"content": "x"}, "finish_reason": "stop"}]})
    request.writer.end()
    orjson.dumps([request.writer.response(), request.writer.input_items()])
    assert all(it.isascii() and it.isprintable() for it in request.ignored)


@settings(max_examples=150, deadline=None)
@given(BODIES)
def test_any_body_is_read_or_refused(body: dict[str, Any]) -> None:
    _read_or_refused(body)


@settings(max_examples=150, deadline=None)
@given(
    st.fixed_dictionaries(
        {"model": st.just("m"), "input": ITEMS},
        optional={"tools": ITEMS, "text": JSON, "reasoning": JSON, "tool_choice": JSON},
    )
)
def test_any_items_and_tools_are_read_or_refused(body: dict[str, Any]) -> None:
    _read_or_refused(body)


DELTA_NAMES = st.sampled_from(("content", "reasoning", "reasoning_content", "refusal", "tool_calls", "role", "x"))
PIECE_NAMES = st.sampled_from(("index", "id", "function", "name", "arguments"))
PIECES = st.lists(st.recursive(LEAF, lambda it: st.dictionaries(PIECE_NAMES, it, max_size=4), max_leaves=6), max_size=3)
DELTAS = st.dictionaries(DELTA_NAMES, LEAF | PIECES, max_size=4)
CHOICES = st.fixed_dictionaries({"delta": DELTAS | LEAF}, optional={"finish_reason": LEAF, "logprobs": JSON})
CHUNKS = st.fixed_dictionaries({}, optional={"choices": st.lists(CHOICES | LEAF, max_size=2) | LEAF, "usage": JSON})


@settings(max_examples=150, deadline=None)
@given(st.lists(CHUNKS, max_size=4))
def test_any_chunks_of_an_engine_are_events_or_an_engines_error(chunks: list[dict[str, Any]]) -> None:
    writer = read({"model": "m", "input": "x"}, request_id="r1", now=1).writer
    stream = writer.head()
    try:
        for it in chunks:
            stream += writer.chunk(it)
        stream += writer.end()
    except EngineError as error:
        stream += writer.failed(error)
    events = events_of(stream)
    assert [it["sequence_number"] for it in events] == list(range(len(events)))
    assert events[-1]["type"] in ("response.completed", "response.incomplete", "response.failed")


def _nest(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": [value]}
    return value


PLACES: list[Callable[[Any], dict[str, Any]]] = [
    lambda deep: {"tools": [{"type": "function", "name": "x", "parameters": {"a": deep}}]},
    lambda deep: {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"a": deep}}}},
    lambda deep: {"input": [{"role": "user", "content": "x", "more": deep}]},
    lambda deep: {"input": [{"type": "function_call", "call_id": "c", "name": "x", "arguments": {"a": deep}}]},
    lambda deep: {"input": [{"role": "user", "content": deep}]},
    lambda deep: {"tools": [{"type": "web_search", "filters": deep}]},
    lambda deep: {"reasoning": {"effort": deep}},
    lambda deep: {
        "tool_choice": {"type": "function", "name": "x", "more": deep},
        "tools": [{"type": "function", "name": "x"}],
    },
]


@pytest.mark.parametrize("place", PLACES)
def test_deep_nesting_is_refused(place: Callable[[Any], dict[str, Any]]) -> None:
    with pytest.raises(BadRequest):
        read({"model": "m", "input": "x", **place(_nest(500))}, request_id="r1", now=1, stores=True)


def test_a_very_long_list_is_read() -> None:
    body = {"model": "m", "input": [{"role": "user", "content": "x"}] * 20_000}
    assert len(read(body, request_id="r1", now=1).chat["messages"]) == 20_000


SAID = st.one_of(TEXT, st.builds(lambda it: [{"type": "input_text", "text": it}], TEXT))
THOUGHT = st.builds(lambda it: {"type": "reasoning", "summary": [{"type": "summary_text", "text": it}]}, TEXT)
ANSWER = st.builds(lambda it: {"role": "assistant", "content": it}, TEXT)


@st.composite
def _turns(draw: st.DrawFn) -> list[list[dict[str, Any]]]:
    """A conversation by turns: each is the assistant's items and then what the client adds."""
    turns = []
    for at in range(draw(st.integers(1, 5))):
        turn = [{"role": "user", "content": draw(SAID)}]
        for step in range(draw(st.integers(0, 3))):
            turn += draw(st.lists(THOUGHT | ANSWER, max_size=3))
            if draw(st.booleans()):
                call_id = f"c{at}{step}"
                turn.append({"type": "function_call", "call_id": call_id, "name": "x", "arguments": draw(TEXT)})
                turn.append({"type": "function_call_output", "call_id": call_id, "output": draw(SAID)})
        turns.append(turn)
    return turns


def _rewritten(item: dict[str, Any]) -> dict[str, Any]:
    """The same item as another client of the same conversation writes it."""
    content = item.get("content")
    told = item | {"id": "x_1", "status": "completed"}
    return told | {"content": [{"type": "output_text", "text": content}]} if isinstance(content, str) else told


@settings(max_examples=200, deadline=None)
@given(_turns())
def test_a_conversation_that_grows_keeps_its_first_bytes(turns: list[list[dict[str, Any]]]) -> None:
    items: list[dict[str, Any]] = []
    before = b"["
    for at, turn in enumerate(turns):
        items += turn[:1]
        body = {"model": "m", "input": [_rewritten(it) if at % 2 else it for it in items]}
        messages = orjson.dumps(read(body, request_id=f"r{at}", now=at).chat["messages"])
        assert messages.startswith(before)
        before = messages[:-1]
        items += turn[1:]
