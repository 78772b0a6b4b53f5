"""The arithmetic of limits and queues is the same in Python and in PostgreSQL: the same cases for both."""

import datetime as dt
import importlib
import math
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from types import SimpleNamespace
from typing import Any, get_args

import psycopg
import pytest

from gateway.admission.memory import Places, Refusal
from gateway.admission.postgres import PostgresQueues
from gateway.admission.swaps import UNSET
from gateway.errors import QuotaSpent, RateLimited, StackError
from gateway.keys.known import Key
from gateway.keys.limit_fields import LimitName, Limits
from gateway.limits.estimates import Estimate
from gateway.limits.memory import Accounts, SharedBook
from gateway.limits.postgres import SKEW, PostgresBook
from gateway.limits.rules import Lease
from gateway.settings import Settings
from gateway.store.store import open_store, prepare
from gateway.usage.rows import UsageBook
from tests.support import limit_cases, queue_cases
from tests.support.clocks import Clock
from tests.support.processes import ROOT

pytestmark = pytest.mark.anyio

# PostgreSQL's own names, taken by functions of the test's in a schema that is looked at first.
FAKES = """
CREATE SCHEMA fake;
CREATE TABLE fake.moment (at timestamptz);
INSERT INTO fake.moment VALUES (to_timestamp(1000));
CREATE FUNCTION fake.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS 'SELECT at FROM fake.moment';
CREATE FUNCTION fake.random() RETURNS double precision LANGUAGE sql AS 'SELECT 0.5::double precision';
"""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def no_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.random", lambda: 0.5)
    monkeypatch.setattr("gateway.limits.postgres.SKEW", 0.0)
    # When the test's clock moves by more than that, the worker did not stand still.
    monkeypatch.setattr("gateway.store.postgres.PATIENCE", math.inf)


class Databases:
    """The store of this test, and for PostgreSQL its clock."""

    def __init__(self, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        self.settings = Settings()
        self.url = self.settings.store_url
        prepare(self.settings)
        if self.url:
            with psycopg.connect(self.url, autocommit=True) as connection:
                connection.execute(FAKES)
                name = connection.info.dbname
                connection.execute(f"ALTER DATABASE {name} SET search_path = fake, public, pg_catalog")

    @contextmanager
    def clock(self) -> Iterator[Clock]:
        """A clock that the database shows too."""
        if not self.url:
            yield Clock()
            return
        with psycopg.connect(self.url, autocommit=True) as connection:

            class Both(Clock):
                def advance(self, seconds: float) -> None:
                    super().advance(seconds)
                    connection.execute("UPDATE fake.moment SET at = to_timestamp(%s)", (self.now,))

            yield Both()


@pytest.fixture
def databases(store_settings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Databases:
    return Databases(store_settings, monkeypatch)


# -- limits -----------------------------------------------------------------------------------------------------------


class Wall:
    """The time of day, and how far it is set off."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._began = dt.datetime(2026, 11, 30, 12, tzinfo=dt.UTC).timestamp() - clock()
        self.days = 0

    def __call__(self) -> float:
        return self._began + self._clock() + self.days * 86_400


class ClockedAccounts(Accounts):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock
        self.occupy(0)

    def now(self) -> float:
        return self._clock()


@asynccontextmanager
async def opened(databases: Databases, clock: Clock, wall: Wall, usage: UsageBook) -> AsyncIterator[Any]:
    """The book that a gateway with that store would use, by these clocks; and what tells the database of requests that
    are over."""
    accounts = ClockedAccounts(clock)
    if not databases.url:

        async def recorded(key_id: str, since: int, until: int) -> int:
            return usage.spent(key_id, since, until)

        async def nothing() -> None:
            pass

        yield SharedBook(accounts, 0, recorded, wall), nothing
        return
    book = PostgresBook(databases.url, accounts, 0)
    book._local._clock = wall
    book._database.now = clock  # type: ignore[method-assign]
    async with book:
        yield book, book._attend


def told(error: StackError) -> str:
    if isinstance(error, QuotaSpent):
        return "spent"
    assert isinstance(error, RateLimited)
    found = re.match(r"This key is limited to \d+ (.*)\. Retry", error.message)
    assert found
    return f"{found[1]} {round(int(error.headers['retry-after-ms']) / 1000, 2):g}"


@pytest.mark.parametrize("case", limit_cases.LIMITS)
async def test_limits_are_the_same_everywhere(databases: Databases, case: str) -> None:
    limits, steps = limit_cases.LIMITS[case]
    with closing(open_store(databases.settings)) as store, databases.clock() as clock:
        usage = UsageBook(store)
        wall = Wall(clock)
        async with opened(databases, clock, wall, usage) as (book, tell):
            scene = LimitScene(book, limits)
            for number, step in enumerate(steps):
                match step:
                    case limit_cases.Pass():
                        wall.days += step.days
                        clock.advance(step.seconds)
                    case limit_cases.Recorded():
                        row = {"id": str(number), "key_id": "k", "at": int((wall() - step.days_ago * 86_400) * 1000)}
                        usage.add([row | {"tokens_in": step.tokens_in, "tokens_out": step.tokens_out}])
                    case _:
                        await scene.do(number, step)
                        await tell()


@pytest.mark.parametrize("name", get_args(LimitName))
async def test_every_limit_is_enforced_in_either_database(databases: Databases, name: LimitName) -> None:
    """With PostgreSQL the second request comes to another host, whose own memory knows nothing of the first."""
    with closing(open_store(databases.settings)) as store, databases.clock() as clock:
        usage, wall = UsageBook(store), Wall(clock)
        async with opened(databases, clock, wall, usage) as (here, _), opened(databases, clock, wall, usage) as (it, _):
            there = it if databases.url else here
            key, estimate = Key("k", limits=Limits(**{name: 1})), Estimate(size=10, prompt=10)
            first = await here.enter(key)
            await first.set_aside(estimate)
            with pytest.raises((RateLimited, QuotaSpent)):
                await (await there.enter(key)).set_aside(estimate)


@pytest.mark.parametrize("name", ["requests_per_minute", "tokens_per_minute"])
async def test_a_client_that_returns_as_told_is_admitted_by_another_worker(
    databases: Databases, monkeypatch: pytest.MonkeyPatch, name: LimitName
) -> None:
    """With PostgreSQL, that worker's clock is behind, as it is when it heard of the first one's late."""
    monkeypatch.setattr("gateway.limits.postgres.SKEW", SKEW)
    with closing(open_store(databases.settings)) as store, databases.clock() as clock:
        usage, wall = UsageBook(store), Wall(clock)
        async with opened(databases, clock, wall, usage) as (here, _), opened(databases, clock, wall, usage) as (it, _):
            there, key, estimate = (
                it if databases.url else here,
                Key("k", limits=Limits(**{name: 60})),
                Estimate(10, 1),
            )
            for _ in range(60):
                await (await here.enter(key)).set_aside(estimate)
            with pytest.raises(RateLimited) as refused:
                await (await here.enter(key)).set_aside(estimate)
            clock.advance(int(refused.value.headers["retry-after-ms"]) / 1000)
            if databases.url:
                there._database.now = lambda: clock() - 0.9 * SKEW
            await (await there.enter(key)).set_aside(estimate)


class LimitScene:
    """The requests of one key."""

    def __init__(self, book: Any, limits: Limits) -> None:
        self._book = book
        self._key = Key("k", limits=limits)
        self._leases: list[Lease] = []

    async def do(self, number: int, step: Any) -> None:
        match step:
            case limit_cases.Change():
                self._key = Key("k", limits=step.limits)
            case limit_cases.Enter():
                self._leases.append(await self._book.enter(self._key))
                self._entered = self._leases[-1]
            case limit_cases.SetAside():
                assert await self._set_aside(self._entered, step.tokens) == step.gets, (number, step)
            case limit_cases.Ask():
                assert await self._ask(step.tokens) == step.gets, (number, step)
            case limit_cases.End():
                self._leases[step.number].settle(step.tokens)

    async def _ask(self, tokens: int) -> str:
        try:
            lease = await self._book.enter(self._key)
        except StackError as exc:
            return told(exc)
        found = await self._set_aside(lease, tokens)
        if found == "in":
            self._leases.append(lease)
        return found

    async def _set_aside(self, lease: Lease, tokens: int) -> str:
        try:
            await lease.set_aside(Estimate(size=10, prompt=tokens))
        except StackError as exc:
            lease.settle(0)
            return told(exc)
        return "in"


# -- queues -----------------------------------------------------------------------------------------------------------


class MemoryQueue:
    """The queue of a host alone."""

    def __init__(self, clock: Clock, slots: int) -> None:
        self._places = Places(clock)
        self._engine = self._places.engine("engine")
        self._places.slots[self._engine] = slots
        self._places.models.mosts[self._engine] = UNSET.most

    async def enter(self, it: queue_cases.Queue) -> tuple[Any, bool] | Refusal:
        what = self._engine, 0, it.key, it.weight, it.wait, queue_cases.WAITING
        return self._places.enter(*what, mark=it.mark, ahead=it.ahead, model=it.model)

    async def loaded(self, it: queue_cases.Loaded) -> None:
        before = self._places.models.loads(self._engine).loaded
        after = {*before, it.model} - {*it.displaced}
        self._places.loaded(self._engine, it.model, it.displaced, after, it.took, failed=it.failed)

    async def look(self) -> None:
        self._places.hand_over(self._engine)

    async def leave(self, place: int, *, served: bool) -> None:
        self._places.leave(place, served=served)

    async def holds(self, place: int) -> bool:
        return self._places.holds(place)

    async def again(self, it: queue_cases.Again) -> float:
        return self._places.again(self._engine, it.key, it.weight, it.mark)


def _exchange(it: queue_cases.Queue | queue_cases.Again) -> Any:
    return SimpleNamespace(key_id=it.key.partition("/")[0], account=it.key, mark=it.mark, priority=it.weight)


class PostgresQueue:
    """The queue of all hosts."""

    def __init__(self, queues: PostgresQueues, slots: int) -> None:
        self._queues = queues
        self._slots = slots

    async def enter(self, it: queue_cases.Queue) -> tuple[Any, bool] | Refusal:
        what: Any = ("engine", self._slots, _exchange(it), it.wait, queue_cases.WAITING)
        found = await self._queues.enter(*what, ahead=it.ahead, model=it.model)
        await self._settled()
        return found if isinstance(found, Refusal) else (found, await self.holds(found))

    async def loaded(self, it: queue_cases.Loaded) -> None:
        before = (await self._queues.loads("engine")).loaded
        after = {*before, it.model} - {*it.displaced}
        await self._queues.loaded("engine", it.model, it.displaced, after, it.took, failed=it.failed)

    async def look(self) -> None:
        await self._queues._look()

    async def leave(self, place: Any, *, served: bool) -> None:
        self._queues.leave(place, served=served)
        await self._settled()

    async def _settled(self) -> None:
        while self._queues._background:
            await next(iter(self._queues._background))

    async def holds(self, place: Any) -> bool:
        query = "SELECT held FROM queue_places WHERE id = %s", (place.id,)
        cursor = await self._queues._database.connection().execute(*query)
        return (await cursor.fetchone() or (False,))[0]

    async def again(self, it: queue_cases.Again) -> float:
        return await self._queues.again("engine", _exchange(it))


@pytest.mark.parametrize("case", queue_cases.QUEUES)
async def test_queues_are_the_same_everywhere(databases: Databases, case: str) -> None:
    slots, steps = queue_cases.QUEUES[case]
    with databases.clock() as clock:
        if not databases.url:
            await play(MemoryQueue(clock, slots), clock, steps)
            return
        async with PostgresQueues(databases.url, lambda _: None, lambda: None) as queues:
            await play(PostgresQueue(queues, slots), clock, steps)


async def play(queue: MemoryQueue | PostgresQueue, clock: Clock, steps: Any) -> None:
    places: list[tuple[str, Any]] = []
    for number, step in enumerate(steps):
        match step:
            case limit_cases.Pass():
                clock.advance(step.seconds)
            case queue_cases.Queue():
                found = await queue.enter(step)
                if isinstance(found, Refusal):
                    assert f"{found.reason} {round(found.wait, 3):g}" == step.gets, (number, step)
                else:
                    places.append((step.key, found[0]))
                    assert ("slot" if found[1] else "waits") == step.gets, (number, step)
            case queue_cases.Leave() | queue_cases.Loaded() | queue_cases.Look():
                left = None
                if isinstance(step, queue_cases.Leave):
                    _, left = places[step.number]
                    places[step.number] = "", None  # a later request may get the same place
                before = [it is not None and await queue.holds(it) for _, it in places]
                match step:
                    case queue_cases.Leave():
                        await queue.leave(left, served=step.served)
                    case queue_cases.Loaded():
                        await queue.loaded(step)
                    case queue_cases.Look():
                        await queue.look()
                after = [it is not None and await queue.holds(it) for _, it in places]
                given = [key for (key, _), was, has in zip(places, before, after, strict=True) if has and not was]
                assert "".join(given) == step.gives, (number, step)
            case queue_cases.Again():
                assert round(await queue.again(step), 3) == step.after, (number, step)


# -- constants --------------------------------------------------------------------------------------------------------


def test_the_constants_of_postgresqls_functions_are_pythons() -> None:
    text = (ROOT / "gateway/store/functions.sql").read_text()
    found = re.findall(r" constant [\w ]+ := ([\d.]+);  -- (gateway[\w.]+)\.(\w+)\n", text)
    assert len(found) == text.count(" constant ") == len(re.findall(r"-- gateway\.", text))
    for value, module, name in found:
        assert float(value) == getattr(importlib.import_module(module), name), name
