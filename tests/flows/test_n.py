"""`n` answers of an engine that makes one per request are one answer to the client."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.fakes.dialects import ENGINES
from tests.support.processes import MESSAGES, FakeEngine, GatewayProcess, events, post, was_cut

ALONE = [it for it in ENGINES if it == "ollama"]  # the engines that ignore n
ONE, TWO, THREE = ({"say": [it, "."]} for it in ("One", "Two", "Three"))
NOTHING = {"refuse": "the engine is tired"}


@pytest.fixture(scope="module")
def http(before_all: GatewayProcess) -> Iterator[httpx.Client]:
    with before_all.client() as client:
        yield client


def ask(http: httpx.Client, mark: str, *tries: dict[str, Any], engine: str = "ollama", **said: Any) -> httpx.Response:
    body = {"model": engine, "messages": MESSAGES, "mark": mark, "tries": list(tries), "n": len(tries)} | said
    return post(http, "/v1/chat/completions", json=body)


def asked(fakes: dict[str, FakeEngine], mark: str, engine: str = "ollama") -> list[dict[str, Any]]:
    return [it["body"] for it in fakes[engine].all_seen()["seen"] if it["body"].get("mark") == mark]


@pytest.mark.parametrize("engine", ALONE)
def test_a_blocking_answer_has_every_choice_and_their_usage(
    http: httpx.Client, fakes: dict[str, FakeEngine], engine: str, mark: str
) -> None:
    answer = ask(http, mark, ONE, TWO, THREE, engine=engine, seed=5)
    told = answer.json()
    assert [(it["index"], it["message"]["content"]) for it in told["choices"]] == [
        (0, "One."),
        (1, "Two."),
        (2, "Three."),
    ]
    assert told["usage"] == {"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": 16}, "the prompt counts once"
    assert "x-stack-ignored-params" not in answer.headers
    bodies = asked(fakes, mark, engine)
    assert [it.get("seed") for it in bodies] == [5, 6, 7], "the same seed would make the same answer"
    assert not any("n" in it for it in bodies)


def test_a_stream_has_every_choice_and_one_end(http: httpx.Client, mark: str) -> None:
    answer = ask(http, mark, ONE, TWO, stream=True, stream_options={"include_usage": True})
    *chunks, usage, done = events(answer.text)
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 7, "completion_tokens": 6, "total_tokens": 13}
    texts, ends = {0: "", 1: ""}, []
    for choice in (it for chunk in chunks for it in chunk["choices"]):
        texts[choice["index"]] += choice["delta"].get("content") or ""
        ends += [(choice["index"], choice["finish_reason"])] if choice["finish_reason"] else []
    assert (texts, ends) == ({0: "One.", 1: "Two."}, [(0, "stop"), (1, "stop")])
    assert len({chunk["id"] for chunk in chunks}) == 1
    roles = [it["index"] for chunk in chunks for it in chunk["choices"] if "role" in it["delta"]]
    assert roles == [0, 1], "each choice has its role once"


def test_a_stream_without_stream_options_has_no_usage(http: httpx.Client, mark: str) -> None:
    assert "usage" not in ask(http, mark, ONE, TWO, stream=True).text


def test_a_completion_has_every_choice_too(http: httpx.Client, mark: str) -> None:
    said = {"model": "ollama", "prompt": "Count.", "n": 2, "mark": mark}
    tries = [{"text": "a"}, {"text": "b"}]
    blocking = http.post("/v1/completions", json=said | {"tries": tries}).json()
    assert [(it["index"], it["text"]) for it in blocking["choices"]] == [(0, "a"), (1, "b")]
    assert blocking["usage"]["completion_tokens"] == 6
    streamed = post(http, "/v1/completions", json=said | {"mark": f"{mark}-s", "tries": tries, "stream": True})
    chunks = [it for it in events(streamed.text) if it != "[DONE]"]
    assert [(it["index"], it["text"]) for chunk in chunks for it in chunk["choices"] if it["text"]] == [
        (0, "a"),
        (1, "b"),
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_if_one_choice_fails_the_answer_fails(http: httpx.Client, mark: str, stream: bool) -> None:
    answer = ask(http, mark, ONE, NOTHING, stream=stream)
    if not stream:
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, "the engine is tired")
        return
    assert was_cut(answer)
    assert events(answer.text)[-1]["error"]["message"] == "the engine is tired"
    assert "[DONE]" not in answer.text


def test_all_the_choices_take_one_slot(http: httpx.Client, fakes: dict[str, FakeEngine], mark: str) -> None:
    fakes["ollama"].peak()
    ask(http, mark, ONE, TWO, THREE)
    assert fakes["ollama"].peak() == 1


def test_every_token_is_charged(http: httpx.Client, before_all: GatewayProcess, mark: str) -> None:
    for stream in (False, True):
        answer = ask(http, f"{mark}-{stream}", ONE, TWO, stream=stream)
        line = before_all.lines(answer.headers["x-request-id"])[-2]
        assert (line["tokens_in"], line["tokens_out"]) == (7, 6)
        assert line["finish_reason"] == "stop"


def test_a_forced_call_is_made_for_each_choice(http: httpx.Client, mark: str) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    tries = [{"good": [["f", {"city": "Oslo"}]]}, {"say": ["No."]}, {"good": [["f", {"city": "Rome"}]]}]
    for stream in (False, True):
        answer = ask(http, f"{mark}-{stream}", *tries, n=2, stream=stream, tools=[tool], tool_choice="required")
        text = answer.text.replace('\\"', '"')
        assert text.count('"call_') == 2, text
        assert text.count('"finish_reason":"tool_calls"') == 2


def test_more_than_sixteen_are_refused(http: httpx.Client, mark: str) -> None:
    answer = ask(http, mark, ONE, n=17)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")


def test_other_engines_make_all_choices_at_once(http: httpx.Client, fakes: dict[str, FakeEngine], mark: str) -> None:
    ask(http, mark, ONE, engine="vllm", n=2)
    (body,) = asked(fakes, mark, "vllm")
    assert body["n"] == 2
