"""What a caller is told of an engine's error: all that the real engines were seen to give (tests/recordings), put
into the mouth of a fake one, through the front door."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import MESSAGES, FakeEngine, GatewayProcess

RECORDINGS = Path(__file__).parent.parent / "recordings"
ENGINES = ("ollama", "vllm", "llamacpp")
# Of the engine's or its operator's own affairs, or of a language that callers don't speak.
PRIVATE = re.compile(
    r"registry\.example|json\.exception|body\.|Go struct|mmproj|\(parameter=|tools = |'loc'|Valid aliases|--"
)

# What isn't the caller's mistake, by its name in the recordings: the status and the code.
OTHERS: dict[str, tuple[int, str]] = {
    "its runner died": (502, "engine_failed"),
    "its core died": (502, "engine_failed"),
    "a Host header with another name": (502, "engine_unauthorized"),
    "mq2-par1-ollama-cold": (503, "server_is_overloaded"),
}
NO_ENDPOINT = ({"detail": "Not Found"}, "File Not Found", "does not support chat", "does not support generate")
# The field that is named, where an engine says which it is, in its way or by a word.
PARAMS = {
    ("llamacpp", "image"): "messages",
    ("llamacpp", "part_text_number"): "messages",
    ("llamacpp", "role_missing"): "messages",
    ("llamacpp", "tools_type"): "tools",
    ("llamacpp", "json_schema_grammar"): "grammar",
    ("llamacpp", "reasoning_format"): "reasoning_format",
    ("llamacpp", "temperature_string"): "temperature",
    ("llamacpp", "dry_last_bad"): "dry_penalty_last_n",
    ("llamacpp", "the chat template's own refusal"): "messages",
    ("ollama", "json_schema_bad"): "response_format",
    ("ollama", "json_schema_string"): "response_format",
    ("ollama", "seed_huge"): "seed",
    ("ollama", "max_tokens_string"): "max_tokens",
    ("ollama", "stop_number_list"): "stop",
    ("ollama", "tools_string"): "tools",
    ("ollama", "smolnat-flat"): "tools",
    ("ollama", "effort_high"): "reasoning_effort",
    ("ollama", "suffix"): "suffix",
    ("ollama", "empty"): "input",
    ("vllm", "temperature_string"): "temperature",
    ("vllm", "tools_custom"): "tools[0].type",
    ("vllm", "seed_huge"): "seed",
    ("vllm", "freq_pen_3"): "frequency_penalty",
    ("vllm", "max_tokens_0"): "messages",  # as it says of a prompt that leaves room for nothing
    ("vllm", "stop_empty"): "stop",
    ("vllm", "image_on_text_model"): "messages",
}


def recorded(engine: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((RECORDINGS / engine / "errors.json").read_text())
    return found


def asked(gateway: GatewayProcess, engine: str, status: int, answer: Any, mark: str, **headers: str) -> Any:
    """What the gateway makes of that answer of the engine's."""
    said = [["event", json.loads(answer.removeprefix("data:").partition("\n")[0])]] if status == 200 else None
    script = said or [["json", [status, answer]]]
    body = {"model": engine, "messages": MESSAGES, "stream": True, "user": mark, "script": script}
    with gateway.client() as client:
        return client.post("/v1/chat/completions", json=body, headers=headers)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_recorded_error_is_told_as_whose_fault_it_is(
    before_all: GatewayProcess, fakes: dict[str, FakeEngine], engine: str
) -> None:
    wrong = []
    for number, row in enumerate(recorded(engine)):
        mark = f"recorded-{engine}-{number}"
        answer = asked(before_all, engine, row["status"], row["answer"], mark, **{"x-stack-queue-timeout": "0"})
        error, name = answer.json()["error"], row["name"]
        busy = row["status"] in (200, 503)
        status, code = OTHERS.get(name, (503, "server_is_overloaded") if busy else (400, error["code"]))
        if row["status"] == 501 or any(str(it) in str(row["answer"]) for it in NO_ENDPOINT):
            code = "unsupported"
        elif row["status"] in (403, 404) and name not in OTHERS:
            status, code = 404, "model_not_found"
        param = PARAMS.get((engine, name), error["param"])
        if (answer.status_code, error["code"], error["param"]) != (status, code, param):
            wrong.append((name, row["status"], answer.status_code, error))
        if PRIVATE.search(error["message"]):
            wrong.append((name, "private", error["message"]))
        if status == 400 and len(fakes[engine].seen(mark)) != 1:
            wrong.append((name, "asked", len(fakes[engine].seen(mark))))
    assert not wrong


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("answer", [{"error": {"message": "CUDA out of memory at 0x7f", "type": "x"}}, {}, "<html>"])
def test_an_unknown_failure_stays_the_engines_own(before_all: GatewayProcess, engine: str, answer: Any) -> None:
    found = asked(before_all, engine, 500, answer, "unknown-failure")
    assert (found.status_code, found.json()["error"]["code"]) == (502, "engine_error")
    assert "CUDA" not in found.text


@pytest.mark.parametrize(
    ("engine", "status", "answer", "says"),
    [
        ("llamacpp", 500, "image input is not supported - hint: provide the mmproj", "cannot read images"),
        ("llamacpp", 400, "Field 'temperature': [json.exception.type_error.302] type must be number", "must be number"),
        (
            "ollama",
            400,
            "json: cannot unmarshal string into Go struct field X.max_tokens of type int",
            "a whole number",
        ),
        (
            "ollama",
            400,
            "json: cannot unmarshal number 9223372036854775808 into Go struct field X.seed of type int",
            "'seed' must be a whole number of at most 64 bits.",
        ),
        (
            "ollama",
            400,
            "Field 'json_schema': \"json_schema\": JSON schema conversion failed:\nPattern must start with '^'",
            "'response_format': \"json_schema\": JSON schema conversion failed:\nPattern must start with '^'",
        ),
        ("vllm", 400, "1 validation error:\n  {'type': 'x', 'loc': 'body.seed', 'msg': 'Too \\'big\\''}", "Too"),
    ],
)
def test_the_reason_is_told_in_plain_words(
    before_all: GatewayProcess, engine: str, status: int, answer: str, says: str
) -> None:
    found = asked(before_all, engine, status, {"error": {"message": answer}}, "plain-words")
    assert found.status_code == 400
    assert says in found.json()["error"]["message"]


@pytest.mark.parametrize(
    "text",
    ["a/", " ", "(parameter=a, value=", "aa.", "While executing ", "json: cannot unmarshal x", "'loc': 'body.", "(1"],
)
def test_a_callers_text_in_an_engines_error_holds_up_nobody(before_all: GatewayProcess, text: str) -> None:
    told = f"Failed to parse tools: Unsupported tool type: {text * (1_000_000 // len(text))}"
    with ThreadPoolExecutor(1) as pool, before_all.client() as other:
        asking = pool.submit(asked, before_all, "llamacpp", 500, {"error": {"message": told}}, "echoed")
        assert other.get("/livez").status_code == 200
        answer = asking.result()
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "tools")
    assert error["message"].startswith("Failed to parse tools: Unsupported tool type:")
    assert len(error["message"]) < 2100


def test_a_field_that_an_engine_names_at_the_end_of_a_long_message_is_told(before_all: GatewayProcess) -> None:
    told = f"Too large. (parameter=seed, value={'9' * 500_000})"
    error = asked(before_all, "vllm", 400, {"error": {"message": told}}, "named-last").json()["error"]
    assert (error["message"], error["param"]) == ("Too large.", "seed")


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("registry.example/library/m:1b does not support tools", "m:1b does not support tools"),
        ('"registry.example/a/b/m" does not support thinking', '"m" does not support thinking'),
        ("org/m does not support tools", "org/m does not support tools"),
    ],
)
def test_a_models_registry_is_not_told(before_all: GatewayProcess, answer: str, says: str) -> None:
    found = asked(before_all, "ollama", 400, {"error": {"message": answer}}, "registry")
    assert found.json()["error"]["message"] == says
