"""Backup and restore: everything that the store holds, from either database into either, while gateways run."""

import gzip
import json
import stat
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from gateway import backup, promptbook, usage
from gateway.settings import Settings
from gateway.store import metadata, open_store, prepare
from tests.containers import Postgres
from tests.processes import MESSAGES, NO_TLS, FakeEngine, GatewayProcess, running_gateway, wait_for
from tests.store.rows import Rows
from tests.store.stack import Command, empty_store


def ask(gateway: GatewayProcess, key: str) -> int:
    headers = {"authorization": f"Bearer {key}"}
    body = {"messages": MESSAGES}
    url = gateway.url + "/v1/chat/completions"
    return httpx.post(url, json=body, headers=headers, timeout=30, verify=NO_TLS).status_code


def test_a_backup_goes_into_the_other_database(engine: FakeEngine, tmp_path: Path, postgres: Postgres) -> None:
    lite = {"STACK_DATA_DIR": empty_store(tmp_path / "lite")}
    other = {"STACK_DATA_DIR": str(tmp_path / "other"), "STACK_STORE_URL": postgres.new_database()}
    first, second = Command(**lite), Command(**other)
    key = first.json("keys", "create", "Ann", "--label", "team=red", "--model", "fake-model", "--concurrent", "3")
    first.run("prompts", "set", "polite", "-", stdin="Be polite,\nalways.")
    first("prompts", "use", "polite", "--key", key["key"]["id"])
    file = tmp_path / "stack.backup"
    with running_gateway(tmp_path / "log", engine.url, **lite) as gateway, closing(Rows(lite)) as rows:
        assert ask(gateway, key["secret"]) == 200
        wait_for(rows.all)
        first("backup", str(file))
        saved = rows.all()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert key["secret"] not in gzip.decompress(file.read_bytes()).decode()

    with running_gateway(tmp_path / "log-2", engine.url, **other) as gateway, closing(Rows(other)) as rows:
        gone = second.json("keys", "create", "made since")["secret"]
        assert (ask(gateway, key["secret"]), ask(gateway, gone)) == (401, 200)
        done = second.run("restore", str(file))
        assert (done.returncode, "say --yes" in done.stderr) == (1, True)
        assert second("restore", str(file), "--yes") == "Restored 1 keys and 1 rows of usage.\n"
        wait_for(lambda: (ask(gateway, key["secret"]), ask(gateway, gone)) == (200, 401), deadline=5)
        assert rows.all()[: len(saved)] == saved
        assert second.json("keys", "list") == first.json("keys", "list")
        assert second("prompts", "show", "polite") == "Be polite,\nalways."

        # And back, through pipes.
        piped = second.run("backup", "-", stdin=b"").stdout
        with closing(Rows(lite)) as before:
            assert first.run("restore", "-", "--yes", stdin=piped).returncode == 0
            wait_for(lambda: before.all() == rows.all())


def test_a_backup_makes_the_store_where_there_is_none(engine: FakeEngine, tmp_path: Path) -> None:
    """Where the file was lost under a running gateway, that sees the old keys again, and never none."""
    data = tmp_path / "data"
    stack = Command(STACK_DATA_DIR=str(data))
    with running_gateway(tmp_path / "log", engine.url, STACK_DATA_DIR=str(data)) as gateway:
        key = stack.json("keys", "create", "Ann")["secret"]
        assert ask(gateway, key) == 200
        stack("backup", str(tmp_path / "good"))
        for it in data.glob("stack.db*"):
            it.rename(tmp_path / it.name)
        (tmp_path / "bad").write_bytes((tmp_path / "good").read_bytes()[:-9])
        done = stack.run("restore", str(tmp_path / "bad"), "--yes")
        assert (done.returncode, "Nothing was changed." in done.stderr) == (1, True)
        assert not list(data.glob("stack.db"))
        assert stack("restore", str(tmp_path / "good"), "--yes").startswith("Restored 1 keys")
        assert stat.S_IMODE((data / "stack.db").stat().st_mode) == 0o600
        assert not list(data.glob(".new-*"))
        wait_for(lambda: ask(gateway, stack.json("keys", "create", "Bob")["secret"]) == 200)
        assert ask(gateway, key) == 200

    other = Command(STACK_DATA_DIR=str(tmp_path / "other"))
    assert other("restore", str(tmp_path / "good"), "--yes").startswith("Restored 1 keys")
    assert [it["name"] for it in other.json("keys", "list")] == ["Ann"]


def lines(data: bytes) -> list[Any]:
    return [json.loads(line) for line in gzip.decompress(data).splitlines()]


def with_lines(change: Callable[[list[Any]], None]) -> Callable[[bytes], bytes]:
    def damaged(data: bytes) -> bytes:
        found = lines(data)
        change(found)
        return gzip.compress("\n".join(map(json.dumps, found)).encode())

    return damaged


DAMAGED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "something else": (lambda _: b"PK\x03\x04 not a backup", "no backup of stack"),
    "empty": (lambda _: b"", "its end is missing"),
    "cut": (lambda data: data[: len(data) // 2], "no backup of stack, or a damaged one"),
    "a flipped bit": (lambda data: data[:-6] + bytes([data[-6] ^ 1]) + data[-5:], "damaged"),
    "other JSON": (lambda _: gzip.compress(b'{"a": 1}\n'), "line 1"),
    "rows missing": (with_lines(lambda it: it.pop(1)), "rows are missing"),
    "no end": (with_lines(lambda it: it.pop()), "its end is missing"),
    "another form": (with_lines(lambda it: it[0].update(stack_backup=2)), "another version"),
    "a field from the future": (with_lines(lambda it: it[1][1].update(colour="red")), "newer version"),
    "a table from the future": (with_lines(lambda it: it[1].__setitem__(0, "colours")), "newer version"),
    "a wrong type": (with_lines(lambda it: it[1][1].update(disabled="no")), "'disabled'"),
    "a missing value": (with_lines(lambda it: it[1][1].pop("name")), "'name'"),
    "a secret of no key": (with_lines(lambda it: it[1][1].update(id="0123456789")), "contradicts itself"),
}


def test_a_damaged_backup_changes_nothing(tmp_path: Path, store_settings: dict[str, str]) -> None:
    stack = Command(**store_settings)
    stack.json("keys", "create", "Ann")
    good = tmp_path / "good"
    stack("backup", str(good))
    stack.json("keys", "create", "Bob")
    before = stack.json("keys", "list")
    store = open_store(Settings(**{name.lower(): value for name, value in store_settings.items()}))
    try:
        for name, (damage, sentence) in DAMAGED.items():
            bad = tmp_path / name
            bad.write_bytes(damage(good.read_bytes()))
            with pytest.raises(backup.BadBackup, match=sentence):
                backup.restore(store, bad)
    finally:
        store.close()
    done = stack.run("restore", str(tmp_path / "cut"), "--yes")
    assert (done.returncode, "Nothing was changed." in done.stderr) == (1, True)
    done = stack.run("restore", str(tmp_path / "nowhere"), "--yes")
    assert (done.returncode, "No such file" in done.stderr) == (1, True)
    done = stack.run("backup", str(tmp_path / "nowhere/x"))
    assert (done.returncode, "No such file" in done.stderr) == (1, True)
    assert stack.json("keys", "list") == before


def test_everything_is_in_a_backup(store_settings: dict[str, str]) -> None:
    """And the migrations make the very tables that the code speaks of."""
    assert usage.usage.metadata is promptbook.uses.metadata is metadata
    assert set(backup.TABLES) == set(metadata.tables) - {"revision"}
    settings = Settings(**{name.lower(): value for name, value in store_settings.items()})
    prepare(settings)
    with closing(open_store(settings)) as store, store.read() as connection:
        # accounts are those of gateway/replicas.py, queues those of gateway/queues.py, which speak SQL.
        options = {"include_object": lambda _, name, *__: not str(name).startswith(("account", "queue"))}
        assert compare_metadata(MigrationContext.configure(connection, opts=options), metadata) == []
