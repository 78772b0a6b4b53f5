"""Several engines: which one is asked, in which order, how often, and when an engine gets no requests."""

import json
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.processes import (
    AUTH,
    KEY,
    MESSAGES,
    FakeEngine,
    GatewayProcess,
    events,
    fake_engine,
    free_port,
    running_gateway,
    scrape,
    text_of,
    wait_for,
)

CHAT = "/v1/chat/completions"
SECOND = "sk-second-0123456789abcdef"


@pytest.fixture(scope="module")
def other() -> Iterator[FakeEngine]:
    with fake_engine() as engine:
        yield engine


@contextmanager
def gateway_with(
    tmp_path: Path,
    engines: dict[str, str],
    models: str,
    *,
    workers: int = 1,
    more: str = "",
    slots: int = 64,
    **env: str,
) -> Iterator[GatewayProcess]:
    """A gateway with a stack.yaml. `engines` is name → URL, `models` and `more` are YAML."""
    lines = "".join(
        f"  {name}: {{dialect: vllm, slots: {slots}, base_url: '{url}'}}\n" for name, url in engines.items()
    )
    file = tmp_path / "stack.yaml"
    file.write_text(f"engines:\n{lines}models:\n{models}\n{more}\n")
    with running_gateway(
        tmp_path / "log", "http://127.0.0.1:1", STACK_CONFIG=str(file), STACK_WORKERS=str(workers), **env
    ) as gateway:
        yield gateway


def ask(gateway: GatewayProcess, *, stream: bool = False, key: str = KEY, **fields: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"} | fields.pop("headers", {})
    body = {"messages": MESSAGES, "stream": stream} | fields
    return httpx.post(gateway.url + CHAT, json=body, headers=headers, timeout=30)


ONE = "  m: {targets: [{engine: a, model: fake-model}]}\ndefault_model: m"
REPLICAS = "  m: {targets: [{engine: a, model: fake-model}, {engine: b, model: fake-model}]}\ndefault_model: m"


def test_replicas_share_by_least_outstanding_requests(
    engine: FakeEngine, other: FakeEngine, tmp_path: Path, mark: str
) -> None:
    script = [["gate", mark], ["role"], ["token", "x"], ["finish", "stop"], ["done"], ["end"]]
    with gateway_with(tmp_path, {"a": engine.url, "b": other.url}, REPLICAS) as gateway, ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask, gateway, stream=True, user=mark, script=script) for _ in range(8)]
        wait_for(lambda: len(engine.seen(mark)) + len(other.seen(mark)) == 8)
        assert (len(engine.seen(mark)), len(other.seen(mark))) == (4, 4)
        engine.release(mark)
        other.release(mark)
        assert all(answer.result().status_code == 200 for answer in answers)


def states(gateway: GatewayProcess) -> list[str]:
    return [line["state"] for line in gateway.log() if line["msg"] == "engine_state"]


def test_a_dead_engine_is_left_alone_until_a_probe_finds_it_well(tmp_path: Path) -> None:
    port = free_port()
    more = "breaker: {failures: 3, open_for: 60, probe_every: 0.2}\nretries: {attempts: 1}"
    with ExitStack() as stack:
        alive = stack.enter_context(fake_engine(port))
        gateway = stack.enter_context(gateway_with(tmp_path, {"a": alive.url}, ONE, more=more))
        assert ask(gateway).status_code == 200
        alive.process.kill()
        alive.process.wait()
        wait_for(lambda: ask(gateway).status_code == 503 and states(gateway) == ["open"])
        assert ask(gateway).json()["error"]["code"] == "engine_unavailable"
        assert httpx.get(gateway.url + "/readyz").json()["engines"]["a"] != "ok"
        stack.enter_context(fake_engine(port))  # the breaker is open for 60 s, but a probe sees it sooner
        wait_for(lambda: states(gateway) == ["open", "closed"])
        assert ask(gateway).status_code == 200


def test_readyz_is_about_the_default_model_and_names_every_engine(engine: FakeEngine, tmp_path: Path) -> None:
    port = free_port()
    engines = {"a": engine.url, "b": f"http://127.0.0.1:{port}"}
    models = (
        "  m: {targets: [{engine: a, model: fake-model}]}\n  n: {targets: [{engine: b, model: x}]}\ndefault_model: m"
    )
    with gateway_with(tmp_path, engines, models, more="breaker: {failures: 1000, probe_every: 0.2}") as gateway:

        def says(state: str) -> bool:
            answer = httpx.get(gateway.url + "/readyz")
            return (answer.status_code, answer.json()["engines"]) == (200, {"a": "ok", "b": state})

        wait_for(lambda: says("engine_unavailable"))
        with fake_engine(port) as other:
            wait_for(lambda: says("ok"))
            other.health(503)
            wait_for(lambda: says("server_is_overloaded"))


def test_retries_at_the_same_engines_wait_longer_each_time_and_not_in_step(
    engine: FakeEngine, other: FakeEngine, tmp_path: Path
) -> None:
    more = "retries: {attempts: 4, budget: 1, backoff: 0.2}"
    with (
        gateway_with(tmp_path, {"a": engine.url, "b": other.url}, REPLICAS, more=more) as gateway,
        ThreadPoolExecutor(3) as pool,
    ):
        answers = list(pool.map(lambda _: ask(gateway, script=[["json", [500, {}]]]), range(3)))
        waits = []
        for answer in answers:
            assert answer.status_code == 502
            lines = gateway.lines(answer.headers["x-request-id"])
            assert [line["msg"] for line in lines[1:-2]] == ["fallback", "retry", "retry"]
            waits.append([after["ts"] - before["ts"] for before, after in pairwise(lines[2:-1])])
    for third, fourth in waits:  # milliseconds before those attempts; a half and all of 400 and 800
        assert 195 <= third < 5 * 400
        assert 395 <= fourth < 5 * 800
    assert len({round(third / 5) for third, _ in waits}) > 1


def test_a_retry_that_has_waited_is_no_second_trial(engine: FakeEngine, tmp_path: Path, mark: str) -> None:
    more = "breaker: {failures: 2, open_for: 60, probe_every: 0.1}\nretries: {backoff: 4, backoff_max: 4}"
    with (
        gateway_with(tmp_path, {"a": engine.url}, ONE, more=more, LLM_FIRST_TOKEN_TIMEOUT="0.3") as gateway,
        ThreadPoolExecutor(2) as pool,
    ):
        waits = pool.submit(ask, gateway, user=mark, script=[["reset"]])  # for two to four seconds
        wait_for(lambda: any(line["msg"] == "retry" for line in gateway.log()))
        assert ask(gateway, stream=True, script=[["hang"]]).status_code == 504
        wait_for(lambda: states(gateway) == ["open", "half-open"])
        trial = pool.submit(ask, gateway, user=mark + "2", script=[["gate", mark], ["json", [200, {"choices": []}]]])
        engine.wait_seen(mark + "2")
        assert waits.result().status_code == 502
        assert len(engine.seen(mark)) == 1
        engine.release(mark)
        assert trial.result().status_code == 200


def test_a_silent_engine_gets_one_request_at_a_time_to_show_that_it_answers(
    engine: FakeEngine, tmp_path: Path, mark: str
) -> None:
    """Its health probes succeed all the while."""
    more = "breaker: {failures: 2, open_for: 60, probe_every: 0.2}\nretries: {attempts: 1}"
    with gateway_with(tmp_path, {"a": engine.url}, ONE, more=more, LLM_FIRST_TOKEN_TIMEOUT="0.5") as gateway:
        for _ in range(2):
            assert ask(gateway, stream=True, script=[["hang"]]).status_code == 504
        wait_for(lambda: states(gateway) == ["open", "half-open"])
        assert ask(gateway, stream=True, script=[["hang"]]).status_code == 504  # not yet
        wait_for(lambda: states(gateway) == ["open", "half-open"] * 2)
        with ThreadPoolExecutor(1) as pool:
            trial = pool.submit(ask, gateway, user=mark, script=[["gate", mark], ["json", [200, {"choices": []}]]])
            engine.wait_seen(mark)
            assert ask(gateway, stream=True).status_code == 503  # one at a time
            engine.release(mark)
            assert trial.result().status_code == 200
        wait_for(lambda: states(gateway)[-1] == "closed")
        assert ask(gateway).status_code == 200


def test_requests_in_the_queue_of_an_engine_go_to_another_one_when_its_breaker_opens(
    engine: FakeEngine, other: FakeEngine, tmp_path: Path, mark: str
) -> None:
    models = """  m:
    targets: [{engine: a, model: fake-model}]
    fallbacks: [{engine: b, model: fake-model}]
default_model: m"""
    more = "breaker: {failures: 1, open_for: 60, probe_every: 60}\nretries: {attempts: 1}"
    metrics = free_port()
    own = {"LLM_FIRST_TOKEN_TIMEOUT": "5", "STACK_METRICS_BIND": f"127.0.0.1:{metrics}"}
    urls = {"a": engine.url, "b": other.url}
    with gateway_with(tmp_path, urls, models, more=more, slots=1, **own) as gateway, ThreadPoolExecutor(4) as pool:
        silent = pool.submit(ask, gateway, user=mark + "1", stream=True, script=[["hang"]])
        engine.wait_seen(mark + "1")
        waiting = [pool.submit(ask, gateway, user=mark) for _ in range(3)]
        wait_for(lambda: scrape(metrics).total("stack_queue_depth") == 3)
        assert silent.result().status_code == 504
        answers = [it.result() for it in waiting]
        assert [it.status_code for it in answers] == [200] * 3
        assert (len(engine.seen(mark)), len(other.seen(mark))) == (0, 3)
        told = gateway.told("fallback", 3)
        assert [(it["from"], it["to"], it["after"]) for it in told] == [("a", "b", "engine_unavailable")] * 3


def test_a_clients_leaving_is_never_held_against_an_engine(engine: FakeEngine, tmp_path: Path, mark: str) -> None:
    more = "breaker: {failures: 1, open_for: 60}"
    with gateway_with(tmp_path, {"a": engine.url}, ONE, more=more) as gateway:
        for _ in range(3):
            body = {"messages": MESSAGES, "user": mark, "script": [["hang"]]}
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(gateway.url + CHAT, json=body, headers=AUTH, timeout=0.5)
        wait_for(lambda: [it["state"] for it in engine.seen(mark)] == ["hung_up"] * 3)
        assert ask(gateway).status_code == 200


SPLIT = """  control: {targets: [{engine: a, model: fake-model}]}
  candidate: {targets: [{engine: b, model: fake-model}]}
  chat:
    aliases: [gpt-4o]
    split:
      sticky: STICKY
      arms: [{name: old, weight: 3, model: control}, {name: new, weight: 1, model: candidate}]
default_model: chat
"""


def test_a_split_is_sticky_and_names_its_arm(engine: FakeEngine, other: FakeEngine, tmp_path: Path) -> None:
    engines = {"a": engine.url, "b": other.url}
    with gateway_with(tmp_path, engines, SPLIT.replace("STICKY", "header:X-Session"), workers=2) as gateway:
        seen: dict[str, set[str]] = {}
        for session in [*map(str, range(60))] * 2:
            answer = ask(gateway, model="gpt-4o", headers={"x-session": session})
            seen.setdefault(session, set()).add(answer.headers["x-stack-arm"])
        assert all(len(arms) == 1 for arms in seen.values())  # the same on both workers
        shares = Counter(arm for arms in seen.values() for arm in arms)
        assert 30 <= shares["old"] <= 57  # of 60 at 3:1; outside it once in a million
        line = gateway.lines(answer.headers["x-request-id"])[-2]
        assert line["arm"] == answer.headers["x-stack-arm"]
        assert line["engine"] == {"old": "a", "new": "b"}[line["arm"]]
        without = {ask(gateway, stream=True).headers["x-stack-arm"] for _ in range(60)}
        assert without == {"old", "new"}  # by chance; one alone once in thirty million times
    with gateway_with(tmp_path, engines, SPLIT.replace("STICKY", "key")) as gateway:
        for key in (KEY, SECOND):
            assert len({ask(gateway, key=key).headers["x-stack-arm"] for _ in range(10)}) == 1


BAD_FILES = {
    "a: [": "stack.yaml:1: not valid YAML",
    "engines: {}\nmodels: {}\ndefault_model: x": "stack.yaml:1: engines: Dictionary should have at least 1 item",
    "engines:\n  a: {dialect: tgi, base_url: 'http://x:1'}\nmodels:\n"
    + ONE: "stack.yaml:2: engines.a.dialect: Input should be",
    "engines:\n  a:\n    dialect: vllm\n    base_url: nope\nmodels:\n"
    + ONE: "stack.yaml:4: engines.a.base_url: must look like",
    "engines:\n  a: {dialect: vllm, base_url: 'http://x:1'}\n  a: {dialect: vllm, base_url: 'http://y:1'}\nmodels:\n"
    + ONE: ("stack.yaml:3: 'a' appears twice"),
    "engines:\n  b: {dialect: vllm, base_url: 'http://x:1'}\nmodels:\n"
    + ONE: "stack.yaml:4: models.m: there is no engine 'a'",
    "engines:\n  a: {dialect: ollama, base_url: 'http://x:1', gpu: x}\nmodels:\n"
    + ONE: "stack.yaml:2: engines.a: 'gpu' is for engines that can sleep, and ollama cannot",
    "engines:\n  a: {dialect: vllm, base_url: 'http://x:1'}\nmodels:\n  m: {tragets: []}\ndefault_model: m": (
        "stack.yaml:4: models.m.tragets: Extra inputs are not permitted"
    ),
    "engines:\n  a: {dialect: vllm, base_url: 'http://x:1'}\nmodels:\n"
    + ONE.replace("default_model: m", "default_model: n"): (
        "stack.yaml:5: default_model: there is no model or alias 'n'"
    ),
    "engines:\n  a: {dialect: vllm, base_url: 'http://x:1', api_key: sk-secret}\nmodels:\n"
    + ONE: "stack.yaml:2: engines.a.api_key: a key must not be in this file; use api_key_file",
    "engines:\n  a:\n    dialect: vllm\n    base_url: 'http://x:1'\n    api_key_file: /nowhere\nmodels:\n"
    + ONE: "stack.yaml:5: engines.a.api_key_file: the file cannot be read",
    "engines:\n  a: {dialect: vllm, base_url: 'http://x:1'}\nmodels:\n"
    + ONE.replace("default_model: m", r'default_model: "m\0"'): (
        "stack.yaml:5: default_model: a model's name must have 1 to 200 characters, without control characters"
    ),
    "engines:\n  ? [a]\n  : b": "stack.yaml:2: a name cannot be a list",
    "engines: {}\ndefault_model: 2026-13-01": "stack.yaml:2: not valid YAML: the value is not a timestamp",
    "engines: &a [*a]": "stack.yaml: it has an alias (*name) inside its own anchor",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_bad_file_is_refused_with_its_line_and_reason(tmp_path: Path, text: str) -> None:
    file = tmp_path / "stack.yaml"
    file.write_text(text)
    with (
        pytest.raises(AssertionError) as refused,
        running_gateway(tmp_path / "log", "http://x:1", STACK_CONFIG=str(file)),
    ):
        pass
    assert BAD_FILES[text] in str(refused.value)
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert "sk-secret" not in (tmp_path / "log").read_text()


def said(gateway: GatewayProcess) -> int:
    """Return how often a reload was refused."""
    return sum("the old ones stay in force" in line["msg"] for line in gateway.log())


def test_sighup_reloads_the_file_and_a_bad_one_leaves_the_old(
    engine: FakeEngine, other: FakeEngine, tmp_path: Path, mark: str
) -> None:
    with gateway_with(tmp_path, {"a": engine.url}, ONE) as gateway:
        script = [["role"], ["token", "x"], ["gate", mark], ["finish", "stop"], ["done"], ["end"]]
        with ThreadPoolExecutor(1) as pool:
            under_way = pool.submit(ask, gateway, stream=True, user=mark, script=script)
            engine.wait_seen(mark)
            file = tmp_path / "stack.yaml"
            good = file.read_text()
            for bad in ("engines: oops", good.replace("base_url", 'api_key_file: "a\\0b", base_url')):
                before = said(gateway)
                file.write_text(bad)
                gateway.process.send_signal(signal.SIGHUP)
                wait_for(lambda before=before: said(gateway) > before)
            assert ask(gateway).status_code == 200
            file.write_text(good.replace(engine.url, other.url))
            gateway.process.send_signal(signal.SIGHUP)
            wait_for(lambda: ask(gateway, user=mark + "2").status_code == 200 and other.seen(mark + "2"))
            engine.release(mark)
            assert text_of(events(under_way.result().text)) == "x"
            assert "error" not in under_way.result().text


def test_blocking_calls_are_sent_as_streams_to_an_engine_that_misses_disconnects(
    engine: FakeEngine, tmp_path: Path, mark: str
) -> None:
    """llama.cpp's server continues a blocking request after its client has disconnected, but aborts a stream."""
    calls = [
        {"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a"'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ":1}"}}]},
    ]
    chunks = [
        {"index": 0, "delta": {"role": "assistant", "content": None}, "finish_reason": None},
        {"index": 0, "delta": {"content": "Grüß"}, "logprobs": {"content": [{"token": "G"}]}, "finish_reason": None},
        {"index": 1, "delta": {"reasoning_content": "hm"}, "finish_reason": None},
        {"index": 0, "delta": {"content": " Gott"}, "logprobs": {"content": [{"token": "t"}]}, "finish_reason": None},
        *({"index": 1, "delta": delta, "finish_reason": None} for delta in calls),
        {"index": 0, "delta": {}, "finish_reason": "stop"},
        {"index": 1, "delta": {}, "finish_reason": "tool_calls"},
    ]
    head = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "fake-model", "extra": 7}
    script = [*(["event", head | {"choices": [chunk]}] for chunk in chunks), ["usage"], ["done"], ["end"]]
    with running_gateway(tmp_path / "log", engine.url, LLM_BACKEND="llamacpp", LLM_IDLE_TIMEOUT="1") as gateway:
        answer = ask(gateway, user=mark, n=2, script=script)
        assert answer.headers["content-type"] == "application/json"
        assert engine.wait_seen(mark)["body"]["stream"] is True
        value = answer.json()
        assert (value["object"], value["extra"], value["usage"]["total_tokens"]) == ("chat.completion", 7, 10)
        first, second = value["choices"]
        assert first["message"] == {"role": "assistant", "content": "Grüß Gott"}
        assert first["logprobs"] == {"content": [{"token": "G"}, {"token": "t"}]}
        assert (first["finish_reason"], second["finish_reason"]) == ("stop", "tool_calls")
        assert second["message"]["reasoning_content"] == "hm"
        function = {"name": "f", "arguments": '{"a":1}'}
        assert second["message"]["tool_calls"] == [{"id": "c1", "type": "function", "function": function}]
        assert json.loads(second["message"]["tool_calls"][0]["function"]["arguments"]) == {"a": 1}
        more = {"tools": [{"type": "function"}], "logprobs": True, "top_logprobs": 3}
        begun = [*MESSAGES, {"role": "assistant", "content": "Well, "}]
        answer = ask(gateway, user=mark + "2", messages=begun, n=2, script=script, **more)
        contents = [it["message"]["content"] for it in answer.json()["choices"]]
        assert contents == ["Well, Grüß Gott", "Well, "]
        asked = engine.wait_seen(mark + "2")["body"]
        assert (asked["n_probs"], asked.keys() & {"logprobs", "top_logprobs"}) == (3, set())  # it refuses those here
        legacy = {"prompt": "x", "messages": "odd", "script": [["token", "x"], ["finish", "stop"], ["done"], ["end"]]}
        assert httpx.post(f"{gateway.url}/v1/completions", json=legacy, headers=AUTH).status_code == 200
        stalled = ask(gateway, script=[["role"], ["token", "x"], ["hang"]])
        assert (stalled.status_code, stalled.json()["error"]["code"]) == (504, "engine_timeout")
        cut = ask(gateway, script=[["role"], ["token", "x"], ["end"]])
        assert (cut.status_code, cut.json()["error"]["code"]) == (502, "engine_broken_stream")


def test_without_a_file_other_models_of_the_engine_may_be_used(engine: FakeEngine, tmp_path: Path, mark: str) -> None:
    settings = {"STACK_MODEL_ALIASES": "fast=other/model:1b,llama3.1:8b=fake-model"}
    with running_gateway(tmp_path / "log", engine.url, STACK_WORKERS="1", **settings) as gateway:
        for name, expected in [("other/model:1b",) * 2, ("fast", "other/model:1b"), ("llama3.1:8b", "fake-model")]:
            assert ask(gateway, model=name, user=mark).status_code == 200
            assert engine.wait_seen(mark)["body"]["model"] == expected
        with gateway.client() as client:
            listed = {model["id"] for model in client.get("/v1/models").json()["data"]}
        assert listed == {"fake-model", "other/model:1b", "fast", "llama3.1:8b"}
