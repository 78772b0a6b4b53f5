"""Tool demands: what a request may demand of its tools, what an engine may answer, and whether the failure is
reported."""

import json
from typing import Any

import httpx
import jsonschema_rs

from tests.support.processes import events, was_cut

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "minLength": 1}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city"],
    "additionalProperties": False,
}


TIME = {"type": "object", "properties": {"zone": {"enum": ["UTC", "CET"]}}, "required": ["zone"]}


SCHEMAS = {"get_weather": WEATHER, "get_time": TIME}


TOOLS = [{"type": "function", "function": {"name": name, "parameters": it}} for name, it in SCHEMAS.items()]


NAMED = {"type": "function", "function": {"name": "get_weather"}}


GOOD = {"good": [["get_weather", {"city": 'Paris, {“x”: "[\\\\"}', "days": 3}]]}


TWO = {"good": [["get_weather", {"city": "Oslo"}], ["get_time", {"zone": "UTC"}]]}


DEMANDS: dict[str, dict[str, Any]] = {
    "required": {"tool_choice": "required"},
    "one call": {"tool_choice": "required", "parallel_tool_calls": False},
    "a named function": {"tool_choice": NAMED},
}


# The engine's first answers. After those in NOTHING_PASSED, the client of a stream has no part of a call.
WRONG: dict[str, dict[str, Any]] = {
    "prose": {"say": ["Sure, ", "I can ", "help."]},
    "prose with brackets": {"say": ["I can't {do} it [yet]."]},
    "nothing": {},
    "a wrong tool": {"say": ['{"name": "delete_', 'all", "arguments": {}}']},
    "an engine's call of a wrong tool": {"calls": [["delete_all", {}]], "finish": "tool_calls"},
    "a call without a name": {"say": ['[{"arguments": {"city": "Oslo"}}]']},
    "tool_calls announced, and none there": {"say": ["Hm."], "finish": "tool_calls"},
    "thinking, and then prose": {"think": "Let me see.", "say": ["It is sunny."]},
    "JSON of another form": {"say": ["[1, 2]"]},
    "arguments in a string": {"say": ['{"name": "get_time", "arguments": "{}"}']},
    "broken JSON": {"say": ['{"name": "get_weather", ', '"arguments": {"city": ', "Oslo}}"]},
    "JSON that ends early": {"say": ['{"name": "get_weather", "arguments": {"city": "Os']},
    "arguments not by the schema": {"say": ['{"name": "get_weather", "arg', 'uments": {"city": 5}}']},
    "an engine's call not by the schema": {"calls": [["get_time", {"zone": "Mars"}]], "finish": "tool_calls"},
    "an engine's call of broken JSON": {"calls": [["get_weather", '{"city": ']], "finish": "tool_calls"},
    # A stream has its last brace alone, in a piece of 7 characters or less
    "an engine's call with a brace too many": {
        "calls": [["get_weather", '{"city":"Osl"}}']],
        "finish": "tool_calls",
    },
}


NOTHING_PASSED = set(list(WRONG)[:9])


# In a stream, text that begins as JSON is taken for the named function's arguments
BEGINS_AS_ARGUMENTS = {"a wrong tool"}


RIGHT: dict[str, dict[str, Any]] = {
    "the form that is asked for": GOOD,
    "thinking, and then a call": {
        "think": "Let me see.",
        "say": ['[{"name":"get_weather","arguments":{"city":"Oslo"}}]'],
    },
    "an engine's call": {"calls": [["get_weather", {"city": "Oslo"}]], "finish": "tool_calls"},
    "a call after text": {"say": ["On it."], "calls": [["get_weather", {"city": "Oslo"}]], "finish": "tool_calls"},
    "two calls": TWO,
    "two of an engine's calls": {"calls": [["get_weather", {"city": "A"}], ["get_weather", {"city": "B"}]]},
    "JSON in a fence": {"say": ["```json\n", '{"name": "get_weather", "arguments": {"city": "Oslo"}}', "\n```"]},
    "JSON after text": {"say": ["Here: ", '{"name": "get_weather", "arguments": {"city": "Oslo"}}']},
    "arguments before the name": {"say": ['{"arguments": {"city": "Oslo"}, ', '"name": "get_weather"}']},
}


def body(engine: str, mark: str, *tries: dict[str, Any], **said: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    return {"model": engine, "messages": messages, "tools": TOOLS, "mark": mark, "tries": list(tries)} | said


def joined(text: str) -> tuple[dict[str, Any], str | None]:
    """Return the message and the finish_reason that a stream's client assembles."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    finish = None
    for chunk in events(text):
        for choice in chunk["choices"] if chunk != "[DONE]" else ():
            finish = choice.get("finish_reason") or finish
            for name in ("content", "reasoning_content"):
                message[name] += choice["delta"].get(name) or ""
            for piece in choice["delta"].get("tool_calls") or ():
                if piece["index"] == len(message["tool_calls"]):
                    assert piece["function"]["name"]
                    assert piece["id"], "a call begins with its name and its id"
                    message["tool_calls"].append(piece)
                    continue
                call = message["tool_calls"][piece["index"]]
                call["function"]["arguments"] += piece["function"]["arguments"]
    return message, finish


def verdict(answer: httpx.Response, demand: dict[str, Any], *, stream: bool) -> str:
    """Return `called`, or `failed` for a proper error. Raises for anything else."""
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (502, "engine_broken_tool_call"), error
        return "failed"
    if stream and was_cut(answer):
        error = events(answer.text)[-1]["error"]
        assert error["code"] == "engine_broken_tool_call", error
        assert "[DONE]" not in answer.text
        return "failed"
    if stream:
        message, finish = joined(answer.text)
    else:
        (choice,) = answer.json()["choices"]
        message, finish = choice["message"], choice["finish_reason"]
    calls = message.get("tool_calls")
    assert calls, f"a silent miss: {answer.text}"
    assert finish in ("tool_calls", "stop")
    for call in calls:
        name = call["function"]["name"]
        assert name == "get_weather" or demand["tool_choice"] != NAMED
        jsonschema_rs.validate(SCHEMAS[name], json.loads(call["function"]["arguments"]))
    assert len({it["id"] for it in calls}) == len(calls)
    assert len(calls) == 1 or (demand["tool_choice"] == "required" and demand.get("parallel_tool_calls", True))
    return "called"
