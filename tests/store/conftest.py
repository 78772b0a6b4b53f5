"""Fixtures of the store's tests: both databases, real ones."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest

from tests.containers import container, docker
from tests.processes import ROOT, free_port, wait_for

PASSWORD = "secret-of-the-test"
IMAGE = "stack-test-postgres"
BASE = os.environ.get("PYTHON_IMAGE", "stack-base:trixie")


@dataclass
class Postgres:
    """A PostgreSQL server in a container of its own."""

    container: str
    port: int

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://postgres:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """The URL of an empty one."""
        name = f"t{uuid4().hex}"
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def stop(self) -> None:
        docker("stop", "--time", "5", self.container)

    def start(self) -> None:
        docker("start", self.container)
        self.wait()

    def wait(self) -> None:
        def answers() -> bool:
            try:
                psycopg.connect(self.url(), connect_timeout=2).close()
            except psycopg.OperationalError:
                return False
            return True

        wait_for(answers, deadline=60)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """One server for the session; each test takes a database of its own."""
    docker("build", "-q", "-t", IMAGE, "--build-arg", f"PYTHON_IMAGE={BASE}", str(ROOT / "tests/store/postgres"))
    port = free_port()
    with container(f"stack-test-{uuid4().hex[:8]}", "-p", f"127.0.0.1:{port}:5432", IMAGE) as name:
        server = Postgres(name, port)
        server.wait()
        yield server


@pytest.fixture(params=["sqlite", "postgres"])
def store_settings(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """The settings of a gateway with an empty store of its own, once in each database."""
    settings = {"STACK_DATA_DIR": str(tmp_path / "data")}
    if request.param == "postgres":
        settings["STACK_STORE_URL"] = request.getfixturevalue("postgres").new_database()
    return settings
