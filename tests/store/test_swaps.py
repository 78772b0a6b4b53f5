"""Two gateways with one PostgreSQL agree on the model that an engine has loaded, and on the engine that is awake."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support import shared_gpu
from tests.support.containers import Postgres
from tests.support.processes import MESSAGES, FakeEngine, GatewayProcess
from tests.support.two_models import CHAT, HELD, LOADING, A, B, ask, before, client, learn, memory, small_engine


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with small_engine() as engine:
        yield engine


@pytest.fixture
def pair(engine: FakeEngine, postgres: Postgres, tmp_path: Path) -> Iterator[list[GatewayProcess]]:
    url = postgres.new_database()
    with ExitStack() as stack:
        yield [stack.enter_context(before(engine, tmp_path, name, STACK_STORE_URL=url)) for name in ("one", "two")]


def test_two_gateways_swap_together(engine: FakeEngine, pair: list[GatewayProcess]) -> None:
    for gateway in pair:
        learn(gateway)
    engine.set(seconds=1.0)
    loads = len(memory(engine)["loads"])

    async def crowd() -> None:
        async with client(pair[0]) as one, client(pair[1]) as two:
            await asyncio.gather(*(ask((one, two)[it // 2 % 2], (A, B)[it % 2], str(it)) for it in range(60)))

    asyncio.run(crowd())
    assert len(memory(engine)["loads"]) - loads <= 15


def test_a_gateway_tells_its_clients_of_the_other_ones_loads(engine: FakeEngine, pair: list[GatewayProcess]) -> None:
    learn(pair[0])
    held = {"model": B, "messages": MESSAGES, "user": "held", "stream": True, "script": HELD}
    with pair[0].client() as one, pair[1].client() as two:
        with one.stream("POST", CHAT, json=held) as stream:
            engine.wait_seen("held")
            answer = two.post(CHAT, json={"model": A, "messages": MESSAGES}, headers={"x-stack-queue-timeout": "0.3"})
            assert answer.status_code == 503
            message = "The model is not loaded, and the engine serves another model first."
            assert answer.json()["error"]["message"].startswith(message)
            assert int(answer.headers["retry-after-ms"]) >= 500, "a stay lasts twice the swap and the way back"
            engine.release("go")
            assert "[DONE]" in stream.read().decode()
        engine.set(seconds=600)
        body = {"model": A, "messages": MESSAGES, "stream": True}
        with one.stream("POST", CHAT, json=body) as loads, two.stream("POST", CHAT, json=body) as waits:
            assert int(loads.headers["x-stack-loading"]) >= 0
            text, said = waits.iter_text(), ""
            while not LOADING.search(said):
                said += next(text)
            engine.set(seconds=0)
            assert "[DONE]" in "".join(text)
            assert "[DONE]" in loads.read().decode()
    assert memory(engine)["loads"] == [A, B, A]


def test_two_gateways_wake_the_engines_of_a_gpu_together(postgres: Postgres, tmp_path: Path) -> None:
    url = postgres.new_database()

    async def crowd(gateways: list[GatewayProcess]) -> None:
        async with client(gateways[0]) as one, client(gateways[1]) as two:

            async def in_turn(mark: int) -> None:
                for model in ((A, B), (B, A))[mark // 2 % 2] * 2:
                    await ask((one, two)[mark % 2], model, str(mark), shared_gpu.SLOW, stream=True)

            await asyncio.gather(*map(in_turn, range(16)))

    with shared_gpu.engines(tmp_path) as engines, ExitStack() as stack:
        asyncio.run(
            crowd(
                [
                    stack.enter_context(shared_gpu.before(engines, tmp_path, name=name, STACK_STORE_URL=url))
                    for name in ("one", "two")
                ]
            )
        )
        assert 3 <= shared_gpu.wakes(*engines) <= 15
        assert max(it.peak() for it in engines) <= 2
        shared_gpu.check(*engines)
