"""Streams: what passes and when it arrives; and what the relay makes of HTTP. How faults end: test_faults.py."""

from typing import Any

import httpx
import pytest

from tests.support.processes import (
    MESSAGES,
    ROOT,
    FakeEngine,
    GatewayProcess,
    events,
    running_gateway,
    text_of,
    wait_for,
)
from tests.support.tool_streams import CITY, calls_at_0

CHAT = "/v1/chat/completions"


def ask(gateway: GatewayProcess, script: list[Any] | None = None, **fields: Any) -> httpx.Response:
    body = {"messages": MESSAGES, "stream": True, **fields} | ({"script": script} if script else {})
    with gateway.client() as client:
        return client.post(CHAT, json=body)


def test_a_stream_is_whole_and_shaped_like_openais(gateway: GatewayProcess) -> None:
    answer = ask(gateway)
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.headers["cache-control"] == "no-cache"
    chunks = events(answer.text)
    assert chunks[-1] == "[DONE]"
    assert text_of(chunks) == "one two three"
    assert [chunk["choices"][0]["delta"].get("role") for chunk in chunks[:-1]] == ["assistant", None, None, None, None]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * 4 + ["stop"]
    assert {(chunk["id"], chunk["created"]) for chunk in chunks[:-1]} == {("chatcmpl-fake", 1)}


def test_a_role_that_the_engine_repeats_reaches_the_client_once_for_each_choice(gateway: GatewayProcess) -> None:
    said = [(0, "one"), (1, "eins"), (0, " two"), (1, " zwei")]
    chunks = [{"choices": [{"index": it, "delta": {"role": "assistant", "content": text}}]} for it, text in said]
    ends = [{"choices": [{"index": it, "delta": {"role": "assistant"}, "finish_reason": "stop"}]} for it in (0, 1)]
    script = [*(["event", it] for it in (*chunks, *ends)), ["done"], ["end"]]
    *told, done = events(ask(gateway, script, n=2).text)
    assert done == "[DONE]"
    choices = [choice for it in told for choice in it["choices"]]
    for index, text in ((0, "one two"), (1, "eins zwei")):
        deltas = [it["delta"] for it in choices if it["index"] == index]
        assert [it.get("role") for it in deltas] == ["assistant", None, None]
        assert "".join(it.get("content", "") for it in deltas) == text


def test_an_empty_role_does_not_reach_the_client(gateway: GatewayProcess) -> None:
    """It took the place of the role that came behind it."""
    roles = ["", None, "assistant", ""]
    chunks = [{"choices": [{"index": 0, "delta": {"role": it, "content": "a"}}]} for it in roles]
    *told, done = events(ask(gateway, [*(["event", it] for it in chunks), ["finish", "stop"], ["done"], ["end"]]).text)
    assert done == "[DONE]"
    deltas = [it["choices"][0]["delta"] for it in told]
    assert [it.get("role", "none") for it in deltas] == ["none", "none", "assistant", "none", "none"]


def test_usage_comes_only_when_asked_for_though_the_engine_is_always_asked(
    gateway: GatewayProcess, engine: FakeEngine, mark: str
) -> None:
    for options, expected in [(None, 0), ({"include_usage": False}, 0), ({"include_usage": True}, 1)]:
        fields = {} if options is None else {"stream_options": options}
        chunks = events(ask(gateway, user=mark, **fields).text)
        usage = [chunk for chunk in chunks if chunk != "[DONE]" and chunk.get("usage")]
        assert len(usage) == expected
        assert all(chunk["choices"] == [] and chunk["usage"]["total_tokens"] == 10 for chunk in usage)
        assert engine.wait_seen(mark)["body"]["stream_options"]["include_usage"] is True


def test_each_token_is_passed_on_when_it_is_made(gateway: GatewayProcess, engine: FakeEngine, mark: str) -> None:
    script = [
        ["role"],
        ["token", "A"],
        ["gate", mark + "1"],
        ["token", "B"],
        ["gate", mark + "2"],
        ["finish", "stop"],
        ["done"],
    ]
    body = {"messages": MESSAGES, "stream": True, "user": mark, "script": [*script, ["end"]]}
    with gateway.client() as client, client.stream("POST", CHAT, json=body) as answer:
        lines = answer.iter_lines()
        assert '"A"' in next(line for line in lines if '"A"' in line)  # here while the engine waits at the first gate
        engine.release(mark + "1")
        assert '"B"' in next(line for line in lines if '"B"' in line)
        engine.release(mark + "2")
        assert list(lines)[-2:] == ["data: [DONE]", ""]


# What llama.cpp (xllamacpp 2026.10.11549, SmolLM2-135M-Instruct) answered to a completion of two prompts.
TWO_PROMPTS = (ROOT / "tests/recordings/llamacpp/completion-of-two-prompts.sse").read_text()


def test_a_completion_of_two_prompts_has_a_choice_for_each(before_all: GatewayProcess) -> None:
    """llama.cpp begins its stream with a null."""
    body = {"model": "llamacpp", "prompt": ["One two three", "Hello my"], "max_tokens": 2}
    script = {"script": [["text", TWO_PROMPTS], ["end"]]}
    with before_all.client() as client:
        blocking = client.post("/v1/completions", json=body | script)
        stream = client.post("/v1/completions", json=body | script | {"stream": True})
    assert (blocking.status_code, stream.status_code) == (200, 200)
    assert [(it["index"], it["text"]) for it in blocking.json()["choices"]] == [(0, "-digit"), (1, " friend's")]
    *chunks, done = events(stream.text)
    assert done == "[DONE]"
    choices = [choice for it in chunks for choice in it["choices"]]
    for index, text in ((0, "-digit"), (1, " friend's")):
        assert "".join(it["text"] for it in choices if it["index"] == index) == text
        assert [it["finish_reason"] for it in choices if it["index"] == index][-1] == "length"


def test_the_pieces_of_a_tool_call_without_an_index_are_one_call(before_all: GatewayProcess) -> None:
    """Streamed, and folded for a blocking request."""

    def piece(**call: Any) -> list[Any]:
        return ["event", {"choices": [{"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": None}]}]

    script = [
        piece(id="a", type="function", function={"name": "f", "arguments": ""}),
        piece(function={"arguments": '{"x"'}),
        piece(function={"arguments": ": 1}"}),
        piece(id="b", type="function", function={"name": "g", "arguments": "{}"}),
    ]
    body = {"model": "llamacpp", "messages": MESSAGES, "script": [*script, ["finish", "tool_calls"], ["done"], ["end"]]}
    with before_all.client() as client:
        blocking = client.post(CHAT, json=body).json()
        chunks = events(client.post(CHAT, json=body | {"stream": True}).text)
    assert [it["function"] for it in blocking["choices"][0]["message"]["tool_calls"]] == [
        {"name": "f", "arguments": '{"x": 1}'},
        {"name": "g", "arguments": "{}"},
    ]
    calls = [it["choices"][0]["delta"]["tool_calls"][0]["index"] for it in chunks[:4]]
    assert calls == [0, 0, 0, 1]


TOOL: dict[str, Any] = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
ASKED: dict[str, dict[str, Any]] = {
    "left alone": {},
    "a demanded call": {"tool_choice": "required"},
    "a strict function": {"tools": [{"type": "function", "function": TOOL["function"] | {"strict": True}}]},
}


@pytest.mark.parametrize("what", ASKED)
def test_calls_that_all_have_the_index_0_are_told_apart_by_their_ids(before_all: GatewayProcess, what: str) -> None:
    body = {"model": "vllm", "messages": MESSAGES, "script": calls_at_0(), "tools": [TOOL], "stream": True}
    with before_all.client() as client:
        chunks = events(client.post(CHAT, json=body | ASKED[what]).text)
    found: dict[int, list[str]] = {}
    for chunk in chunks[:-1]:
        for piece in chunk["choices"][0]["delta"].get("tool_calls", ()) if chunk["choices"] else ():
            made = found.setdefault(piece["index"], [piece.get("id"), ""])
            made[1] += piece["function"]["arguments"]
    assert found == {0: ["Oslo", '{"city":"Oslo"}'], 1: ["Rome", '{"city":"Rome"}']}, chunks


JSON = '{"choices":[{"index":0,"message":{"content":"hi"},"finish_reason":"stop"}]}'
OK = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
FRAMED = {
    "with a length": f"{OK}content-length: {len(JSON)}\r\n\r\n{JSON}",
    "ended by its connection": f"{OK}\r\n{JSON}",
    "ended by its connection, HTTP/1.0": f"{OK.replace('1.1', '1.0')}\r\n{JSON}",
    "after a 100 and a 103": "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 X\r\na: b\r\n\r\n"
    f"{OK}content-length: {len(JSON)}\r\n\r\n{JSON}",
    "with junk behind it": f"{OK}content-length: {len(JSON)}\r\n\r\n{JSON}HTTP/1.1 200 OK\r\n\r\n",
    "chunked, with a trailer": f"{OK}transfer-encoding: chunked\r\n\r\n{len(JSON):x}\r\n{JSON}\r\n0\r\nx: y\r\n\r\n",
}
UNUSABLE = {
    "a chunk cut short": f"{OK}transfer-encoding: chunked\r\n\r\nff\r\n{JSON}",
    "two lengths": f"{OK}content-length: 5\r\ncontent-length: {len(JSON)}\r\n\r\n{JSON}",
    "a header of 100 kB": f"{OK}x: {'y' * 100_000}\r\ncontent-length: {len(JSON)}\r\n\r\n{JSON}",
    "an upgrade": "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n",
}


@pytest.mark.parametrize("name", FRAMED)
def test_every_legal_framing_of_an_answer_is_understood(gateway: GatewayProcess, name: str) -> None:
    with gateway.client() as client:
        for _ in range(3):  # whatever it leaves behind must not meet the next request
            answer = client.post(CHAT, json={"messages": MESSAGES, "script": [["raw", FRAMED[name]], ["close"]]})
            assert (answer.status_code, answer.text) == (200, JSON)
            assert client.post(CHAT, json={"messages": MESSAGES}).json()["id"] == "chatcmpl-fake"


@pytest.mark.parametrize("name", UNUSABLE)
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_not_sound_http_is_502(gateway: GatewayProcess, name: str, stream: bool) -> None:
    with gateway.client() as client:
        script = [["raw", UNUSABLE[name]], ["close"]]
        answer = client.post(CHAT, json={"messages": MESSAGES, "stream": stream, "script": script})
        assert (answer.status_code, answer.json()["error"]["type"]) == (502, "server_error")
        assert client.post(CHAT, json={"messages": MESSAGES}).json()["id"] == "chatcmpl-fake"


def test_connections_to_the_engine_are_reused(engine: FakeEngine, tmp_path: Any) -> None:
    with running_gateway(tmp_path / "log", engine.url, STACK_WORKERS="1") as gateway:
        ask(gateway)
        before = engine.all_seen()["connections"]
        for _ in range(10):
            assert events(ask(gateway).text)[-1] == "[DONE]"
        # /_seen itself opens one connection each time it is asked
        assert engine.all_seen()["connections"] - before <= 5, "ten answers, and the probes of other gateways"


def test_readyz_tells_an_engine_that_is_loading(engine: FakeEngine, gateway: GatewayProcess) -> None:
    engine.health(503)
    try:
        with gateway.client() as client:
            answer = wait_for(lambda: (it := client.get("/readyz")).status_code == 503 and it)
            assert answer.json()["error"]["code"] in ("model_loading", "server_is_overloaded")
            assert "retry-after" in answer.headers
    finally:
        engine.health(200)
