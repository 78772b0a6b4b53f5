"""Traces: which spans there are of a request, and whose children they are."""

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.support.collector import Collector, Span, collecting
from tests.support.processes import (
    AUTH,
    MESSAGES,
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
CANARY = "canary-51c7"
CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CONFIG = """
engines:
  engine: &engine {{dialect: vllm, base_url: "{url}"}}
  other: *engine
  narrow: {{dialect: vllm, base_url: "{url}", slots: 1}}
  gone: {{dialect: vllm, base_url: "{gone}"}}
models:
  fake-model: {{targets: [{{engine: engine, model: fake-model}}]}}
  narrow: {{targets: [{{engine: narrow, model: fake-model}}]}}
  first-gone: {{targets: [{{engine: gone, model: fake-model}}], fallbacks: [{{engine: engine, model: fake-model}}]}}
  resumed: {{targets: [{{engine: engine, model: x}}, {{engine: other, model: x}}], resume: {{most: 1}}}}
  alone: {{targets: [{{engine: engine, model: x}}], resume: {{most: 1, wait: 1}}}}
  waiting: {{targets: [{{engine: gone, model: fake-model}}], resume: {{most: 1}}}}
default_model: fake-model
breaker: {{failures: 1000}}
retries: {{budget: 1, backoff: 0}}
"""
CUT = {"dialect": "vllm", "pieces": ["one", " two", " three"], "cuts": [2]}


@dataclass
class Setting:
    gateway: GatewayProcess
    engine: FakeEngine
    collector: Collector
    metrics: int
    gone: int  # the port of an engine that is away

    def ask(self, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        with self.gateway.client() as client:
            return post(client, CHAT, json={"messages": MESSAGES} | fields, headers=headers or {})

    def trace(self, answer: httpx.Response) -> list[Span]:
        return self.collector.of(answer.headers["x-request-id"])


@pytest.fixture(scope="module")
def own(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    path, gone, metrics = tmp_path_factory.mktemp("traces"), free_port(), free_port()
    (path / "stack.yaml").write_text(CONFIG.format(url=engine.url, gone=f"http://127.0.0.1:{gone}"))
    with collecting() as collector:
        settings = {
            "STACK_CONFIG": str(path / "stack.yaml"),
            "STACK_WORKERS": "1",
            "STACK_METRICS_BIND": f"127.0.0.1:{metrics}",
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Basic%20abc, x-team=blue",
            "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test%201,docker.cli.cobra.command_path=docker",
        }
        with running_gateway(path / "log", engine.url, **settings) as gateway:
            yield Setting(gateway, engine, collector, metrics, gone)


MALFORMED = (
    "",
    "00-" + "0" * 32 + "-b7ad6b7169203331-01",
    "00-0af7651916cd43dd8448eb211c80319c-" + "0" * 16 + "-01",
    "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
    "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
    "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
)
UNSAMPLED, LATER = CALLER[0][::-1], "c" + CALLER[0][1:]
SENT: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    # name: the headers and the body
    "unsampled": ({"traceparent": f"00-{UNSAMPLED}-{CALLER[1]}-00"}, {}),
    "stream": ({}, {"stream": True, "temperature": 0.5, "max_tokens": 64}),
    "traced": ({"traceparent": f"00-{'-'.join(CALLER)}-01", "tracestate": "vendor=value,other=1"}, {}),
    **{f"malformed {it}": ({"traceparent": it, "tracestate": "vendor=value"}, {}) for it in MALFORMED},
    "a later version": ({"traceparent": f"cc-{LATER}-{CALLER[1]}-01-what-comes"}, {}),
    "fallback": ({}, {"model": "first-gone"}),
    "retried": ({}, {"script": [["close"]]}),
    "resumed": ({}, {"model": "resumed", "stream": True, "script": [["answer", CUT]]}),
    "bad_request": ({}, {"messages": 3}),
    "invalid_api_key": ({"authorization": "Bearer wrong"}, {}),
    "model_not_found": ({}, {"model": "nobody-has-it"}),
}


@dataclass
class Sent:
    """The answer to one of SENT, and what the engine saw of the request."""

    answer: httpx.Response
    seen: list[dict[str, Any]]


@pytest.fixture(scope="module")
def sent(own: Setting) -> dict[str, Sent]:
    """All of SENT, sent one after the other before a test waits for their spans, which go out once a second."""
    found = {}
    for name, (headers, fields) in SENT.items():
        answer = own.ask(headers, user=f"traces: {name}", **fields)
        found[name] = Sent(answer, own.engine.seen(f"traces: {name}"))
    return found


def children(spans: list[Span], of: Span) -> list[str]:
    return [it.name for it in spans if it.parent == of.id]


def test_a_stream_has_a_span_with_its_attempt_and_its_first_token(own: Setting, sent: dict[str, Sent]) -> None:
    answer, (seen,) = sent["stream"].answer, sent["stream"].seen
    request, attempt = own.trace(answer)
    assert (request.name, request.kind, request.parent) == (f"POST {CHAT}", "server", "")
    assert (attempt.name, attempt.kind, attempt.parent) == ("chat fake-model", "client", request.id)
    assert request.began <= attempt.began <= attempt.ended <= request.ended
    assert attempt.began < attempt.events["stack.first_token"] < attempt.ended
    assert abs(request.began - time.time()) < 60
    assert not request.failed
    assert not attempt.failed
    assert request.attributes == {
        "http.request.method": "POST",
        "http.route": CHAT,
        "http.response.status_code": 200,
        "url.scheme": "http",
        "url.path": CHAT,
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "fake-model",
        "gen_ai.request.stream": True,
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 3,
        "stack.api": "chat_completions",
        "stack.key.id": own.gateway.lines(answer.headers["x-request-id"])[0]["key"],
        "stack.request.id": answer.headers["x-request-id"],
    }
    first = attempt.attributes.pop("gen_ai.response.time_to_first_chunk")
    assert first == pytest.approx(attempt.events["stack.first_token"] - attempt.began, abs=0.001)
    assert attempt.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": "fake-model",
        "gen_ai.request.stream": True,
        "gen_ai.request.max_tokens": 64,
        "gen_ai.request.temperature": 0.5,
        "server.address": "127.0.0.1",
        "server.port": int(own.engine.url.rpartition(":")[2]),
        "stack.engine": "engine",
        "stack.engine.request.id": seen["headers"]["x-request-id"],
    }
    assert seen["headers"]["traceparent"] == f"00-{request.trace}-{attempt.id}-01"


def test_the_collector_knows_whose_spans_they_are(own: Setting, sent: dict[str, Sent]) -> None:
    own.trace(sent["stream"].answer)
    (headers, resource) = own.collector.headers[-1], own.collector.resources[-1]
    assert headers["content-type"] == "application/x-protobuf"
    assert (headers["authorization"], headers["x-team"]) == ("Basic abc", "blue")
    assert (resource["service.name"], resource["deployment.environment.name"]) == ("stack", "test 1")
    assert not any("docker" in it for it in resource)  # by Docker's command, which adds this
    assert {"service.version", "service.instance.id"} <= set(resource)


def test_a_callers_trace_goes_on_and_is_handed_on(own: Setting, sent: dict[str, Sent]) -> None:
    trace, parent = CALLER
    request, attempt = own.trace(sent["traced"].answer)
    assert (request.trace, request.parent, request.state) == (trace, parent, "vendor=value,other=1")
    assert request.flags == 0x301, "sampled, and its parent is another program's"
    assert (attempt.trace, attempt.parent, attempt.flags) == (trace, request.id, 0x101)
    seen = sent["traced"].seen[0]["headers"]
    assert (seen["traceparent"], seen["tracestate"]) == (f"00-{trace}-{attempt.id}-01", "vendor=value,other=1")


def test_a_caller_that_does_not_sample_is_believed(own: Setting, sent: dict[str, Sent]) -> None:
    seen = sent["unsampled"].seen[0]["headers"]["traceparent"]
    assert re.fullmatch(rf"00-{UNSAMPLED}-[0-9a-f]{{16}}-00", seen)
    assert CALLER[1] not in seen
    own.trace(sent["model_not_found"].answer)  # told after it
    assert not [it for it in own.collector.spans if it.trace == UNSAMPLED]


@pytest.mark.parametrize("value", MALFORMED)
def test_a_malformed_trace_begins_anew(own: Setting, sent: dict[str, Sent], value: str) -> None:
    request, _ = own.trace(sent[f"malformed {value}"].answer)
    assert (request.parent, request.state) == ("", "")
    assert request.trace not in value


def test_a_later_version_of_the_header_is_read(own: Setting, sent: dict[str, Sent]) -> None:
    request, _ = own.trace(sent["a later version"].answer)
    assert (request.trace, request.parent) == (LATER, CALLER[1])


def test_attempts_and_a_fallback_are_children_of_the_request(own: Setting, sent: dict[str, Sent]) -> None:
    request, first, second = own.trace(sent["fallback"].answer)
    assert (first.parent, second.parent) == (request.id, request.id)
    assert (first.failed, first.attributes["error.type"]) == (True, "engine_unavailable")
    assert (first.attributes["stack.engine"], second.attributes["stack.engine"]) == ("gone", "engine")
    assert first.ended <= second.began
    assert (second.failed, request.failed, request.attributes["stack.attempts"]) == (False, False, 2)


def test_every_retry_has_a_span_with_its_error(own: Setting, sent: dict[str, Sent]) -> None:
    answer = sent["retried"].answer
    request, *attempts = own.trace(answer)
    assert answer.status_code == 502
    assert len(attempts) == request.attributes["stack.attempts"] > 1
    assert {(it.parent, it.failed, it.attributes["error.type"]) for it in attempts} == {
        (request.id, True, "engine_error")
    }
    assert (request.failed, request.attributes["error.type"]) == (True, "engine_error")
    assert request.attributes["http.response.status_code"] == 502
    assert len({it.attributes["stack.engine.request.id"] for it in attempts}) == len(attempts)


def test_a_wait_for_a_slot_has_a_span_before_the_attempt(own: Setting, mark: str) -> None:
    script = [["role"], ["token", "x"], ["gate", mark], ["finish", "stop"], ["done"], ["end"]]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(own.ask, model="narrow", stream=True, user=mark, script=script)
        own.engine.wait_seen(mark, "running")
        second = pool.submit(own.ask, model="narrow", stream=True)
        wait_for(lambda: scrape(own.metrics).total("stack_queue_depth", upstream="narrow") == 1)
        own.engine.release(mark)
        first.result()
        answer = second.result()
    request, queue, attempt = own.trace(answer)
    assert (queue.name, queue.kind, queue.attributes) == ("queue", "internal", {"stack.engine": "narrow"})
    assert (queue.parent, attempt.parent) == (request.id, request.id)
    assert request.began <= queue.began < queue.ended <= attempt.began
    assert round((queue.ended - queue.began) * 1000) == pytest.approx(int(answer.headers["x-stack-queue-ms"]), abs=2)


def test_a_resume_holds_the_attempts_that_continue_the_answer(own: Setting, sent: dict[str, Sent]) -> None:
    request, first, resume, second = own.trace(sent["resumed"].answer)
    assert children([first, resume, second], request) == ["chat x", "resume"]
    assert children([first, resume, second], resume) == ["chat x"]
    assert (first.failed, resume.failed, second.failed, request.failed) == (True, False, False, False)
    assert resume.began == pytest.approx(first.ended, abs=0.001)
    assert resume.began <= second.began <= second.ended <= resume.ended + 0.001
    assert "stack.first_token" in first.events
    assert request.attributes["stack.resumes"] == 1
    assert {first.attributes["stack.engine"], second.attributes["stack.engine"]} == {"engine", "other"}


def test_an_answer_that_nobody_continued_shows_how_long_it_was_searched_for(own: Setting) -> None:
    own.engine.health(503)
    try:
        answer = own.ask(model="alone", stream=True, script=[["role"], ["token", "x"], ["close"]])
    finally:
        own.engine.health(200)
    request, first, resume = own.trace(answer)
    assert (first.parent, resume.parent, resume.name) == (request.id, request.id, "resume")
    assert resume.failed
    assert request.failed
    assert request.attributes["error.type"] == "engine_broken_stream"
    assert request.attributes["http.response.status_code"] == 200
    assert resume.ended - resume.began > 0.9


def test_a_wait_for_an_engine_that_is_down_has_a_span(own: Setting, mark: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(own.ask, model="waiting", user=mark)
        wait_for(lambda: scrape(own.metrics).total("stack_slots_used", upstream="gone"))
        with fake_engine(own.gone):
            answer = waiting.result()
    assert answer.status_code == 200
    request, first, outage, second = own.trace(answer)
    assert (first.failed, outage.name, second.failed) == (True, "outage", False)
    assert {it.parent for it in (first, outage, second)} == {request.id}


def test_a_client_that_left_is_nobodys_failure(own: Setting, mark: str) -> None:
    headers, script = {"x-request-id": f"left-{mark}"}, [["role"], ["token", "x"], ["hang"]]
    body = {"messages": MESSAGES, "stream": True, "user": mark, "script": script}
    with own.gateway.client() as client, client.stream("POST", CHAT, json=body, headers=headers) as answer:
        next(answer.iter_lines())
    own.engine.wait_seen(mark, "hung_up")
    request, attempt = own.collector.of(f"left-{mark}")
    assert (request.failed, request.attributes["error.type"]) == (False, "client_left")
    assert (attempt.failed, attempt.attributes["error.type"]) == (False, "client_left")
    assert request.attributes["http.response.status_code"] == 499


def test_a_long_finish_reason_is_cut_in_spans_and_in_the_log_and_not_for_the_client(own: Setting) -> None:
    long = [letter * 100_000 for letter in "fg"]
    whole = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": long[0]}]}
    scripts = {
        False: [["json", [200, whole]]],
        True: [["role"], ["token", "x"], ["finish", long[1]], ["done"], ["end"]],
    }
    for (stream, script), reason in zip(scripts.items(), long, strict=True):
        answer = own.ask(stream=stream, script=script)
        assert f'"{reason}"' in answer.text
        request, _ = own.trace(answer)
        assert request.attributes["gen_ai.response.finish_reasons"] == [reason[:64]]
        lines = own.gateway.told("chat_finished_stream" if stream else "chat_finished")
        ids = {it["request_id"]: it["finish_reason"] for it in lines}
        assert ids[answer.headers["x-request-id"]] == reason[:64]


def test_a_refused_request_has_a_span_and_no_attempt(own: Setting, sent: dict[str, Sent]) -> None:
    for outcome in ("bad_request", "invalid_api_key", "model_not_found"):
        answer = sent[outcome].answer
        (request,) = own.trace(answer)
        assert (request.name, request.failed) == (f"POST {CHAT}", False)
        assert request.attributes["error.type"] == outcome
        assert request.attributes["http.response.status_code"] == answer.status_code


def test_other_paths_are_named_by_their_route(own: Setting) -> None:
    answers = [httpx.get(own.gateway.url + path, headers=AUTH) for path in ("/v1/models/fake-model", f"/{CANARY}")]
    httpx.get(own.gateway.url + "/livez")
    last = own.ask()
    found, unknown = (own.trace(it)[0] for it in answers)
    assert found.name == "GET /v1/models/{model}" or found.name.startswith("GET /v1/models/{")
    assert (unknown.name, unknown.attributes["url.path"]) == ("GET", f"/{CANARY}")
    own.trace(last)
    assert not [it for it in own.collector.spans if it.attributes.get("url.path") == "/livez"]
