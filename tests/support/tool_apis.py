"""Tool APIs: demands for tool calls (tests/support/tool_demands.py) in the form of each API, and their outcome."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import jsonschema_rs

from tests.support import judges, tool_demands
from tests.support.faces import events
from tests.support.fakes.told import telling
from tests.support.processes import was_cut
from tests.support.tool_demands import NAMED, SCHEMAS

Json = dict[str, Any]
Calls = list[tuple[str, Any]]


@dataclass(frozen=True)
class ToolApi:
    """One API. `body` makes a request from an engine, a mark, the engine's answers, a demand and whether to stream."""

    path: str
    body: Callable[..., Json]
    verdict: Callable[..., str]


def _response(engine: str, mark: str, tries: list[Json], demand: Json, *, stream: bool) -> Json:
    tools = [{"type": "function", "name": name, "parameters": it, "strict": False} for name, it in SCHEMAS.items()]
    asked = {"model": engine, "input": telling(mark=mark, tries=tries), "tools": tools, "stream": stream} | demand
    return asked | ({"tool_choice": {"type": "function", "name": "get_weather"}} if _named(demand) else {})


def _message(engine: str, mark: str, tries: list[Json], demand: Json, *, stream: bool) -> Json:
    choice: Json = {"type": "tool", "name": "get_weather"} if _named(demand) else {"type": "any"}
    if demand.get("parallel_tool_calls") is False:
        choice["disable_parallel_tool_use"] = True
    tools = [{"name": name, "input_schema": it} for name, it in SCHEMAS.items()]
    said = [{"role": "user", "content": telling(mark=mark, tries=tries)}]
    return {
        "model": engine,
        "max_tokens": 500,
        "messages": said,
        "tools": tools,
        "tool_choice": choice,
        "stream": stream,
    }


def _chat(engine: str, mark: str, tries: list[Json], demand: Json, *, stream: bool) -> Json:
    return tool_demands.body(engine, mark, *tries, stream=stream, **demand)


def _named(demand: Json) -> bool:
    return bool(demand["tool_choice"] == NAMED)


def _of_response(answer: httpx.Response, demand: Json, *, stream: bool) -> str:
    if answer.status_code != 200:  # 400, because Codex asks thirty times after a 502
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "engine_broken_tool_call"), error
        return "failed"
    if not stream:
        return _called(judges.response(answer.json()), demand)
    told = events(answer.text)
    if not was_cut(answer):
        return _called(judges.response_stream(told), demand)
    assert [it["type"] for it in told[-2:]] == ["error", "response.failed"], told
    assert told[-2]["code"] == "engine_broken_tool_call"
    assert told[-1]["response"]["error"]["code"] == "invalid_prompt"  # at which Codex stops
    assert [it["sequence_number"] for it in told] == list(range(len(told)))
    done = [it["item"] for it in told if it["type"] == "response.output_item.done"]
    _fit([(it["name"], json.loads(it["arguments"])) for it in done if it["type"] == "function_call"])
    return "failed"


def _of_message(answer: httpx.Response, demand: Json, *, stream: bool) -> str:
    if answer.status_code != 200:
        assert (answer.status_code, answer.headers["x-should-retry"]) == (502, "false")
        _missed(answer.json())
        return "failed"
    if not stream:
        return _called(judges.message(answer.json()), demand)
    told = events(answer.text)
    if not was_cut(answer):
        return _called(judges.message_stream(told), demand)
    assert told[-1]["type"] == "error", told
    _missed(told[-1])
    names = {it["index"]: it["content_block"].get("name") for it in told if it["type"] == "content_block_start"}
    texts = dict.fromkeys(names, "")
    for it in told:
        if it["type"] == "content_block_delta":
            texts[it["index"]] += it["delta"].get("partial_json", "")
    stopped = [it["index"] for it in told if it["type"] == "content_block_stop"]
    _fit([(names[it], json.loads(texts[it])) for it in stopped if names[it]])
    return "failed"


def _missed(error: Json) -> None:
    assert error["error"]["type"] == "api_error", error
    assert "Try again, or use a larger model." in error["error"]["message"], error


def _called(said: judges.Said, demand: Json) -> str:
    assert said.calls, f"a silent miss: {said}"
    _fit(list(said.calls))
    assert not _named(demand) or {name for name, _ in said.calls} == {"get_weather"}
    assert len(said.calls) == 1 or (not _named(demand) and demand.get("parallel_tool_calls", True))
    return "called"


def _fit(calls: Calls) -> None:
    """Check the calls that a client has whole: it may run them at once."""
    for name, arguments in calls:
        jsonschema_rs.validate(SCHEMAS[name], arguments)


TOOL_APIS = {
    "chat": ToolApi("/v1/chat/completions", _chat, tool_demands.verdict),
    "responses": ToolApi("/v1/responses", _response, _of_response),
    "messages": ToolApi("/v1/messages", _message, _of_message),
}
