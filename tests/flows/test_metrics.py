"""/metrics: right over several workers, through their deaths and reloads, and without any words of callers or
engines."""

import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway import metrics
from gateway.settings import Settings
from tests.support.metered import CHAT, Metered, metered
from tests.support.processes import (
    AUTH,
    MESSAGES,
    ROOT,
    FakeEngine,
    fake_engine,
    free_port,
    running_gateway,
    scrape,
    text_of,
    wait_for,
)
from tests.support.streams import Stream, streams_under_way

START = [["role"], ["token", "one"], ["token", " two"]]


@contextmanager
def stopped(pids: set[int]) -> Iterator[None]:
    """Have processes stand still until the block's end."""

    def state(pid: int) -> str:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]

    assert pids
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        wait_for(lambda: {state(pid) for pid in pids} == {"T"})
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def stop_before_the_patience_ends(mark: str) -> list[Any]:
    return [["role"], ["token", "before "], ["gate", mark], ["finish", "stop"], ["done"], ["end"]]


@pytest.fixture(scope="module")
def own(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Metered]:
    """Two workers; nothing may close the engine to them; patience short enough to be tried."""
    path = tmp_path_factory.mktemp("metered")
    config = path / "stack.yaml"
    config.write_text(
        f"""
engines:
  engine: {{dialect: vllm, base_url: "{engine.url}"}}
  away: {{dialect: vllm, base_url: "http://127.0.0.1:{free_port()}"}}
models:
  fake-model: {{targets: [{{engine: engine, model: fake-model}}]}}
  first-away:
    targets: [{{engine: away, model: fake-model}}]
    fallbacks: [{{engine: engine, model: fake-model}}]
  half:
    split:
      sticky: request
      arms: [{{name: an-arm, weight: 1, model: fake-model}}, {{name: another-arm, weight: 1, model: first-away}}]
default_model: fake-model
breaker: {{failures: 1000}}
"""
    )
    settings = {"STACK_CONFIG": str(config), "LLM_IDLE_TIMEOUT": "1", "STACK_HOLD": "5"}
    with metered(path / "log", engine.url, **settings) as own:
        yield own


def test_two_workers_add_up(own: Metered) -> None:
    own.wait("stack_upstream_workers", 2, upstream="engine", state="closed")
    before = own.scrape()
    for pid in own.gateway.workers():  # one after the other has to serve 30 alone
        with stopped(set(own.gateway.workers()) - {pid}):
            for number in range(30):
                assert own.ask(stream=number % 2 == 0).status_code == 200
    responses = "stack_http_requests_total"  # the last that is counted of a request, after its last byte
    own.wait(responses, before.total(responses, status="2xx") + 60, status="2xx")
    after = own.scrape()

    def grown(name: str, **labels: str) -> float:
        return after.total(name, **labels) - before.total(name, **labels)

    assert grown("stack_requests_total", kind="chat", model="fake-model", arm="", outcome="finished") == 60
    assert grown("stack_http_requests_total", status="2xx") == 60
    assert grown("stack_tokens_total", direction="input") == 60 * 7
    assert grown("stack_tokens_total", direction="output") == 60 * 3
    assert grown("stack_request_duration_seconds_count") == 60
    assert grown("stack_request_duration_seconds_bucket", le="+Inf") == 60
    assert grown("stack_time_to_first_token_seconds_count") == 30  # of streams alone
    assert grown("stack_time_per_output_token_seconds_count") == 30
    assert grown("stack_time_to_first_token_seconds_sum") > 0
    for name, longest in (("request_duration", "llm_timeout"), ("time_to_first_token", "llm_first_token_timeout")):
        limits = {float(it) for it in after.by(f"stack_{name}_seconds_bucket", "le")} - {float("inf")}
        assert max(limits) >= Settings.model_fields[longest].default
    assert after.total("stack_requests_in_flight") == 0


OUTCOMES: dict[str, tuple[dict[str, Any], str, str]] = {
    "whole": ({}, "finished", "2xx"),
    "whole stream": ({"stream": True}, "finished", "2xx"),
    "reset in mid-stream": ({"stream": True, "script": [*START, ["reset"]]}, "engine_broken_stream", "2xx"),
    "malformed": ({"stream": True, "script": [*START, ["text", "data: {]\n\n"]]}, "engine_broken_stream", "2xx"),
    "silent in mid-stream": ({"stream": True, "script": [*START, ["hang"]]}, "engine_timeout", "2xx"),
    "its own error": ({"script": [["json", [500, {"error": "no"}]]]}, "engine_error", "5xx"),
    "refused by the engine": (
        {"script": [["json", [418, {"error": {"message": "m", "code": "canary-code"}}]]]},
        "engine_refused",
        "4xx",
    ),
    "no JSON": ({"script": [["raw", "HTTP/1.1 200 OK\r\n\r\nhello"], ["close"]]}, "engine_error", "5xx"),
    "bad field": ({"messages": 3}, "bad_request", "4xx"),
    "unknown model": ({"model": "canary-model"}, "model_not_found", "4xx"),
    "a split's arm": ({"model": "half"}, "finished", "2xx"),
    "a fallback": ({"model": "first-away"}, "finished", "2xx"),
}


@pytest.mark.parametrize("case", OUTCOMES)
def test_every_request_has_one_outcome(own: Metered, case: str) -> None:
    fields, outcome, status = OUTCOMES[case]
    before = own.scrape()
    answer = own.ask(**fields)
    own.gateway.lines(answer.headers["x-request-id"])
    after = own.scrape()

    def grown(name: str, label: str) -> dict[str, float]:
        old = before.by(name, label)
        return {it: value - old.get(it, 0) for it, value in after.by(name, label).items() if value != old.get(it, 0)}

    assert grown("stack_requests_total", "outcome") == {outcome: 1}
    assert grown("stack_http_requests_total", "status") == {status: 1}
    broken = status == "2xx" and outcome != "finished"
    assert sum(grown("stack_broken_streams_total", "kind").values()) == broken
    (arm,) = grown("stack_requests_total", "arm")
    assert arm in (("an-arm", "another-arm") if case == "a split's arm" else ("",))
    if arm == "":
        assert bool(grown("stack_fallbacks_total", "route")) == (case == "a fallback")
    assert after.total("stack_requests_in_flight") == 0
    logged = [it for it in own.gateway.lines(answer.headers["x-request-id"]) if "outcome" in it]
    assert [it["outcome"] for it in logged] == (
        [outcome] if grown("stack_request_duration_seconds_count", "kind") else []
    )


def test_a_client_that_left_is_counted_as_that(own: Metered, engine: FakeEngine, mark: str) -> None:
    before = own.scrape()
    body = {"messages": MESSAGES, "stream": True, "user": mark, "script": [["role"], ["token", "x"], ["hang"]]}
    with own.gateway.client() as client, client.stream("POST", CHAT, json=body) as answer:
        lines = answer.iter_lines()  # to be kept: when it goes, httpx closes the connection
        next(lines)
        own.wait("stack_requests_in_flight", 1)
    engine.wait_seen(mark, "hung_up")
    own.wait(
        "stack_requests_total", before.total("stack_requests_total", outcome="client_left") + 1, outcome="client_left"
    )
    after = own.scrape()
    assert after.total("stack_requests_in_flight") == 0
    assert after.total("stack_broken_streams_total") == before.total("stack_broken_streams_total")
    own.wait("stack_http_requests_total", before.total("stack_http_requests_total", status="499") + 1, status="499")


def test_a_retry_is_counted_and_the_request_once(own: Metered) -> None:
    before = own.scrape()
    assert own.ask(script=[["close"]]).status_code == 502
    after = own.scrape()
    assert after.total("stack_retries_total", upstream="engine") > before.total(
        "stack_retries_total", upstream="engine"
    )
    assert after.total("stack_requests_total") == before.total("stack_requests_total") + 1


def test_nothing_is_written_while_a_stream_goes_on(own: Metered, engine: FakeEngine, mark: str) -> None:
    wait_for(lambda: own.scrape().total("stack_requests_in_flight") == 0)
    script = [["role"], ["token", "x"], ["gate", mark], ["tokens", [500, 10]], ["gate", mark + "2"], ["finish", "stop"]]
    stream = Stream(own.gateway, [*script, ["done"], ["end"]], mark)
    files = sorted(own.directory().iterdir())
    wait_for(lambda: '"x"' in stream.text)
    wait_for(lambda: own.scrape().total("stack_slots_used") == 1)  # told a moment later
    before = [file.read_bytes() for file in files]
    engine.release(mark)
    wait_for(lambda: stream.text.count("xxxxxxxxxx") == 500)
    assert [file.read_bytes() for file in files] == before
    engine.release(mark + "2")
    assert len(stream.chunks()) == 504
    wait_for(lambda: [file.read_bytes() for file in files] != before)


def test_the_gateways_own_time_is_told_apart_from_the_engines(own: Metered) -> None:
    before = own.scrape()
    for stream in (True, False):
        script = [["pause", 0.2], ["role"], ["token", "x"], ["finish", "stop"], ["done"], ["end"]]
        whole = [["pause", 0.2], ["json", [200, {"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}]]]
        assert own.ask(stream=stream, script=script if stream else whole).status_code == 200
    assert own.ask(script=[["json", [422, {}]]]).status_code == 422
    after = own.scrape()

    def grown(name: str, **labels: str) -> float:
        return after.total(name, **labels) - before.total(name, **labels)

    assert grown("stack_engine_seconds_count", upstream="engine") == 3
    assert grown("stack_engine_seconds_sum", upstream="engine") >= 0.4
    assert grown("stack_gateway_seconds_count", api="chat_completions") == 2, "of whole answers"
    both = grown("stack_engine_seconds_sum") + grown("stack_gateway_seconds_sum")
    assert 0 < both <= grown("stack_request_duration_seconds_sum")


def test_every_metric_is_in_the_table_and_no_other() -> None:
    sources = "".join((ROOT / "gateway" / it).read_text() for it in ("instruments.py", "server/facts.py"))
    made = set(re.findall(r'"(stack_\w+)"', sources))
    table = set(re.findall(r"^\| (stack_\w+) ", str(metrics.__doc__), re.MULTILINE))
    assert {it.removesuffix("_total") for it in table} == made


def test_no_words_of_callers_or_engines_become_labels(own: Metered) -> None:
    canary = "canary-9d1c"
    fields = {"user": canary, "messages": [{"role": "user", "content": canary}]}
    error = {"error": {"message": canary, "type": canary, "code": canary}}
    own.ask(**fields, model=canary)
    own.ask(**fields, script=[["json", [422, error]]])
    own.ask(**fields, stream=True, script=[*START, ["event", error], ["end"]])
    headers = {"authorization": f"Bearer {canary}", "x-request-id": canary, "x-trace": canary, "user-agent": canary}
    httpx.post(own.gateway.url + CHAT, content=canary, headers=headers | {"content-type": "application/json"})
    httpx.get(f"{own.gateway.url}/{canary}?{canary}")
    httpx.request(canary.upper(), own.gateway.url + "/livez")
    assert "canary" not in own.scrape().text.lower()


def test_only_get_metrics_and_only_on_its_own_port(own: Metered) -> None:
    url = f"http://127.0.0.1:{own.port}"
    assert httpx.get(own.gateway.url + "/metrics", headers=AUTH).status_code == 404
    assert httpx.get(url + "/metrics").headers["content-type"].startswith("text/plain; version=0.0.4")
    for path in ("/", "/metrics/", "/metricsx", "/livez", "/v1/models", "//metrics", "/%6detrics"):
        assert httpx.get(url + path).status_code == 404, path
    for method in ("POST", "HEAD", "PUT", "DELETE", "OPTIONS"):
        assert httpx.request(method, url + "/metrics").status_code == 404, method


def test_scrapers_that_dawdle_are_let_go(own: Metered) -> None:
    with socket.create_connection(("127.0.0.1", own.port)) as silent, socket.socket() as garbage:
        garbage.connect(("127.0.0.1", own.port))
        garbage.sendall(b"\0" * 20_000)
        started = time.monotonic()
        own.scrape()
        assert time.monotonic() - started < 8  # the stated patience is 2 s, for each of the two
        assert silent.recv(1) in (b"", b"H")


def test_a_killed_workers_streams_are_in_flight_no_more_and_its_counts_stay(
    engine: FakeEngine, tmp_path: Path, mark: str
) -> None:
    with metered(tmp_path / "log", engine.url) as own:
        for _ in range(20):
            own.ask()
        with streams_under_way(own.gateway, mark) as streams:
            own.wait("stack_requests_in_flight", 10)
            old = set(own.gateway.workers())
            for pid in old:
                os.kill(pid, signal.SIGKILL)
            wait_for(lambda: own.settled(old))
            own.wait("stack_requests_in_flight", 0)
            for stream in streams:
                stream.join(30)
        samples = own.scrape()
        assert samples.by("stack_requests_total", "outcome") == {"finished": 20}
        assert samples.total("stack_tokens_total", direction="input") == 20 * 7
        own.wait("stack_upstream_workers", 2, state="closed")
        wait_for(lambda: own.ask().status_code == 200)
        own.wait("stack_requests_total", 21)


def test_a_reload_keeps_counts_and_what_is_in_flight(engine: FakeEngine, tmp_path: Path, mark: str) -> None:
    with metered(tmp_path / "log", engine.url) as own:
        for _ in range(5):
            own.ask()
        stream = Stream(own.gateway, stop_before_the_patience_ends(mark), mark)
        wait_for(lambda: "before" in stream.text)
        for _ in range(4):
            old = set(own.gateway.workers())
            own.gateway.process.send_signal(signal.SIGHUP)
            wait_for(lambda old=old: len(set(own.gateway.workers()) - old) >= 2)
            wait_for(lambda: len(own.gateway.workers()) <= 3)  # two, and the one with the stream
            own.wait("stack_requests_in_flight", 1)
        assert own.scrape().total("stack_requests_total") == 5
        engine.release(mark)
        assert text_of(stream.chunks()) == "before "
        own.wait("stack_requests_total", 6)
        own.wait("stack_requests_in_flight", 0)
        wait_for(lambda: len(own.gateway.workers()) == 2)
        own.wait("stack_upstream_workers", 2, state="closed")
        seats = {file.name.rpartition("_")[2] for file in own.directory().iterdir()}
        assert len(seats) <= 5, seats  # used again: there were ten workers


def test_twenty_kills_under_scrapes_lose_no_count_and_fail_no_scrape(engine: FakeEngine, tmp_path: Path) -> None:
    """Half of them at once after the start, when files are being opened."""
    with metered(tmp_path / "log", engine.url) as own:
        stop = threading.Event()
        trouble: list[Any] = []

        def watch() -> None:
            while not stop.is_set():
                try:
                    own.scrape()
                except (AssertionError, OSError, HTTPException, ValueError) as exc:
                    trouble.append(repr(exc))

        watcher = threading.Thread(target=watch)
        watcher.start()
        answered = 0
        for number in range(20):
            if number % 2:
                wait_for(lambda: own.ask().status_code == 200)
                answered += 1
                # An answer is counted just after its last byte (its usage just before): that moment is not the subject.
                wait_for(lambda: own.scrape().total("stack_requests_total", outcome="finished") >= answered)  # noqa: B023
            workers = own.gateway.workers()
            victim = workers[-1] if workers else 0
            if victim:
                os.kill(victim, signal.SIGKILL)
                wait_for(lambda victim=victim: victim not in own.gateway.workers())
        wait_for(lambda: own.scrape().total("stack_upstream_workers", state="closed") == 2)
        stop.set()
        watcher.join()
        assert trouble == []
        assert own.scrape().total("stack_requests_total", outcome="finished") >= answered
        assert own.scrape().total("stack_requests_in_flight") == 0
        assert len(list(own.directory().iterdir())) <= 9  # three files each of two seats, or three for a moment


def test_an_empty_file_fails_nothing(engine: FakeEngine, tmp_path: Path) -> None:
    """prometheus-client leaves one when it is killed between opening and sizing it, and then can't read it."""
    with metered(tmp_path / "log", engine.url) as own:
        own.ask()
        directory = own.directory()
        for name in ("counter_9.db", "histogram_9.db", "gauge_livesum_9.db"):
            (directory / name).touch()
        wait_for(lambda: own.scrape().total("stack_requests_total") == 1)
        # and one of a seat that is used: its next worker gives it a size and goes on
        seat = directory / "counter_0.db"
        old = set(own.gateway.workers())
        for pid in old:
            os.kill(pid, signal.SIGKILL)
        os.truncate(seat, 0)
        wait_for(lambda: own.settled(old))
        wait_for(lambda: own.ask().status_code == 200)
        own.scrape()
        assert own.gateway.stop() == 0
        assert not directory.exists()  # it tidies up


def test_without_room_to_count_requests_go_on(engine: FakeEngine, tmp_path: Path) -> None:
    """A file may have 64 kB here; on a full disk the write fails the same way."""
    port = free_port()
    settings = {"STACK_METRICS_BIND": f"127.0.0.1:{port}", "STACK_WORKERS": "1"}
    with running_gateway(tmp_path / "log", engine.url, under=("prlimit", "--fsize=65536"), **settings) as gateway:
        with gateway.client() as client:
            assert client.post(CHAT, json={"messages": MESSAGES}).status_code == 200
        assert {it.name for it in scrape(port).all} == {
            "stack_build_info",
            "stack_usage_journal_bytes",
            "stack_usage_journal_limit_bytes",
        }, "what the master knows"
        wait_for(lambda: any("no space for metrics" in line["msg"] for line in gateway.log()))


def test_a_port_that_is_taken_is_had_later(engine: FakeEngine, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        settings = {"STACK_METRICS_BIND": f"127.0.0.1:{port}", "STACK_WORKERS": "1"}
        with running_gateway(tmp_path / "log", engine.url, **settings) as gateway:
            wait_for(lambda: any("cannot listen" in line["msg"] for line in gateway.log()))
            other.close()

            def answers() -> bool:
                try:
                    return scrape(port).total("stack_upstream_workers") == 1
                except (OSError, HTTPException):
                    return False

            wait_for(answers)


def test_the_state_of_an_engine_is_seen(tmp_path: Path) -> None:
    with fake_engine() as engine:
        settings = {"STACK_WORKERS": "1", "STACK_DRAIN_DELAY": "0"}
        with metered(tmp_path / "log", engine.url, **settings) as own:
            own.wait("stack_upstream_workers", 1, upstream="engine", state="closed")
            engine.process.kill()

            def opened() -> bool:
                own.ask()
                return own.scrape().total("stack_upstream_workers", state="open") == 1

            wait_for(opened)
            assert own.scrape().by("stack_upstream_workers", "state") == {"open": 1}


def test_off_means_no_port_and_no_files(engine: FakeEngine, tmp_path: Path) -> None:
    with running_gateway(tmp_path / "log", engine.url, STACK_METRICS_BIND="", TMPDIR=str(tmp_path)) as gateway:
        with gateway.client() as client:
            assert client.post(CHAT, json={"messages": MESSAGES}).status_code == 200
        assert not list(tmp_path.glob("stack-metrics-*"))
        assert not [line for line in gateway.log() if line["msg"] == "metrics"]
        assert json.dumps(gateway.log())
