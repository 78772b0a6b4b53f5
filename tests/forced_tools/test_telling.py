"""The text that describes the tools to a model is the same for the same conversation."""

from itertools import pairwise
from typing import Any

import pytest

from gateway.forced_tools.demand import Demand, read
from gateway.forced_tools.telling import MAX_REASON, told

PARAMETERS = {"type": "object", "properties": {"b": {}, "a": {}}}
TOOL = {"type": "function", "function": {"name": "f", "description": "Does f.", "parameters": PARAMETERS}}
USER: dict[str, Any] = {"role": "user", "content": "Hi"}
SYSTEM: dict[str, Any] = {"role": "system", "content": "Be short."}


def demand(choice: Any = "required") -> Demand:
    found = read({"tools": [TOOL], "tool_choice": choice})
    assert found is not None
    return found


def test_the_words_stand_at_the_end_of_the_system_message() -> None:
    first, last = told([SYSTEM, USER], demand())
    assert first["content"].startswith("Be short.\n\nFunctions")
    assert (
        '{"name":"f","description":"Does f.","parameters":{"type":"object","properties":{"b":{},"a":{}}}}'
        in first["content"]
    )
    assert last is USER


def test_without_a_system_message_there_is_one() -> None:
    assert [it["role"] for it in told([USER], demand())] == ["system", "user"]


def test_a_system_message_of_parts_gets_a_part() -> None:
    parts = [{"type": "text", "text": "Be short."}]
    first, _ = told([{"role": "developer", "content": parts}, USER], demand())
    assert [it["type"] for it in first["content"]] == ["text", "text"]


def test_a_conversation_that_grows_is_told_the_same() -> None:
    more = [SYSTEM, USER, {"role": "assistant", "content": "Yes"}, USER]
    assert told(more, demand())[:2] == told(more[:2], demand())


@pytest.mark.parametrize("last", [USER, {"role": "tool", "tool_call_id": "x", "content": "4"}])
def test_a_reason_is_told_at_the_end_by_a_user(last: dict[str, Any]) -> None:
    messages = told([SYSTEM, USER, {"role": "assistant", "content": "x"}, last], demand(), "It is text." + "x" * 1000)
    assert messages[-1]["role"] == "user"
    assert "not accepted: It is text." in messages[-1]["content"]
    assert len(messages[-1]["content"]) < MAX_REASON + 200
    roles = [it["role"] for it in messages]
    assert ("user", "user") not in list(pairwise(roles))


def test_the_request_itself_is_not_changed() -> None:
    messages = [dict(SYSTEM), dict(USER)]
    told(messages, demand(), "x")
    assert messages == [SYSTEM, USER]
