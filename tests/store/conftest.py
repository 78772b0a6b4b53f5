"""Fixtures of the store's tests: both databases, real ones."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.command import Command, empty_store
from tests.support.containers import Postgres, running_postgres
from tests.support.keys import ADMIN
from tests.support.processes import FakeEngine, GatewayProcess, running_gateway


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """One server for the session; each test takes a database of its own."""
    with running_postgres() as server:
        yield server


def _settings(request: pytest.FixtureRequest, data: Path, *, tables: bool = True) -> dict[str, str]:
    settings = {"STACK_DATA_DIR": empty_store(data)}
    if request.param == "postgres":
        postgres: Postgres = request.getfixturevalue("postgres")
        settings["STACK_STORE_URL"] = postgres.new_database() if tables else postgres.empty_database()
    return settings


@pytest.fixture(params=["sqlite", "postgres"])
def store_settings(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """The settings of a gateway with an empty store of its own, once in each database."""
    return _settings(request, tmp_path / "data")


@pytest.fixture(params=["sqlite", "postgres"])
def bare_settings(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """The same, of a store without tables, so that the migrations run. SQLite's never have any."""
    return _settings(request, tmp_path / "data", tables=False)


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def lasting_settings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same, of one store for all tests of a file."""
    return _settings(request, tmp_path_factory.mktemp("store") / "data")


@pytest.fixture
def stack(lasting_settings: dict[str, str]) -> Command:
    """The command, on the store of `gateway`."""
    return Command(**lasting_settings)


@pytest.fixture(scope="module")
def gateway(
    engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory, lasting_settings: dict[str, str]
) -> Iterator[GatewayProcess]:
    """A gateway for all tests of a file, with an admin key."""
    log = tmp_path_factory.mktemp("gateway") / "log"
    with running_gateway(log, engine.url, STACK_ADMIN_KEYS=ADMIN, **lasting_settings) as gateway:
        yield gateway
