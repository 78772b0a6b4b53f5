"""vLLM engines that share a GPU: one of them is awake, and the requests are served in batches. Two workers. The engines
are scripted. The GPU's memory is a lock that only one of them can hold."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.console import visiting
from tests.support.keys import ADMIN
from tests.support.processes import MESSAGES, FakeEngine, GatewayProcess, fake_engine, free_port, scrape, wait_for
from tests.support.shared_gpu import SLOW, before, check, engines, gpu, wakes
from tests.support.two_models import CHAT, HELD, LOADING, A, B, ask, client

METRICS = free_port()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[list[FakeEngine]]:
    with engines(tmp_path) as pair:
        yield pair


@pytest.fixture
def gateway(pair: list[FakeEngine], tmp_path: Path) -> Iterator[GatewayProcess]:
    with before(pair, tmp_path, (3, 1), STACK_SWAP_WAIT="1", STACK_ADMIN_KEYS=ADMIN) as gateway:
        yield gateway


def states(gateway: GatewayProcess) -> dict[str, str]:
    """Each engine's state, as the console tells it."""
    with visiting(gateway) as operator:
        return {it["name"]: it["state"] for it in operator.get("/console/now.json").json()["engines"]}


def test_alternating_requests_are_served_in_batches(pair: list[FakeEngine], gateway: GatewayProcess) -> None:
    async def crowd() -> None:
        async with client(gateway) as http:

            async def in_turn(mark: str) -> None:
                for model in (A, B) * 2:
                    await ask(http, model, mark, SLOW, stream=True)

            await asyncio.gather(*(in_turn(str(it)) for it in range(20)))

    asyncio.run(crowd())
    assert [len(it.asked(CHAT)) for it in pair] == [40, 40]
    assert 3 <= wakes(*pair) <= 15
    assert [it.peak() for it in pair] == [3, 1], "each has its own slots"
    check(*pair)
    with gateway.client() as http:
        assert http.get("/readyz").status_code == 200
    assert states(gateway) == ({A: "ok", B: "asleep"} if gpu(pair[0])["awake"] else {A: "asleep", B: "ok"})
    loads = gateway.told("model_loaded", wakes(*pair))
    assert len(loads) == wakes(*pair)
    assert {it["engine"] for it in loads} == {A, B}


def test_one_request_is_served_beside_a_flood(pair: list[FakeEngine], gateway: GatewayProcess) -> None:
    async def flood() -> None:
        async with client(gateway) as http:
            waits = asyncio.create_task(ask(http, A, "first"))
            await waits

            async def client_of_one() -> None:
                while not waits.done():
                    await ask(http, A, "flood", SLOW, stream=True)

            waits = asyncio.create_task(asyncio.to_thread(pair[0].wait_seen, "flood"))
            crowd = [asyncio.create_task(client_of_one()) for _ in range(12)]
            await waits
            waits = asyncio.create_task(ask(http, B, "alone"))
            await asyncio.gather(*crowd)
            await waits

    asyncio.run(flood())
    assert len(pair[1].asked(CHAT)) == 1
    assert wakes(*pair) <= 3, "to the flood, to the one request, and back"
    check(*pair)


def test_an_engine_sleeps_when_its_answers_have_ended(pair: list[FakeEngine], gateway: GatewayProcess) -> None:
    body = {"messages": MESSAGES, "stream": True}
    with (
        gateway.client() as http,
        http.stream("POST", CHAT, json=body | {"model": B, "user": "held", "script": HELD}) as held,
        http.stream("POST", CHAT, json=body | {"model": A}) as waits,
    ):
        pair[1].wait_seen("held")
        said, text = "", waits.iter_text()
        assert int(waits.headers["x-stack-loading"]) >= 0
        while not LOADING.search(said):
            said += next(text)
        assert gpu(pair[1])["did"] == []
        pair[1].release("go")
        assert "[DONE]" in held.read().decode()
        assert "[DONE]" in "".join(text)
    check(*pair)


def test_an_engine_that_does_not_wake_costs_another_one_swap(pair: list[FakeEngine], gateway: GatewayProcess) -> None:
    def answer(model: str) -> tuple[int, str | None]:
        told = http.post(CHAT, json={"model": model, "messages": MESSAGES})
        return told.status_code, told.json().get("error", {}).get("code")

    pair[0].set(wakes=False)
    with gateway.client() as http:
        assert answer(B) == (200, None)
        assert [answer(A), answer(A)] == [(503, "engine_asleep")] * 2
        assert answer(B) == (200, None)
        assert answer(A) == (503, "engine_asleep")
        entries = http.get("/v1/models").json()["data"]
        assert {it["id"]: it["loaded"] for it in entries} == {A: False, B: True}
    assert states(gateway) == {A: "barred", B: "ok"}
    assert [path for path, _ in gpu(pair[1])["did"]] == ["/sleep", "/wake_up"]
    (line,) = gateway.told("engine_swap_failed")
    assert (line["engine"], line["reason"], line["level"]) == (A, "/wake_up: 500", "warning")


@pytest.mark.parametrize("other", [A, B])
def test_a_dead_engine_has_room_to_start(pair: list[FakeEngine], tmp_path: Path, other: str) -> None:
    """Whether it dies while it is awake, or while `other` is. It cannot start while another one is awake."""
    with before(
        pair, tmp_path, STACK_RESUME="1", STACK_RESUME_WAIT="60", STACK_METRICS_BIND=f"127.0.0.1:{METRICS}"
    ) as gateway:

        async def both() -> None:
            async with client(gateway) as http:
                await ask(http, other, "before")
                pair[1].process.kill()
                dead = asyncio.create_task(ask(http, B, "dead"))
                await asyncio.to_thread(wait_for, lambda: scrape(METRICS).total("stack_slots_used", upstream=B) == 1)
                living = asyncio.create_task(ask(http, A, "living"))
                await asyncio.to_thread(wait_for, lambda: scrape(METRICS).total("stack_queue_depth") == 1)
                await asyncio.to_thread(wait_for, lambda: not gpu(pair[0])["awake"])
                port = int(pair[1].url.rpartition(":")[2])
                with fake_engine(port, "vllm", gpu=str(tmp_path / "gpu")) as again:
                    assert "one two three" in await dead
                    assert "one two three" in await living
                    check(pair[0], again)

        asyncio.run(both())


def test_an_engine_that_died_idle_has_room_to_start(pair: list[FakeEngine], tmp_path: Path) -> None:
    with before(pair, tmp_path, STACK_RESUME_WAIT="60", STACK_METRICS_BIND=f"127.0.0.1:{METRICS}") as gateway:

        async def one() -> None:
            async with client(gateway) as http:
                await ask(http, B, "before")
                pair[1].process.kill()
                living = asyncio.create_task(ask(http, A, "living"))
                await asyncio.to_thread(wait_for, lambda: scrape(METRICS).total("stack_slots_used", upstream=A) == 1)
                port = int(pair[1].url.rpartition(":")[2])
                with fake_engine(port, "vllm", gpu=str(tmp_path / "gpu")) as again:
                    assert "one two three" in await living
                    assert [path for path, _ in gpu(again)["did"]] == ["/sleep"]

        asyncio.run(one())


def test_an_engine_that_is_awake_does_not_wait_for_a_dead_one(pair: list[FakeEngine], tmp_path: Path) -> None:
    pair[0].process.kill()
    with before(pair, tmp_path, STACK_RESUME_WAIT="600") as gateway, gateway.client() as http:
        assert http.post(CHAT, json={"model": B, "messages": MESSAGES}).status_code == 200
