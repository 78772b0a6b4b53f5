"""Containers that are removed when the process that started them ends, however it ends."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from uuid import uuid4

import psycopg

from gateway.settings import Settings
from gateway.store.store import open_store
from tests.support.processes import ROOT, free_port, wait_for

BASE = os.environ.get("PYTHON_IMAGE", "stack-base:trixie")
PASSWORD = "secret-of-the-test"

# Tried again if another object must be removed first.
REMOVE = 'cat; for _ in 1 2 3 4 5 6 7 8 9; do docker "$@" >/dev/null 2>&1 && break; sleep 1; done'


def docker(*words: str) -> str:
    """Return the output of a docker command, which must succeed."""
    done = subprocess.run(["docker", *words], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def build(name: str, directory: str = ".", context: str | None = None) -> str:
    """Build the image of a directory of this tree, and return its id. Its name keeps it for the next time."""
    words = f"--tag=stack-test-{name}", f"--build-arg=PYTHON_IMAGE={BASE}", f"--file={ROOT}/{directory}/Dockerfile"
    return docker("build", "--quiet", *words, f"{ROOT}/{context or directory}")


@contextmanager
def removing(*removal: str) -> Iterator[None]:
    """Make docker remove something at the end. The remover waits for a pipe to break, which also happens after a
    SIGKILL."""
    with subprocess.Popen(["sh", "-c", REMOVE, "sh", *removal], stdin=subprocess.PIPE, start_new_session=True):
        yield


@contextmanager
def container(name: str, *words: str) -> Iterator[str]:
    """Run a detached container with these arguments of `docker run`, and yield its name."""
    with removing("rm", "--force", "--volumes", name):
        docker("run", "--detach", "--init", "--name", name, *words)
        yield name


@dataclass
class Postgres:
    """A PostgreSQL server in a container of its own."""

    container: str
    port: int

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://postgres:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    def empty_database(self) -> str:
        """Return the URL of a new database without tables."""
        return self._copied("template1")

    def new_database(self) -> str:
        """Return the URL of a new database with empty tables. It is a copy, because migrations take half a second."""
        return self._copied(self._migrated)

    @cached_property
    def _migrated(self) -> str:
        """The name of a database whose tables stay empty."""
        url = self.empty_database()
        store = open_store(Settings(stack_store_url=url))
        store.migrate()
        store.close()
        return url.rpartition("/")[2]

    def _copied(self, template: str) -> str:
        name = f"t{uuid4().hex}"
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY")
        return self.url(name)

    def stop(self) -> None:
        docker("stop", "--time", "30", self.container)

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

        wait_for(answers, deadline=150)


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    image, port = build("postgres", "tests/store/postgres"), free_port()
    with container(f"stack-test-{uuid4().hex[:8]}", f"--publish=127.0.0.1:{port}:5432", image) as name:
        server = Postgres(name, port)
        server.wait()
        yield server
