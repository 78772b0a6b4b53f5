"""Streams: what passes, when it arrives, and how each fault ends."""

import socket
import time
from typing import Any

import httpx
import pytest

from tests.processes import (
    MESSAGES,
    FakeEngine,
    GatewayProcess,
    events,
    fake_engine,
    running_gateway,
    text_of,
    wait_for,
)

CHAT = "/v1/chat/completions"
START = [["role"], ["token", "one"], ["token", " two"]]


def ask(gateway: GatewayProcess, script: list[Any] | None = None, **fields: Any) -> httpx.Response:
    body = {"messages": MESSAGES, "stream": True, **fields} | ({"script": script} if script else {})
    with gateway.client() as client:
        return client.post(CHAT, json=body)


def test_a_stream_is_whole_and_shaped_like_openais(gateway: GatewayProcess) -> None:
    answer = ask(gateway)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    chunks = events(answer.text)
    assert chunks[-1] == "[DONE]"
    assert text_of(chunks) == "one two three"
    assert [chunk["choices"][0]["delta"].get("role") for chunk in chunks[:-1]] == ["assistant", None, None, None, None]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * 4 + ["stop"]
    assert {(chunk["id"], chunk["created"]) for chunk in chunks[:-1]} == {("chatcmpl-fake", 1)}


def test_usage_comes_only_when_asked_for_though_the_engine_is_always_asked(
    gateway: GatewayProcess, engine: FakeEngine, mark: str
) -> None:
    for options, expected in [(None, 0), ({"include_usage": False}, 0), ({"include_usage": True}, 1)]:
        fields = {} if options is None else {"stream_options": options}
        chunks = events(ask(gateway, user=mark, **fields).text)
        usage = [chunk for chunk in chunks if chunk != "[DONE]" and chunk.get("usage")]
        assert len(usage) == expected
        assert all(chunk["choices"] == [] and chunk["usage"]["total_tokens"] == 10 for chunk in usage)
        assert engine.wait_seen(mark)["body"]["stream_options"] == {"include_usage": True}


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


def test_done_releases_the_client_though_the_engine_keeps_its_socket_open(gateway: GatewayProcess) -> None:
    chunks = events(ask(gateway, [*START, ["finish", "stop"], ["done"], ["text", "data: late\n\n"], ["hang"]]).text)
    assert chunks[-1] == "[DONE]"
    assert chunks.count("[DONE]") == 1


def test_a_finished_answer_without_done_gets_its_done(gateway: GatewayProcess) -> None:
    for ending in (["end"], ["close"]):
        chunks = events(ask(gateway, [*START, ["finish", "stop"], ending]).text)
        assert chunks[-1] == "[DONE]"
        assert "error" not in chunks[-2]


BROKEN = {
    "reset in mid-stream": ([*START, ["reset"]], "engine_broken_stream"),
    "connection closed in mid-stream": ([*START, ["close"]], "engine_broken_stream"),
    "clean end without finish_reason": ([*START, ["end"]], "engine_broken_stream"),
    "empty delta, then a clean end (Ollama)": (
        [*START, ["event", {"choices": [{"index": 0, "delta": {}}]}], ["end"]],
        "engine_broken_stream",
    ),
    "[DONE] without finish_reason": ([*START, ["done"], ["end"]], "engine_broken_stream"),
    "one of two choices never finishes": (
        [
            *START,
            ["event", {"choices": [{"index": 1, "delta": {"content": "x"}}]}],
            ["finish", "stop"],
            ["done"],
            ["end"],
        ],
        "engine_broken_stream",
    ),
    "malformed JSON": ([*START, ["text", 'data: {"choices": [\n\n'], ["hang"]], "engine_broken_stream"),
    "invalid UTF-8": ([*START, ["hex", b'data: {"x": "\xff"}\n\n'.hex()], ["hang"]], "engine_broken_stream"),
    "a frame cut in half": ([*START, ["text", 'data: {"choices"'], ["close"]], "engine_broken_stream"),
    "error frame, object": (
        [*START, ["event", {"error": {"message": "CUDA died", "code": 500}}], ["hang"]],
        "engine_error",
    ),
    "error frame, text": ([*START, ["event", {"error": "out of memory"}], ["hang"]], "engine_error"),
    "silence in mid-stream": ([*START, ["hang"]], "engine_timeout"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_an_answer_that_cannot_be_finished_ends_with_an_error_and_done(
    gateway: GatewayProcess, engine: FakeEngine, mark: str, fault: str
) -> None:
    script, code = BROKEN[fault]
    answer = ask(gateway, script, user=mark)
    assert answer.status_code == 200
    chunks = events(answer.text)  # every frame that came is whole and valid
    assert text_of(chunks).startswith("one two")
    assert chunks[-1] == "[DONE]"
    assert set(chunks[-2]["error"]) == {"message", "type", "param", "code"}
    assert chunks[-2]["error"]["code"] == code
    assert "CUDA" not in answer.text
    wait_for(lambda: engine.wait_seen(mark)["state"] != "running")  # the engine's socket is let go
    lines = gateway.lines(answer.headers["x-request-id"])
    assert [line["msg"] for line in lines] == ["chat_started", "chat_finished_stream", "request"]
    assert lines[1]["outcome"] == code


EARLY = {
    "error as the first event": (
        [["event", {"error": {"message": "busy", "code": 503}}], ["hang"]],
        503,
        "server_is_overloaded",
    ),
    "clean end before any event": (
        [["head", [200, {"content-type": "text/event-stream"}]], ["end"]],
        502,
        "engine_broken_stream",
    ),
    "only pings, then the end": ([["text", ": ping\n\n"], ["end"]], 502, "engine_broken_stream"),
    "JSON instead of a stream": ([["json", [200, {"choices": []}]]], 502, "engine_broken_stream"),
    "first frame malformed": ([["text", "data: {]\n\n"], ["hang"]], 502, "engine_broken_stream"),
    "closed without an answer": ([["close"]], 502, "engine_error"),
    "reset without an answer": ([["reset"]], 502, "engine_error"),
    "never answers": ([["hang"]], 504, "engine_timeout"),
}


@pytest.mark.parametrize("fault", EARLY)
def test_a_fault_before_the_first_event_keeps_its_status(gateway: GatewayProcess, fault: str, tmp_path: Any) -> None:
    script, status, code = EARLY[fault]
    if fault == "never answers":  # with a hold longer than the patience, the head is still unsent
        with fake_engine() as engine:
            settings = {"LLM_FIRST_TOKEN_TIMEOUT": "1", "STACK_HOLD": "5", "STACK_WORKERS": "1"}
            with running_gateway(tmp_path / "log", engine.url, **settings) as impatient:
                answer = ask(impatient, script)
    else:
        answer = ask(gateway, script)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_a_long_prefill_is_bridged_with_pings(gateway: GatewayProcess, engine: FakeEngine, mark: str) -> None:
    """The hold is 1 s here. The engine begins only once the client has seen two pings."""
    body = {"messages": MESSAGES, "stream": True, "user": mark}
    script = [["gate", mark], ["role"], ["token", "late"], ["finish", "stop"], ["done"], ["end"]]
    with gateway.client() as client, client.stream("POST", CHAT, json=body | {"script": script}) as answer:
        lines = answer.iter_lines()
        assert [next(lines), next(lines), next(lines)] == [": ping", "", ": ping"]
        engine.release(mark)
        rest = "\n".join(lines)
    assert text_of(events(rest)) == "late"
    assert rest.endswith("data: [DONE]\n")


def test_an_engine_that_never_starts_after_pings_ends_honestly(gateway: GatewayProcess) -> None:
    """Patience is 3 s and the hold 1 s: the head is out when patience ends."""
    answer = ask(gateway, [["hang"]])
    assert answer.status_code == 200
    assert answer.text.startswith(": ping\n\n")
    assert [it if it == "[DONE]" else it["error"]["code"] for it in events(answer.text)] == ["engine_timeout", "[DONE]"]


LAST = '{"choices":[{"index":0,"delta":{"content":"ä"},"finish_reason":"stop"}]}'
ODD = {
    "CRLF": f"data: {LAST}\r\n\r\ndata: [DONE]\r\n\r\n",
    "CR": f"data: {LAST}\r\rdata: [DONE]\r\r",
    "no space after the colon": f"data:{LAST}\n\ndata:[DONE]\n\n",
    "data on two lines": f"data: {LAST[:11]}\ndata: {LAST[11:]}\n\ndata: [DONE]\n\n",
    "comments and ids": f"data: {LAST.replace('stop', '')}\nid: 1\n\n: hi\n\ndata: {LAST}\n\ndata: [DONE]\n\n",
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("step", [1, 1000])
def test_odd_but_legal_framing_passes_byte_for_byte(gateway: GatewayProcess, name: str, step: int) -> None:
    raw = ODD[name].encode()
    pieces = [["hex", raw[start : start + step].hex()] for start in range(0, len(raw), step)]
    assert ask(gateway, [*pieces, ["end"]]).content == raw


def test_an_endless_event_is_stopped_at_the_cap(gateway: GatewayProcess) -> None:
    answer = ask(gateway, [*START, ["text", 'data: {"x": "'], ["flood", 12_000_000], ["hang"]])
    assert events(answer.text)[-2]["error"]["code"] == "engine_broken_stream"
    assert len(answer.content) < 10_000


def test_a_stale_connection_is_replaced_without_the_client_noticing(gateway: GatewayProcess) -> None:
    """The engine ends its answer properly and then closes the idle connection, as a restarted one does."""
    for _ in range(20):
        chunks = events(ask(gateway, [*START, ["finish", "stop"], ["done"], ["end_and_close"]]).text)
        assert chunks[-1] == "[DONE]"
        assert "error" not in chunks[-2]


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
    "not HTTP": "SSH-2.0-OpenSSH_9.2\r\n",
    "shorter than its length": f"{OK}content-length: {len(JSON) + 5}\r\n\r\n{JSON}",
    "a chunk cut short": f"{OK}transfer-encoding: chunked\r\n\r\nff\r\n{JSON}",
    "two lengths": f"{OK}content-length: 5\r\ncontent-length: {len(JSON)}\r\n\r\n{JSON}",
    "compressed unasked": f"{OK}content-encoding: gzip\r\ncontent-length: 5\r\n\r\n12345",
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
        assert engine.all_seen()["connections"] - before <= 2


def test_engine_away_and_back(tmp_path: Any) -> None:
    with fake_engine() as first:
        port = int(first.url.rpartition(":")[2])
        with running_gateway(tmp_path / "log", first.url, STACK_WORKERS="1") as gateway, gateway.client() as client:
            assert client.get("/readyz").status_code == 200
            first.process.kill()
            first.process.wait()
            for stream in (False, True):
                answer = client.post(CHAT, json={"messages": MESSAGES, "stream": stream})
                assert answer.status_code == 503
                assert answer.json()["error"]["code"] == "engine_unavailable"
                assert int(answer.headers["retry-after"]) > 0
            wait_for(lambda: client.get("/readyz").status_code == 503)
            assert client.get("/livez").status_code == 200
            assert client.get("/v1/models").status_code == 200
            with fake_engine(port):
                assert text_of(events(ask(gateway).text)) == "one two three"
                wait_for(lambda: client.get("/readyz").status_code == 200)


def test_a_black_hole_times_out(tmp_path: Any) -> None:
    """A listening socket whose backlog is full answers no SYN."""
    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0))
        hole.listen(0)
        fillers = []
        for _ in range(8):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(hole.getsockname())
            fillers.append(filler)
        url = f"http://127.0.0.1:{hole.getsockname()[1]}"
        with running_gateway(tmp_path / "log", url, LLM_CONNECT_TIMEOUT="1", STACK_WORKERS="1") as gateway:
            started = time.monotonic()
            answer = ask(gateway)
            assert (answer.status_code, answer.json()["error"]["code"]) == (504, "engine_timeout")
            assert time.monotonic() - started < 5
        for filler in fillers:
            filler.close()


def test_readyz_tells_an_engine_that_is_loading(engine: FakeEngine, gateway: GatewayProcess) -> None:
    engine.health(503)
    try:
        with gateway.client() as client:
            answer = wait_for(lambda: (it := client.get("/readyz")).status_code == 503 and it)
            assert answer.json()["error"]["code"] in ("model_loading", "server_is_overloaded")
            assert "retry-after" in answer.headers
    finally:
        engine.health(200)
