"""The log: what an operator reads, and what must never be in it."""

from pathlib import Path

import httpx

from tests.processes import (
    KEY,
    MESSAGES,
    FakeEngine,
    GatewayProcess,
    running_gateway,
)

CHAT = "/v1/chat/completions"
CANARY = "canary-7f3a"


def test_a_stream_writes_three_lines_that_share_its_id(gateway: GatewayProcess) -> None:
    with gateway.client() as client:
        answer = client.post(CHAT, json={"messages": MESSAGES, "stream": True})
    started, finished, request = gateway.lines(answer.headers["x-request-id"])
    assert started["msg"] == "chat_started"
    assert (started["model"], started["n_messages"], started["stream"]) == ("fake-model", 1, True)
    assert finished["msg"] == "chat_finished_stream"
    assert (finished["tokens_in"], finished["tokens_out"], finished["finish_reason"]) == (7, 3, "stop")
    assert finished["ttft_ms"] > 0
    assert finished["outcome"] == "finished"
    assert request["msg"] == "request"
    assert (request["method"], request["path"], request["status"]) == ("POST", CHAT, 200)
    assert request["elapsed_ms"] >= finished["ttft_ms"]
    for line in (started, finished, request):
        assert line["level"] == "info"
        assert isinstance(line["ts"], int)
        assert line["ts"] > 1_700_000_000_000
        assert not any(isinstance(value, dict | list) for value in line.values())  # flat


def test_a_blocking_call_writes_three_lines(gateway: GatewayProcess) -> None:
    with gateway.client() as client:
        answer = client.post(CHAT, json={"messages": MESSAGES})
    started, finished, request = gateway.lines(answer.headers["x-request-id"])
    assert [started["msg"], finished["msg"], request["msg"]] == ["chat_started", "chat_finished", "request"]
    assert (finished["tokens_in"], finished["tokens_out"], finished["finish_reason"]) == (7, 3, "stop")


def test_every_line_is_json_from_start_to_end(engine: FakeEngine, tmp_path: Path) -> None:
    with running_gateway(tmp_path / "log", engine.url) as gateway:
        httpx.get(gateway.url + "/health")
        with httpx.Client() as raw:  # uvicorn's own complaint
            raw.get(gateway.url + "/health", headers={"host": "x y"})
        gateway.stop()
        lines = gateway.log()  # raises if one isn't JSON
    assert all({"ts", "level", "msg"} <= set(line) for line in lines)
    assert {line["logger"] for line in lines if "logger" in line} >= {"gunicorn.error", "uvicorn.error"}


def test_nothing_private_is_logged(engine: FakeEngine, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": CANARY}]
    script = [["role"], ["token", CANARY], ["event", {"error": {"message": CANARY}}], ["end"]]
    with running_gateway(tmp_path / "log", engine.url, STACK_LOG_LEVEL="DEBUG") as gateway, gateway.client() as client:
        for stream in (True, False):
            client.post(CHAT, json={"messages": messages, "stream": stream})
        client.post(CHAT, json={"messages": messages, "stream": True, "script": script})
        client.post(CHAT + f"?q={CANARY}", json={"messages": messages}, headers={"x-trace": CANARY, "cookie": CANARY})
        client.post(CHAT, json={"messages": messages}, headers={"authorization": f"Bearer {CANARY}"})
        client.post(CHAT, content=f'{{"messages": {CANARY}}}')
        gateway.stop()
        text = gateway.log_path.read_text()
    assert "chat_finished" in text
    assert CANARY not in text
    assert KEY not in text


def test_content_is_logged_only_at_debug_and_with_the_switch(engine: FakeEngine, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": CANARY}]
    for level, expected in (("INFO", False), ("DEBUG", True)):
        settings = {"STACK_LOG_LEVEL": level, "STACK_LOG_CONTENT": "true", "STACK_WORKERS": "1"}
        with running_gateway(tmp_path / "log", engine.url, **settings) as gateway, gateway.client() as client:
            client.post(CHAT, json={"messages": messages, "stream": True})
            gateway.stop()
            lines = gateway.log()
        content = [line for line in lines if line["msg"] in ("prompt", "output")]
        assert bool(content) == expected
        assert all(line["level"] == "debug" for line in content)
        if expected:
            assert CANARY in content[0]["body"]
            assert " three" in content[1]["body"]


def test_control_characters_in_a_path_stay_escaped(gateway: GatewayProcess, mark: str) -> None:
    httpx.get(gateway.url + "/v1/models/%0a%1b[31m{%22ts%22:1}", headers={"x-request-id": mark})
    (line,) = gateway.lines(mark)
    assert line["path"] == '/v1/models/\n\x1b[31m{"ts":1}'
    assert "\x1b" not in gateway.log_path.read_text()
