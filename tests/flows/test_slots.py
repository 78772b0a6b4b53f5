"""A vLLM tells nobody how many requests it takes at a time, and refuses what is too much: the gateway learns it, and
the caller waits in the queue instead. Two workers."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import httpx
import pytest

from tests.support.processes import (
    AUTH,
    MESSAGES,
    FakeEngine,
    GatewayProcess,
    fake_engine,
    free_port,
    running_gateway,
    scrape,
    wait_for,
)
from tests.support.rows import Rows

CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
CONFIG = """
engines:
  learned: {{dialect: vllm, base_url: "{learned}"}}
  own: {{dialect: vllm, base_url: "{own}"}}
  told: {{dialect: vllm, slots: 40, base_url: "{told}"}}
  shut: {{dialect: vllm, base_url: "{shut}"}}
  small: {{dialect: vllm, base_url: "{small}"}}
models:
  learned: {{targets: [{{engine: learned, model: fake-model}}]}}
  own: {{targets: [{{engine: own, model: fake-model}}]}}
  told: {{targets: [{{engine: told, model: fake-model}}]}}
  shut: {{targets: [{{engine: shut, model: fake-model}}]}}
  small: {{targets: [{{engine: small, model: fake-model}}]}}
default_model: learned
"""
TAKES = {"learned": 4, "own": 4, "told": 4, "shut": 0, "small": 8}  # inputs at a time


@pytest.fixture(scope="module")
def engines() -> Iterator[dict[str, FakeEngine]]:
    with (
        fake_engine(dialect="vllm") as learned,
        fake_engine(dialect="vllm") as own,
        fake_engine(dialect="vllm") as told,
        fake_engine(dialect="vllm") as shut,
        fake_engine(dialect="vllm") as small,
    ):
        yield {"learned": learned, "own": own, "told": told, "shut": shut, "small": small}


@pytest.fixture(scope="module")
def metrics() -> int:
    return free_port()


@pytest.fixture(scope="module")
def gateway(
    tmp_path_factory: pytest.TempPathFactory, engines: dict[str, FakeEngine], metrics: int
) -> Iterator[GatewayProcess]:
    directory = tmp_path_factory.mktemp("slots")
    (directory / "stack.yaml").write_text(CONFIG.format(**{name: it.url for name, it in engines.items()}))
    settings = {
        "STACK_DATA_DIR": str(directory),
        "STACK_CONFIG": str(directory / "stack.yaml"),
        "STACK_METRICS_BIND": f"127.0.0.1:{metrics}",
        "STACK_QUEUE_TIMEOUT": "60",
    }
    with running_gateway(directory / "log", engines["learned"].url, **settings) as gateway:
        yield gateway


@pytest.fixture(autouse=True)
def _anew(engines: dict[str, FakeEngine]) -> None:
    for name, engine in engines.items():
        engine.set(takes=TAKES[name], works=0.05)


def burst(gateway: GatewayProcess, model: str, count: int, **fields: Any) -> list[httpx.Response]:
    """Send that many requests at once, every second one a stream."""
    script = [["role"], ["pause", 0.05], ["token", "x"], ["finish", "stop"], ["usage"], ["done"], ["end"]]

    async def all_of_them() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=gateway.url, headers=AUTH, timeout=120, limits=limits) as client:
            bodies = [
                {"model": model, "messages": MESSAGES, "stream": bool(it % 2), "script": script} | fields
                for it in range(count)
            ]
            return await asyncio.gather(*(client.post(CHAT, json=body) for body in bodies))

    return asyncio.run(all_of_them())


def refusals(engine: FakeEngine) -> int:
    """Return how often the engine has reported that it is full since its state was set."""
    return sum("full" in it for it in engine.asked(CHAT) + engine.asked("/v1/embeddings") + engine.asked(COMPLETION))


def told(answers: list[httpx.Response]) -> dict[Any, int]:
    return Counter(it.status_code if it.is_success else (it.status_code, it.json()["error"]["code"]) for it in answers)


def test_a_hundred_at_once_are_all_answered_and_the_next_hundred_know_the_slots(
    gateway: GatewayProcess, engines: dict[str, FakeEngine], metrics: int
) -> None:
    engine = engines["learned"]
    assert told(burst(gateway, "learned", 100)) == {200: 100}
    first = refusals(engine)
    slots = scrape(metrics).total("stack_slots", upstream="learned")
    engine.set(works=0.05)
    since = time.monotonic()
    assert told(burst(gateway, "learned", 100)) == {200: 100}
    assert first > 0
    assert 1 <= slots <= 8
    # One that is tried too many every three seconds, and as many as were learned too many at first.
    assert refusals(engine) <= 8 + (time.monotonic() - since) / 3 * 4


def test_slots_are_raised_again_while_others_wait(
    gateway: GatewayProcess, engines: dict[str, FakeEngine], metrics: int
) -> None:
    engine = engines["own"]
    engine.set(takes=1)
    assert told(burst(gateway, "own", 20)) == {200: 20}
    before = scrape(metrics).total("stack_slots", upstream="own")
    engine.set(takes=4, works=0.4)
    raised = threading.Event()

    def ask() -> set[Any]:
        found: set[Any] = set()
        while not raised.is_set():
            found |= told(burst(gateway, "own", 4, stream=False)).keys()
        return found

    with ThreadPoolExecutor(2) as pool:  # one more than the slots waits at any time
        asked = [pool.submit(ask) for _ in range(2)]
        try:
            wait_for(lambda: scrape(metrics).total("stack_slots", upstream="own") > before)
        finally:
            raised.set()
        assert [it.result() for it in asked] == [{200}] * 2


def test_a_number_of_slots_that_was_set_stays_and_callers_wait_all_the_same(
    gateway: GatewayProcess, engines: dict[str, FakeEngine], metrics: int
) -> None:
    assert told(burst(gateway, "told", 30)) == {200: 30}
    assert refusals(engines["told"]) > 0
    assert scrape(metrics).total("stack_slots", upstream="told") == 40


@pytest.mark.parametrize("count", [1, 12])
def test_an_engine_that_refuses_everything_is_not_asked_for_ever(
    gateway: GatewayProcess, engines: dict[str, FakeEngine], count: int
) -> None:
    answers = burst(gateway, "shut", count)
    assert told(answers) == {(503, "server_is_overloaded"): count}
    assert all(it.headers["retry-after"] for it in answers)
    assert refusals(engines["shut"]) <= (2 if count == 1 else 6 * count)


def test_a_request_that_may_not_wait_is_rejected_at_once(
    gateway: GatewayProcess, engines: dict[str, FakeEngine]
) -> None:
    with gateway.client() as client:
        headers = {"x-stack-queue-timeout": "0"}
        answer = client.post(CHAT, json={"model": "shut", "messages": MESSAGES}, headers=headers)
    assert told([answer]) == {(503, "server_is_overloaded"): 1}
    assert refusals(engines["shut"]) == 1


def test_a_request_that_a_full_engine_rejected_costs_no_tokens(
    gateway: GatewayProcess, engines: dict[str, FakeEngine], mark: str
) -> None:
    """Its client leaves while it waits for another turn."""
    engines["told"].set(takes=1, works=0.05)
    held = {"script": [["role"], ["token", "x"], ["gate", mark], ["finish", "stop"], ["done"], ["end"]], "user": mark}
    asked = {"model": "told", "messages": MESSAGES}
    with gateway.client() as client, client.stream("POST", CHAT, json=asked | held | {"stream": True}) as running:
        lines = running.iter_lines()
        assert next(lines)
        with pytest.raises(httpx.ReadTimeout):
            client.post(CHAT, json=asked | {"max_tokens": 5000}, headers={"x-request-id": mark}, timeout=1)
        with closing(Rows({"STACK_DATA_DIR": str(gateway.log_path.parent)})) as rows:
            wait_for(lambda: rows.of(mark)["outcome"] == "client_left")
            row = rows.of(mark)
        engines["told"].release(mark)
    assert (row["tokens_in"], row["tokens_out"]) == (0, 0)


MANY: list[tuple[str, dict[str, Any], str, int]] = [
    ("/v1/embeddings", {"input": ["x"] * 9}, "input", 9),
    ("/v1/embeddings", {"input": [[1, 2]] * 513}, "input", 513),
    (COMPLETION, {"prompt": ["One"] * 9, "max_tokens": 3}, "prompt", 9),
    (COMPLETION, {"prompt": ["One"] * 3, "n": 3, "temperature": 1, "max_tokens": 3}, "prompt", 9),
    (COMPLETION, {"prompt": ["One"] * 9, "max_tokens": 3, "stream": True}, "prompt", 9),
    (COMPLETION, {"prompt": "One", "n": 9, "temperature": 1, "max_tokens": 3}, "n", 9),
    (CHAT, {"messages": MESSAGES, "n": 9, "temperature": 1}, "n", 9),
    (CHAT, {"messages": MESSAGES, "n": 9, "temperature": 1, "stream": True}, "n", 9),
]


@pytest.mark.parametrize(("path", "body", "param", "number"), MANY)
def test_more_inputs_than_an_idle_engine_takes_are_refused_with_their_number(
    gateway: GatewayProcess, engines: dict[str, FakeEngine], path: str, body: dict[str, Any], param: str, number: int
) -> None:
    with gateway.client() as client:
        answer = client.post(path, json={"model": "small"} | body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "too_many_inputs", param)
    assert str(number) in error["message"]
    assert refusals(engines["small"]) == 2


def test_one_request_of_many_inputs_takes_no_slots_from_others(
    gateway: GatewayProcess, engines: dict[str, FakeEngine], metrics: int
) -> None:
    """It is rejected beside other requests too, and that must not lower the learned slots."""

    async def beside() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=gateway.url, headers=AUTH, timeout=60) as client:
            small = {"model": "small", "messages": MESSAGES}
            large = {"model": "small", "input": ["x"] * 9}
            asked = [client.post(CHAT, json=small) for _ in range(4)]
            return await asyncio.gather(*asked, client.post("/v1/embeddings", json=large))

    engines["small"].set(works=1.0)
    assert told(asyncio.run(beside()))[200] == 4
    assert scrape(metrics).total("stack_slots", upstream="small") == 256
