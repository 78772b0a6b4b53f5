"""Bodies: a field that could harm an engine, or that can be read in two ways, is refused by name. Everything else
passes."""

import json
from typing import Any

import pytest

from gateway.api import guard
from tests.support.attacks import CHAT, reaches_the_engine
from tests.support.bodies import BODIES
from tests.support.processes import MESSAGES, FakeEngine, GatewayProcess


@pytest.mark.parametrize("name", BODIES)
def test_refused_bodies_name_the_field(gateway: GatewayProcess, name: str) -> None:
    body, param = BODIES[name]
    with gateway.client() as client:
        got = client.post(CHAT, content=body)
    assert got.status_code == 400, got.text
    assert got.json()["error"]["param"] == param
    assert param is None or param in got.json()["error"]["message"]


def test_every_field_that_steers_an_engine_is_refused(gateway: GatewayProcess) -> None:
    with gateway.client() as client:
        for field in set().union(*guard.CONTROL_FIELDS.values()):
            got = client.post(CHAT, json={"messages": MESSAGES, field: "something"})
            assert (got.status_code, got.json()["error"]["param"]) == (400, field)


@reaches_the_engine
def test_a_control_field_at_its_default_passes_and_is_left_out(
    gateway: GatewayProcess, engine: FakeEngine, mark: str
) -> None:
    """A control field at its default, also as a float, or null. And 1 is not true, nor 0 false."""
    fields = {name: values for fields in guard.CONTROL_FIELDS.values() for name, values in fields.items()}
    plain = {"messages": MESSAGES, "user": mark, "model": "fake-model"}
    nulls = dict.fromkeys(fields)
    defaults = {name: values[0] for name, values in fields.items() if values}
    floats = {name: float(value) for name, value in defaults.items() if type(value) is int}
    with gateway.client() as client:
        for said in (nulls, defaults, floats):
            got = client.post(CHAT, json=plain | said)
            assert got.status_code == 200, got.text
        for said in ({"cache_prompt": 1}, {"priority": False}, {"id_slot": -1.5}):
            got = client.post(CHAT, json=plain | said)
            assert (got.status_code, got.json()["error"]["param"]) == (400, next(iter(said)))
    assert [it["body"] for it in engine.seen(mark)] == [plain] * 3


@reaches_the_engine
def test_a_whole_number_may_be_written_as_a_float(gateway: GatewayProcess, engine: FakeEngine, mark: str) -> None:
    said = {"n": 1.0, "max_tokens": 6.0, "seed": 7e0, "top_logprobs": 2.0}
    with gateway.client() as client:
        assert client.post(CHAT, json={"messages": MESSAGES, "user": mark} | said).status_code == 200
    body = engine.wait_seen(mark)["body"]
    assert [(type(body[name]), body[name]) for name in said] == [(int, value) for value in said.values()]


@reaches_the_engine
def test_the_callers_own_content_passes_unchanged(gateway: GatewayProcess, engine: FakeEngine, mark: str) -> None:
    """Names in any capitals, whole numbers of any size: in schemas, in a tool's arguments, in metadata."""
    schema = {
        "type": "object",
        "properties": {"Type": {"type": "integer", "maximum": 2**70}, "Model": {"enum": [-(2**64), 2**64 - 1]}},
        "Required": ["Type"],
        "_meta": {"messages": 1, "Messages": 2},
    }
    body = {
        "messages": [{"role": "assistant", "content": "x", "tool_calls": [{"function": {"arguments": '{"N": 1}'}}]}],
        "tools": [{"type": "function", "function": {"name": "Name", "parameters": schema}}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        "metadata": {"Model": "x", "_x": "y", "big": 10**30},
        "logit_bias": {"N": 1},
        "chat_template_kwargs": {"Enable_Thinking": False, "_x": 10**40},
        "x-Custom": {"Messages": 1},
        "user": mark,
        "model": "fake-model",
    }
    with gateway.client() as client:
        for content in (json.dumps(body), json.dumps(body, indent=1)):
            got = client.post(CHAT, content=content)
            assert got.status_code == 200, got.text
    assert [it["body"] for it in engine.seen(mark)] == [body, body]


@pytest.mark.parametrize(("path", "field"), [("/v1/completions", "prompt"), ("/v1/embeddings", "input")])
def test_lists_of_prompts_are_bounded(gateway: GatewayProcess, path: str, field: str) -> None:
    for many in (["x"] * 2049, [1] + ["x"] * 2048, [[1]] * 90_000):
        with gateway.client() as client:
            got = client.post(path, json={field: many})
        assert (got.status_code, got.json()["error"]["param"]) == (400, field)


@reaches_the_engine
@pytest.mark.parametrize(
    "body",
    [
        {"messages": MESSAGES, "n": 16, "best_of": None, "bad_words": ["x"], "top_k": 5, "grammar": "root ::= x"},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]}
            ]
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "//uQ", "format": "mp3"}}]}
            ]
        },
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"options": 1, "priority": 2}]}]},
        {"messages": MESSAGES, "metadata": {"priority": "high", "options": "x"}, "chat_template_kwargs": {"a": False}},
        {"prompt": list(range(5000))},
        {"prompt": ["x"] * 2048},
        {"messages": MESSAGES, "seed": 2**63},
    ],
)
def test_a_valid_body_passes_unchanged(
    gateway: GatewayProcess, engine: FakeEngine, mark: str, body: dict[str, Any]
) -> None:
    body = body | {"user": mark, "model": "fake-model"}
    for content in (json.dumps(body), json.dumps(body, indent=2)):
        with gateway.client() as client:
            got = client.post(CHAT if "messages" in body else "/v1/completions", content=content)
        assert got.status_code == 200, got.text
        assert engine.wait_seen(mark)["body"] == body
