"""Two gateways with one PostgreSQL: an engine's slots and queue are one, and each goes on by itself without it."""

import asyncio
import hashlib
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from statistics import median

import httpx
import psycopg
import pytest

from tests.support.containers import Postgres
from tests.support.crowd import GENERATION, KEYS, ask, obeyed, settings
from tests.support.keys import CHAT
from tests.support.keys import ask as ask_key
from tests.support.processes import (
    MESSAGES,
    NO_TLS,
    FakeEngine,
    GatewayProcess,
    fake_engine,
    running_gateway,
    wait_for,
)

SLOTS = 3


@pytest.fixture(scope="module")
def engine() -> Iterator[FakeEngine]:
    with fake_engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def url(postgres: Postgres) -> str:
    """The database's."""
    return postgres.new_database()


@pytest.fixture(scope="module")
def pair(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory, url: str) -> Iterator[list[GatewayProcess]]:
    with ExitStack() as stack:
        gateways = []
        for name in ("a", "b"):
            directory = tmp_path_factory.mktemp(name)
            options = settings(STACK_STORE_URL=url, LLM_SLOTS=str(SLOTS), STACK_QUEUE="32")
            gateways.append(stack.enter_context(running_gateway(directory / "log", engine.url, **options)))
        yield gateways


def together(pair: list[GatewayProcess], count: int) -> list[int]:
    async def all_of_them() -> list[int]:
        callers = (ask(pair[number % 2].port, KEYS[number % 4], user=str(number)) for number in range(count))
        return [it.status for it in await asyncio.gather(*callers)]

    return asyncio.run(all_of_them())


def test_two_gateways_share_an_engines_slots(engine: FakeEngine, pair: list[GatewayProcess]) -> None:
    engine.peak()
    assert set(together(pair, 20)) == {200}
    assert engine.peak() == SLOTS


def test_two_gateways_share_a_fair_queue(pair: list[GatewayProcess], engine: FakeEngine) -> None:
    async def both() -> list[float]:
        flood = [asyncio.create_task(ask(pair[0].port, KEYS[0], user=str(it))) for it in range(30)]
        waits = [(await ask(pair[1].port, KEYS[1])).queued / GENERATION for _ in range(8)]
        for it in flood:
            it.cancel()
        await asyncio.gather(*flood, return_exceptions=True)
        return waits

    assert median(asyncio.run(both())) < 2
    wait_for(lambda: engine.running() == 0)
    assert set(together(pair, 6)) == {200}, "those who left have left nothing behind"


def test_a_client_that_obeys_retry_after_is_admitted(pair: list[GatewayProcess]) -> None:
    returned, admitted = asyncio.run(obeyed(pair[0].port, KEYS, 30, clients=60, enough=20))
    assert returned >= 20
    assert admitted >= 0.9 * returned


def test_a_request_that_waited_in_vain_has_a_promise_where_both_look(
    pair: list[GatewayProcess], engine: FakeEngine, url: str, mark: str
) -> None:
    script = [["gate", mark], ["json", [200, {"choices": []}]]]
    with ThreadPoolExecutor() as pool:
        held = [pool.submit(ask_key, pair[0], KEYS[0], script=script, user=f"{mark}-{it}") for it in range(SLOTS)]
        try:
            for it in range(SLOTS):
                engine.wait_seen(f"{mark}-{it}")
            with psycopg.connect(url) as connection:
                connection.execute("DELETE FROM queue_promises")  # those of the tests before
            late = {"authorization": f"Bearer {KEYS[7]}", "x-stack-queue-timeout": "0.2"}
            answer = httpx.post(pair[1].url + CHAT, json={"messages": MESSAGES}, headers=late, verify=NO_TLS)
            assert answer.json()["error"]["code"] == "queue_timeout"
            with psycopg.connect(url) as connection:
                key_id = hashlib.sha256(KEYS[7].encode()).hexdigest()[:8]
                query = "SELECT count(*) FROM queue_promises WHERE starts_with(mark, %s)", (key_id,)
                assert connection.execute(*query).fetchone() == (1,)
        finally:
            engine.release(mark)
        assert {it.result().status_code for it in held} == {200}


def test_the_slots_of_a_killed_worker_come_back(engine: FakeEngine, pair: list[GatewayProcess]) -> None:
    async def hold(it: GatewayProcess) -> None:
        while True:  # what came before may be in the way
            await ask(it.port, KEYS[0], 60, user="long")

    async def kill() -> None:
        callers = [asyncio.create_task(hold(it)) for it in pair for _ in range(2)]
        while engine.running() < SLOTS:  # noqa: ASYNC110  another process sets no event
            await asyncio.sleep(0.02)
        for it in pair:
            for pid in it.workers():
                os.kill(pid, signal.SIGKILL)
        for caller in callers:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)

    asyncio.run(kill())

    def all_served() -> bool:
        engine.peak()
        try:
            return set(together(pair, 12)) == {200} and engine.peak() == SLOTS
        except (OSError, EOFError):
            return False  # no worker is there yet

    wait_for(all_served, deadline=75)


def test_each_counts_for_itself_without_the_database(
    engine: FakeEngine, pair: list[GatewayProcess], postgres: Postgres
) -> None:
    postgres.stop()
    try:
        engine.peak()
        assert set(together(pair, 20)) == {200}
        assert SLOTS <= engine.peak() <= 2 * SLOTS
        told = [line["msg"] for it in pair for line in it.log() if line["level"] == "error"]
        assert any("each host counts by itself" in line for line in told)
    finally:
        postgres.start()

    def shared() -> bool:
        engine.peak()
        return set(together(pair, 20)) == {200} and engine.peak() == SLOTS

    wait_for(shared, deadline=75)
