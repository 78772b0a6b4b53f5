"""Reading Messages requests of real clients: all of them, and what must stay the same from turn to turn."""

import orjson
import pytest

from gateway.translation.messages import Asked, read
from gateway.translation.messages.conversation import BILLING
from tests.support.message_recordings import REQUESTS, body
from tests.support.message_requests import messages, text
from tests.support.recorded import Recorded


def chat_of(recorded: Recorded) -> Asked:
    return read(recorded.body, request_id="r1", now=0, counting=recorded.path.endswith("count_tokens"))


@pytest.mark.parametrize("recorded", REQUESTS, ids=str)
def test_every_recorded_request_is_read(recorded: Recorded) -> None:
    given, made = recorded.body, chat_of(recorded)
    chat = made.chat
    assert chat["model"] == given["model"]
    assert chat.get("max_tokens") == given.get("max_tokens")
    assert made.stream is bool(given.get("stream")) is ("stream" in chat)
    assert chat.get("stream_options") == ({"include_usage": True} if made.stream else None)
    written = orjson.dumps(chat).decode()
    assert "cache_control" not in written
    assert BILLING not in written
    assert "defer_loading" not in written
    roles = [it["role"] for it in chat["messages"]]
    assert roles.count("assistant") == sum(it["role"] == "assistant" for it in given["messages"])
    assert roles.count("system") == sum(it["role"] == "system" for it in given["messages"]) + ("system" in given)
    assert set(made.ignored) <= {"safeguards", "thinking.budget_tokens"}
    for it in chat["messages"]:
        assert it["role"] == "user" or type(it["content"]) is str


GROWN = [
    ("anthropic-sdk-js", "tools round trip", "tools round trip request 2"),
    ("langchain-js", "langchain-anthropic bindTools round trip", "langchain-anthropic bindTools round trip request 2"),
    (
        "opencode",
        "over @ai-sdk anthropic: messages, first request",
        "over @ai-sdk anthropic: messages, after thinking and a tool call",
    ),
    ("pi", "messages, first request", "messages, after thinking and a tool call"),
    ("vercel-ai-sdk", "ai+anthropic generateText tools", "ai+anthropic generateText tools request 2"),
]


@pytest.mark.parametrize(("client", "first", "second"), GROWN)
def test_a_recorded_conversation_that_goes_on_begins_with_the_same_bytes(client: str, first: str, second: str) -> None:
    before, after = (read(body(client, what), request_id="r", now=0).chat for what in (first, second))
    count = len(before["messages"])
    assert len(after["messages"]) > count
    assert orjson.dumps(after["messages"][:count]) == orjson.dumps(before["messages"])
    assert orjson.dumps(after["tools"]) == orjson.dumps(before["tools"])


def test_all_of_claude_codes_requests_of_one_kind_share_tools_system_prompt_and_instruction() -> None:
    """One writes the instruction as blocks, others as a string; the billing block is another one in each."""
    first = read(body("claude-code", "say hello, first request"), request_id="r", now=0).chat
    for what in (
        "after a tool call: its result",
        "after thinking, text and a tool call",
        "after two tool calls at once",
    ):
        later = read(body("claude-code", what), request_id="r", now=0).chat
        assert orjson.dumps(later["tools"]) == orjson.dumps(first["tools"])
        assert later["messages"][0] == first["messages"][0]
        assert later["messages"][2] == first["messages"][2]
        assert [it["role"] for it in later["messages"][:4]] == ["system", "user", "system", "assistant"]


def test_claude_codes_image_in_a_result_follows_the_result() -> None:
    *_, tool, last = messages(*body("claude-code", "a tool result with an image")["messages"])
    assert tool == {"role": "tool", "tool_call_id": "toolu_mock0", "content": "[image 1] follows in the next message."}
    label, image = last["content"]
    assert (last["role"], label) == ("user", text("[image 1]"))
    assert image["image_url"]["url"].startswith("data:image/png;base64,iVBOR")


def test_loaded_tools_follow_all_others_in_the_order_of_their_references() -> None:
    first = read(body("claude-code", "say hello, first request"), request_id="r", now=0).chat["tools"]
    later = read(
        body("claude-code", "after ToolSearch: tool_reference and deferred tools"), request_id="r", now=0
    ).chat["tools"]
    assert later[: len(first)] == first
    names = [it["function"]["name"] for it in later[len(first) :]]
    assert names == ["CronList", "EnterWorktree", "ExitWorktree", "SendMessage", "WebFetch"]
    assert "DeferredToolPlaceholder" not in [it["function"]["name"] for it in first]


def test_broken_arguments_of_an_earlier_call_are_sound_json() -> None:
    chat = read(body("claude-code", "after a call with broken JSON arguments"), request_id="r", now=0).chat
    (made,) = next(it for it in chat["messages"] if it["role"] == "assistant")["tool_calls"]
    assert orjson.loads(made["function"]["arguments"]) == {"__unparsedToolInput": {"raw": '{"command": ', "len": 12}}
