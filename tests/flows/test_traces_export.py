"""Traces: what a setting adds, and a collector that is away, refuses, or is not there."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.traces import names
from tests.support.collector import Collector, collecting
from tests.support.processes import MESSAGES, FakeEngine, GatewayProcess, free_port, running_gateway, scrape, wait_for

CHAT = "/v1/chat/completions"
CANARY = "canary-51c7"
CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(scope="module")
def telling(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[GatewayProcess, Collector]]:
    """A gateway that tells its collector what is said."""
    with collecting() as collector:
        settings = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url + "/", "STACK_TRACE_CONTENT": "true"}
        with running_gateway(tmp_path_factory.mktemp("telling") / "log", engine.url, **settings) as gateway:
            yield gateway, collector


def test_prompts_and_answers_are_told_if_a_setting_asks(telling: tuple[GatewayProcess, Collector]) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": CANARY},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
            ],
        },
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "found"},
        {"role": "tool", "tool_call_id": "d", "content": [{"type": "text", "text": it} for it in ("also", "this")]},
    ]
    gateway, collector = telling
    with gateway.client() as client:
        answers = [client.post(CHAT, json={"messages": messages, "stream": stream}) for stream in (True, False)]
    for answer in answers:
        assert answer.status_code == 200, answer.text
        request, _ = collector.of(answer.headers["x-request-id"])
        told, made = (json.loads(request.attributes[name]) for name in (names.INPUT, names.OUTPUT))
        assert [it["role"] for it in told] == ["system", "user", "assistant", "tool", "tool"]
        assert told[1]["parts"] == [{"type": "text", "content": CANARY}, {"type": "image_url"}]
        assert told[2]["parts"] == [{"type": "tool_call", "id": "c", "name": "look", "arguments": "{}"}]
        assert told[3]["parts"] == [{"type": "tool_call_response", "id": "c", "response": "found"}]
        assert told[4]["parts"] == [{"type": "tool_call_response", "id": "d", "response": "also\nthis"}]
        text = {"type": "text", "content": "one two three"}
        assert made == [{"role": "assistant", "parts": [text], "finish_reason": "stop"}]


def test_every_choice_of_an_answer_is_told(telling: tuple[GatewayProcess, Collector]) -> None:
    chunks = [["event", {"choices": [{"index": it, "delta": {"content": f"text {it}"}}]}] for it in range(2)]
    ends = [["event", {"choices": [{"index": it, "delta": {}, "finish_reason": "stop"}]}] for it in range(2)]
    body = {"messages": MESSAGES, "stream": True, "n": 2, "script": [*chunks, *ends, ["done"], ["end"]]}
    gateway, collector = telling
    with gateway.client() as client:
        request, _ = collector.of(client.post(CHAT, json=body).headers["x-request-id"])
    made = json.loads(request.attributes[names.OUTPUT])
    assert [it["parts"][0]["content"] for it in made] == ["text 0", "text 1"]


def test_an_answer_of_tool_calls_alone_is_told(telling: tuple[GatewayProcess, Collector]) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    whole = {"choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]}
    delta = {"role": "assistant", "tool_calls": [{"index": 0, **call}]}
    chunk = {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    ends = [["event", chunk], ["finish", "tool_calls"], ["done"], ["end"]]
    gateway, collector = telling
    for script in ([["json", [200, whole]]], ends):
        body = {"messages": MESSAGES, "stream": script is ends, "script": script}
        with gateway.client() as client:
            request, _ = collector.of(client.post(CHAT, json=body).headers["x-request-id"])
        (made,) = json.loads(request.attributes[names.OUTPUT])
        (part,) = made["parts"]
        assert (part["type"], part["name"], part["arguments"]) == ("tool_call", "look", "{}")
        assert part.get("id", "c") == "c"


def test_what_is_told_of_a_long_conversation_is_bounded(telling: tuple[GatewayProcess, Collector]) -> None:
    parts = [{"type": "text", "text": "p" * 5000}] * 300
    messages = [{"role": "user", "content": it} for it in (*["m" * 20_000] * 30, parts, "the last one")]
    gateway, collector = telling
    with gateway.client() as client:
        request, _ = collector.of(client.post(CHAT, json={"messages": messages}).headers["x-request-id"])
    told = [it["parts"] for it in json.loads(request.attributes[names.INPUT])]
    assert told[-1] == [{"type": "text", "content": "the last one"}]
    assert [(it["type"], len(it["content"])) for it in told[-2]] == [("text", 16_384)]
    assert sum(len(it["content"]) for them in told for it in them) <= 131_072


def test_spans_beyond_the_backlog_are_lost_and_the_reason_is_told(engine: FakeEngine, tmp_path: Path) -> None:
    large = [{"role": "user", "content": "\x01" * 16_384}] * 8  # 800 kB in a span
    with collecting() as collector:
        settings = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "STACK_TRACE_CONTENT": "true", "STACK_WORKERS": "1"}
        with running_gateway(tmp_path / "log", engine.url, **settings) as gateway, gateway.client() as client:
            collector.open.clear()
            client.post(CHAT, json={"messages": MESSAGES})
            wait_for(lambda: collector.asked)
            for _ in range(8):
                assert client.post(CHAT, json={"messages": large}).status_code == 200
            collector.open.set()
            (line,) = gateway.told("spans_dropped")
    assert line["reason"] == "too many spans wait for the collector"


def test_spans_wait_for_a_collector_that_is_away(engine: FakeEngine, tmp_path: Path) -> None:
    port = free_port()
    settings = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}", "STACK_WORKERS": "1"}
    with running_gateway(tmp_path / "log", engine.url, **settings) as gateway, gateway.client() as client:
        ids = [client.post(CHAT, json={"messages": MESSAGES}).headers["x-request-id"] for _ in range(20)]
        with collecting(port) as collector:
            for request_id in ids:
                collector.of(request_id)


def test_spans_that_a_collector_refuses_or_rejects_are_lost_and_counted(engine: FakeEngine, tmp_path: Path) -> None:
    port = free_port()
    with collecting() as collector:
        collector.status = 400
        settings = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "STACK_METRICS_BIND": f"127.0.0.1:{port}"}
        with running_gateway(tmp_path / "log", engine.url, **settings) as gateway, gateway.client() as client:
            for _ in range(3):
                assert client.post(CHAT, json={"messages": MESSAGES}).status_code == 200
            wait_for(lambda: scrape(port).total("stack_spans_dropped_total") == 6)
            lines = wait_for(lambda: [it for it in gateway.log() if it["msg"] == "spans_dropped"])
            assert (lines[0]["level"], lines[0]["reason"]) == ("warning", "the collector answered 400")
            for collector.status, collector.rejects in ((204, 0), (202, 300)):
                collector.of(client.post(CHAT, json={"messages": MESSAGES}).headers["x-request-id"])
            wait_for(lambda: scrape(port).total("stack_spans_dropped_total") == 6 + 2, message="both of the second one")


def test_the_last_spans_go_out_when_the_gateway_stops(engine: FakeEngine, tmp_path: Path) -> None:
    with collecting() as collector:
        settings = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}
        with running_gateway(tmp_path / "log", engine.url, **settings) as gateway, gateway.client() as client:
            answer = client.post(CHAT, json={"messages": MESSAGES})
            assert gateway.stop() == 0
        assert len(collector.of(answer.headers["x-request-id"])) == 2


def test_a_share_of_the_traces_can_be_sampled(engine: FakeEngine, tmp_path: Path) -> None:
    trace, parent = CALLER
    with collecting() as collector:
        settings = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_TRACES_SAMPLER_ARG": "0", "STACK_WORKERS": "1"}
        with running_gateway(tmp_path / "log", engine.url, **settings) as gateway, gateway.client() as client:
            for _ in range(5):
                client.post(CHAT, json={"messages": MESSAGES})
            headers = {"traceparent": f"00-{trace}-{parent}-01"}  # whoever samples it wants all of it
            collector.of(client.post(CHAT, json={"messages": MESSAGES}, headers=headers).headers["x-request-id"])
        assert {it.trace for it in collector.spans} == {trace}


def test_without_a_collector_nothing_of_it_is_loaded_and_no_trace_handed_on(
    engine: FakeEngine, tmp_path: Path, mark: str
) -> None:
    with running_gateway(tmp_path / "log", engine.url, PYTHONPROFILEIMPORTTIME="1") as gateway:
        with gateway.client() as client:
            headers = {"traceparent": f"00-{CALLER[0]}-{CALLER[1]}-01"}
            client.post(CHAT, json={"messages": MESSAGES, "user": mark}, headers=headers)
        loaded = set(re.findall(r"\| +(\S+)$", gateway.log_path.read_text(), re.MULTILINE))
    assert "traceparent" not in engine.wait_seen(mark)["headers"]
    assert "gateway.app" in loaded
    assert {it for it in loaded if it.startswith("gateway.traces")} == {"gateway.traces", "gateway.traces.trace"}
    assert not [it for it in loaded if it.startswith(("opentelemetry.sdk", "opentelemetry.proto", "google.protobuf"))]
