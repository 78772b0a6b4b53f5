"""The usage of requests while its store or disk has a fault: rows wait, and what is lost is counted."""

import os
import signal
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psycopg
import pytest

from tests.support.command import Command
from tests.support.containers import Postgres
from tests.support.processes import (
    NO_TLS,
    ROOT,
    FakeEngine,
    GatewayProcess,
    free_port,
    running_gateway,
    scrape,
    wait_for,
)
from tests.support.rows import Rows
from tests.support.usage import ask_many


def waits(gateway: GatewayProcess) -> bool:
    return any("waits in the journal" in str(line["msg"]) for line in gateway.log())


@contextmanager
def locked(data: Path) -> Iterator[None]:
    with closing(sqlite3.connect(data / "stack.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


def test_rows_wait_for_a_locked_store(engine: FakeEngine, tmp_path: Path) -> None:
    settings = {"STACK_DATA_DIR": str(tmp_path / "data")}
    with running_gateway(tmp_path / "log", engine.url, **settings) as gateway, closing(Rows(settings)) as rows:
        with locked(tmp_path / "data"):
            sent = ask_many(gateway, "locked", 10)
            wait_for(lambda: waits(gateway))
            # Killed meanwhile: the journals outlive their workers.
            for pid in gateway.workers():
                os.kill(pid, signal.SIGKILL)
            wait_for(lambda: httpx.get(gateway.url + "/livez", verify=NO_TLS).status_code == 200)
            sent |= ask_many(gateway, "again", 10)
            assert rows.all() == []
        wait_for(lambda: {row["request_id"] for row in rows.all()} == sent)
        assert {row["outcome"] for row in rows.all()} == {"finished"}


@contextmanager
def read_only(url: str) -> Iterator[None]:
    name = url.rpartition("/")[2]
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()"
        connection.execute(others, [name])
        yield
        connection.execute("SET default_transaction_read_only = off")
        connection.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
        connection.execute(others, [name])


@contextmanager
def stopped(postgres: Postgres) -> Iterator[None]:
    postgres.stop()
    try:
        yield
    finally:
        postgres.start()


@pytest.mark.parametrize("fault", ["read-only", "stopped"])
def test_rows_wait_for_postgres(engine: FakeEngine, tmp_path: Path, postgres: Postgres, fault: str) -> None:
    settings = {"STACK_DATA_DIR": str(tmp_path / "data"), "STACK_STORE_URL": postgres.new_database()}
    with running_gateway(tmp_path / "log", engine.url, **settings) as gateway, closing(Rows(settings)) as rows:
        sent = ask_many(gateway, "before", 5)
        wait_for(lambda: {row["request_id"] for row in rows.all()} == sent)
        with stopped(postgres) if fault == "stopped" else read_only(settings["STACK_STORE_URL"]):
            sent |= ask_many(gateway, "during", 10)
            wait_for(lambda: waits(gateway))
            sent |= ask_many(gateway, "still", 5)
        wait_for(lambda: {row["request_id"] for row in rows.all()} == sent)
        wait_for(lambda: any("saved again" in str(line["msg"]) for line in gateway.log()))


# The data directory is a small file system of the gateway's own: it can be filled, and made read-only.
MOUNTED = ["unshare", "--map-root-user", "--mount", "sh", "-c", 'mount -t tmpfs -o size=2m tmpfs "$0" && exec "$@"']


@dataclass
class SmallDisk:
    """A gateway on it."""

    gateway: GatewayProcess
    seen: Path  # where it is seen from here
    metrics: int

    @property
    def data(self) -> Path:
        return Path("/", *self.seen.parts[4:])  # below /proc/PID/root

    def inside(self) -> list[str]:
        pid = str(self.gateway.process.pid)
        return ["nsenter", "--target", pid, "--user", "--mount", "--preserve-credentials", f"--wd={ROOT}"]

    def mount(self, *words: str) -> None:
        """Once nothing stands in its way, such as a file that is open just now."""
        command = [*self.inside(), "mount", *words, str(self.data)]
        wait_for(lambda: subprocess.run(command, check=False, capture_output=True).returncode == 0)

    def rows(self) -> int:
        sums = Command(*self.inside(), STACK_DATA_DIR=str(self.data)).json("usage", "--by", "outcome")
        return int(sum(it["requests"] for it in sums))

    def dropped(self) -> int:
        return int(scrape(self.metrics).total("stack_usage_dropped_total"))


@pytest.fixture
def disk(engine: FakeEngine, tmp_path: Path) -> Iterator[SmallDisk]:
    data, metrics = tmp_path / "data", free_port()
    data.mkdir()
    settings = {"STACK_DATA_DIR": str(data), "STACK_METRICS_BIND": f"127.0.0.1:{metrics}"}
    with running_gateway(tmp_path / "log", engine.url, under=[*MOUNTED, str(data)], **settings) as gateway:
        seen = Path(f"/proc/{gateway.process.pid}/root{data}")
        wait_for(lambda: len(list(seen.glob("journal/*/*"))) == 2)  # both workers are there
        yield SmallDisk(gateway, seen, metrics)


def test_with_a_full_disk_requests_go_on_and_what_is_lost_is_counted(disk: SmallDisk) -> None:
    filler = disk.seen / "filler"
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(bytes(4 << 20))
    sent: set[str] = set()
    while disk.dropped() < 10:
        sent |= ask_many(disk.gateway, f"full-{len(sent)}", 100)
    filler.unlink()
    after = ask_many(disk.gateway, "after", 10)
    wait_for(lambda: disk.rows() + disk.dropped() == len(sent | after))
    assert disk.dropped() <= len(sent)
    wait_for(lambda: sum(line["count"] for line in disk.gateway.told("usage_dropped")) == disk.dropped())


def test_with_a_read_only_disk_nothing_is_lost(disk: SmallDisk) -> None:
    sent = ask_many(disk.gateway, "before", 5)
    disk.mount("--bind", str(disk.data))
    disk.mount("-o", "remount,bind,ro")
    sent |= ask_many(disk.gateway, "read-only", 10)
    wait_for(lambda: waits(disk.gateway))
    sent |= ask_many(disk.gateway, "still", 10)
    disk.mount("-o", "remount,bind,rw")
    wait_for(lambda: disk.rows() == len(sent))
    assert disk.dropped() == 0
