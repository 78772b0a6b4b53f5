"""Joining contents: many texts, as a request may hold them, are joined in linear time. If each text were joined to all
before it, 1 TB would be copied, which takes minutes, and the test would not end before its deadline."""

from typing import Any

import pytest

from gateway.errors import EngineRefused
from gateway.translation.contents import joined
from gateway.translation.messages import read as read_messages
from gateway.translation.responses import read as read_response
from gateway.upstream import concessions, messages

pytestmark = pytest.mark.timeout(30)
MANY = 50_000
TEXT = "x" * 800
PART = {"type": "text", "text": TEXT}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}


def test_text_parts_for_ollama() -> None:
    (made,) = messages.read("ollama", [{"role": "user", "content": [PART] * MANY}])
    assert made["content"] == [{"type": "text", "text": "\n".join([TEXT] * MANY)}]


def test_text_blocks_of_the_messages_api() -> None:
    body = {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": [PART] * MANY}]}
    made = read_messages(body, request_id="r", now=1).chat["messages"]
    assert made == [{"role": "user", "content": "\n\n".join([TEXT] * MANY)}]


@pytest.mark.parametrize(
    ("items", "field"),
    [
        ([CALL, *[{"role": "assistant", "content": TEXT}] * MANY], "content"),
        ([{"type": "reasoning", "summary": [PART]}, CALL] * MANY, "reasoning_content"),
    ],
    ids=["texts", "reasoning"],
)
def test_what_follows_a_call_in_the_responses_api(items: list[Any], field: str) -> None:
    (made,) = read_response({"model": "m", "input": items}, request_id="r", now=1).chat["messages"]
    assert made[field] == "\n\n".join([TEXT] * MANY)


@pytest.mark.parametrize("role", ["user", "system"])
def test_messages_for_an_engine_that_refused_their_roles(role: str) -> None:
    error = EngineRefused("Conversation roles must alternate", status=400)
    said = [{"role": "user", "content": TEXT}, *[{"role": role, "content": TEXT}] * (MANY - 1)]
    found = concessions.after(error, {"messages": said}, None)
    assert found is not None
    assert found.fields["messages"] == [{"role": "user", "content": "\n\n".join([TEXT] * MANY)}]


def test_contents_are_a_text_or_a_list_of_parts() -> None:
    assert joined([]) == joined(["", None]) == ""
    assert joined(["a", "", "b"]) == "a\n\nb"
    assert joined(["a", "b", [PICTURE], "", "c"]) == [
        {"type": "text", "text": "a\n\nb"},
        PICTURE,
        {"type": "text", "text": "c"},
    ]
