"""The log: what an operator reads, and what it must never contain."""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.processes import (
    KEY,
    MESSAGES,
    ROOT,
    FakeEngine,
    GatewayProcess,
    fake_engine,
    free_port,
    post,
    running_gateway,
    scrape,
    wait_for,
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


@pytest.mark.parametrize(("raised", "lines"), [("ValueError('lost')", ["error"]), ("SystemExit(0)", [])])
def test_an_exception_that_nobody_can_catch_is_a_line_like_any_other(raised: str, lines: list[str]) -> None:
    program = f"""
from gateway import logs
class It:
    def __del__(self):
        raise {raised}
logs.configure("INFO")
It()
logs.flush()
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert ran.stderr == ""
    assert [json.loads(line)["level"] for line in ran.stdout.splitlines()] == lines


def test_nothing_private_is_logged(engine: FakeEngine, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": CANARY}]
    script = [["role"], ["token", CANARY], ["event", {"error": {"message": CANARY}}], ["end"]]
    with running_gateway(tmp_path / "log", engine.url, STACK_LOG_LEVEL="DEBUG") as gateway, gateway.client() as client:
        for stream in (True, False):
            client.post(CHAT, json={"messages": messages, "stream": stream})
        post(client, CHAT, json={"messages": messages, "stream": True, "script": script})
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


NESTED = {
    "an object": '{"a":' * 300 + "1" + "}" * 300,
    "a list": "[" * 1000 + "]" * 1000,
    "a tool's parameters": '{"properties":' * 260 + "{}" + "}" * 260,
}


def test_a_body_that_can_not_be_logged_holds_nothing_back(engine: FakeEngine, tmp_path: Path) -> None:
    """The key may have one concurrent request, so each one must have ended in the account, the metrics and the log."""
    port = free_port()
    settings = {"STACK_LOG_LEVEL": "DEBUG", "STACK_LOG_CONTENT": "true", "STACK_WORKERS": "1"}
    settings |= {"STACK_LIMIT_CONCURRENT": "1", "STACK_METRICS_BIND": f"127.0.0.1:{port}"}
    with running_gateway(tmp_path / "log", engine.url, **settings) as gateway, gateway.client() as client:
        for value in NESTED.values():
            content = b'{"messages":[{"role":"user","content":"x"}],"x":%s}' % value.encode()
            refused = client.post(CHAT, content=content, headers={"content-type": "application/json"})
            assert refused.status_code == 400, refused.text
            assert client.post(CHAT, json={"messages": MESSAGES}).status_code == 200
        samples = wait_for(lambda: it if not (it := scrape(port)).total("stack_requests_in_flight") else None)
        assert samples.total("stack_requests_total", outcome="finished") == len(NESTED)
        assert not [line for line in gateway.log() if line["level"] == "error"]


def test_control_characters_in_a_path_stay_escaped(gateway: GatewayProcess, mark: str) -> None:
    httpx.get(gateway.url + "/v1/models/%0a%1b[31m{%22ts%22:1}", headers={"x-request-id": mark})
    (line,) = gateway.lines(mark)
    assert line["path"] == '/v1/models/\n\x1b[31m{"ts":1}'
    assert "\x1b" not in gateway.log_path.read_text()


# ── Less of it ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_event_and_a_logger_can_have_a_level_of_their_own(engine: FakeEngine, tmp_path: Path) -> None:
    levels = "request=WARNING,chat_started=ERROR,uvicorn.error=ERROR,sqlalchemy.engine=DEBUG,fallback=ERROR"
    with running_gateway(tmp_path / "log", engine.url, STACK_LOG_LEVELS=levels) as gateway, gateway.client() as client:
        assert client.post(CHAT, json={"messages": MESSAGES}).status_code == 200
        broken = post(client, CHAT, json={"messages": MESSAGES, "script": [["json", [500, {}]]]})
        gateway.lines(broken.headers["x-request-id"])
        gateway.stop()
        lines = gateway.log()
    told = {line["msg"] for line in lines if "request_id" in line}
    assert told == {"chat_finished", "retry", "request"}
    assert {line["status"] for line in lines if line["msg"] == "request"} == {502}
    assert {line["logger"] for line in lines if "logger" in line} == {"stack", "gunicorn.error"}


def test_a_wrong_level_is_told_at_the_start(engine: FakeEngine, tmp_path: Path) -> None:
    for wrong in ("request=LOUD", "request"):
        with (
            pytest.raises(AssertionError, match="STACK_LOG_LEVELS"),
            running_gateway(tmp_path / "log", engine.url, STACK_LOG_LEVELS=wrong),
        ):
            pass


def test_of_what_succeeds_a_share_is_logged_and_of_what_fails_everything(
    engine: FakeEngine, tmp_path: Path, mark: str
) -> None:
    def lines(request_id: str) -> list[str]:
        return [line["msg"] for line in gateway.log() if line.get("request_id") == request_id]

    with running_gateway(tmp_path / "log", engine.url, STACK_LOG_SAMPLE="0.5") as gateway, gateway.client() as client:
        succeeded = [f"{mark}-{number}" for number in range(60)]
        for name in succeeded:
            client.post(CHAT, json={"messages": MESSAGES, "stream": True}, headers={"x-request-id": name})
        failed = [f"{mark}-failed-{number}" for number in range(10)]
        for name in failed:
            script = [["role"], ["token", "x"], ["close"]] if name.endswith("0") else [["json", [500, {}]]]
            body = {"messages": MESSAGES, "stream": True, "script": script}
            post(client, CHAT, json=body, headers={"x-request-id": name})
        post(client, CHAT, json={"messages": 3}, headers={"x-request-id": f"{mark}-wrong"})
        gateway.stop()
    told = {name: lines(name) for name in succeeded}
    assert set(map(tuple, told.values())) == {(), ("chat_started", "chat_finished_stream", "request")}
    assert all("chat_finished_stream" in lines(name) for name in failed)
    assert all("request" in lines(name) for name in failed if not name.endswith("0"))
    assert lines(f"{mark}-wrong") == ["request"]


# ── Levels ───────────────────────────────────────────────────────────────────────────────────────────────────────────

TABLE = {
    (event, level)
    for event, level in re.findall(r"^\| `(\w+)` \| (\w+) \|", (ROOT / "docs/logs.md").read_text(), re.MULTILINE)
}
# What a full disk, a blocked pipe, a flood, a dying engine or a killed worker brings about, in tests of their own.
RARE = {
    ("answer_taken_over", "warning"),
    ("usage_dropped", "warning"),
    ("spans_dropped", "warning"),
    ("quota_near", "warning"),
    ("log_lines_dropped", "warning"),
    ("requests_not_logged", "info"),
    ("engine_killer_suspected", "warning"),
    ("response_not_stored", "warning"),
    ("model_loaded", "info"),
    ("model_load_failed", "warning"),
    ("engine_swap_failed", "warning"),
}
LEVELS = """
engines:
  engine: &engine {{dialect: vllm, base_url: "{url}"}}
  other: *engine
  gone: {{dialect: vllm, base_url: "{gone}"}}
  telling: {{dialect: llamacpp, base_url: "{telling}"}}
models:
  fake-model: &fake {{targets: [{{engine: engine, model: fake-model}}]}}
  gone: {{targets: [{{engine: gone, model: x}}], fallbacks: [{{engine: engine, model: x}}]}}
  resumed: {{targets: [{{engine: engine, model: x}}, {{engine: other, model: x}}], resume: {{most: 1}}}}
  telling: {{targets: [{{engine: telling, model: x}}]}}
  waiting: {{targets: [{{engine: gone, model: x}}], resume: {{most: 1}}}}
default_model: fake-model
breaker: {{failures: 1, probe_every: 0.2}}
retries: {{budget: 1, backoff: 0}}
"""
FULL = "The engine is currently busy and cannot accept new requests. Please try again later or on a different instance."


def kind(event: str) -> str:
    return re.sub(r"^(chat|completion|embedding)_", "KIND_", event)


def test_every_event_is_logged_at_the_level_that_its_table_says(engine: FakeEngine, tmp_path: Path, mark: str) -> None:
    port, metrics = free_port(), free_port()
    file = tmp_path / "stack.yaml"
    settings = {
        "STACK_METRICS_BIND": f"127.0.0.1:{metrics}",
        "STACK_CONFIG": str(file),
        "STACK_LOG_LEVEL": "DEBUG",
        "STACK_LOG_CONTENT": "true",
        "STACK_WORKERS": "1",
    }
    with fake_engine(dialect="llamacpp") as telling:
        file.write_text(LEVELS.format(url=engine.url, gone=f"http://127.0.0.1:{port}", telling=telling.url))
        with running_gateway(tmp_path / "log", engine.url, **settings) as gateway, gateway.client() as client:

            def ask(*script: list[Any], key: str = "", **fields: Any) -> int:
                body = {"messages": MESSAGES} | ({"script": script} if script else {}) | fields
                return post(client, CHAT, json=body, headers={"idempotency-key": key} if key else {}).status_code

            for path in ("/v1/completions", "/v1/embeddings"):
                assert client.post(path, json={"prompt": "x", "input": "x"}).status_code == 200
            for stream in (True, False):
                assert ask(stream=stream, model="gone") == 200
                assert ask(["json", [503, {}]], stream=stream) == 503
                assert ask(["json", [503, {"error": {"message": FULL}}]], stream=stream) == 503
                assert ask(["json", [422, {}]], stream=stream) == 422
                assert ask(["json", [500, {}]], stream=stream) == 502
                assert ask(stream=stream, key=f"{mark}{stream}") == 200
                assert ask(stream=stream, key=f"{mark}{stream}") == 200
            broken = ask(["role"], ["token", "x"], ["end"], stream=True)
            cut = {"dialect": "vllm", "pieces": ["one", " two"], "cuts": [2]}
            assert (broken, ask(["answer", cut], stream=True, model="resumed", user=mark)) == (200, 200)
            with ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(ask, model="waiting")
                wait_for(lambda: scrape(metrics).total("stack_slots_used", upstream="gone"))
                with fake_engine(port):
                    assert waiting.result() == 200
                    wait_for(lambda: any(it["msg"] == "engine_state" and it["level"] == "info" for it in gateway.log()))
            wait_for(lambda: any(it["msg"] == "engine_slots" for it in gateway.log()))
            gateway.stop()
            told = [line for line in gateway.log() if "logger" not in line]
    assert {(kind(line["msg"]), line["level"]) for line in told} == TABLE - RARE
    levels = {it["outcome"]: it["level"] for it in told if "outcome" in it}
    assert levels["finished"] == levels["engine_refused"] == "info"
    assert levels["server_is_overloaded"] == "warning"
    assert levels["engine_error"] == levels["engine_broken_stream"] == "error"
    assert {line["level"] for line in told if line["msg"] == "request" and line["status"] in (200, 422)} == {"info"}


def test_every_event_that_the_source_names_is_in_the_table() -> None:
    source = "".join(it.read_text() for it in (ROOT / "gateway").rglob("*.py"))
    named = set(re.findall(r"""logs\.event\(\s*"(\w+)\"""", source))
    assert named
    assert named <= {event for event, _ in TABLE}
