"""Requests wait for engines that are all down: what docs/when-an-engine-dies.md says of it. The engine has four slots
for each of three dialects; it is killed, and started again at the same address."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tests.support.kinds import DIALECTS
from tests.support.processes import (
    AUTH,
    JSON,
    MESSAGES,
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
SECOND = {"authorization": "Bearer sk-second-0123456789abcdef"}
PIECES = ["One", " two", " three", " four", "."]
WHOLE = "".join(PIECES)
SLOTS = 4
LOADING = ["json", [503, {"error": {"message": "Loading model", "code": 503}}]]
CONFIG = """
engines:
  ollama: {{dialect: ollama, slots: 4, base_url: '{url}'}}
  vllm: {{dialect: vllm, slots: 4, base_url: '{url}'}}
  llamacpp: {{dialect: llamacpp, slots: 4, base_url: '{url}'}}
  other: {{dialect: vllm, slots: 4, base_url: '{other}'}}
  weak: {{dialect: ollama, slots: 4, base_url: '{other}'}}
models:
  ollama: {{targets: [{{engine: ollama, model: fake-model}}]}}
  vllm: {{targets: [{{engine: vllm, model: fake-model}}]}}
  llamacpp: {{targets: [{{engine: llamacpp, model: fake-model}}]}}
  pair: {{targets: [{{engine: vllm, model: fake-model}}], fallbacks: [{{engine: other, model: fake-model}}]}}
  unequal: {{targets: [{{engine: vllm, model: fake-model}}], fallbacks: [{{engine: weak, model: small}}]}}
  hasty: {{targets: [{{engine: vllm, model: fake-model}}], resume: {{wait: 1}}}}
  brief: {{targets: [{{engine: vllm, model: fake-model}}], timeouts: {{total: 1}}}}
  never: {{targets: [{{engine: vllm, model: fake-model}}], resume: {{most: 0}}}}
default_model: vllm
breaker: {{failures: {failures}, open_for: 0.5}}
"""


@dataclass
class Setting:
    """A gateway, where its engine is or was, and its metrics."""

    gateway: GatewayProcess
    port: int
    metrics: int


@contextmanager
def serving(
    directory: Path, port: int, *, other: int | None = None, failures: int = 1, **settings: str
) -> Iterator[Setting]:
    """`failures` open an engine's breaker. `other` is the port of another engine, which is down unless it is given."""
    file, metrics = directory / "stack.yaml", free_port()
    urls = {"url": f"http://127.0.0.1:{port}", "other": f"http://127.0.0.1:{other or free_port()}"}
    file.write_text(CONFIG.format(**urls, failures=failures))
    own = {"STACK_CONFIG": str(file), "STACK_WORKERS": "1", "STACK_METRICS_BIND": f"127.0.0.1:{metrics}"}
    said = {"STACK_RESUME": "3", "STACK_HOLD": "0.3"} | settings
    with running_gateway(directory / "log", f"http://127.0.0.1:{port}", **said, **own) as gateway:
        yield Setting(gateway, port, metrics)


@pytest.fixture(scope="module")
def down(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    """A gateway whose engines are all down."""
    with serving(tmp_path_factory.mktemp("down"), free_port()) as setting:
        yield setting


class Caller(threading.Thread):
    """One request, and what has come of its answer."""

    def __init__(self, at: Setting, model: str, *, headers: dict[str, str] | None = None, **fields: Any) -> None:
        super().__init__(daemon=True)
        self.mark = uuid4().hex
        self.text, self.status, self.seconds = "", 0, 0.0
        self.headers: httpx.Headers = httpx.Headers()
        self.leave = threading.Event()
        script = {"dialect": model if model in ("ollama", "llamacpp") else "vllm", "pieces": PIECES}
        script |= fields.pop("answer", {})
        known = {"user": self.mark, "script": [["answer", script]]}
        # A raw request to Ollama has no field for a script, so the message holds it, too.
        messages = [{"role": "user", "content": f"Say it. #{json.dumps(known)}"}] if model == "ollama" else MESSAGES
        self._body = {"model": model, "messages": messages} | known | fields
        self._at, self._headers = at, AUTH | JSON | (headers or {})
        self.start()

    def run(self) -> None:
        began = time.monotonic()
        url, asked = self._at.gateway.url + CHAT, {"json": self._body, "headers": self._headers}
        with suppress(httpx.RemoteProtocolError), httpx.stream("POST", url, timeout=60, **asked) as answer:
            self.status, self.headers = answer.status_code, answer.headers
            for piece in answer.iter_text():
                self.text += piece
                if self.leave.is_set():
                    break
        self.seconds = time.monotonic() - began

    def wait(self) -> str:
        """Wait for the answer; return its text, or the code of its error."""
        self.join(60)
        assert not self.is_alive(), self.text
        if self._body.get("stream") and self.status == 200:
            *chunks, last = events(self.text)
            return text_of(chunks) if last == "[DONE]" else str(last["error"]["code"])
        answer = json.loads(self.text)
        return str(answer["error"]["code"] if "error" in answer else answer["choices"][0]["message"]["content"])


def waiting(at: Setting) -> float:
    return scrape(at.metrics).total("stack_queue_depth")


def in_line(at: Setting, number: int, ask: Callable[[], Caller]) -> list[Caller]:
    """Send that many more requests, each when the one before waits in the queue."""
    before, callers = waiting(at), []
    for count in range(1, number + 1):
        callers.append(ask())
        wait_for(lambda count=count: waiting(at) == before + count)
    return callers


def order(at: Setting, callers: list[Caller]) -> list[int]:
    """Return the numbers of the callers in the order in which they first got a slot."""
    ids = [it.headers["x-request-id"] for it in callers]

    def begun() -> list[str]:
        told = [line["request_id"] for line in at.gateway.told("chat_started", len(ids))]
        return [it for it in told if it in ids]

    wait_for(lambda: len(begun()) == len(ids))
    return [ids.index(it) for it in begun()]


@pytest.mark.parametrize("stream", [True, False])
def test_ten_requests_on_four_slots_outlive_their_engine(tmp_path: Path, *, stream: bool) -> None:
    """Of each dialect: four are being answered, four of the same key and then two of another one wait in the queue."""
    with fake_engine() as first, serving(tmp_path, int(first.url.rpartition(":")[2])) as at:
        hang = {"cuts": [4], "how": [["hang"]], "at": [first.process.pid]}

        def ask(model: str, headers: dict[str, str] | None = None) -> Caller:
            return Caller(at, model, stream=stream, answer=hang, headers=headers)

        asked = {model: [ask(model) for _ in range(SLOTS)] for model in DIALECTS}
        wait_for(lambda: first.running() == len(DIALECTS) * SLOTS)
        wait_for(lambda: not stream or all(PIECES[0] in it.text for callers in asked.values() for it in callers))
        for model in DIALECTS:
            asked[model] += in_line(at, 4, partial(ask, model))
            asked[model] += in_line(at, 2, partial(ask, model, SECOND))
        first.process.kill()
        first.process.wait()
        wait_for(lambda: {it["engine"] for it in opened(at)} >= {*DIALECTS})
        assert waiting(at) == 6 * len(DIALECTS)
        with fake_engine(at.port) as second:
            for model, callers in asked.items():
                assert [it.wait() for it in callers] == [WHOLE] * 10, model
                assert {it.status for it in callers} == {200}, model
                assert [len(second.seen(it.mark)) for it in callers] == [1] * 10, model
        for model, callers in asked.items():
            turns = order(at, callers)[SLOTS:]
            assert [it for it in turns if it < 8] == [4, 5, 6, 7], model
            assert turns.index(9) < turns.index(7), (model, "the other key's turns come in between")


def opened(at: Setting) -> list[dict[str, Any]]:
    """Return the log's lines about breakers that opened."""
    return [it for it in at.gateway.log() if it["msg"] == "engine_state" and it["state"] == "open"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_comes_while_its_engine_is_down_waits_for_it(tmp_path: Path, *, stream: bool) -> None:
    with serving(tmp_path, free_port()) as at:
        callers = [Caller(at, "pair", stream=stream)]
        wait_for(lambda: scrape(at.metrics).total("stack_slots_used") == 1)
        callers += [Caller(at, "vllm", stream=stream) for _ in range(7)]
        wait_for(lambda: waiting(at) == 3)
        if stream:
            wait_for(lambda: all(": ping" in it.text for it in callers))
        with fake_engine(at.port):
            assert [it.wait() for it in callers] == [WHOLE] * 8
        waited = at.gateway.told("waited")
        assert {(it["after"], it["to"]) for it in waited} == {("engine_unavailable", "vllm")}


TOO_LONG = {"type": "exceed_context_size_error", "n_prompt_tokens": 9000, "n_ctx": 4096, "code": 400}
REFUSALS: dict[str, dict[str, Any]] = {
    "its window": TOO_LONG | {"message": "the request exceeds the available context size, try increasing it"},
    "what it can do": {"message": "fake-model does not support tools", "type": "invalid_request_error", "code": None},
}


@pytest.mark.parametrize("why", REFUSALS)
def test_the_limits_of_a_fallback_are_no_answer_while_the_engine_before_it_is_down(tmp_path: Path, why: str) -> None:
    refusal = [["json", [400, {"error": REFUSALS[why]}]]]
    with fake_engine() as small, serving(tmp_path, free_port(), other=int(small.url.rpartition(":")[2])) as at:
        told = {"script_for": {"small": refusal}}
        hasty = Caller(at, "unequal", headers={"x-stack-queue-timeout": "0"}, **told)
        assert hasty.wait() == "engine_unavailable", hasty.text
        caller = Caller(at, "unequal", **told)
        wait_for(lambda: small.seen(caller.mark))
        with fake_engine(at.port) as engine:
            assert caller.wait() == WHOLE
            assert [len(it.seen(caller.mark)) for it in (engine, small)] == [1, 1]


@pytest.mark.parametrize(("status", "code"), [(503, "server_is_overloaded"), (500, "engine_error")])
def test_the_limits_of_a_fallback_are_no_answer_while_the_engine_before_it_fails(
    tmp_path: Path, status: int, code: str
) -> None:
    refusal = [["json", [400, {"error": TOO_LONG | {"message": "exceeds the available context size"}}]]]
    with fake_engine() as engine, fake_engine() as small:
        at, other = (int(it.url.rpartition(":")[2]) for it in (engine, small))
        with serving(tmp_path, at, other=other) as its:
            told = {"script_for": {"small": refusal, "fake-model": [["json", [status, {}]]]}}
            caller = Caller(its, "unequal", **told)
            assert caller.wait() == code, caller.text
            assert len(small.seen(caller.mark)) == 1


BUSY = "The engine is currently busy and cannot accept new requests. Please try again later."


def test_a_full_engine_is_asked_again_and_not_its_fallback_whose_limits_the_request_exceeds(tmp_path: Path) -> None:
    refusal = [["json", [400, {"error": TOO_LONG | {"message": "exceeds the available context size"}}]]]
    with fake_engine() as engine, fake_engine() as small:
        at, other = (int(it.url.rpartition(":")[2]) for it in (engine, small))
        with serving(tmp_path, at, other=other) as its:
            full = ["json", [503, {"error": {"message": BUSY, "type": "Service Unavailable", "code": 503}}]]
            told = {"answer": {"cuts": [0], "how": [full]}, "script_for": {"small": refusal}}
            caller = Caller(its, "unequal", stream=True, **told)
            assert caller.wait() == WHOLE, caller.text
            assert [len(it.seen(caller.mark)) for it in (engine, small)] == [2, 1]


def test_a_wait_beside_others_is_no_attempt(tmp_path: Path) -> None:
    """A request that waited with others, and asked nobody until then, is retried once like any other."""
    with serving(tmp_path, free_port(), failures=1000) as at:
        callers = [Caller(at, "vllm", stream=True)]
        wait_for(lambda: ": ping" in callers[0].text)
        callers.append(Caller(at, "vllm", answer={"cuts": [0]}))
        wait_for(lambda: scrape(at.metrics).total("stack_slots_used") == 2)
        with fake_engine(at.port) as engine:
            assert [it.wait() for it in callers] == [WHOLE] * 2
            assert len(engine.seen(callers[1].mark)) == 2


def test_requests_that_wait_do_not_ask_the_engine_again_and_again(tmp_path: Path) -> None:
    """One of them got the error that the model is loading. The others wait for the health probe, too."""
    with fake_engine() as engine, serving(tmp_path, int(engine.url.rpartition(":")[2])) as at:
        engine.health(503)
        callers = [Caller(at, "llamacpp", answer={"cuts": [0], "how": [LOADING]})]
        wait_for(lambda: engine.seen(callers[0].mark))
        wait_for(lambda: scrape(at.metrics).total("stack_slots_used", upstream="llamacpp") == 1)
        callers += [Caller(at, "llamacpp") for _ in range(9)]
        wait_for(lambda: waiting(at) == 6)
        engine.health(200)
        assert [it.wait() for it in callers] == [WHOLE] * 10
        assert sum(len(engine.seen(it.mark)) for it in callers) <= 14


def test_if_no_engine_is_back_in_time_the_error_is_that_of_the_outage(down: Setting) -> None:
    blocking, streamed = Caller(down, "hasty"), Caller(down, "hasty", stream=True)
    for caller in (blocking, streamed):
        assert caller.wait() == "engine_unavailable"
        assert 0.9 < caller.seconds < 10
    assert (blocking.status, blocking.headers["retry-after"]) == (503, "5")
    assert ": ping" in streamed.text


@pytest.mark.parametrize("how", ["x-stack-resume", "most", "x-stack-queue-timeout"])
def test_a_request_with_resume_off_gets_a_503_at_once(down: Setting, how: str) -> None:
    headers = {"x-stack-resume": "off", "x-stack-queue-timeout": "0"}
    caller = Caller(down, "never" if how == "most" else "vllm", headers={how: headers[how]} if how in headers else {})
    assert caller.wait() == "engine_unavailable"
    assert caller.status == 503
    assert caller.seconds < 5


def test_the_deadline_of_the_queue_ends_the_wait_for_an_engine(down: Setting) -> None:
    caller = Caller(down, "vllm", headers={"x-stack-queue-timeout": "0.7"})
    assert caller.wait() == "engine_unavailable"
    assert 0.6 < caller.seconds < 10


def test_a_client_that_disconnects_ends_its_wait_for_an_engine(down: Setting) -> None:
    caller = Caller(down, "vllm", stream=True)
    wait_for(lambda: ": ping" in caller.text)
    caller.leave.set()
    caller.join(10)
    line = down.gateway.lines(caller.headers["x-request-id"])[-1]
    assert line["status"] == 499 or line["outcome"] == "client_left"
    wait_for(lambda: scrape(down.metrics).total("stack_slots_used") == 0)


def test_a_wait_for_an_engine_costs_no_tokens(down: Setting) -> None:
    """Neither a client that leaves meanwhile, nor one whose answer takes too long, pays for work that nobody did."""
    left = {"x-request-id": uuid4().hex}
    body = {"model": "vllm", "messages": MESSAGES, "max_tokens": 5000}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(down.gateway.url + CHAT, json=body, headers=AUTH | left, timeout=1)
    caller = Caller(down, "brief", max_tokens=5000)
    assert caller.wait() == "engine_timeout"
    for request_id in (left["x-request-id"], caller.headers["x-request-id"]):
        ends = [it for it in down.gateway.lines(request_id) if it["msg"] == "chat_finished"]  # none: nobody was asked
        assert all(it["tokens_out"] == 0 for it in ends)


def test_the_queue_of_an_engine_that_is_down_has_its_bounds(tmp_path: Path) -> None:
    with serving(tmp_path, free_port(), STACK_QUEUE="2") as at:
        callers = [Caller(at, "vllm") for _ in range(SLOTS)]
        wait_for(lambda: scrape(at.metrics).total("stack_slots_used", upstream="vllm") == SLOTS)
        line = in_line(at, 1, lambda: Caller(at, "vllm"))
        line += in_line(at, 1, lambda: Caller(at, "vllm", headers=SECOND))
        refused = Caller(at, "vllm", headers=SECOND)
        assert refused.wait() in ("queue_full", "queue_share_full")
        assert int(refused.headers["retry-after"]) > 0
        with fake_engine(at.port):
            assert [it.wait() for it in callers + line] == [WHOLE] * (SLOTS + 2)


def test_a_model_that_is_being_fetched_is_not_waited_for(tmp_path: Path) -> None:
    file = tmp_path / "progress.json"
    file.write_text(json.dumps({"model": "fake-model", "state": "fetching", "completed": 5 * 10**7, "total": 10**8}))
    with serving(tmp_path, free_port(), STACK_PROGRESS_FILE=str(file)) as at:
        caller = Caller(at, "vllm")
        assert caller.wait() == "model_loading"
        assert "0.05 of 0.10 GB" in caller.text
        assert caller.seconds < 5


def test_an_engine_that_dies_of_the_request_is_not_asked_again_after_its_wait(tmp_path: Path) -> None:
    """A request that was alone with its engine when the engine died may be the reason."""
    with fake_engine() as first, serving(tmp_path, int(first.url.rpartition(":")[2])) as at:
        caller = Caller(at, "vllm", script=[["die"]])
        assert caller.wait() == "engine_failed"
        with fake_engine(at.port) as second:
            assert not second.seen(caller.mark)
