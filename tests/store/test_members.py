"""A worker that joins again tells PostgreSQL of what it still runs, and of nothing else."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest

from gateway.admission.postgres import PostgresQueues
from gateway.admission.visit import Spot
from gateway.errors import RateLimited
from gateway.keys.known import Key
from gateway.keys.limit_fields import Limits
from gateway.limits.estimates import Estimate
from gateway.limits.memory import Accounts
from gateway.limits.postgres import PostgresBook
from gateway.store.postgres import PATIENCE, LostError
from tests.support.clocks import Clock
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


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the workers' hosts."""
    clock = Clock()
    for module in ("store", "limits"):
        monkeypatch.setattr(f"gateway.{module}.postgres.time", SimpleNamespace(monotonic=clock))
    return clock


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


async def stand_still(clock: Clock, still: Any, lives: Any, seconds: float = PATIENCE, *, host: bool = False) -> None:
    """Let time pass in which one of two workers does nothing. `host`: its host's clock stood too."""
    end = clock() + seconds
    while clock() < end:
        clock.advance(PATIENCE / 2)
        await lives._attend()
    if host:
        still._database._ahead -= seconds


@pytest.mark.parametrize("host", [False, True])
async def test_requests_of_a_worker_that_stood_still_wait_again_and_count_again(
    url: str, clock: Clock, *, host: bool
) -> None:
    lost: list[None] = []
    async with (
        PostgresQueues(url, lambda _: None, lambda: lost.append(None)) as still,
        PostgresQueues(url, lambda _: None, lambda: None) as lives,
    ):
        for it in (still, lives):
            it._task.cancel()
        runs, waits = await enter(still, 1), await enter(still, 1)
        assert (runs.holds, waits.holds) == (True, False)
        await stand_still(clock, still, lives, host=host)
        other = await enter(lives, 1)
        assert other.holds, "the database has given up what the first one had"
        await still._attend()
        assert lost, "those that wait are told"
        with pytest.raises(LostError):
            await enter(still, 1)
        await still._attend()
        assert held(url, still) == [runs.id]
        assert held(url, lives) == [other.id]
        with psycopg.connect(url) as connection:
            assert connection.execute("SELECT count(*) FROM account_owners").fetchone() == (2,)


@pytest.mark.parametrize("host", [False, True])
async def test_what_a_worker_that_stood_still_has_counts_only_once(url: str, clock: Clock, *, host: bool) -> None:
    """Here no other worker entered meanwhile, so the database still has its places."""
    async with (
        PostgresQueues(url, lambda _: None, lambda: None) as still,
        PostgresQueues(url, lambda _: None, lambda: None) as lives,
    ):
        for it in (still, lives):
            it._task.cancel()
        runs = await enter(still, 2)
        await stand_still(clock, still, lives, host=host)
        for _ in range(2):
            await still._attend()
        assert held(url, still) == [runs.id]
        assert (await enter(lives, 2)).holds


@pytest.mark.parametrize("seconds", [PATIENCE, 610.0])
async def test_running_requests_of_a_worker_that_stood_still_count_for_their_key_again(
    url: str, clock: Clock, seconds: float
) -> None:
    """After ten minutes, the database has forgotten the worker."""
    key, estimate = Key("key", limits=Limits(concurrent=1)), Estimate(size=0, prompt=1)
    async with PostgresBook(url, Accounts(), 0) as still, PostgresBook(url, Accounts(), 0) as lives:
        for it in (still, lives):
            it._task.cancel()
        runs = await still.enter(key)
        await runs.set_aside(estimate)
        await stand_still(clock, still, lives, seconds)
        other = await lives.enter(key)
        await other.set_aside(estimate)  # the database no longer counts the first one's
        other.settle(0)
        await lives._attend()
        for _ in range(2):
            await still._attend()
        refused = await lives.enter(key)
        with pytest.raises(RateLimited):
            await refused.set_aside(estimate)
        refused.settle(0)
        runs.settle(0)
        await still._attend()
        await (await lives.enter(key)).set_aside(estimate)
