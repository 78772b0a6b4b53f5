"""A request that kills its engine kills only one, once. The ordinary death of an engine costs no caller an answer."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from http.client import HTTPException
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tests.support.processes import (
    MESSAGES,
    GatewayProcess,
    Undying,
    events,
    running_gateway,
    text_of,
    undying_engine,
    wait_for,
)

CHAT = "/v1/chat/completions"
CONFIG = """
engines:
  a: {{dialect: vllm, slots: 64, base_url: "{a}"}}
  b: {{dialect: vllm, slots: 64, base_url: "{b}"}}
  c: {{dialect: vllm, slots: 64, base_url: "{c}"}}
  a-folded: {{dialect: llamacpp, slots: 64, base_url: "{a}"}}
  b-folded: {{dialect: llamacpp, slots: 64, base_url: "{b}"}}
models:
  one: {{targets: [{{engine: a, model: a}}]}}
  two: {{targets: [{{engine: a, model: a}}], fallbacks: [{{engine: b, model: b}}], resume: {{across_models: true}}}}
  three: {{targets: [{{engine: a, model: a}}, {{engine: b, model: b}}, {{engine: c, model: c}}]}}
  folded: {{targets: [{{engine: a-folded, model: a}}, {{engine: b-folded, model: b}}]}}
default_model: three
breaker: {{failures: 1000}}
"""


HEAD: list[Any] = ["head", [200, {"content-type": "text/event-stream"}]]
WHOLE: list[list[Any]] = [["role"], ["token", "one"], ["finish", "stop"], ["usage"], ["done"], ["end"]]


class Fleet:
    """Three engines that are started again whenever they die, behind a gateway with two workers."""

    def __init__(self, gateway: GatewayProcess, engines: list[Undying]) -> None:
        self.gateway = gateway
        self.engines = engines

    @property
    def deaths(self) -> int:
        return sum(engine.deaths for engine in self.engines)

    def ask(self, model: str, script: Any = None, **fields: Any) -> httpx.Response:
        """One request on a connection of its own, so that any of the workers gets it."""
        body = {"model": model, "messages": MESSAGES} | fields | ({"script": script} if script else {})
        got = b""
        with self.gateway.client() as client, client.stream("POST", CHAT, json=body) as answer:
            with suppress(httpx.RemoteProtocolError):  # a stream that failed is cut
                for piece in answer.iter_bytes():
                    got += piece
            return httpx.Response(answer.status_code, headers=answer.headers, content=got)

    def asked(self, mark: str) -> int:
        return sum(len(engine.seen(mark)) for engine in self.engines)

    def released(self, gate: str) -> bool:
        """Release those that wait at a gate of any engine that answers now."""
        for engine in self.engines:
            with suppress(OSError, HTTPException):
                engine.release(gate)
        return True

    def well(self) -> None:
        """Wait until every engine and the gateway answer again."""
        for engine in self.engines:
            wait_for(lambda engine=engine: _answers(engine))
        for model in ("one", "two", "three"):
            wait_for(lambda model=model: self.ask(model, user=uuid4().hex).status_code == 200)


def _answers(engine: Undying) -> bool:
    try:
        return httpx.get(engine.url + "/health", verify=False).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    directory = tmp_path_factory.mktemp("fleet")
    file = directory / "stack.yaml"
    with ExitStack() as stack:
        engines = [stack.enter_context(undying_engine()) for _ in range(3)]
        file.write_text(CONFIG.format(**dict(zip("abc", (engine.url for engine in engines), strict=True))))
        with running_gateway(
            directory / "log", engines[0].url, STACK_CONFIG=str(file), STACK_WORKERS="2", STACK_RESUME="3"
        ) as gateway:
            fleet = Fleet(gateway, engines)
            fleet.well()  # from here on there are kept connections
            yield fleet


@pytest.mark.parametrize(
    ("model", "script", "stream"),
    [
        ("one", [["die"]], False),
        ("three", [["die"]], True),
        ("three", [["pause", 1.5], ["die"]], False),
        ("three", [HEAD, ["die"]], True),  # engines that send their head before they begin to work
        ("folded", [["die"]], False),
        ("folded", [HEAD, ["text", ": ping\n\n"], ["die"]], False),
    ],
)
def test_a_request_that_kills_its_engine_kills_one_and_once(
    fleet: Fleet, model: str, script: list[list[Any]], *, stream: bool
) -> None:
    before = fleet.deaths
    fields = {"user": uuid4().hex, "stream": stream}
    for _ in range(4):  # a client repeats it, on whichever worker
        answer = fleet.ask(model, script, **fields)
        assert answer.status_code == 502, answer.text
        assert answer.json()["error"]["code"] == "engine_failed"
        assert answer.headers["x-should-retry"] == "false"
        wait_for(lambda: fleet.deaths > before)
    fleet.well()
    assert fleet.deaths == before + 1


def test_requests_whose_engine_died_by_another_cause_are_answered_by_the_next(fleet: Fleet) -> None:
    """Several different requests without a token died together, so none of them is blamed."""
    before, answers = fleet.deaths, []
    script_for = {"a": [["gate", "never"]]}

    def ask(number: int) -> None:
        stream = bool(number % 2)
        answers.append(fleet.ask("two", user=f"{mark}-{number}", stream=stream, script_for=script_for))

    mark = uuid4().hex
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    wait_for(lambda: fleet.engines[0].running() == 6)
    fleet.engines[0].process.kill()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 6
    fleet.well()
    assert fleet.deaths == before + 1


def test_a_suspect_among_others_is_handed_on_once_at_most(fleet: Fleet) -> None:
    before, answers = fleet.deaths, []
    mark = uuid4().hex

    def innocent(number: int) -> None:
        answers.append(fleet.ask("three", user=f"{mark}-{number}", stream=True, script_for=slow))

    slow = {name: [["gate", mark], *WHOLE] for name in "abc"}
    threads = [threading.Thread(target=innocent, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    wait_for(lambda: sum(engine.running() for engine in fleet.engines) == 6)
    answer = fleet.ask("three", [["die"]], user=mark)
    assert answer.status_code == 502
    wait_for(lambda: fleet.deaths > before)
    wait_for(lambda: fleet.released(mark) and not any(thread.is_alive() for thread in threads))
    assert fleet.deaths <= before + 2
    assert fleet.ask("three", [["die"]], user=mark).json()["error"]["code"] == "engine_failed"
    fleet.well()
    assert fleet.deaths <= before + 2


def test_a_begun_answer_goes_on_elsewhere_when_its_engine_dies(fleet: Fleet) -> None:
    before = fleet.deaths
    script_for = {"a": [["role"], ["token", "zero"], ["die"]], "b": WHOLE}
    answer = fleet.ask("two", user=uuid4().hex, stream=True, script_for=script_for)
    assert answer.status_code == 200
    assert text_of(events(answer.text)) == "zeroone"
    fleet.well()
    assert fleet.deaths == before + 1


def test_an_answer_that_broke_off_alone_twice_is_not_handed_on_again(fleet: Fleet) -> None:
    """Whatever the engines died of after some tokens, no third one gets the request."""
    before = fleet.deaths
    script = [["role"], ["token", "one"], ["die"]]
    answer = fleet.ask("three", script, user=uuid4().hex, stream=True)
    assert answer.status_code == 200
    assert "engine_failed" in answer.text
    fleet.well()
    assert fleet.deaths == before + 2
