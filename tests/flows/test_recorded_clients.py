"""What real clients sent to OpenAI's own endpoints, on each engine's dialect: each request is answered as they need."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import orjson
import pytest

from tests.support.fakes.dialects import ENGINES
from tests.support.processes import ROOT, FakeEngine, GatewayProcess, events, post

SENT = [
    orjson.loads(line)
    for line in (ROOT / "tests/recordings/clients/openai-requests.jsonl").read_bytes().splitlines()
]  # fmt: skip
CLIENTS = sorted({it["client"] for it in SENT})


@pytest.fixture(scope="module")
def http(before_all: GatewayProcess) -> Iterator[httpx.Client]:
    with before_all.client() as client:
        yield client


def forced(body: dict[str, Any]) -> bool:
    choice = body.get("tool_choice") or "auto"
    return isinstance(choice, dict) or choice not in ("auto", "none")


def assert_whole(body: dict[str, Any], answer: httpx.Response) -> None:
    """Of a generation: one finish_reason for each choice and `[DONE]`, without which some ask again for ever, and usage
    where it was asked for, in a chunk of its own."""
    assert answer.status_code == 200, answer.text
    prompts = body["prompt"] if isinstance(body.get("prompt"), list) else [None]
    choices = (body.get("n") or 1) * len(prompts)
    if not body.get("stream"):
        told = answer.json()
        assert all(it["finish_reason"] for it in told["choices"])
        assert told["usage"]["total_tokens"] > 0
        return
    *chunks, done = events(answer.text)
    assert done == "[DONE]"
    assert all("choices" in it for it in chunks)
    reasons = [it["index"] for chunk in chunks for it in chunk["choices"] if it.get("finish_reason")]
    assert sorted(reasons) == list(range(choices))
    usages = [it["usage"] for it in chunks if it.get("usage")]
    assert len(usages) == bool((body.get("stream_options") or {}).get("include_usage"))
    assert not usages or chunks[-1]["choices"] == []


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("client", CLIENTS)
def test_every_recorded_request_is_answered_whole(
    http: httpx.Client, fakes: dict[str, FakeEngine], client: str, engine: str
) -> None:
    fake = fakes[engine]
    got = []
    for it in (it for it in SENT if it["client"] == client):
        path, body = it["path"], it["body"] | {"model": engine}
        fake.set(context=200_000)
        if forced(body):  # the engine answers with text: it fails if it had to call a tool
            answer = http.post(path, json=body | {"stream": False})
            assert (answer.status_code, "did not make the tool call" in answer.text) == (502, True), answer.text
            continue
        answer = post(http, path, json=body)
        if path == "/v1/embeddings":
            inputs = body["input"] if isinstance(body["input"], list) else [body["input"]]
            assert (answer.status_code, len(answer.json()["data"])) == (200, len(inputs))
            continue
        if engine == "ollama" and isinstance(body.get("prompt"), list):  # it takes one, and the answer says so
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
            continue
        assert_whole(body, answer)
        if path == "/v1/chat/completions":
            got.append((body["messages"], fake.asked(path)[-1]["body"]["messages"]))
    for sent, seen in got:  # a conversation that grows reaches the engine with the same beginning
        for longer, more in got:
            if sent == longer[: len(sent)]:
                assert json.dumps(more[: len(seen)]) == json.dumps(seen)
