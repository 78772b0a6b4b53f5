"""Properties of reading Messages requests: no input breaks it, and a conversation that goes on keeps its bytes."""

from typing import Any

import orjson
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.errors import BadRequest, EngineError
from gateway.translation.messages import Asked, read
from gateway.translation.messages.conversation import BILLING
from gateway.translation.messages.fields import BOOKKEEPING, KEPT, OF_CHAT, REFUSED, TRANSLATED
from tests.support.message_answers import writer
from tests.support.message_recordings import parsed

PNG = "iVBORw0KGgo="
WORDS = """type text image document search_result tool_use tool_result tool_reference thinking redacted_thinking source
    base64 url data media_type image/png content title context id name input tool_use_id tool_name is_error signature
    role user assistant system cache_control defer_loading input_schema description strict allowed_callers custom auto
    any tool none effort format schema json_schema enabled adaptive disabled budget_tokens display edits x"""
NAMES = st.sampled_from(sorted({*WORDS.split(), *TRANSLATED, *KEPT, *BOOKKEEPING, *REFUSED, *OF_CHAT, "", "a\nb"}))
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | NAMES
    | st.text(max_size=4)
)
JUNK = st.recursive(
    SCALARS, lambda it: st.lists(it, max_size=3) | st.dictionaries(NAMES, it, max_size=4), max_leaves=12
)

IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}
RICH: dict[str, Any] = {
    "model": "m",
    "max_tokens": 9,
    "stream": True,
    "system": [{"type": "text", "text": f"{BILLING} x"}, {"type": "text", "text": "p"}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "q"}, IMAGE]},
        {"role": "system", "content": "s"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "text", "text": "a"},
                {"type": "tool_use", "id": "t1", "name": "look_up", "input": {"a": [1]}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "t1",
                    "is_error": False,
                    "content": [{"type": "text", "text": "r"}, IMAGE, {"type": "tool_reference", "tool_name": "b"}],
                },
                {"type": "document", "title": "t", "source": {"type": "content", "content": [IMAGE]}},
                {"type": "search_result", "title": "t", "source": "u", "content": [{"type": "text", "text": "f"}]},
            ],
        },
    ],
    "tools": [
        {"name": "look_up", "input_schema": {"type": "object"}, "strict": True},
        {"name": "b", "input_schema": {}, "defer_loading": True, "allowed_callers": ["direct"]},
        {"type": "web_search_20250305", "name": "web_search"},
    ],
    "tool_choice": {"type": "tool", "name": "b", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "output_config": {"effort": "high", "format": {"type": "json_schema", "schema": {}}},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "stop_sequences": ["END"],
    "temperature": 0.5,
    "top_k": 4,
}


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a body: the object or list, and the name or index in it."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = []
    for key, item in inside:
        found += [(value, key), *places(item)]
    return found


@st.composite
def spoilt(draw: st.DrawFn) -> dict[str, Any]:
    """A rich and right body, of which one to three places hold something else."""
    body = orjson.loads(orjson.dumps(RICH))
    for _ in range(draw(st.integers(1, 3))):
        there = places(body)
        holder, key = there[draw(st.integers(0, len(there) - 1))]
        holder[key] = draw(JUNK)
    return body


def outcome(body: dict[str, Any], *, counting: bool = False) -> Asked | BadRequest:
    try:
        return read(body, request_id="r", now=0, counting=counting)
    except BadRequest as error:
        return error


def test_the_rich_body_is_right() -> None:
    assert isinstance(outcome(RICH), Asked)


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(NAMES, JUNK, max_size=6) | spoilt(), st.booleans())
def test_no_body_gives_anything_but_a_request_or_an_error_that_names_a_field(
    body: dict[str, Any], counting: bool
) -> None:
    made = outcome(body, counting=counting)
    if isinstance(made, BadRequest):
        assert made.param is not None
        assert made.status == 400
    else:
        assert made.chat["messages"]
        assert all(type(it) is str and it.isascii() and "," not in it for it in made.ignored)


def test_no_depth_breaks_it() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    for holder, key in places(RICH):
        before, holder[key] = holder[key], deep
        try:
            assert isinstance(outcome(RICH), Asked | BadRequest)
        finally:
            holder[key] = before
    while deep:  # unwound by hand: the interpreter would do it by recursion
        deep = deep[0]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
TEXTS = TEXT.map(lambda it: {"type": "text", "text": it})
RESULTS = st.lists(TEXTS | st.just(IMAGE) | st.just({"type": "tool_reference", "tool_name": "b"}), max_size=3)


@st.composite
def turns(draw: st.DrawFn) -> list[dict[str, Any]]:
    """A conversation: users' texts and images, calls with their results, thoughts, instructions."""
    found: list[dict[str, Any]] = []
    for turn in range(draw(st.integers(1, 4))):
        parts = draw(st.lists(TEXTS | st.just(IMAGE), max_size=3))
        found.append({"role": "user", "content": parts or draw(TEXT)})
        if draw(st.booleans()):
            found.append({"role": "system", "content": draw(TEXT)})
        calls = [{"type": "tool_use", "id": f"t{turn}", "name": "b", "input": draw(st.dictionaries(TEXT, TEXT))}]
        thought = [{"type": "thinking", "thinking": draw(TEXT), "signature": ""}]
        found.append({"role": "assistant", "content": thought + draw(st.lists(TEXTS, max_size=2)) + calls})
        results = [{"type": "tool_result", "tool_use_id": f"t{turn}", "content": draw(RESULTS)}]
        found.append({"role": "user", "content": results + draw(st.lists(TEXTS, max_size=1))})
    return found


def marked(content: Any, draw: st.DrawFn) -> Any:
    """The same content as a client may write it in another turn: a text as a block or not, with a mark or not."""
    if isinstance(content, str):
        return draw(st.sampled_from([content, [{"type": "text", "text": content}]]))
    if len(content) == 1 and content[0]["type"] == "text" and draw(st.booleans()):
        return content[0]["text"]
    mark = {"cache_control": {"type": "ephemeral"}}
    return [it | (mark if draw(st.booleans()) else {}) for it in content]


@settings(deadline=None)
@given(st.data(), turns(), st.sampled_from([None, "p", [{"type": "text", "text": "p"}]]), TEXT)
def test_a_conversation_that_goes_on_begins_with_the_same_bytes(
    data: st.DataObject, found: list[dict[str, Any]], system: Any, digits: str
) -> None:
    whole = read({"model": "m", "max_tokens": 9, "system": system, "messages": found}, request_id="r1", now=1).chat
    cut = data.draw(st.integers(1, len(found)))
    again = [it | {"content": marked(it["content"], data.draw)} for it in found[:cut]]
    if system is not None:
        bill = {"type": "text", "text": f"{BILLING} {digits}"}
        system = [bill, {"type": "text", "text": "p", "cache_control": {"type": "ephemeral"}}]
    part = read({"model": "m", "max_tokens": 9, "system": system, "messages": again}, request_id="r2", now=2).chat
    begun = whole["messages"][: len(part["messages"])]
    assert orjson.dumps(begun) == orjson.dumps(part["messages"])


@given(turns())
def test_a_request_read_twice_gives_the_same_bytes(found: list[dict[str, Any]]) -> None:
    body = RICH | {"messages": [*RICH["messages"], *found]}
    first, second = (read(body, request_id=it, now=len(it)).chat for it in ("r1", "r22"))
    assert orjson.dumps(first) == orjson.dumps(second)


FIELDS = """choices index delta message content reasoning_content reasoning refusal tool_calls id type function name
    arguments finish_reason stop_reason usage prompt_tokens completion_tokens prompt_tokens_details cached_tokens
    completion_tokens_details reasoning_tokens"""
ANSWER_NAMES = st.sampled_from(FIELDS.split())
ANSWER_JUNK = st.recursive(
    SCALARS, lambda it: st.lists(it, max_size=2) | st.dictionaries(ANSWER_NAMES, it, max_size=4), max_leaves=8
)
DELTAS = st.dictionaries(ANSWER_NAMES, ANSWER_JUNK, max_size=4)
CHOICES = st.fixed_dictionaries({}, optional={"delta": DELTAS, "message": DELTAS, "finish_reason": ANSWER_JUNK})
ENGINES_JUNK = st.dictionaries(ANSWER_NAMES, ANSWER_JUNK, max_size=4) | st.fixed_dictionaries(
    {"choices": st.lists(CHOICES, max_size=1)}, optional={"usage": ANSWER_JUNK}
)


@settings(deadline=None, max_examples=300)
@given(st.lists(ENGINES_JUNK, max_size=4))
def test_no_answer_of_an_engine_gives_anything_but_events_or_an_engines_error(chunks: list[dict[str, Any]]) -> None:
    it = writer()
    sent = it.head()
    try:
        for chunk in chunks:
            sent += it.chunk(chunk)
        sent += it.end()
    except EngineError as error:
        sent += it.failed(error)
    assert parsed(sent)[-1]["type"] in ("message_stop", "error")


@settings(deadline=None, max_examples=300)
@given(ENGINES_JUNK)
def test_no_blocking_answer_gives_anything_but_a_message_or_an_engines_error(completion: dict[str, Any]) -> None:
    try:
        message = writer().whole(completion)
    except EngineError:
        return
    assert type(message["stop_reason"]) is str
