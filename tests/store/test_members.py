"""A worker that joins again tells PostgreSQL of what it still runs, and of nothing else."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest

from gateway.admission.postgres import PostgresQueues
from gateway.admission.visit import Spot
from tests.support.containers import Postgres

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.store.postgres.WAIT", 600.0)


@pytest.fixture
def url(postgres: Postgres) -> str:
    """The database's."""
    return postgres.new_database()


@pytest.fixture
async def queues(url: str) -> AsyncIterator[PostgresQueues]:
    """A worker that joins when the test says so."""
    async with PostgresQueues(url, lambda _: None, lambda: None) as queues:
        queues._task.cancel()
        yield queues


async def enter(queues: PostgresQueues, slots: int) -> Spot:
    it: Any = SimpleNamespace(key_id="key", account="key", mark="mark", priority=1)
    spot = await queues.enter("engine", slots, it, 60, 8, ahead=False)
    assert isinstance(spot, Spot)
    return spot


async def rejoin(queues: PostgresQueues) -> None:
    queues._member.lose(TimeoutError("the test's"))
    await queues._attend()
    while queues._background:
        await next(iter(queues._background))


def held(url: str, queues: PostgresQueues) -> list[int]:
    """The places that this worker has in the database."""
    with psycopg.connect(url) as connection:
        query = "SELECT id FROM queue_places WHERE held AND owner = %s ORDER BY id", (queues._member.owner,)
        return [number for (number,) in connection.execute(*query)]


@pytest.mark.parametrize("told", [True, False])
async def test_a_request_that_ends_while_its_worker_joins_leaves_no_place(
    url: str, queues: PostgresQueues, monkeypatch: pytest.MonkeyPatch, *, told: bool
) -> None:
    """The database has just been `told` of it, or is not told yet."""
    spots = [await enter(queues, 2) for _ in range(2)]
    first_told, ended = asyncio.Event(), asyncio.Event()
    execute = psycopg.AsyncConnection.execute

    async def stops(self: Any, query: Any, *rest: Any) -> Any:
        cursor = await execute(self, query, *rest)
        if query.startswith("INSERT INTO queue_places"):
            first_told.set()
            await ended.wait()
        return cursor

    monkeypatch.setattr(psycopg.AsyncConnection, "execute", stops)
    joins = asyncio.create_task(rejoin(queues))
    await first_told.wait()
    ends, runs = spots if told else reversed(spots)
    queues.leave(ends)
    ended.set()
    await joins
    assert held(url, queues) == [runs.id]
    await rejoin(queues)
    assert held(url, queues) == [runs.id]
    queues.leave(runs)
    await rejoin(queues)
    assert held(url, queues) == []


async def test_a_worker_that_could_not_join_tells_all_of_it_the_next_time(
    url: str, queues: PostgresQueues, monkeypatch: pytest.MonkeyPatch
) -> None:
    spots = [await enter(queues, 2) for _ in range(2)]
    execute = psycopg.AsyncConnection.execute

    async def fails(self: Any, query: Any, *rest: Any) -> Any:
        if query.startswith("INSERT INTO queue_places"):
            raise TimeoutError
        return await execute(self, query, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(psycopg.AsyncConnection, "execute", fails)
        await rejoin(queues)
    assert not queues._member.owner
    await rejoin(queues)
    assert held(url, queues) == [it.id for it in spots]
