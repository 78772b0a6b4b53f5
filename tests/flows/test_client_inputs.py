"""Inputs of Responses and Messages clients that broke other gateways, each on every engine's dialect.

The scripted engines answer in the frames of their dialect. Each test is one row of the two tables of such inputs.
"""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.faces import MESSAGES_API, RESPONSES, Api, events, script
from tests.support.fakes.dialects import ENGINES
from tests.support.processes import FakeEngine, GatewayProcess, post
from tests.support.tool_streams import CITY, calls, delta

CHAT = "/v1/chat/completions"
STRICT = {"x-stack-strict": "true"}
EACH = pytest.mark.parametrize("engine", ENGINES)
FORMS = pytest.mark.parametrize("stream", [False, True])
FLAT: dict[str, Any] = {"type": "function", "name": "weather", "parameters": CITY}
WEATHER: dict[str, Any] = {"name": "weather", "input_schema": CITY}
PNG = "iVBORw0KGgo="
CALL = [["weather", ['{"city"', ':"Rome"}']]]


@pytest.fixture(scope="module")
def http(before_all: GatewayProcess) -> Iterator[httpx.Client]:
    with before_all.client() as client:
        yield client


@pytest.fixture
def fake(fakes: dict[str, FakeEngine], engine: str) -> Iterator[FakeEngine]:
    fakes[engine].set(context=100_000)
    yield fakes[engine]
    fakes[engine].set(one_system=False, anchored=False)


def says(**what: Any) -> str:
    """Return a user's message to which the engine answers so."""
    return script(["says", what])


def ask(http: httpx.Client, api: Api, body: dict[str, Any], **options: Any) -> httpx.Response:
    answer = post(http, api.path, json=body, **options)
    assert answer.status_code == 200, answer.text
    return answer


def told(http: httpx.Client, api: Api, engine: str, text: str, /, *, stream: bool, **more: Any) -> dict[str, Any]:
    """Return the whole response or message, whose stream the events must agree with."""
    answer = ask(http, api, api.body(text, model=engine, stream=stream, **more))
    if not stream:
        assert answer.headers["content-type"] == "application/json"
        return answer.json()
    assert answer.headers["content-type"] == "text/event-stream"
    found = events(answer.text)
    return found[-1]["response"] if api is RESPONSES else message_of(found)


def message_of(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Add up a message from its events, as Anthropic's clients do. Each block has its own place in the stream."""
    kinds = [it["type"] for it in found if it["type"] != "ping"]
    assert (kinds[0], kinds[-2:], kinds.count("message_start")) == (
        "message_start",
        ["message_delta", "message_stop"],
        1,
    )
    message: dict[str, Any] = found[0]["message"] | {"content": []}
    for it in found:
        if it["type"] == "content_block_start":
            assert it["index"] == len(message["content"])
            message["content"].append(it["content_block"])
        elif it["type"] == "content_block_delta":
            assert it["index"] == len(message["content"]) - 1
            block, delta = message["content"][-1], it["delta"]
            name = {"input_json_delta": "partial_json"}.get(delta["type"], delta["type"].removesuffix("_delta"))
            block[name] = block.get(name, "") + delta[name]
        elif it["type"] == "message_delta":
            message |= it["delta"] | {"usage": it["usage"]}
    for block in message["content"]:
        if block["type"] == "tool_use":
            block["input"] = json.loads(block.pop("partial_json", "") or "{}")
    return message


def sent(fake: FakeEngine) -> dict[str, Any]:
    """Return the last request that the engine got."""
    return fake.asked(CHAT)[-1]["body"]


def kinds(output: list[dict[str, Any]]) -> list[str]:
    return [it["type"] for it in output]


# -- Responses --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fake")
@EACH
def test_a_plain_text_stream_has_every_event_with_its_ids_and_indexes(http: httpx.Client, engine: str) -> None:
    body = RESPONSES.body(says(pieces=["one", " two"]), model=engine, stream=True)
    found = events(ask(http, RESPONSES, body).text)
    part = ["response.content_part.added", *["response.output_text.delta"] * 2, "response.output_text.done"]
    item = ["response.output_item.added", *part, "response.content_part.done", "response.output_item.done"]
    assert kinds(found) == ["response.created", "response.in_progress", *item, "response.completed"]
    assert [it["sequence_number"] for it in found] == list(range(len(found)))
    final = found[-1]["response"]
    assert (final["object"], final["model"], final["status"]) == ("response", engine, "completed")
    assert final["id"].startswith("resp_")
    (message,) = final["output"]
    assert message["content"][0]["text"] == "one two"
    for it in found[3:-2]:
        assert (it["item_id"], it["output_index"], it["content_index"]) == (message["id"], 0, 0)


@pytest.mark.usefixtures("fake")
@EACH
def test_a_response_is_completed_only_after_the_usage_that_follows_the_finish_reason(
    http: httpx.Client, engine: str
) -> None:
    final = told(http, RESPONSES, engine, says(thinks=["Hm."], pieces=["a", "b"]), stream=True)
    assert (final["usage"]["input_tokens"], final["usage"]["output_tokens"]) == (7, 3)
    assert final["usage"].keys() >= {"input_tokens_details", "output_tokens_details", "total_tokens"}


@pytest.mark.usefixtures("fake")
@FORMS
@EACH
def test_an_answer_at_its_limit_is_incomplete_with_its_reason_and_usage(
    http: httpx.Client, engine: str, stream: bool
) -> None:
    text = says(pieces=["one"], finish="length")
    final = told(http, RESPONSES, engine, text, stream=stream, max_output_tokens=1)
    assert (final["status"], final["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert (kinds(final["output"]), final["usage"]["output_tokens"]) == (["message"], 1)
    thought = says(thinks=["Hm", "m"], finish="length")
    final = told(http, RESPONSES, engine, thought, stream=stream, max_output_tokens=2)
    assert (final["status"], kinds(final["output"])) == ("incomplete", ["reasoning"])


@pytest.mark.usefixtures("fake")
@EACH
def test_arguments_in_one_piece_come_as_a_delta_and_are_done(http: httpx.Client, engine: str) -> None:
    text = says(calls=[["weather", ['{"city":"Rome"}']]])
    found = events(ask(http, RESPONSES, RESPONSES.body(text, model=engine, stream=True, tools=[FLAT])).text)
    arguments = [it for it in found if it["type"].startswith("response.function_call_arguments")]
    assert [it.get("delta", it.get("arguments")) for it in arguments] == ['{"city":"Rome"}'] * 2
    assert found[-1]["response"]["output"][0]["arguments"] == '{"city":"Rome"}'


@EACH
def test_tools_that_no_engine_has_are_named_as_ignored_and_refused_in_strict_mode(
    http: httpx.Client, fake: FakeEngine, engine: str
) -> None:
    hosted = [{"type": it} for it in ("web_search", "image_generation", "tomorrow")]
    body = RESPONSES.body(model=engine, tools=[*hosted, FLAT, {"type": "custom", "name": "patch"}])
    answer = ask(http, RESPONSES, body)
    assert answer.headers["x-stack-ignored-params"] == "tools.web_search,tools.image_generation,tools.tomorrow"
    assert [it["function"]["name"] for it in sent(fake)["tools"]] == ["weather", "patch"]
    strict = http.post(RESPONSES.path, json=body, headers=STRICT)
    assert (strict.status_code, strict.json()["error"]["param"]) == (400, "tools.web_search")


HISTORY: dict[str, list[dict[str, Any]]] = {
    "a custom tool's output as a list of parts": [
        {"type": "custom_tool_call", "call_id": "c", "name": "patch", "input": "x"},
        {"type": "custom_tool_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "done"}]},
    ],
    "an assistant's turn without a status": [
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hi."}]}
    ],
    "an assistant's turn without content": [{"role": "assistant", "content": []}],
    "arguments that are not JSON": [
        {"type": "function_call", "call_id": "c", "name": "weather", "arguments": '{"city": "Ro'},
        {"type": "function_call_output", "call_id": "c", "output": "sunny"},
    ],
    "reasoning with another provider's encrypted text": [
        {"type": "reasoning", "summary": [], "encrypted_content": "gAAAA", "content": None},
        {"role": "assistant", "content": "Hi."},
    ],
    "reasoning without an item after it": [{"type": "reasoning", "summary": [], "content": None}],
}


@EACH
def test_a_history_that_other_gateways_refuse_is_accepted(http: httpx.Client, fake: FakeEngine, engine: str) -> None:
    for what, items in HISTORY.items():
        asked = [{"role": "user", "content": "Hello"}, *items, {"role": "user", "content": "Go on."}]
        answer = ask(http, RESPONSES, {"model": engine, "input": asked, "tools": [FLAT]})
        assert answer.json()["status"] == "completed", what
        messages = sent(fake)["messages"]
        assert (messages[0]["content"], messages[-1]["content"]) == ("Hello", "Go on."), what
        for call in (call for it in messages for call in it.get("tool_calls", ())):
            json.loads(call["function"]["arguments"])  # engines parse them, and fail


@EACH
def test_state_that_is_not_kept_is_refused_by_its_field(http: httpx.Client, fake: FakeEngine, engine: str) -> None:
    asked = {"previous_response_id": "resp_1", "conversation": "conv_1", "store": True, "background": True}
    for field, value in asked.items():
        answer = http.post(RESPONSES.path, json=RESPONSES.body(model=engine, **{field: value}))
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
        assert len(answer.json()["error"]["message"]) > 40  # it says what to do instead
    assert fake.asked(CHAT) == []


def test_a_request_for_no_answer_is_refused(http: httpx.Client, fakes: dict[str, FakeEngine]) -> None:
    fakes["vllm"].set()
    wrong = {
        "prompt_cache_options.prewarm": {"prompt_cache_options": {"prewarm": True}},
        "generate": {"generate": False},
    }
    for field, asks in wrong.items():
        answer = http.post(RESPONSES.path, json=RESPONSES.body(model="vllm", **asks))
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
        assert field in answer.json()["error"]["message"]
    assert fakes["vllm"].asked(CHAT) == []
    ask(http, RESPONSES, RESPONSES.body(model="vllm", prompt_cache_options={"prewarm": False}, generate=True))
    assert fakes["vllm"].asked(CHAT)[0]["body"].keys().isdisjoint({"prompt_cache_options", "generate"})


@pytest.mark.usefixtures("fake")
@FORMS
@EACH
def test_white_space_between_reasoning_and_a_call_is_no_message(http: httpx.Client, engine: str, stream: bool) -> None:
    text = says(thinks=["\n", "Hm."], pieces=["\n", "\n"], calls=CALL)
    output = told(http, RESPONSES, engine, text, stream=stream, tools=[FLAT])["output"]
    assert [it["type"] for it in output] == ["reasoning", "function_call"]
    text = says(thinks=["Hm."], pieces=["\n", "\n", "Yes."])
    output = told(http, RESPONSES, engine, text, stream=stream)["output"]
    assert [it["content"][0]["text"] for it in output] == ["Hm.", "\n\nYes."]


@pytest.mark.parametrize("api", [RESPONSES, MESSAGES_API], ids=["responses", "messages"])
def test_white_space_within_a_call_does_not_end_it(http: httpx.Client, api: Api) -> None:
    head, *rest = json.loads(calls('{"city"', ':"Rome"}').removeprefix("script:"))
    text = script(head, *rest[:2], delta({"content": "\n"}), *rest[2:])
    tools = {"responses": [FLAT], "messages": [WEATHER]}[api.name]
    answer = told(http, api, "vllm", text, stream=True, tools=tools)
    (call,) = answer["output"] if api is RESPONSES else answer["content"]
    assert (call["arguments"] if api is RESPONSES else json.dumps(call["input"])).replace(" ", "") == '{"city":"Rome"}'


def test_a_reference_to_unknown_reasoning_is_left_out_and_any_other_says_what_to_do(
    http: httpx.Client, fakes: dict[str, FakeEngine]
) -> None:
    """Vercel's SDK sends references unless it is told that nothing is stored."""
    fakes["vllm"].set()
    output = {"type": "function_call_output", "call_id": "c", "output": "x"}
    turns = [
        {"role": "user", "content": "Hello"},
        {"type": "item_reference", "id": "rs_x_0"},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        output,
    ]
    answer = ask(http, RESPONSES, {"model": "vllm", "input": turns})
    assert answer.headers["x-stack-ignored-params"] == "input.item_reference"
    sent = fakes["vllm"].asked(CHAT)[0]["body"]["messages"]
    assert [it["role"] for it in sent] == ["user", "assistant", "tool"]
    turns.insert(1, {"type": "item_reference", "id": "msg_x_0"})
    refused = http.post(RESPONSES.path, json={"model": "vllm", "input": turns})
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, "input[1].id")
    assert "providerOptions: { openai: { store: false } }" in error["message"]
    assert "STACK_RESPONSES_DAYS" in error["message"]


def test_fields_that_tell_where_a_call_came_from_ask_for_nothing(http: httpx.Client) -> None:
    turns: dict[str, Any] = {
        "responses": [
            {"type": "function_call", "call_id": "c", "name": "f", "namespace": "n", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "name": "f", "namespace": "n", "output": "x"},
        ],
        "messages": [
            {"role": "user", "content": "Hello"},
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {}, "caller": {"type": "direct"}}],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "x"}]},
        ],
    }
    for api, field in ((RESPONSES, "input"), (MESSAGES_API, "messages")):
        answer = ask(http, api, api.body(model="vllm") | {field: turns[api.name]}, headers=STRICT)
        assert "x-stack-ignored-params" not in answer.headers


# -- Messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fake")
@FORMS
@EACH
def test_reasoning_text_and_a_call_are_blocks_in_their_order(http: httpx.Client, engine: str, stream: bool) -> None:
    text = says(thinks=["Let", " me"], pieces=["On", " it."], calls=CALL)
    message = told(http, MESSAGES_API, engine, text, stream=stream, tools=[WEATHER])
    thinking, said, use = message["content"]
    assert (thinking["type"], thinking["thinking"]) == ("thinking", "Let me")
    assert said == {"type": "text", "text": "On it."}
    assert (use["type"], use["name"], use["input"]) == ("tool_use", "weather", {"city": "Rome"})
    assert message["stop_reason"] == "tool_use"


@pytest.mark.usefixtures("fake")
@FORMS
@EACH
def test_blocks_without_text_are_never_sent(http: httpx.Client, engine: str, stream: bool) -> None:
    text = says(thinks=["\n"], pieces=["", "\n\n"], calls=CALL)
    message = told(http, MESSAGES_API, engine, text, stream=stream, tools=[WEATHER])
    assert kinds(message["content"]) == ["tool_use"]


@EACH
def test_a_system_text_in_blocks_and_unknown_fields_lose_nothing(
    http: httpx.Client, fake: FakeEngine, engine: str
) -> None:
    mark = {"cache_control": {"type": "ephemeral"}}
    body = MESSAGES_API.body(model=engine, system=[{"type": "text", "text": it, **mark} for it in ("a", "b")], wild=1)
    answer = ask(http, MESSAGES_API, body)
    assert answer.headers["x-stack-ignored-params"] == "wild"
    assert sent(fake)["messages"][0] == {"role": "system", "content": "a\n\nb"}


@EACH
def test_tools_of_unknown_types_are_skipped_and_named(http: httpx.Client, fake: FakeEngine, engine: str) -> None:
    tools = [{"type": "advisor_20260301", "name": "advisor"}, {"type": "web_search_20250305", "name": "w"}, WEATHER]
    answer = ask(http, MESSAGES_API, MESSAGES_API.body(model=engine, tools=tools))
    assert answer.headers["x-stack-ignored-params"] == "tools"
    assert [it["function"]["name"] for it in sent(fake)["tools"]] == ["weather"]


@EACH
def test_results_are_contiguous_and_their_images_follow(http: httpx.Client, fake: FakeEngine, engine: str) -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}
    uses = [{"type": "tool_use", "id": it, "name": "weather", "input": {}} for it in ("a", "b")]
    results = [
        {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "sunny"}, image]},
        {"type": "tool_result", "tool_use_id": "b", "content": "rain"},
    ]
    turns = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": uses},
        {"role": "user", "content": results},
    ]
    ask(http, MESSAGES_API, MESSAGES_API.body(model=engine, tools=[WEATHER]) | {"messages": turns})
    messages = sent(fake)["messages"]
    assert [it["role"] for it in messages] == ["user", "assistant", "tool", "tool", "user"]
    assert [it["type"] for it in messages[-1]["content"]] == ["text", "image_url"]


@pytest.mark.usefixtures("fake")
@EACH
def test_a_tool_choice_is_held_to(http: httpx.Client, engine: str) -> None:
    good = says(good=[["weather", {"city": "Rome"}]])
    for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
        for stream in (False, True):
            message = told(http, MESSAGES_API, engine, good, stream=stream, tools=[WEATHER], tool_choice=choice)
            assert [(it["name"], it["input"]) for it in message["content"]] == [("weather", {"city": "Rome"})]
    told_none = told(http, MESSAGES_API, engine, says(pieces=["No."], calls=CALL), stream=False, tools=[WEATHER],
                     tool_choice={"type": "none"})  # fmt: skip
    assert kinds(told_none["content"]) == ["text"]


@pytest.mark.usefixtures("fake")
@EACH
def test_frames_without_a_space_behind_data_are_read(http: httpx.Client, engine: str) -> None:
    message = told(http, MESSAGES_API, engine, says(pieces=["one", " two"], bare=True), stream=True)
    assert message["content"] == [{"type": "text", "text": "one two"}]


def test_a_summary_of_a_conversation_is_text_to_the_engine(http: httpx.Client, fakes: dict[str, FakeEngine]) -> None:
    fakes["vllm"].set()
    block = {"type": "compaction", "content": "We greeted.", "encrypted_content": "x", "signature": "y"}
    turns = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": [block, {"type": "text", "text": "Yes."}]},
        {"role": "assistant", "content": [block | {"content": None}, {"type": "text", "text": "And."}]},
        {"role": "user", "content": "Go on."},
    ]
    answer = ask(http, MESSAGES_API, MESSAGES_API.body(model="vllm") | {"messages": turns}, headers=STRICT)
    assert "x-stack-ignored-params" not in answer.headers
    sent = fakes["vllm"].asked(CHAT)[0]["body"]["messages"]
    assert [it["content"] for it in sent] == ["Hello", "We greeted.\n\nYes.", "And.", "Go on."]


def test_a_block_that_an_assistant_cannot_have_is_refused_with_those_that_it_can(http: httpx.Client) -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}
    turns = [{"role": "assistant", "content": [image]}, {"role": "user", "content": "Hello"}]
    answer = http.post(MESSAGES_API.path, json=MESSAGES_API.body(model="vllm") | {"messages": turns})
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert message.startswith("'messages[0].content[0].type' must be one of text, thinking, tool_use")
