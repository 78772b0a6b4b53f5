"""Nothing that a request says is dropped in silence: each parameter of OpenAI's, on each engine, is taken, translated,
refused, or reported. What an engine takes is said by the fake of its dialect, whose table is not the gateway's."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai.types.audio.speech_create_params import SpeechCreateParams
from openai.types.audio.transcription_create_params import TranscriptionCreateParamsBase as TranscriptionParameters
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParameters
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParameters
from openai.types.embedding_create_params import EmbeddingCreateParams

from gateway.dialects import DIALECTS
from gateway.endpoints import Kind
from gateway.upstream.messages import PARTS, REASONING, ROLES
from gateway.upstream.parameters import EXTRAS, TABLES
from tests.support.fakes.dialects import ENGINES
from tests.support.parameters import NAMED, PATHS, STRICT, TOOL, ask, reported, sample
from tests.support.processes import ROOT, FakeEngine, GatewayProcess, events, running_gateway

BESIDE: dict[str, dict[str, Any]] = {"stream_options": {"stream": True}, "tool_choice": {"tools": [TOOL]}}
COUNTED = {"vllm": {"continuous_usage_stats": True}}  # options of a stream that the gateway asks for, whoever calls
BOTH = {kind: TABLES[kind] | EXTRAS[kind] for kind in TABLES}
CASES = [
    (engine, kind, name)
    for engine in ENGINES
    for kind, table in BOTH.items()
    for name in table
    if DIALECTS[engine].endpoints[kind] is not None
]


@pytest.fixture(scope="module")
def http(before_all: GatewayProcess) -> Iterator[httpx.Client]:
    with before_all.client() as client:
        yield client


@pytest.mark.parametrize(("engine", "kind", "name"), CASES)
def test_each_parameter_is_taken_translated_refused_or_reported(
    http: httpx.Client, fakes: dict[str, FakeEngine], engine: str, kind: Kind, name: str
) -> None:
    fake, path = fakes[engine], PATHS[kind]
    said = {name: engine if name == "model" else sample(kind, name)} | BESIDE.get(name, {})
    fake.set()
    answer = ask(http, kind, engine, **said)
    first, *more = fake.asked(path)
    seen = first
    use = BOTH[kind][name][ENGINES.index(engine)]
    if use == "taken":
        assert name in seen["took"]
        sent = said[name] | COUNTED.get(engine, {}) if name == "stream_options" else said[name]
        assert name == "model" or seen["body"][name] == sent
    elif use == "as max_tokens":
        assert "max_tokens" in seen["took"]
        assert (seen["body"]["max_tokens"], name in seen["body"]) == (said[name], False)
    elif use == "refused":
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
    elif use == "by the gateway":
        assert name not in seen["took"], "see test_forced_tools and test_n"
    dropped = use == "ignored"
    if dropped:
        assert name not in seen["took"]
    assert reported(answer) == ([name] if dropped else []), answer.text
    fake.set()
    strict = ask(http, kind, engine, STRICT, **said)
    if dropped:
        error = strict.json()["error"]
        assert (strict.status_code, error["type"], error["param"]) == (400, "invalid_request_error", name)
        assert name in error["message"]
        assert not fake.asked(path)
    else:
        assert strict.status_code == answer.status_code
        assert len(fake.asked(path)) == 1 + len(more)


@pytest.mark.parametrize(("engine", "taken"), [("ollama", False), ("vllm", True), ("llamacpp", False)])
def test_a_tool_that_is_named_counts_too(
    http: httpx.Client, fakes: dict[str, FakeEngine], engine: str, taken: bool
) -> None:
    fakes[engine].set()
    answer = ask(http, "chat", engine, tools=[TOOL], tool_choice=NAMED)
    first, *_ = fakes[engine].asked(PATHS["chat"])
    assert ("tool_choice" in first["took"]) == taken
    assert reported(answer) == []


@pytest.mark.parametrize("engine", ENGINES)
def test_a_parameter_at_its_default_is_not_named_as_ignored(http: httpx.Client, engine: str) -> None:
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


def test_several_are_named_in_order_on_streams_too_and_for_browsers(http: httpx.Client) -> None:
    origin = {"origin": "https://app.example"}
    said = {"user": "x", "logit_bias": {"1": 1}, "store": True}
    answer = ask(http, "chat", "ollama", origin, stream=True, **said)
    assert events(answer.text)[-1] == "[DONE]"
    assert answer.headers["x-stack-ignored-params"] == "logit_bias,store,user"
    exposed = set(answer.headers["access-control-expose-headers"].split(", "))
    assert {"x-stack-arm", "x-stack-ignored-params", "x-stack-resumes", "idempotent-replayed"} <= exposed


def test_an_engines_own_parameters_pass(http: httpx.Client, fakes: dict[str, FakeEngine]) -> None:
    fakes["vllm"].set()
    answer = ask(http, "chat", "vllm", STRICT, top_k=5, chat_template_kwargs={"enable_thinking": False})
    (seen,) = fakes["vllm"].asked(PATHS["chat"])
    assert (answer.status_code, reported(answer)) == (200, [])
    assert (seen["body"]["top_k"], seen["body"]["chat_template_kwargs"]) == (5, {"enable_thinking": False})


def test_the_ignored_parameters_are_those_of_the_engine_that_answered(http: httpx.Client) -> None:
    biased = {"logit_bias": {"1": 1}}
    assert reported(ask(http, "chat", "dead-vllm-then-ollama", **biased)) == ["logit_bias"]
    assert reported(ask(http, "chat", "dead-ollama-then-vllm", **biased)) == []
    assert reported(ask(http, "chat", "dead-ollama-then-vllm", user="x", **biased)) == ["user"]


def test_strict_mode_leaves_out_the_engines_that_would_ignore(http: httpx.Client, fakes: dict[str, FakeEngine]) -> None:
    """Another of the model's engines takes the parameter. The first one works and would answer."""
    for fake in fakes.values():
        fake.set()
    biased = {"logit_bias": {"1": 1}}
    assert ask(http, "chat", "ollama-then-vllm", STRICT, **biased).status_code == 200
    assert (len(fakes["ollama"].asked(PATHS["chat"])), len(fakes["vllm"].asked(PATHS["chat"]))) == (0, 1)
    assert reported(ask(http, "chat", "ollama-then-vllm", **biased)) == ["logit_bias"]
    refused = ask(http, "chat", "ollama-then-vllm", STRICT, user="x", **biased)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unsupported_parameter")


def test_a_header_that_is_neither_true_nor_false_is_refused(http: httpx.Client) -> None:
    answer = ask(http, "chat", "vllm", {"x-stack-strict": "yes"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-stack-strict")


def test_strict_by_setting_and_the_request_has_the_last_word(fakes: dict[str, FakeEngine], tmp_path: Path) -> None:
    settings = {"LLM_BACKEND": "ollama", "STACK_STRICT_PARAMS": "true"}
    with running_gateway(tmp_path / "log", fakes["ollama"].url, **settings) as gateway, gateway.client() as http:
        refused = ask(http, "chat", "fake-model", user="x")
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "user")
        assert reported(ask(http, "chat", "fake-model", {"x-stack-strict": "False"}, user="x")) == ["user"]


def test_the_tables_are_complete() -> None:
    """OpenAI's client has types for every parameter, except for `stream`."""
    assert TABLES["chat"].keys() == ChatParameters.__annotations__.keys() | {"stream"}
    assert TABLES["completion"].keys() == CompletionParameters.__annotations__.keys() | {"stream"}
    assert TABLES["embedding"].keys() == EmbeddingCreateParams.__annotations__.keys()
    # The client writes `[]` behind the name of a list in a form.
    assert {it.removesuffix("[]") for it in TABLES["transcription"]} == TranscriptionParameters.__annotations__.keys()
    assert TABLES["speech"].keys() == SpeechCreateParams.__annotations__.keys()


def test_the_documentation_has_the_same_tables() -> None:
    for kind, path in PATHS.items():
        assert shown(f"## `{path}`") == {name: list(uses) for name, uses in TABLES[kind].items()}
        assert shown(f"### at `{path}`") == {name: list(uses) for name, uses in EXTRAS[kind].items()}
    assert shown("### Roles") == {name: list(uses) for name, uses in ROLES.items()}
    assert shown("### Parts of a content") == {name: list(uses) for name, uses in PARTS.items()}
    assert shown("### Reasoning of an earlier answer") == {name: list(uses) for name, uses in REASONING.items()}


def shown(heading: str) -> dict[str, list[str]]:
    """Return the table below a heading of the page."""
    page = (ROOT / "docs/parameters.md").read_text()
    section = re.split(r"\n##+ ", page.partition(f"\n{heading}\n")[2])[0]
    rows = re.findall(r"^\| `([\w \[\]]+)` \| (.*?) \| (.*?) \| (.*?) \|$", section, re.MULTILINE)
    return {name: uses for name, *uses in rows}
