"""The seven requests of Open Responses' compliance suite, on every engine's dialect, blocking and streamed.

The answers and each event are validated against the specification's own schemas, with the suite's further demands. The
package openresponses-types has the schemas of the OpenAPI document of 2026-04-24 as pydantic models. The requests have
the suite's form, in words of our own; a scripted engine makes the tool calls.
"""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openresponses_types as spec
import pydantic
import pytest

from tests.support.faces import events, script
from tests.support.fakes.dialects import ENGINES
from tests.support.processes import GatewayProcess, post

# A model for each type of event.
EVENTS: dict[str, type[pydantic.BaseModel]] = {
    kind.value: model
    for name, model in vars(spec).items()
    if name.endswith("StreamingEvent")
    for kind in model.model_fields["type"].annotation
}
CALLS = script(["says", {"calls": [["get_weather", ['{"location":', '"San Francisco, CA"}']]]}])
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Tell the weather of a place.",
    "parameters": {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]},
}
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJg"
    "gg=="
)


def said(role: str, content: Any) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": content}


LOOK = [{"type": "input_text", "text": "What is in this picture?"}, {"type": "input_image", "image_url": PIXEL}]
# By the suite's own names: the input, and the types of the output.
SUITE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "basic-response": ({"input": [said("user", "Greet me in three words.")]}, ["message"]),
    "streaming-response": ({"input": [said("user", "Count to five.")]}, ["message"]),
    "system-prompt": ({"input": [said("system", "You are a pirate."), said("user", "Greet me.")]}, ["message"]),
    "tool-calling": ({"input": [said("user", CALLS)], "tools": [WEATHER]}, ["function_call"]),
    "tool-calling-streaming": ({"input": [said("user", CALLS)], "tools": [WEATHER]}, ["function_call"]),
    "image-input": ({"input": [said("user", LOOK)]}, ["message"]),
    "multi-turn": (
        {"input": [said("user", "I am Alice."), said("assistant", "Hello Alice!"), said("user", "Who am I?")]},
        ["message"],
    ),
}
ARGUMENTS = "response.function_call_arguments"


@pytest.fixture(scope="module")
def http(before_all: GatewayProcess) -> Iterator[httpx.Client]:
    with before_all.client() as client:
        yield client


def check(model: type[pydantic.BaseModel], value: Any) -> None:
    """Validate a value as JSON, without conversions."""
    model.model_validate_json(json.dumps(value), strict=True)


def streamed(http: httpx.Client, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the events of a stream, all of which are valid and in their order."""
    found = events(post(http, "/v1/responses", json=body | {"stream": True}).text)
    assert found
    for it in found:
        check(EVENTS[it["type"]], it)
    assert [it["sequence_number"] for it in found] == list(range(len(found)))
    return found


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", SUITE)
def test_an_answer_is_valid_and_complete_blocking_and_streamed(http: httpx.Client, engine: str, name: str) -> None:
    asked, output = SUITE[name]
    body = {"model": engine, **asked}
    check(spec.CreateResponseBody, body)
    answer = http.post("/v1/responses", json=body | {"stream": False})
    assert answer.status_code == 200, answer.text
    found = streamed(http, body)
    for response in (answer.json(), found[-1]["response"]):
        check(spec.ResponseResource, response)
        assert (response["status"], [it["type"] for it in response["output"]]) == ("completed", output)
    kinds = [(it["type"], it.get("item", {}).get("type")) for it in found]
    assert ("response.output_item.added", output[0]) in kinds
    assert ("response.output_item.done", output[0]) in kinds
    if output == ["function_call"]:
        pieces = [it["delta"] for it in found if it["type"] == f"{ARGUMENTS}.delta"]
        (whole,) = [it["arguments"] for it in found if it["type"] == f"{ARGUMENTS}.done"]
        assert "".join(pieces) == whole == '{"location":"San Francisco, CA"}'


@pytest.mark.parametrize("engine", ENGINES)
def test_an_answer_that_is_cut_or_fails_or_reasons_is_valid_too(http: httpx.Client, engine: str) -> None:
    cut = script(["says", {"pieces": ["one"], "finish": "length"}])
    assert streamed(http, {"model": engine, "input": cut})[-1]["type"] == "response.incomplete"
    broken = streamed(http, {"model": engine, "input": script(["role"], ["token", "one"], ["close"])})
    assert [it["type"] for it in broken[-2:]] == ["error", "response.failed"]
    thinks = script(["says", {"thinks": ["Hm."], "pieces": ["one"]}])
    reasoned = streamed(http, {"model": engine, "input": thinks, "reasoning": {"summary": "auto"}})
    assert [it["type"] for it in reasoned[-1]["response"]["output"]] == ["reasoning", "message"]
    plain = events(post(http, "/v1/responses", json={"model": engine, "input": thinks, "stream": True}).text)
    # OpenAI's name of these two, and the only one that its clients know. The specification's is without "text".
    assert {it["type"] for it in plain} - EVENTS.keys() == {f"response.reasoning_text.{it}" for it in ("delta", "done")}


def test_the_schemas_find_a_mistake(http: httpx.Client) -> None:
    assert spec.__spec_version__ == "2026-04-24"
    response = http.post("/v1/responses", json={"model": "vllm", "input": "Hello"}).json()
    for wrong in ({"usage": "3"}, {"created_at": "1"}, {"output": [{"type": "message"}]}, {"object": "chat"}):
        with pytest.raises(pydantic.ValidationError):
            check(spec.ResponseResource, response | wrong)
    for name in ("usage", "tools", "completed_at", "service_tier"):
        with pytest.raises(pydantic.ValidationError, match=name):
            check(spec.ResponseResource, {field: it for field, it in response.items() if field != name})
