"""Roles, parts and values reach each engine in a form that it takes, or are refused by their name: those that Ollama
0.32.15 and vLLM 0.32.0 were seen to drop, to misread or to refuse (docs/parameters.md)."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from gateway.endpoints import Kind
from tests.support.fakes.dialects import ENGINES
from tests.support.parameters import PATHS, STRICT, TOOL, ask, reported
from tests.support.processes import FakeEngine, GatewayProcess


@pytest.fixture(scope="module")
def http(before_all: GatewayProcess) -> Iterator[httpx.Client]:
    with before_all.client() as client:
        yield client


def got(http: httpx.Client, fake: FakeEngine, kind: Kind, model: str, **said: Any) -> dict[str, Any]:
    """What the engine got."""
    fake.set()
    answer = ask(http, kind, model, STRICT, **said)
    assert answer.status_code == 200, answer.text
    (seen,) = fake.asked(PATHS[kind])
    body: dict[str, Any] = seen["body"]
    return body


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def called(arguments: str | None) -> list[dict[str, Any]]:
    return [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": arguments}}]


PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
REFUSAL = {"type": "refusal", "refusal": "No."}

TRANSLATED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a developer's message": ({"role": "developer", "content": "x"}, {"role": "system", "content": "x"}),
    "a developer's, in capitals": ({"role": "Developer", "content": "x"}, {"role": "system", "content": "x"}),
    "several texts": (user([text("a"), text("b"), text("c")]), user([text("a\nb\nc")])),
    "texts around a picture": (
        user([text("a"), text("b"), PICTURE, text("c")]),
        user([text("a\nb"), PICTURE, text("c")]),
    ),
    "a refusal": ({"role": "assistant", "content": [REFUSAL]}, {"role": "assistant", "content": [text("No.")]}),
    "a text and a refusal": (
        {"role": "assistant", "content": [text("a"), REFUSAL]},
        {"role": "assistant", "content": [text("a\nNo.")]},
    ),
    "no parts": (user([]), user("")),
    "null": (user(None), user("")),
    "no content": ({"role": "user"}, user("")),
    "null, and no calls": (
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "assistant", "content": "", "tool_calls": []},
    ),
    "a call without arguments": (
        {"role": "assistant", "content": None, "tool_calls": called("")},
        {"role": "assistant", "content": None, "tool_calls": called("{}")},
    ),
    "a call whose arguments are null": (
        {"role": "assistant", "content": "x", "tool_calls": called(None)},
        {"role": "assistant", "content": "x", "tool_calls": called("{}")},
    ),
}


@pytest.mark.parametrize("name", TRANSLATED)
def test_ollama_gets_a_form_that_it_takes(http: httpx.Client, fakes: dict[str, FakeEngine], name: str) -> None:
    said, becomes = TRANSLATED[name]
    last = user("x")
    assert got(http, fakes["ollama"], "chat", "ollama", messages=[said, last])["messages"] == [becomes, last]


@pytest.mark.parametrize("name", TRANSLATED)
def test_vllm_gets_what_was_said(http: httpx.Client, fakes: dict[str, FakeEngine], name: str) -> None:
    said, _ = TRANSLATED[name]
    assert got(http, fakes["vllm"], "chat", "vllm", messages=[said])["messages"] == [said]


def test_llamacpp_gets_a_refusal_as_text(http: httpx.Client, fakes: dict[str, FakeEngine]) -> None:
    said = {"role": "assistant", "content": [text("a"), REFUSAL, PICTURE]}
    becomes = {"role": "assistant", "content": [text("a"), text("No."), PICTURE]}
    assert got(http, fakes["llamacpp"], "chat", "llamacpp", messages=[said])["messages"] == [becomes]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_of_an_earlier_answer_has_the_name_that_the_engine_reads(
    http: httpx.Client, fakes: dict[str, FakeEngine], engine: str, name: str
) -> None:
    reads = {"ollama": "reasoning", "vllm": name, "llamacpp": "reasoning_content"}[engine]
    said = [user("x"), {"role": "assistant", "content": "y"}, user("z")]
    sent = [said[0], said[1] | {name: "Hm."}, said[2]]
    assert got(http, fakes[engine], "chat", engine, messages=sent)["messages"] == [
        said[0],
        said[1] | {reads: "Hm."},
        said[2],
    ]
    if engine != "vllm":  # a client that sends both
        both = [said[1] | {"reasoning": "Hm.", "reasoning_content": "Hm."}, said[2]]
        assert got(http, fakes[engine], "chat", engine, messages=both)["messages"][0] == said[1] | {reads: "Hm."}


OLLAMA_REFUSES: dict[str, tuple[Kind, dict[str, Any], str]] = {
    "a file": (
        "chat",
        {"messages": [user([text("x"), {"type": "file", "file": {"file_id": "x"}}])]},
        "messages[0].content[1].type",
    ),
    "an unknown part": ("chat", {"messages": [user([{"type": "wonder"}])]}, "messages[0].content[0].type"),
    "a part without a type": ("chat", {"messages": [user([{"text": "x"}])]}, "messages[0].content[0].type"),
    "a part that is no object": ("chat", {"messages": [user(["x"])]}, "messages[0].content[0].type"),
    "an empty prompt": ("completion", {"prompt": ""}, "prompt"),
    "two prompts": ("completion", {"prompt": ["a", "b"]}, "prompt"),
    "no prompts": ("completion", {"prompt": []}, "prompt"),
    "a prompt in tokens": ("completion", {"prompt": [1, 2]}, "prompt[0]"),
    "no tokens at most": ("completion", {"prompt": "x", "echo": True, "max_tokens": 0}, "max_tokens"),
    "an empty input": ("embedding", {"input": ""}, "input"),
    "an empty input among others": ("embedding", {"input": ["x", ""]}, "input[1]"),
    "no inputs": ("embedding", {"input": []}, "input"),
    "an input in tokens": ("embedding", {"input": [[1, 2]]}, "input[0]"),
}


@pytest.mark.parametrize("name", OLLAMA_REFUSES)
def test_what_ollama_can_make_nothing_of_is_refused_unless_another_engine_can(
    http: httpx.Client, fakes: dict[str, FakeEngine], name: str
) -> None:
    kind, said, param = OLLAMA_REFUSES[name]
    for fake in fakes.values():
        fake.set()
    refused = ask(http, kind, "ollama", **said)
    error = refused.json()["error"]
    assert (refused.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert param in error["message"]
    ask(http, kind, "ollama-then-vllm", **said)
    assert (len(fakes["ollama"].asked(PATHS[kind])), len(fakes["vllm"].asked(PATHS[kind]))) == (0, 1)


SAYS_NOTHING: list[tuple[str, Kind, dict[str, Any], dict[str, Any]]] = [
    *((engine, "chat", {"stop": ""}, {}) for engine in ENGINES),
    *((engine, "chat", {"stop": ["", "a", ""]}, {"stop": ["a"]}) for engine in ENGINES),
    *((engine, "completion", {"stop": [""]}, {}) for engine in ENGINES),
    *((engine, "completion", {"suffix": ""}, {}) for engine in ENGINES),
    *((engine, "chat", {"grammar": ""}, {}) for engine in ENGINES),
    *((engine, "chat", {"user": "", "reasoning": {}}, {"user": "", "reasoning": {}}) for engine in ENGINES),
    ("ollama", "completion", {"prompt": ["x"]}, {"prompt": "x"}),
    ("vllm", "completion", {"prompt": ["x"]}, {"prompt": ["x"]}),
    ("vllm", "chat", {"tools": [], "tool_choice": "auto"}, {}),
    ("vllm", "chat", {"tool_choice": "none"}, {}),
    ("vllm", "chat", {"tools": [TOOL], "tool_choice": "auto"}, {"tools": [TOOL], "tool_choice": "auto"}),
    ("vllm", "chat", {"stream_options": {"include_usage": True}}, {}),
    ("ollama", "chat", {"tools": [TOOL], "tool_choice": "none"}, {"tool_choice": "none"}),
    ("vllm", "completion", {"echo": True, "max_tokens": 0}, {"echo": True, "max_tokens": 0}),
]  # fmt: skip


@pytest.mark.parametrize(("engine", "kind", "said", "becomes"), SAYS_NOTHING)
def test_values_that_ask_for_nothing_are_left_out(
    http: httpx.Client,
    fakes: dict[str, FakeEngine],
    engine: str,
    kind: Kind,
    said: dict[str, Any],
    becomes: dict[str, Any],
) -> None:
    plain = got(http, fakes[engine], kind, engine)
    if engine == "llamacpp" and "stop" in becomes:
        del plain["stream"], plain["stream_options"]  # a stream would lack text (gateway.relay.fold)
    assert got(http, fakes[engine], kind, engine, **said) == plain | becomes


def test_no_tools_at_all_for_ollama_where_none_may_be_called(http: httpx.Client) -> None:
    assert reported(ask(http, "chat", "ollama", tools=[TOOL], tool_choice="none")) == []
    assert reported(ask(http, "chat", "ollama", tools=[TOOL], tool_choice="auto")) == []
