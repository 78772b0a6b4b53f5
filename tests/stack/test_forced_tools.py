"""A demanded tool call comes from a real model that would not make one by itself, over each of the three APIs. `make
soak` asks for 50 of them."""

import json
import os
from collections.abc import Iterator
from typing import Any

import anthropic
import jsonschema_rs
import openai
import pytest

from tests.support.processes import KEY
from tests.support.stack import Stack

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


Calls = list[tuple[str, Any]]


@pytest.fixture
def claude(stack: Stack) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=stack.url, api_key=KEY, max_retries=0, timeout=200) as client:
        yield client


@pytest.mark.parametrize("number", range(CALLS))
def test_a_real_model_makes_the_call_that_is_demanded(
    client: openai.OpenAI, claude: anthropic.Anthropic, number: int
) -> None:
    """24 in a row have every demand over every API, blocking and streamed."""
    demand, stream = DEMANDS[number % len(DEMANDS)], bool(number // len(DEMANDS) % 2)
    question = ASKED[number % len(ASKED) - 1]
    match number % 3:
        case 0:
            calls = over_chat(client, question, demand, number, stream=stream)
        case 1:
            calls = over_responses(client, question, demand, number, stream=stream)
        case _:
            calls = over_messages(claude, question, demand, number, stream=stream)
    assert calls
    for name, arguments in calls:
        jsonschema_rs.validate(SCHEMAS[name], arguments)
    if demand["tool_choice"] != "required":
        assert [name for name, _ in calls] == [demand["tool_choice"]["function"]["name"]]
    assert len(calls) == 1 or demand == DEMANDS[0]


def over_chat(client: openai.OpenAI, question: str, demand: dict[str, Any], seed: int, *, stream: bool) -> Calls:
    asked: dict[str, Any] = {
        "model": MODEL,
        "tools": TOOLS,
        "temperature": 0.8,
        "seed": seed,
        "max_tokens": 600,
        **demand,
    }
    asked["messages"] = [{"role": "user", "content": question}]
    if stream:
        with client.chat.completions.stream(**asked) as answer:
            completion: Any = answer.get_final_completion()
    else:
        completion = client.chat.completions.create(**asked)
    (choice,) = completion.choices
    assert choice.finish_reason == "tool_calls"
    assert not choice.message.content
    return [(it.function.name, json.loads(it.function.arguments)) for it in choice.message.tool_calls]


def over_responses(client: openai.OpenAI, question: str, demand: dict[str, Any], seed: int, *, stream: bool) -> Calls:
    asked: dict[str, Any] = {"model": MODEL, "input": question, "temperature": 0.8, "max_output_tokens": 600, **demand}
    asked["tools"] = [{"type": "function", "strict": False, **it["function"]} for it in TOOLS]
    asked["extra_body"] = {"seed": seed}
    if demand["tool_choice"] != "required":
        asked["tool_choice"] = {"type": "function", "name": demand["tool_choice"]["function"]["name"]}
    if stream:
        with client.responses.stream(**asked) as answer:
            response: Any = answer.get_final_response()
    else:
        response = client.responses.create(**asked)
    assert response.status == "completed"
    assert {it.type for it in response.output} == {"function_call"}
    return [(it.name, json.loads(it.arguments)) for it in response.output]


def over_messages(
    claude: anthropic.Anthropic, question: str, demand: dict[str, Any], seed: int, *, stream: bool
) -> Calls:
    choice: dict[str, Any] = {"type": "any"}
    if demand["tool_choice"] != "required":
        choice = {"type": "tool", "name": demand["tool_choice"]["function"]["name"]}
    if demand.get("parallel_tool_calls") is False:
        choice["disable_parallel_tool_use"] = True
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 600, "tool_choice": choice}
    asked["messages"] = [{"role": "user", "content": question}]
    asked["tools"] = [{"name": name, "input_schema": it} for name, it in SCHEMAS.items()]
    asked["extra_body"] = {"seed": seed, "temperature": 0.8}
    if stream:
        with claude.messages.stream(**asked) as answer:
            message: Any = answer.get_final_message()
    else:
        message = claude.messages.create(**asked)
    assert message.stop_reason == "tool_use"
    assert {it.type for it in message.content} == {"tool_use"}
    return [(it.name, it.input) for it in message.content]
