"""A demanded tool call comes from a real model that would not make one by itself. `make soak` asks for 50 of them."""

import json
import os
from typing import Any

import jsonschema_rs
import openai
import pytest

CALLS = int(os.environ.get("FORCED_CALLS", "10"))
MODEL = "SmolLM2-135M-Instruct"
SCHEMAS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 20, "pattern": "^[A-Z][a-z]+$"},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
            "unit": {"enum": ["celsius", "fahrenheit"]},
        },
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
    "plan_route": {
        "type": "object",
        "properties": {"stops": {"type": "array", "items": {"$ref": "#/$defs/stop"}, "minItems": 1, "maxItems": 2}},
        "required": ["stops"],
        "$defs": {"stop": {"type": "object", "properties": {"at": {"enum": ["Oslo", "Rome"]}}, "required": ["at"]}},
    },
}
TOOLS: list[Any] = [{"type": "function", "function": {"name": name, "parameters": it}} for name, it in SCHEMAS.items()]
DEMANDS: list[dict[str, Any]] = [
    {"tool_choice": "required"},
    {"tool_choice": "required", "parallel_tool_calls": False},
    {"tool_choice": {"type": "function", "function": {"name": "get_weather"}}},
    {"tool_choice": {"type": "function", "function": {"name": "plan_route"}}},
]
ASKED = ["What is the weather in Paris?", "Hello! Tell me a story about a fox.", "Take me to Rome by Oslo.", "2+2?"]


@pytest.mark.parametrize("number", range(CALLS))
def test_a_real_model_makes_the_call_that_is_demanded(client: openai.OpenAI, number: int) -> None:
    demand, stream = DEMANDS[number % len(DEMANDS)], bool(number // len(DEMANDS) % 2)
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": ASKED[number % len(ASKED) - 1]}],
        "tools": TOOLS,
        "temperature": 0.8,
        "seed": number,
        "max_tokens": 600,
        **demand,
    }
    if stream:
        with client.chat.completions.stream(**asked) as answer:
            completion: Any = answer.get_final_completion()
    else:
        completion = client.chat.completions.create(**asked)
    (choice,) = completion.choices
    calls = choice.message.tool_calls
    assert calls, choice
    assert choice.finish_reason == "tool_calls"
    assert not choice.message.content
    for call in calls:
        jsonschema_rs.validate(SCHEMAS[call.function.name], json.loads(call.function.arguments))
    if demand["tool_choice"] != "required":
        assert [it.function.name for it in calls] == [demand["tool_choice"]["function"]["name"]]
    assert len(calls) == 1 or demand == DEMANDS[0]
