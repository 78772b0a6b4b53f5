"""Totals: log, metrics, usage, traces and console say the same of a thousand mixed requests, also of those that fail
and those whose client disconnects."""

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tests.support.collector import Collector, collecting
from tests.support.console import Visit, visiting
from tests.support.keys import ADMIN
from tests.support.processes import (
    AUTH,
    JSON,
    KEY,
    MESSAGES,
    NO_TLS,
    FakeEngine,
    GatewayProcess,
    Samples,
    free_port,
    post,
    running_gateway,
    scrape,
    wait_for,
)
from tests.support.rows import Rows

CHAT = "/v1/chat/completions"
CONFIG = """
engines:
  engine: &engine {{dialect: vllm, base_url: "{url}"}}
  other: *engine
  gone: {{dialect: vllm, base_url: "http://127.0.0.1:{gone}"}}
models:
  fake-model: {{targets: [{{engine: engine, model: fake-model}}]}}
  first-gone: {{targets: [{{engine: gone, model: x}}], fallbacks: [{{engine: engine, model: x}}]}}
  resumed: {{targets: [{{engine: engine, model: x}}, {{engine: other, model: x}}], resume: {{most: 1}}}}
default_model: fake-model
breaker: {{failures: 1000}}
retries: {{budget: 1, backoff: 0}}
"""
START = [["role"], ["token", "one"], ["token", " two"]]
CUT = {"dialect": "vllm", "pieces": ["one", " two", " three"], "cuts": [2]}
KEPT = {"stream": True, "script": [*START, ["gate", "left"], ["finish", "stop"], ["usage"], ["done"], ["end"]]}


@dataclass(frozen=True)
class Kind:
    """A request, and whether its client leaves before the answer is complete. `kept`: it has an Idempotency-Key."""

    body: dict[str, Any]
    path: str = CHAT
    leaves: bool = False
    kept: bool = False
    times: int = 1
    engaged: bool = True  # an engine is asked


# What is sent, by what it is.
KINDS: dict[str, Kind] = {
    "whole": Kind({}),
    "whole stream": Kind({"stream": True}),
    "a fallback": Kind({"model": "first-gone"}),
    "a resume": Kind({"model": "resumed", "stream": True, "script": [["answer", CUT]]}),
    "a stream that breaks": Kind({"stream": True, "script": [*START, ["close"]]}),
    "an error of the engine": Kind({"script": [["json", [500, {}]]]}),
    "refused by the engine": Kind({"script": [["json", [422, {}]]]}),
    "the client leaves": Kind({"stream": True, "script": [*START, ["hang"]]}, leaves=True),
    "the client of a blocking answer leaves": Kind({"script": [["hang"]]}, leaves=True),
    "an answer that goes on when its client has left": Kind(KEPT, leaves=True, kept=True),
    "an answer that is replayed": Kind({}, kept=True, times=2),
    "a response": Kind({"model": "fake-model", "input": "Hi"}, "/v1/responses"),
    "a message": Kind({"model": "fake-model", "messages": MESSAGES, "max_tokens": 9}, "/v1/messages"),
    "a wrong field": Kind({"messages": 3}, engaged=False),
    "an unknown model": Kind({"model": "nobody-has-it"}, engaged=False),
}
ROUNDS = 70
ASKED = ROUNDS * len(KINDS)
REQUESTS = ROUNDS * sum(it.times for it in KINDS.values())  # replays included
ROWS = ROUNDS * sum(it.engaged for it in KINDS.values())
PATHS = {it.path for it in KINDS.values()}
ENGAGED = {"finished", "engine_broken_stream", "engine_error", "engine_refused", "client_left"}


@dataclass
class Told:
    gateway: GatewayProcess
    collector: Collector
    metrics: int
    rows: Rows


@pytest.fixture(scope="module")
def told(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    path, metrics = tmp_path_factory.mktemp("totals"), free_port()
    (path / "stack.yaml").write_text(CONFIG.format(url=engine.url, gone=free_port()))
    with collecting() as collector:
        settings = {
            "STACK_CONFIG": str(path / "stack.yaml"),
            "STACK_DATA_DIR": str(path / "data"),
            "STACK_METRICS_BIND": f"127.0.0.1:{metrics}",
            "STACK_ADMIN_KEYS": ADMIN,
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            "STACK_IDEMPOTENCY_LINGER": "600",
        }
        with running_gateway(path / "log", engine.url, **settings) as gateway:
            send(gateway, engine)
            rows = Rows(settings)
            yield Told(gateway, collector, metrics, rows)
            rows.close()


def send(gateway: GatewayProcess, engine: FakeEngine) -> None:
    """Send all requests. Those answers that go on without their client end when the gateway knows that it has left."""
    kinds, left = list(KINDS.values()), set()

    def one(number: int) -> None:
        kind, mark = kinds[number % len(kinds)], uuid4().hex
        body = {"messages": MESSAGES, "user": mark} | kind.body if kind.path == CHAT else kind.body
        key = {"idempotency-key": mark} if kind.kept else {}
        if kind.leaves and "stream" not in body:
            with closing(HTTPConnection("127.0.0.1", httpx.URL(gateway.url).port)) as connection:
                connection.request("POST", kind.path, json.dumps(body), AUTH | JSON)
                engine.wait_seen(mark)
            return
        with gateway.client() as client:
            if kind.leaves:
                with client.stream("POST", kind.path, json=body, headers=key) as answer:
                    next(answer.iter_lines())
                left.add(answer.headers["x-request-id"])
                return
            for _ in range(kind.times):
                post(client, kind.path, json=body, headers=key)

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(one, number) for number in range(ASKED)]:
            done.result()
    wait_for(lambda: left <= {it["request_id"] for it in gateway.log() if it["msg"] == "request"})
    engine.release("left")


def finished(told: Told) -> list[dict[str, Any]]:
    """The last lines of requests that reached an engine, once all are there."""

    def lines() -> list[dict[str, Any]]:
        found = [line for line in told.gateway.log() if line["msg"].startswith("chat_finished")]
        return found if len(found) == ROWS else []

    return wait_for(lines)


def spans(told: Told) -> list[dict[str, Any]]:
    """The attributes of the spans of requests, once all are there."""

    def found() -> list[dict[str, Any]]:
        own = [it.attributes for it in told.collector.spans if it.kind == "server"]
        return own if len(own) >= REQUESTS else []

    return wait_for(found)


def rows(told: Told) -> list[dict[str, Any]]:
    return wait_for(lambda: it if len(it := told.rows.all()) == ROWS else [])


def samples(told: Told) -> Samples:
    wait_for(lambda: scrape(told.metrics).total("stack_http_requests_total") >= REQUESTS)
    return scrape(told.metrics)


def test_each_request_has_the_same_outcome_everywhere(told: Told) -> None:
    logged = Counter(line["outcome"] for line in finished(told))
    assert set(logged) == ENGAGED
    assert Counter(row["outcome"] for row in rows(told)) == logged
    counted = samples(told).by("stack_requests_total", "outcome")
    assert {name: counted[name] for name in logged} == logged
    assert sum(counted.values()) == ASKED
    traced = Counter(it.get("error.type", "finished") for it in spans(told) if "gen_ai.operation.name" in it)
    assert traced == logged


def test_tokens_are_the_same_everywhere(told: Told) -> None:
    of_rows, own = rows(told), [it for it in spans(told) if "gen_ai.operation.name" in it]
    for direction, column, attribute in (
        ("input", "tokens_in", "gen_ai.usage.input_tokens"),
        ("output", "tokens_out", "gen_ai.usage.output_tokens"),
    ):
        total = sum(row[column] for row in of_rows)
        assert total > 0
        assert samples(told).total("stack_tokens_total", direction=direction) == total
        assert sum(it.get(attribute, 0) for it in own) == total
        assert sum(line[column] for line in finished(told)) == total


def test_statuses_attempts_and_resumes_are_the_same_everywhere(told: Told) -> None:
    own = spans(told)
    requests = [line for line in told.gateway.log() if line["msg"] == "request" and line["path"] in PATHS]
    assert Counter(line["status"] for line in requests) == Counter(it["http.response.status_code"] for it in own)
    by_class = samples(told).by("stack_http_requests_total", "status")
    assert sum(by_class.values()) == len(requests) == len(own) == REQUESTS
    logged, of_rows = finished(told), rows(told)
    attempts = [it for it in told.collector.spans if it.kind == "client"]
    assert len(attempts) == sum(row["attempts"] for row in of_rows) == sum(line.get("attempts", 1) for line in logged)
    assert len(attempts) == samples(told).total("stack_engine_seconds_count")
    resumes = sum(row["resumes"] for row in of_rows)
    assert resumes == ROUNDS == sum(line.get("resumes", 0) for line in logged)
    assert resumes == sum(it.name == "resume" and not it.failed for it in told.collector.spans)
    assert resumes == samples(told).total("stack_resumes_total", outcome="resumed")


SUMS = "requests", "finished", "failed", "tokens_in", "tokens_out"


def added_up(of_rows: list[dict[str, Any]]) -> dict[str, int]:
    """What the console should tell of these usage rows."""
    outcomes = Counter(row["outcome"] for row in of_rows)
    failed = len(of_rows) - outcomes["finished"] - outcomes["client_left"]
    tokens = {name: sum(row[name] for row in of_rows) for name in ("tokens_in", "tokens_out")}
    return {"requests": len(of_rows), "finished": outcomes["finished"], "failed": failed, **tokens}


def of_csv(visit: Visit, where: str) -> dict[str, dict[str, int]]:
    """The sums of each name in a CSV of the console."""
    lines = csv.DictReader(visit.get(f"/console/{where}").text.splitlines())
    return {next(iter(line.values())): {name: int(line[name]) for name in SUMS} for line in lines}


def of_page(visit: Visit, where: str) -> list[dict[str, int]]:
    """The sums of each row in the table of a page."""
    body = visit.get(f"/console/{where}").text.rpartition("<tbody>")[2]
    cells = [re.findall(r'<td class="n">([\d,]+)</td>', row) for row in body.split("</tr>")]
    return [{name: int(it.replace(",", "")) for name, it in zip(SUMS, row, strict=False)} for row in cells if row]


def test_the_console_tells_the_same(told: Told) -> None:
    of_rows = rows(told)
    total = added_up(of_rows)
    assert all(total.values())
    with visiting(told.gateway) as operator, visiting(told.gateway, KEY) as owner:
        wait_for(lambda: of_csv(operator, "usage.csv?by=all") == {"": total})
        assert of_page(operator, "usage?by=all") == [total]
        for by in ("model", "engine", "key"):
            column = "key_id" if by == "key" else by
            names = {row[column] or "" for row in of_rows}
            expected = {it: added_up([row for row in of_rows if (row[column] or "") == it]) for it in names}
            assert of_csv(operator, f"usage.csv?by={by}") == expected
            by_size = sorted(expected.values(), key=lambda it: sorted(it.items()))
            assert sorted(of_page(operator, f"usage?by={by}"), key=lambda it: sorted(it.items())) == by_size
        assert [*of_csv(owner, "own.csv").values()] == of_page(owner, "own") == [total]
        outcomes = {row["request_id"]: row["outcome"] for row in of_rows}
        for order in ("newest", "slowest", "failed"):
            page = operator.get(f"/console/requests?order={order}").text
            listed = dict(
                re.findall(r'href="/console/requests/([^"]+)".*?<span class="state[^>]*>(\w+)<', page, re.DOTALL)
            )
            assert len(listed) == 50
            assert listed.items() <= outcomes.items()

        def now() -> tuple[int, int, list[Any]]:
            told = operator.get("/console/now.json").json()
            return told["answered"], told["waiting"], told["running"]

        wait_for(lambda: now() == (0, 0, []))  # each worker tells it once a second


def test_nothing_was_lost(told: Told) -> None:
    found = samples(told)
    for name in ("stack_spans_dropped_total", "stack_usage_dropped_total", "stack_log_lines_dropped_total"):
        assert found.total(name) == 0
    assert found.total("stack_requests_in_flight") == 0
    assert httpx.get(told.gateway.url + "/livez", verify=NO_TLS).status_code == 200
