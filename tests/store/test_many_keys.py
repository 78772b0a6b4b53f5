"""A hundred thousand keys: what is changed of one is read alone."""

import hashlib
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from gateway.settings import Settings
from gateway.store.store import prepare
from tests.support.command import empty_store
from tests.support.keys import ADMIN, admin, status
from tests.support.processes import FakeEngine, running_gateway, wait_for

COUNT = 100_000
WITHIN = 2.0  # seconds after which a change of a key holds everywhere, as the README says


def fill(file: Path) -> None:
    now = int(time.time())
    ids = [f"K{number:09d}" for number in range(COUNT)]
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.executemany(
            "INSERT INTO keys VALUES (?, ?, 'Ann', ?, NULL, 0, NULL, '{}', 1, '{}', NULL, NULL)",
            ((it, it, now) for it in ids),
        )
        connection.executemany(
            "INSERT INTO secrets VALUES (?, ?, ?, NULL)",
            ((hashlib.sha256(it.encode()).hexdigest(), it, now) for it in ids),
        )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data directory whose store has 100,000 keys."""
    data = tmp_path / "data"
    prepare(Settings(stack_data_dir=Path(empty_store(data))))
    fill(data / "stack.db")
    return data


def test_a_key_is_revoked_at_once_among_a_hundred_thousand(engine: FakeEngine, data: Path, tmp_path: Path) -> None:
    """One worker, because each reads all keys when it starts."""
    settings = {"STACK_DATA_DIR": str(data), "STACK_ADMIN_KEYS": ADMIN, "STACK_WORKERS": "1"}
    with running_gateway(tmp_path / "log", engine.url, **settings) as gateway, admin(gateway) as api:
        one, other = (api.post("/admin/keys", json={"name": name}).json() for name in ("one", "other"))
        for it in (one, other):
            wait_for(lambda it=it: status(gateway, it["secret"]) == {200})  # type: ignore[misc]
        with closing(sqlite3.connect(data / "stack.db")) as connection, connection:  # of which no worker is told
            connection.execute("UPDATE keys SET disabled = 1 WHERE id = ?", (other["key"]["id"],))
        began = time.monotonic()
        api.patch(f"/admin/keys/{one['key']['id']}", json={"disabled": True}).raise_for_status()
        wait_for(lambda: status(gateway, one["secret"]) == {401})
        took = time.monotonic() - began
        assert status(gateway, other["secret"]) == {200}, "only what has changed was read"
        assert took < WITHIN * 5  # the machine may be busy
