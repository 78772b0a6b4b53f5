"""Reading Messages requests: what broke other gateways, field by field."""

from typing import Any

import orjson
import pytest

from gateway.errors import BadRequest
from gateway.translation.messages import read
from gateway.translation.messages.conversation import BILLING
from tests.support.message_requests import (
    FUNCTION,
    IMAGE,
    PNG,
    TOOL,
    asked,
    assistant,
    call,
    messages,
    result,
    text,
    user,
)


def test_a_deferred_tool_is_offered_when_it_was_called_or_is_chosen() -> None:
    deferred = TOOL | {"defer_loading": True}
    other = TOOL | {"name": "other"}
    assert [it["function"]["name"] for it in asked(tools=[deferred, other]).chat["tools"]] == ["other"]
    called = asked(user("hi"), assistant([call()]), user([result("x")]), tools=[deferred, other]).chat["tools"]
    assert [it["function"]["name"] for it in called] == ["other", "look_up"]
    chosen = asked(tools=[deferred], tool_choice={"type": "tool", "name": "look_up"}).chat
    assert chosen["tools"] == [{"type": "function", "function": FUNCTION}]


def test_deferred_tools_are_offered_when_a_search_at_anthropic_was_to_find_them() -> None:
    search = {"type": "tool_search_tool_regex_20251119", "name": "tool_search_tool_regex"}
    made = asked(tools=[search, TOOL | {"defer_loading": True}])
    assert [it["function"]["name"] for it in made.chat["tools"]] == ["look_up"]
    assert made.ignored == ("tools",)


def test_tools_that_run_at_anthropic_are_left_out_and_named() -> None:
    made = asked(tools=[{"type": "web_search_20250305", "name": "web_search"}, {"type": "advisor_20260301"}, TOOL])
    assert made.chat["tools"] == [{"type": "function", "function": FUNCTION}]
    assert made.ignored == ("tools",)
    assert "tools" not in asked(tools=[{"type": "web_search_20250305", "name": "web_search"}]).chat


def test_a_schema_passes_as_it_is() -> None:
    schema = {"$schema": "s", "properties": {"a": {"pattern": "^wf_[a-z0-9-]{6,}$", "exclusiveMinimum": 0}}}
    made = asked(tools=[TOOL | {"input_schema": schema, "strict": True, "eager_input_streaming": True}])
    assert made.chat["tools"][0]["function"] == FUNCTION | {"parameters": schema, "strict": True}
    assert made.ignored == ()


CHOICES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"type": "auto"}, {"tool_choice": "auto"}),
    ({"type": "any"}, {"tool_choice": "required"}),
    ({"type": "none"}, {"tool_choice": "none"}),
    ({"type": "tool", "name": "look_up"}, {"tool_choice": {"type": "function", "function": {"name": "look_up"}}}),
    ({"type": "any", "disable_parallel_tool_use": True}, {"tool_choice": "required", "parallel_tool_calls": False}),
    ({"type": "auto", "disable_parallel_tool_use": False}, {"tool_choice": "auto"}),
]


@pytest.mark.parametrize(("choice", "fields"), CHOICES)
def test_a_tool_choice_is_chats(choice: dict[str, Any], fields: dict[str, Any]) -> None:
    chat = asked(tools=[TOOL], tool_choice=choice).chat
    assert {name: chat.get(name) for name in ("tool_choice", "parallel_tool_calls")} == {
        "tool_choice": None,
        "parallel_tool_calls": None,
    } | fields


def test_a_choice_among_no_tools_is_left_out_unless_it_demands_one() -> None:
    assert "tool_choice" not in asked(tool_choice={"type": "auto"}).chat
    with pytest.raises(BadRequest, match="'tool_choice' demands"):
        asked(tool_choice={"type": "any"})


def test_strings_and_blocks_with_or_without_marks_are_the_same_bytes() -> None:
    mark = {"cache_control": {"type": "ephemeral"}}
    plain = messages(user("a"), {"role": "system", "content": "s"}, assistant("b"), user("c"), system="p")
    marked = messages(
        user([text("a", **mark)]),
        {"role": "system", "content": [text("s", **mark)]},
        assistant([text("b")]),
        user([text("c", **mark)]),
        system=[text("p", **mark)],
    )
    assert orjson.dumps(plain) == orjson.dumps(marked)


def test_the_billing_block_is_dropped_from_the_first_place_only() -> None:
    bill = text(f"{BILLING} cc_version=2.1.332.1c9;")
    assert messages(system=[bill, text("p")])[0] == {"role": "system", "content": "p"}
    assert messages(system=[bill])[0]["role"] == "user"
    assert BILLING in messages(system=[text("p"), bill])[0]["content"]


def test_a_system_message_in_the_midst_stays_in_its_place() -> None:
    found = messages(user("a"), {"role": "system", "content": "s"}, assistant("b"), user("c"))
    assert [it["role"] for it in found] == ["user", "system", "assistant", "user"]


def test_results_come_first_and_contiguous_and_images_after() -> None:
    *_, first, second, last = messages(
        user("q"),
        assistant([text("Let me see."), call(called="t1"), call(called="t2")]),
        user([text("and this"), result([text("one"), IMAGE], "t1"), IMAGE, result(None, "t2", is_error=True)]),
    )
    assert first == {
        "role": "tool",
        "tool_call_id": "t1",
        "content": "one\n\n[image 1] follows in the next message.",
    }
    assert second == {"role": "tool", "tool_call_id": "t2", "content": "Error:"}
    url = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
    assert last == {"role": "user", "content": [text("[image 1]"), url, text("and this"), url]}


def test_an_assistants_turn_keeps_thoughts_text_and_calls() -> None:
    for signature in ({"signature": "bW9jaw=="}, {"signature": ""}, {}):
        thinking = {"type": "thinking", "thinking": "hm", **signature}
        found = messages(user("q"), assistant([thinking, text("Let me."), call(given={"a": 1})]), user([result("x")]))
        assert found[1] == {
            "role": "assistant",
            "content": "Let me.",
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": "t1", "type": "function", "function": {"name": "look_up", "arguments": '{"a":1}'}},
            ],
        }


def test_empty_texts_and_thoughts_leave_nothing() -> None:
    empty = [{"type": "thinking", "thinking": "", "signature": "x"}, text("")]
    assert messages(user([text(""), text("a")]), assistant(empty)) == [user("a"), assistant("")]


def test_what_ran_at_anthropic_in_an_earlier_turn_is_left_out_and_named() -> None:
    ran = [
        {"type": "redacted_thinking", "data": "x"},
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
        {"type": "web_search_tool_result", "tool_use_id": "s", "content": []},
    ]
    made = asked(user("q"), assistant([*ran, text("a")]), user("b"))
    assert made.chat["messages"][1] == assistant("a")
    assert made.ignored == ("messages.content",)


def test_documents_with_text_are_told_and_others_refused() -> None:
    plain = {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "D"}}
    built = {"type": "document", "source": {"type": "content", "content": [text("C"), IMAGE]}}
    found = {"type": "search_result", "title": "S", "source": "u", "content": [text("F")]}
    (message,) = messages(user([plain, found, built]))
    assert message["content"][0] == text("T\n\nD\n\nS\n\nu\n\nF\n\nC")
    assert message["content"][1]["type"] == "image_url"
    pdf = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": PNG}}
    with pytest.raises(BadRequest) as caught:
        asked(user([pdf]))
    assert caught.value.param == "messages[0].content[0].source"


def test_citations_that_were_asked_for_are_named_as_missing() -> None:
    plain = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "D"}}
    assert asked(user([plain | {"citations": {"enabled": False}}])).ignored == ()
    assert asked(user([plain | {"citations": {"enabled": True}}])).ignored == ("messages.content.citations",)


def test_sampling_stops_and_limits_are_chats() -> None:
    chat = asked(stop_sequences=["END"], temperature=0.5, top_p=1, top_k=40, seed=7, max_tokens=24.0).chat
    assert {name: chat[name] for name in chat.keys() - {"messages", "model"}} == {
        "stop": ["END"],
        "temperature": 0.5,
        "top_p": 1,
        "top_k": 40,
        "seed": 7,
        "max_tokens": 24,
    }
    assert type(chat["max_tokens"]) is int


EFFORTS: list[tuple[dict[str, Any], str | None]] = [
    ({}, None),
    ({"thinking": {"type": "adaptive", "display": "omitted"}}, None),
    ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}}, "high"),
    ({"output_config": {"effort": "low"}}, "low"),
    ({"thinking": {"type": "disabled"}, "output_config": {"effort": "high"}}, "none"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "low"),
    ({"thinking": {"type": "enabled", "budget_tokens": 8000}}, "medium"),
    ({"thinking": {"type": "enabled", "budget_tokens": 31_999, "display": "omitted"}}, "high"),
]


@pytest.mark.parametrize(("fields", "effort"), EFFORTS)
def test_thinking_and_effort_become_one_optional_reasoning_effort(fields: dict[str, Any], effort: str | None) -> None:
    made = asked(**fields)
    assert made.chat.get("reasoning_effort") == effort
    assert made.advice == (() if effort is None else ("reasoning_effort",))


def test_a_format_is_a_response_format() -> None:
    form = {"type": "json_schema", "schema": {"type": "object"}}
    for fields in ({"output_config": {"format": form}}, {"output_format": form}):
        assert asked(**fields).chat["response_format"] == {
            "type": "json_schema",
            "json_schema": {"name": "output", "strict": True, "schema": {"type": "object"}},
        }


def test_bookkeeping_is_accepted_and_other_fields_are_named() -> None:
    edits = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    quiet = asked(metadata={"user_id": "u"}, cache_control={"type": "ephemeral"}, context_management=edits, betas=["b"])
    assert quiet.ignored == ()
    assert quiet.chat == asked().chat
    loud = asked(
        user([text("a", wild=1, citations=[])]),
        safeguards=[{}],
        compaction={"type": "auto"},
        speed="fast",
        context_management={"edits": [{"type": "clear_tool_uses_20250919"}]},
        nothing=None,
    )
    assert loud.ignored == (
        "compaction",
        "safeguards",
        "messages.content.wild",
        "speed",
        "context_management.edits",
    )
    assert loud.chat == asked(user("a")).chat


def test_counting_needs_no_limit_and_streams_nothing() -> None:
    made = read({"model": "m", "messages": [user("hi")], "stream": True}, request_id="r", now=0, counting=True)
    assert not made.stream
    assert made.chat == {"model": "m", "messages": [user("hi")]}
