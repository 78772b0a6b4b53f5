"""Nothing that a request says is dropped in silence: each parameter of OpenAI's, on each engine, is taken, translated,
refused, or reported. What an engine takes is said by the fake of its dialect, whose table is not the gateway's."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParameters
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParameters
from openai.types.embedding_create_params import EmbeddingCreateParams

from gateway.exchange import Kind
from gateway.parameters import TABLES
from tests.flows.conftest import ENGINES
from tests.processes import MESSAGES, ROOT, FakeEngine, GatewayProcess, events, running_gateway

STRICT = {"x-stack-strict": "true"}
PATHS: dict[Kind, str] = {
    "chat": "/v1/chat/completions",
    "completion": "/v1/completions",
    "embedding": "/v1/embeddings",
}
LEAST: dict[Kind, dict[str, Any]] = {
    "chat": {"messages": MESSAGES},
    "completion": {"prompt": "One, two,"},
    "embedding": {"input": "one"},
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
NAMED = {"type": "function", "function": {"name": "weather"}}

# A value of each that is not its default.
SAMPLES: dict[str, Any] = {
    "messages": MESSAGES,
    "prompt": "One, two,",
    "input": "one",
    "stream": True,
    "stream_options": {"include_usage": True},
    "max_tokens": 5,
    "max_completion_tokens": 5,
    "temperature": 0.3,
    "top_p": 0.5,
    "n": 2,
    "best_of": 2,
    "stop": ["x"],
    "seed": 7,
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "logit_bias": {"50256": -100},
    "logprobs": True,
    "top_logprobs": 2,
    "response_format": {"type": "json_object"},
    "tools": [TOOL],
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "reasoning_effort": "low",
    "verbosity": "low",
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy", "format": "wav"},
    "prediction": {"type": "content", "content": "one"},
    "web_search_options": {},
    "functions": [TOOL["function"]],
    "function_call": {"name": "weather"},
    "user": "someone",
    "safety_identifier": "someone",
    "prompt_cache_key": "key",
    "prompt_cache_retention": "24h",
    "prompt_cache_options": {"mode": "explicit"},
    "service_tier": "flex",
    "store": True,
    "metadata": {"a": "b"},
    "moderation": {"model": "omni-moderation-latest"},
    "suffix": "four",
    "echo": True,
    "encoding_format": "base64",
    "dimensions": 8,
}
CASES = [(engine, kind, name) for engine in ENGINES for kind, table in TABLES.items() for name in table]


@pytest.fixture(scope="module")
def http(before_all: GatewayProcess) -> Iterator[httpx.Client]:
    with before_all.client() as client:
        yield client


def ask(
    http: httpx.Client, kind: Kind, engine: str, headers: dict[str, str] | None = None, **said: Any
) -> httpx.Response:
    return http.post(PATHS[kind], json=LEAST[kind] | {"model": engine} | said, headers=headers)


def reported(answer: httpx.Response) -> list[str]:
    header = answer.headers.get("x-stack-ignored-params")
    return header.split(",") if header else []


@pytest.mark.parametrize(("engine", "kind", "name"), CASES)
def test_each_parameter_is_taken_translated_refused_or_reported(
    http: httpx.Client, fakes: dict[str, FakeEngine], engine: str, kind: Kind, name: str
) -> None:
    fake, path = fakes[engine], PATHS[kind]
    said = {name: SAMPLES.get(name, engine)} | ({"stream": True} if name == "stream_options" else {})
    fake.set()
    answer = ask(http, kind, engine, **said)
    (seen,) = fake.asked(path)
    use = TABLES[kind][name][ENGINES.index(engine)]
    if use == "taken":
        assert name in seen["took"]
        assert name == "model" or seen["body"][name] == said[name]
    elif use == "as max_tokens":
        assert "max_tokens" in seen["took"]
        assert (seen["body"]["max_tokens"], name in seen["body"]) == (said[name], False)
    elif use == "refused":
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
    elif use == "ignored":
        assert name not in seen["took"]
    dropped = use == "ignored"
    assert reported(answer) == ([name] if dropped else [])
    fake.set()
    strict = ask(http, kind, engine, STRICT, **said)
    if dropped:
        error = strict.json()["error"]
        assert (strict.status_code, error["type"], error["param"]) == (400, "invalid_request_error", name)
        assert name in error["message"]
        assert not fake.asked(path)
    else:
        assert strict.status_code == answer.status_code
        assert len(fake.asked(path)) == 1


@pytest.mark.parametrize(("engine", "dropped"), [("ollama", True), ("vllm", False), ("llamacpp", True)])
def test_a_tool_that_is_named_counts_too(
    http: httpx.Client, fakes: dict[str, FakeEngine], engine: str, dropped: bool
) -> None:
    fakes[engine].set()
    answer = ask(http, "chat", engine, tools=[TOOL], tool_choice=NAMED)
    (seen,) = fakes[engine].asked(PATHS["chat"])
    assert ("tool_choice" not in seen["took"]) == dropped
    assert reported(answer) == (["tool_choice"] if dropped else [])


@pytest.mark.parametrize("engine", ENGINES)
def test_what_says_nothing_is_not_missed(http: httpx.Client, engine: str) -> None:
    """A parameter at its default, or null, changes nothing by being dropped."""
    defaults = {
        "n": 1,
        "logit_bias": {},
        "tools": [TOOL],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "modalities": ["text"],
        "service_tier": "auto",
        "store": False,
        "metadata": {},
        "verbosity": "medium",
        "user": None,
        "prediction": None,
        "max_completion_tokens": None,
    }
    answer = ask(http, "chat", engine, STRICT, **defaults)
    assert (answer.status_code, reported(answer)) == (200, [])


@pytest.mark.parametrize("engine", ENGINES)
def test_the_newer_limit_wins_over_the_older(http: httpx.Client, fakes: dict[str, FakeEngine], engine: str) -> None:
    """As it does in vLLM and in llama.cpp (tests/stack)."""
    fakes[engine].set()
    assert ask(http, "chat", engine, max_tokens=9, max_completion_tokens=5).status_code == 200
    (seen,) = fakes[engine].asked(PATHS["chat"])
    assert seen["body"].get("max_completion_tokens", seen["body"]["max_tokens"]) == 5


def test_several_are_named_in_order_on_streams_too_and_for_browsers(http: httpx.Client) -> None:
    origin = {"origin": "https://app.example"}
    said = {"user": "x", "n": 2, "logit_bias": {"1": 1}, "store": True}
    answer = ask(http, "chat", "ollama", origin, stream=True, **said)
    assert events(answer.text)[-1] == "[DONE]"
    assert answer.headers["x-stack-ignored-params"] == "logit_bias,n,store,user"
    exposed = set(answer.headers["access-control-expose-headers"].split(", "))
    assert {"x-stack-arm", "x-stack-ignored-params", "x-stack-resumes"} <= exposed


def test_an_engines_own_parameters_pass(http: httpx.Client, fakes: dict[str, FakeEngine]) -> None:
    fakes["vllm"].set()
    answer = ask(http, "chat", "vllm", STRICT, top_k=5, chat_template_kwargs={"enable_thinking": False})
    (seen,) = fakes["vllm"].asked(PATHS["chat"])
    assert (answer.status_code, reported(answer)) == (200, [])
    assert (seen["body"]["top_k"], seen["body"]["chat_template_kwargs"]) == (5, {"enable_thinking": False})


def test_it_is_about_the_engine_that_answered(http: httpx.Client) -> None:
    assert reported(ask(http, "chat", "dead-vllm-then-ollama", n=2)) == ["n"]
    assert reported(ask(http, "chat", "dead-ollama-then-vllm", n=2)) == []
    assert reported(ask(http, "chat", "dead-ollama-then-vllm", n=2, user="x")) == ["user"]


def test_strict_mode_leaves_out_the_engines_that_would_ignore(http: httpx.Client, fakes: dict[str, FakeEngine]) -> None:
    """Where another of the model's engines takes it; the first one is well, and would answer."""
    for fake in fakes.values():
        fake.set()
    assert ask(http, "chat", "ollama-then-vllm", STRICT, n=2).status_code == 200
    assert (len(fakes["ollama"].asked(PATHS["chat"])), len(fakes["vllm"].asked(PATHS["chat"]))) == (0, 1)
    assert reported(ask(http, "chat", "ollama-then-vllm", n=2)) == ["n"]
    refused = ask(http, "chat", "ollama-then-vllm", STRICT, n=2, user="x")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unsupported_parameter")


def test_a_header_that_is_neither_true_nor_false_is_refused(http: httpx.Client) -> None:
    answer = ask(http, "chat", "vllm", {"x-stack-strict": "yes"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-stack-strict")


def test_strict_by_setting_and_the_request_has_the_last_word(fakes: dict[str, FakeEngine], tmp_path: Path) -> None:
    settings = {"LLM_BACKEND": "ollama", "STACK_STRICT_PARAMS": "true"}
    with running_gateway(tmp_path / "log", fakes["ollama"].url, **settings) as gateway, gateway.client() as http:
        refused = ask(http, "chat", "fake-model", n=2)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
        assert reported(ask(http, "chat", "fake-model", {"x-stack-strict": "False"}, n=2)) == ["n"]


def test_the_tables_are_complete() -> None:
    """The official client knows every parameter there is; `stream` it knows elsewhere."""
    assert TABLES["chat"].keys() == ChatParameters.__annotations__.keys() | {"stream"}
    assert TABLES["completion"].keys() == CompletionParameters.__annotations__.keys() | {"stream"}
    assert TABLES["embedding"].keys() == EmbeddingCreateParams.__annotations__.keys()


def test_the_page_says_the_same() -> None:
    page = (ROOT / "docs/parameters.md").read_text()
    for kind, table in TABLES.items():
        section = page.partition(f"\n## `{PATHS[kind]}`\n")[2].partition("\n## ")[0]
        rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \|$", section, re.MULTILINE)
        assert {name: uses for name, *uses in rows} == {name: list(uses) for name, uses in table.items()}
