"""Engines whose answers differ a little from the API's: what is plain all the same reaches each client in the form that
its own API has for it."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support import faces, judges, twins
from tests.support.faces import END, MESSAGES_API, RESPONSES, script
from tests.support.judges import Said
from tests.support.processes import FakeEngine, events, post, running_gateway
from tests.support.tool_streams import CITY

CHAT = "/v1/chat/completions"
HEAD = {"id": "chatcmpl-odd", "object": "chat.completion", "created": 1, "model": "fake-model"}
CHUNK = {"id": "chatcmpl-fake", "object": "chat.completion.chunk", "created": 1, "model": "fake-model"}
DEEP: Any = {"a": json.loads("[" * 300 + "]" * 300)}
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
FINISHES = {"chat": "tool_calls", "responses": "completed", "messages": "tool_use"}


@pytest.fixture(scope="module")
def http(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a gateway before one engine that does as its script says, in each dialect."""
    directory = tmp_path_factory.mktemp("odd")
    (directory / "stack.yaml").write_text(twins.CONFIG.format(a=engine.url))
    settings = {"STACK_CONFIG": str(directory / "stack.yaml"), "STACK_WORKERS": "1", "STACK_RESUME": "3"}
    with running_gateway(directory / "log", engine.url, **settings) as gateway, gateway.client() as client:
        yield client


def delta(fields: dict[str, Any], reason: str | None = None) -> list[Any]:
    return ["event", CHUNK | {"choices": [{"index": 0, "delta": fields, "finish_reason": reason}]}]


def ask(http: httpx.Client, api: str, steps: list[Any], *, guarded: bool = False, **more: Any) -> httpx.Response:
    """Ask for an answer that may call a tool; `guarded`: at most one call."""
    text = script(*steps)
    if api == "chat":
        tools: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": CITY}}]
        body = {"model": "vllm", "messages": [{"role": "user", "content": text}], "tools": tools}
        return post(http, CHAT, json=body | ({"parallel_tool_calls": False} if guarded else {}) | more)
    if api == "responses":
        tools = [{"type": "function", "name": "weather", "parameters": CITY, "strict": False}]
        body = RESPONSES.body(text, "vllm", tools=tools) | ({"parallel_tool_calls": False} if guarded else {})
        return post(http, RESPONSES.path, json=body | more)
    body = MESSAGES_API.body(text, "vllm", tools=[{"name": "weather", "input_schema": CITY}])
    choice = {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}} if guarded else {}
    return post(http, MESSAGES_API.path, json=body | choice | more)


def said(api: str, answer: httpx.Response, *, stream: bool) -> Said:
    """What the answer says, which must be valid by the types of its API."""
    assert answer.status_code == 200, answer.text
    if api == "chat":
        (one,) = judges.chat_stream(events(answer.text), usage=False) if stream else judges.chat(answer.json())
        return one
    if api == "responses":
        return judges.response_stream(faces.events(answer.text)) if stream else judges.response(answer.json())
    return judges.message_stream(faces.events(answer.text)) if stream else judges.message(answer.json())


def called(arguments: Any, *, stream: bool) -> list[Any]:
    """The steps of an engine's answer with two calls, both with these arguments."""
    function = {"name": "weather", "arguments": arguments}
    calls = [{"id": f"call_{it}", "type": "function", "function": function} for it in (0, 1)]
    if stream:
        pieces = [{"index": index, **it} for index, it in enumerate(calls)]
        return [["role"], delta({"tool_calls": pieces}), ["finish", "tool_calls"], *END[1:]]
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
    return [["json", [200, HEAD | {"choices": [choice], "usage": USAGE}]]]


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("api", FINISHES)
def test_arguments_that_are_an_object_become_their_json_text(
    http: httpx.Client, api: str, *, stream: bool, guarded: bool
) -> None:
    """They became {} without a word if at most one call was asked for. Otherwise a client of chat completions got an
    object, and other clients an error."""
    answer = ask(http, api, called({"city": "Oslo"}, stream=stream), guarded=guarded, stream=stream)
    got = said(api, answer, stream=stream)
    calls = (("weather", {"city": "Oslo"}),) * (1 if guarded else 2)
    assert (got.calls, got.finish) == (calls, FINISHES[api]), answer.text


@pytest.mark.parametrize("model", ["llamacpp", "ollama"])
def test_arguments_that_are_an_object_become_their_json_text_in_a_folded_answer(http: httpx.Client, model: str) -> None:
    answer = ask(http, "chat", called({"city": "Oslo"}, stream=True), model=model).json()
    calls = [it["function"] for it in answer["choices"][0]["message"]["tool_calls"]]
    assert [(it["name"], json.loads(it["arguments"])) for it in calls] == [("weather", {"city": "Oslo"})] * 2


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("arguments", [["Oslo"], 5, True, DEEP], ids=["a list", "a number", "true", "too deep"])
def test_arguments_that_are_neither_a_text_nor_an_object_that_can_be_one_are_an_error(
    http: httpx.Client, arguments: Any, *, stream: bool, guarded: bool
) -> None:
    answer = ask(http, "chat", called(arguments, stream=stream), guarded=guarded, stream=stream)
    told = events(answer.text)[-1] if stream and answer.status_code == 200 else answer.json()
    assert told["error"]["code"] == "engine_broken_stream", answer.text


@pytest.mark.parametrize("model", ["llamacpp", "ollama"])
def test_an_empty_string_replaces_nothing_in_a_folded_answer(http: httpx.Client, model: str) -> None:
    """Some engines repeat each field, with an empty value."""
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}}
    steps = [delta({"role": "assistant", "content": "Hm", "tool_calls": [call]})]
    for it in ('{"city":', '"Oslo"}'):
        more = {"index": 0, "id": "", "type": "", "function": {"name": "", "arguments": it}}
        steps.append(delta({"role": "", "content": "", "tool_calls": [more]}, ""))
    steps += [delta({"role": "", "content": ""}, "tool_calls"), delta({"role": "", "content": ""}, "")]
    steps += [["event", dict.fromkeys(CHUNK, "") | {"choices": [], "usage": USAGE}], *END[2:]]
    answer = ask(http, "chat", steps, model=model).json()
    (choice,) = answer["choices"]
    assert (choice["message"]["role"], choice["message"]["content"]) == ("assistant", "Hm")
    (told,) = choice["message"]["tool_calls"]
    told.pop("index", None)
    function = {"name": "weather", "arguments": '{"city":"Oslo"}'}
    assert told == {"id": "call_1", "type": "function", "function": function}
    assert choice["finish_reason"] == "tool_calls"
    assert {name: answer[name] for name in CHUNK} == CHUNK | {"object": "chat.completion"}


# Of Messages: the limit of the request was not reached.
ENDED = {"chat": "length", "responses": "incomplete", "messages": "model_context_window_exceeded"}
ENDS = [["role"], delta({"content": "Hi"}, ""), delta({}, "length"), delta({}, "stop"), delta({}, ""), *END[1:]]


def finish(api: str, answer: httpx.Response, *, stream: bool) -> str:
    """Why the answer ended."""
    if api == "responses":  # the judges take whole answers only
        it = faces.events(answer.text)[-1]["response"] if stream else answer.json()
        return str(it["status"])
    return said(api, answer, stream=stream).finish


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("api", ENDED)
def test_the_first_finish_reason_of_a_stream_is_the_only_one(http: httpx.Client, api: str, *, guarded: bool) -> None:
    """A second one was forwarded, too. An empty one is none."""
    answer = ask(http, api, ENDS, guarded=guarded, stream=True)
    if api == "chat":
        choices = [it for chunk in events(answer.text)[:-1] for it in chunk["choices"]]
        assert [it["finish_reason"] for it in choices if it["finish_reason"] is not None] == ["length"]
    else:
        assert finish(api, answer, stream=True) == ENDED[api], answer.text


@pytest.mark.parametrize("model", ["llamacpp", "ollama"])
@pytest.mark.parametrize("api", ENDED)
def test_the_first_finish_reason_is_that_of_a_folded_answer(http: httpx.Client, api: str, model: str) -> None:
    answer = ask(http, api, ENDS, model=model)
    assert '"Hi"' in answer.text
    assert finish(api, answer, stream=False) == ENDED[api], answer.text
