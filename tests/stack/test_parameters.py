"""What docs/parameters.md says of llama.cpp, tried on it: what is taken acts, what is ignored doesn't, and a prompt
that is too long comes back with the numbers that the engine itself tells."""

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest

from gateway.endpoints import Kind
from gateway.upstream.parameters import ENGINES, TABLES
from tests.support.parameters import NAMED, PATHS, SAMPLES, TOOL
from tests.support.processes import wait_for
from tests.support.stack import BUSY, QUESTION, Stack

PLAIN: dict[Kind, dict[str, Any]] = {
    "chat": {"messages": QUESTION, "temperature": 0, "max_tokens": 12},
    "completion": {"prompt": "One, two,", "temperature": 0, "max_tokens": 12},
    "embedding": {"input": "a cat sat on the mat"},
}
IGNORED = {  # the tiny engine ranks no documents
    kind: [name for name, uses in TABLES[kind].items() if uses[ENGINES.index("llamacpp")] == "ignored"]
    for kind in PLAIN
}


@pytest.fixture
def http(stack: Stack) -> Iterator[httpx.Client]:
    with stack.client() as client:
        yield client


@pytest.fixture(scope="module")
def plain(stack: Stack) -> dict[Kind, Any]:
    """What is made when nothing more is said."""
    with stack.client() as client:
        return {kind: made(ask(client, kind)) for kind in PLAIN}


def ask(http: httpx.Client, kind: Kind = "chat", **said: Any) -> httpx.Response:
    """An answer; on a busy machine the engine may be silent for longer than these tests' stack allows."""
    body = PLAIN[kind] | said
    answer = wait_for(lambda: (it := http.post(PATHS[kind], json=body)).status_code != 504 and it, deadline=200)
    assert answer.status_code == 200, answer.text
    return answer


def text(http: httpx.Client, **said: Any) -> str:
    content: str = ask(http, **said).json()["choices"][0]["message"]["content"]
    return content


def engine(stack: Stack, path: str, body: Any = None) -> Any:
    """What the engine says at an endpoint of its own."""
    data = "" if body is None else f", {json.dumps(body)!r}.encode()"
    code = (
        "import urllib.request as u;"
        f"print(u.urlopen(u.Request('http://127.0.0.1:8080{path}'{data}), timeout=60).read().decode())"
    )
    return json.loads(stack.python("engine", code))


# -- taken, translated ------------------------------------------------------------------------------------------------


def test_both_limits_cut_and_the_newer_one_wins(http: httpx.Client) -> None:
    for said in ({"max_tokens": 3}, {"max_completion_tokens": 3}, {"max_tokens": 9, "max_completion_tokens": 3}):
        answer = ask(http, **said).json()
        assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (3, "length")
    for names in ({"max_tokens": 3, "max_completion_tokens": 9}, {"max_tokens": 9, "n_predict": 3}):
        assert ask(http, **names).json()["usage"]["completion_tokens"] == 3, "the smallest holds, whatever its name"


@pytest.mark.parametrize("stop", ["3", ["nothing", "3"]])
def test_stop_stops(http: httpx.Client, stop: Any) -> None:
    whole, cut = text(http), ask(http, stop=stop).json()["choices"][0]
    assert whole.partition("3")[1] == "3"
    assert (cut["message"]["content"], cut["finish_reason"]) == (whole.partition("3")[0], "stop")


def test_seed_temperature_and_top_p(http: httpx.Client) -> None:
    hot = {"temperature": 1.5, "max_tokens": 20}
    seeds = [text(http, seed=seed, **hot) for seed in (1, 1, 2)]
    assert seeds[0] == seeds[1] != seeds[2]
    cold = [text(http, seed=1, max_tokens=20), *(text(http, seed=seed, top_p=0.0001, **hot) for seed in range(2))]
    assert set(cold) == {text(http, max_tokens=20)}


def test_logit_bias_forbids_a_token(stack: Stack, http: httpx.Client) -> None:
    (one,) = engine(stack, "/tokenize", {"content": "1"})["tokens"]
    assert text(http).startswith("1")
    assert "1" not in text(http, logit_bias={str(one): -100})


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
def test_penalties_change_the_words(http: httpx.Client, name: str) -> None:
    assert text(http, max_tokens=30, **{name: 2}) != text(http, max_tokens=30)


def test_n_and_logprobs(http: httpx.Client) -> None:
    choices = ask(http, n=3, logprobs=True, top_logprobs=2).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert all(len(token["top_logprobs"]) == 2 for choice in choices for token in choice["logprobs"]["content"])


def test_response_format_holds(http: httpx.Client) -> None:
    schema = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}
    form = {"type": "json_schema", "json_schema": {"name": "sum", "schema": schema | {"additionalProperties": False}}}
    assert json.loads(text(http, response_format=form, max_tokens=60)).keys() == {"sum"}
    assert text(http, response_format={"type": "json_object"}).startswith("{")


TEMPLATE = "{{ messages[0]['content'] }} effort={{ reasoning_effort }} tools={{ tools | length }}"
APPLY = f"""
import json, os, sys, urllib.request
from importlib.machinery import SourceFileLoader
import xllamacpp
params = SourceFileLoader("serve", "/opt/engine/serve").load_module().parameters()
params.port, params.n_ctx, params.n_parallel, params.chat_template = 8081, 128, 1, {TEMPLATE!r}
server = xllamacpp.Server(params)
body = {{"messages": [{{"role": "user", "content": "Hi"}}], "reasoning_effort": "high", "tools": [{TOOL!r}]}}
request = json.dumps(body).encode()
print(json.load(urllib.request.urlopen("http://127.0.0.1:8081/apply-template", request))["prompt"])
sys.stdout.flush()
os._exit(0)
"""


def test_tools_and_reasoning_effort_reach_a_template_that_knows_them(stack: Stack, http: httpx.Client) -> None:
    """This model's doesn't; what `parallel_tool_calls` does takes a model that calls several."""
    assert "Hi effort=high tools=1" in stack.python("engine", APPLY)
    refused = http.post(PATHS["chat"], json=PLAIN["chat"] | {"tools": [TOOL], "tool_choice": "whatever"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tool_choice")


# -- ignored ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PLAIN)
def test_what_is_ignored_changes_nothing_and_is_named(http: httpx.Client, plain: dict[Kind, Any], kind: Kind) -> None:
    answer = ask(http, kind, **{name: SAMPLES[name] for name in IGNORED[kind]})
    assert set(answer.headers["x-stack-ignored-params"].split(",")) == set(IGNORED[kind])
    assert made(answer) == plain[kind]


def test_a_named_tool_is_called_because_the_gateway_forces_it(http: httpx.Client) -> None:
    answer = ask(http, tools=[TOOL], tool_choice=NAMED, max_tokens=100)
    assert "x-stack-ignored-params" not in answer.headers
    assert answer.headers["x-stack-forced-tools"] == "schema"
    (call,) = answer.json()["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == NAMED["function"]["name"]


def made(answer: httpx.Response) -> Any:
    """What was made, of what."""
    body = answer.json()
    parts = [choice.get("message") or choice["text"] for choice in body.get("choices", ())]
    return parts, [it["embedding"] for it in body.get("data", ())], body["usage"]["prompt_tokens"]


# -- too long ---------------------------------------------------------------------------------------------------------


def words(stack: Stack, tokens: int) -> list[dict[str, str]]:
    """Messages of so many tokens, as the engine counts them."""

    def count(messages: Any) -> int:
        counted: int = engine(stack, "/v1/chat/completions/input_tokens", {"messages": messages})["input_tokens"]
        return counted

    few = [{"role": "user", "content": "word " * 100}]
    messages = [{"role": "user", "content": "word " * (100 + tokens - count(few))}]
    assert count(messages) == tokens
    return messages


def test_a_context_error_has_the_engines_numbers(stack: Stack, http: httpx.Client) -> None:
    limit = engine(stack, "/props")["default_generation_settings"]["n_ctx"]
    for kind, prompt in (("chat", words(stack, limit + 7)), ("completion", "word " * 5000)):
        field = "messages" if kind == "chat" else "prompt"
        tokens = limit + 7 if kind == "chat" else len(engine(stack, "/tokenize", {"content": prompt})["tokens"])
        for stream in (False, True):
            answer = http.post(PATHS[kind], json={field: prompt, "stream": stream})  # type: ignore[index]
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", field)
            assert error["message"].startswith(
                f"This model's maximum context length is {limit} tokens. "
                f"However, your {field} resulted in {tokens} tokens."
            )


def test_a_context_error_of_an_embedding_has_the_engines_numbers(http: httpx.Client) -> None:
    """The engine says it with a 500; its limit is that of a batch."""
    answer = http.post("/v1/embeddings", json={"input": ["short", "word " * 3000]})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "input")
    assert "context length is 512 tokens" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_just_fits_is_not_refused(stack: Stack, http: httpx.Client, stream: bool) -> None:
    """One token more is, at once. This one takes its time, so it is left once the engine is at work on it."""
    limit = engine(stack, "/props")["default_generation_settings"]["n_ctx"]
    messages = words(stack, limit - 1)
    body = {"messages": messages, "stream": stream}
    with suppress(httpx.ReadTimeout), http.stream("POST", PATHS["chat"], json=body, timeout=2) as answer:
        assert answer.status_code == 200
    wait_for(lambda: stack.python("engine", BUSY) == "0", deadline=120)  # it looks up between two parts of a prompt
    refused = http.post(PATHS["chat"], json={"messages": words(stack, limit), "stream": stream})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
