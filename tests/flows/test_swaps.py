"""An Ollama with more models than fit into its memory: requests are served in batches, and clients are told of loads.
Two workers. The engine is scripted: it loads a model when it is asked for it, and counts that."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import MESSAGES, FakeEngine, GatewayProcess, fake_engine, free_port, scrape, wait_for
from tests.support.two_models import CHAT, HELD, LOADING, A, B, ask, before, client, learn, memory, small_engine

METRICS = free_port()


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with small_engine() as engine:
        yield engine


@pytest.fixture
def gateway(engine: FakeEngine, tmp_path: Path) -> Iterator[GatewayProcess]:
    with before(engine, tmp_path, STACK_METRICS_BIND=f"127.0.0.1:{METRICS}") as gateway:
        yield gateway


def test_alternating_requests_of_many_clients_cause_few_loads(engine: FakeEngine, gateway: GatewayProcess) -> None:
    engine.set(seconds=0.5)

    async def crowd() -> None:
        async with client(gateway) as http:
            await asyncio.gather(*(ask(http, (A, B)[it % 2], str(it)) for it in range(80)))

    learn(gateway)
    before = len(memory(engine)["loads"])
    asyncio.run(crowd())
    assert len(engine.asked(CHAT)) == 82
    assert len(memory(engine)["loads"]) - before <= 20


def test_a_model_is_loaded_only_when_no_request_for_another_one_runs(
    engine: FakeEngine, gateway: GatewayProcess
) -> None:
    learn(gateway)

    async def both() -> None:
        async with client(gateway) as http:
            tasks = [asyncio.create_task(ask(http, B, "held", HELD, stream=True))]
            await asyncio.to_thread(engine.wait_seen, "held")
            tasks += [asyncio.create_task(ask(http, A, mark, stream=True)) for mark in ("next", "after")]
            await asyncio.to_thread(wait_for, lambda: scrape(METRICS).total("stack_queue_depth") == 2)
            assert engine.seen("next") == engine.seen("after") == []
            assert memory(engine)["models"] == [B]
            engine.release("go")
            await asyncio.gather(*tasks)

    asyncio.run(both())
    assert memory(engine)["loads"] == [A, B, A]
    kept = [it["body"]["keep_alive"] for it in engine.asked("/api/chat") if "keep_alive" in it["body"]]
    assert set(kept) == {240}, "the engine's own time, which was about to end, is made longer"


def loads_in(gateway: GatewayProcess) -> list[dict[str, Any]]:
    return [it for it in gateway.log() if it["msg"] == "model_loaded"]


def test_clients_that_wait_for_a_load_are_told_so(engine: FakeEngine, gateway: GatewayProcess) -> None:
    learn(gateway)
    engine.set(seconds=600)
    with (
        gateway.client() as http,
        http.stream("POST", CHAT, json={"model": A, "messages": MESSAGES, "stream": True}) as one,
        http.stream("POST", CHAT, json={"model": A, "messages": MESSAGES, "stream": True}) as two,
    ):
        for answer in (one, two):  # the first loads the model, and the second waits for that
            assert int(answer.headers["x-stack-loading"]) >= 0
        texts = [answer.iter_text() for answer in (one, two)]
        for text in texts:
            said = ""
            while not LOADING.search(said):
                said += next(text)
        engine.set(seconds=0)
        assert all("[DONE]" in "".join(text) for text in texts)
    assert memory(engine)["loads"] == [A, B, A]
    lines = wait_for(lambda: found if len(found := loads_in(gateway)) == 3 else None)
    assert [(it["model"], it["all_fit"]) for it in lines] == [(A, True), (B, False), (A, False)]
    assert {it["level"] for it in lines} == {"info"}


def test_a_load_goes_on_when_its_client_disconnects(engine: FakeEngine, gateway: GatewayProcess) -> None:
    learn(gateway)
    engine.set(seconds=600)
    with (
        gateway.client() as http,
        http.stream("POST", CHAT, json={"model": A, "messages": MESSAGES, "stream": True}) as answer,
    ):
        assert "x-stack-loading" in answer.headers
        wait_for(lambda: memory(engine)["loading"] == A)
    wait_for(lambda: '"outcome":"client_left"' in gateway.log_path.read_text())
    engine.set(seconds=0)
    wait_for(lambda: memory(engine)["models"] == [A])
    assert memory(engine)["given_up"] == 0


def test_a_load_that_a_restart_of_the_engine_ends_holds_up_no_other_model(tmp_path: Path) -> None:
    port = free_port()
    with ExitStack() as closing:
        with fake_engine(port, dialect="ollama") as engine:
            engine.set(
                room=1, seconds=4
            )  # a load that is lost was waited for as if it took twice that, and five seconds
            gateway = closing.enter_context(before(engine, tmp_path))
            learn(gateway)
            engine.set(seconds=600)
            http = closing.enter_context(gateway.client())
            with http.stream("POST", CHAT, json={"model": A, "messages": MESSAGES, "stream": True}):
                wait_for(lambda: memory(engine)["loading"] == A)
            wait_for(lambda: '"outcome":"client_left"' in gateway.log_path.read_text())
        with fake_engine(port, dialect="ollama") as engine:
            engine.set(room=1, seconds=0.1)
            answer = http.post(CHAT, json={"model": B, "messages": MESSAGES})
            assert (answer.status_code, memory(engine)["models"]) == (200, [B])
    assert int(answer.headers["x-stack-queue-ms"]) < 10_000


def test_models_that_fit_are_served_side_by_side(engine: FakeEngine, gateway: GatewayProcess) -> None:
    engine.set(room=2)
    learn(gateway)

    async def both() -> None:
        async with client(gateway) as http:
            first = asyncio.create_task(ask(http, B, "held", HELD, stream=True))
            await asyncio.to_thread(engine.wait_seen, "held")
            for _ in range(3):
                assert "one two three" in await ask(http, A, "meanwhile")
            engine.release("go")
            await first

    asyncio.run(both())
    assert memory(engine)["loads"] == [A, B]


def test_a_request_that_cannot_wait_for_its_model_is_told_why(engine: FakeEngine, gateway: GatewayProcess) -> None:
    learn(gateway)
    body = {"messages": MESSAGES, "user": "held", "stream": True, "script": HELD}
    with gateway.client() as http, http.stream("POST", CHAT, json=body | {"model": B}) as stream:
        engine.wait_seen("held")
        answer = http.post(CHAT, json={"model": A, "messages": MESSAGES}, headers={"x-stack-queue-timeout": "0.3"})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (503, "queue_timeout")
        assert error["message"].startswith("The model is not loaded, and the engine serves another model first.")
        assert int(answer.headers["retry-after-ms"]) > 0
        engine.release("go")
        assert "[DONE]" in stream.read().decode()


def test_a_model_that_cannot_be_loaded_takes_the_engine_from_the_others_once(
    engine: FakeEngine, gateway: GatewayProcess
) -> None:
    """Those that wait for it are refused too, and so is whoever asks any worker later."""
    learn(gateway)
    engine.set(too_large=[A])

    async def crowd() -> None:
        async with client(gateway) as http:

            async def refused(_: int) -> None:
                answer = await http.post(CHAT, json={"model": A, "messages": MESSAGES})
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_unavailable")

            held = asyncio.create_task(ask(http, B, "held", HELD, stream=True))
            await asyncio.to_thread(engine.wait_seen, "held")
            them = [asyncio.create_task(refused(it)) for it in range(8)]
            await asyncio.to_thread(wait_for, lambda: scrape(METRICS).total("stack_queue_depth") == 8)
            engine.release("go")
            await asyncio.gather(held, *them)
            for it in range(4):
                await refused(it)
                await ask(http, B, "served")

    asyncio.run(crowd())
    assert (memory(engine)["failed"], memory(engine)["loads"]) == ([A], [A, B, B])
    assert {it["body"]["model"] for it in engine.asked(CHAT)} == {B}, "the requests themselves were not sent"
    (line,) = gateway.told("model_load_failed")
    assert (line["model"], line["level"]) == (A, "warning")
