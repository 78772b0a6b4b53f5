"""Totals: log, metrics, usage, traces and console say the same of a thousand mixed requests, also of those that fail
and those whose client disconnects."""

import csv
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tests.support.collector import Collector, collecting
from tests.support.console import Visit, visiting
from tests.support.keys import ADMIN
from tests.support.processes import (
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
LEFT = {"stream": True, "script": [*START, ["hang"]]}
# What is sent, by what it is.
KINDS: dict[str, dict[str, Any]] = {
    "whole": {},
    "whole stream": {"stream": True},
    "a fallback": {"model": "first-gone"},
    "a resume": {"model": "resumed", "stream": True, "script": [["answer", CUT]]},
    "a stream that breaks": {"stream": True, "script": [*START, ["close"]]},
    "an error of the engine": {"script": [["json", [500, {}]]]},
    "refused by the engine": {"script": [["json", [422, {}]]]},
    "the client leaves": LEFT,
    "a wrong field": {"messages": 3},
    "an unknown model": {"model": "nobody-has-it"},
}
REQUESTS = 1000
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
        }
        with running_gateway(path / "log", engine.url, **settings) as gateway:
            send(gateway)
            rows = Rows(settings)
            yield Told(gateway, collector, metrics, rows)
            rows.close()


def send(gateway: GatewayProcess) -> None:
    names = list(KINDS)

    def one(number: int) -> None:
        kind = names[number % len(names)]
        body = {"messages": MESSAGES, "user": uuid4().hex} | KINDS[kind]
        with gateway.client() as client:
            if body.get("script") != LEFT["script"]:
                post(client, CHAT, json=body)
                return
            with client.stream("POST", CHAT, json=body) as answer:
                next(answer.iter_lines())

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(one, number) for number in range(REQUESTS)]:
            done.result()


def finished(told: Told) -> list[dict[str, Any]]:
    """The last lines of requests that reached an engine, once all are there."""

    def lines() -> list[dict[str, Any]]:
        found = [line for line in told.gateway.log() if line["msg"].startswith("chat_finished")]
        return found if len(found) == REQUESTS * 8 // 10 else []

    return wait_for(lines)


def spans(told: Told) -> list[dict[str, Any]]:
    """The attributes of the spans of requests, once all are there."""

    def found() -> list[dict[str, Any]]:
        own = [it.attributes for it in told.collector.spans if it.kind == "server"]
        return own if len(own) >= REQUESTS else []

    return wait_for(found)


def rows(told: Told) -> list[dict[str, Any]]:
    return wait_for(lambda: it if len(it := told.rows.all()) == REQUESTS * 8 // 10 else [])


def samples(told: Told) -> Samples:
    wait_for(lambda: scrape(told.metrics).total("stack_http_requests_total") >= REQUESTS)
    return scrape(told.metrics)


def test_each_request_has_the_same_outcome_everywhere(told: Told) -> None:
    logged = Counter(line["outcome"] for line in finished(told))
    assert set(logged) == ENGAGED
    assert Counter(row["outcome"] for row in rows(told)) == logged
    counted = samples(told).by("stack_requests_total", "outcome")
    assert {name: counted[name] for name in logged} == logged
    assert sum(counted.values()) == REQUESTS
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
    assert sum(line["tokens_out"] for line in finished(told)) == sum(row["tokens_out"] for row in of_rows)


def test_statuses_attempts_and_resumes_are_the_same_everywhere(told: Told) -> None:
    own = spans(told)
    requests = [line for line in told.gateway.log() if line["msg"] == "request" and line["path"] == CHAT]
    assert Counter(line["status"] for line in requests) == Counter(it["http.response.status_code"] for it in own)
    by_class = samples(told).by("stack_http_requests_total", "status")
    assert sum(by_class.values()) == len(requests) == len(own) == REQUESTS
    logged, of_rows = finished(told), rows(told)
    attempts = [it for it in told.collector.spans if it.kind == "client"]
    assert len(attempts) == sum(row["attempts"] for row in of_rows) == sum(line.get("attempts", 1) for line in logged)
    assert len(attempts) == samples(told).total("stack_engine_seconds_count")
    resumes = sum(row["resumes"] for row in of_rows)
    assert resumes == REQUESTS // 10 == sum(line.get("resumes", 0) for line in logged)
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
