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

from gateway.cli import backup
from gateway.prompts import book as promptbook
from gateway.settings import Settings
from gateway.store.revisions import metadata
from gateway.store.store import open_store, prepare
from gateway.usage import rows as usage
from tests.support.command import Command, empty_store
from tests.support.containers import Postgres
from tests.support.front_end import FrontEnd
from tests.support.processes import MESSAGES, NO_TLS, FakeEngine, GatewayProcess, running_gateway, wait_for
from tests.support.rows import Rows


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
    chat = first.json("keys", "create", "chat", "--users")
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
        assert (done.returncode, "use --yes" in done.stderr) == (1, True)
        assert second("restore", str(file), "--yes") == "Restored 2 keys and 1 usage rows.\n"
        wait_for(lambda: (ask(gateway, key["secret"]), ask(gateway, gone)) == (200, 401), deadline=5)
        assert FrontEnd(gateway, chat["secret"], chat["signing_secret"]).ask("ann").status_code == 200
        assert rows.all()[: len(saved)] == saved
        assert second.json("keys", "list") == first.json("keys", "list")
        assert second("prompts", "show", "polite") == "Be polite,\nalways."

        # And back, through pipes. The last request's row may come after the first backup.
        def back() -> bool:
            piped = second.run("backup", "-", stdin=b"").stdout
            assert first.run("restore", "-", "--yes", stdin=piped).returncode == 0
            return before.all() == rows.all()

        with closing(Rows(lite)) as before:
            wait_for(back)


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
    "something else": (lambda _: b"PK\x03\x04 not a backup", "not a backup of stack"),
    "empty": (lambda _: b"", "its end is missing"),
    "cut": (lambda data: data[: len(data) // 2], "not a backup of stack, or is damaged"),
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


def _row(table: str, **fields: Any) -> Callable[[bytes], bytes]:
    """With a further row of that table."""
    key = {
        "id": "0000000000",
        "name": "x",
        "owner": "",
        "created_at": 1,
        "disabled": False,
        "limits": {},
        "priority": 1,
    }
    rows: dict[str, dict[str, Any]] = {
        "keys": key | {"labels": {}},
        "secrets": {"digest": "a" * 64, "key_id": "0000000000", "created_at": 1},
        "deleted_keys": {"id": "0000000001", "name": "x"},
        "default_limits": {"name": "concurrent", "value": 1},
        "prompts": {"name": "p", "version": 1, "template": "x", "created_at": 1},
        "prompt_uses": {"of": "model", "target": "m", "name": "p"},
        "usage": {"id": "x", "at": 1},
    }

    def change(found: list[Any]) -> None:
        found.insert(-1, [table, rows[table] | fields])
        found[-1]["rows"][table] = found[-1]["rows"].get(table, 0) + 1

    return with_lines(change)


@with_lines
def _twice(found: list[Any]) -> None:
    found.insert(2, found[1])
    found[-1]["rows"]["keys"] += 1


@with_lines
def _deleted(found: list[Any]) -> None:
    found.insert(-1, ["deleted_keys", {"id": found[1][1]["id"], "name": "x"}])
    found[-1]["rows"]["deleted_keys"] = 1


# What no command and no API would take, and what would keep every worker from learning of any key.
UNFIT: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a limit that is text": (_row("keys", limits={"concurrent": "x"}), "limits.concurrent"),
    "a limit of true": (_row("keys", limits={"concurrent": True}), "limits.concurrent"),
    "a limit of nothing": (_row("keys", limits={"concurrent": 0}), "limits.concurrent"),
    "a limit without a name": (_row("keys", limits={"per_year": 1}), "limits.per_year"),
    "limits that are a list": (_row("keys", limits=[]), "limits"),
    "no limits": (_row("keys", limits=None), "limits"),
    "priority 0": (_row("keys", priority=0), "priority"),
    "priority 101": (_row("keys", priority=101), "priority"),
    "a priority of true": (_row("keys", priority=True), "priority"),
    "a fraction of a second": (_row("keys", created_at=1.5), "created_at"),
    "a date beyond the calendar": (_row("keys", expires_at=1 << 60), "expires_at"),
    "a date before all": (_row("keys", expires_at=-1), "expires_at"),
    "a name that is too long": (_row("keys", name="x" * 201), "name"),
    "a name with a line break": (_row("keys", name="a\nb"), "name"),
    "no name": (_row("keys", name=""), "name"),
    "an id that is none": (_row("keys", id="../x"), "id"),
    "disabled: 1": (_row("keys", disabled=1), "disabled"),
    "models that are text": (_row("keys", models="m"), "models"),
    "no models at all": (_row("keys", models=[]), "models"),
    "a label that is a number": (_row("keys", labels={"a": 1}), "labels"),
    "a key twice": (_twice, "contradicts itself"),
    "a digest that is no hexadecimal": (_row("secrets", digest="z" * 64), "digest"),
    "a short digest": (_row("secrets", digest="ab"), "digest"),
    "a secret's date that is text": (_row("secrets", expires_at="soon"), "expires_at"),
    "a secret of no key": (_row("secrets", key_id="nobody"), "contradicts itself"),
    "a default limit without a name": (_row("default_limits", name="per_year"), "name"),
    "a default limit of nothing": (_row("default_limits", value=0), "value"),
    "a template that is none": (_row("prompts", template="{% if %}"), "template"),
    "a template without an end": (_row("prompts", template="{{ 'x'.ljust(1000000000) }}"), "template"),
    "version 0": (_row("prompts", version=0), "version"),
    "a prompt's name with a space": (_row("prompts", name="a b"), "name"),
    "a prompt that is used and isn't there": (_row("prompt_uses", name="gone"), "prompt 'gone' is missing"),
    "a use of something else": (_row("prompt_uses", of="team"), "of"),
    "more tokens than a sum can hold": (_row("usage", tokens_in=1 << 62), "tokens_in"),
    "usage of a day beyond the calendar": (_row("usage", at=1 << 62), "at"),
    "a template with a NUL": (_row("prompts", template="a\0b"), r"line \d+.*'template'.*NUL"),
    "a key that is also deleted": (_deleted, "contradicts itself"),
    "a deleted key without a name": (_row("deleted_keys", name=None), "name"),
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
        for name, (damage, sentence) in (DAMAGED | UNFIT).items():
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


def test_everything_is_in_a_backup(bare_settings: dict[str, str]) -> None:
    """And the migrations make the very tables that the code speaks of."""
    assert usage.usage.metadata is promptbook.uses.metadata is metadata
    assert set(backup.TABLES) == set(metadata.tables) - {
        "revision",
        "changes",
        "responses",
        "response_totals",
        "usage_sums",
    }
    settings = Settings(**{name.lower(): value for name, value in bare_settings.items()})
    prepare(settings)
    with closing(open_store(settings)) as store, store.read() as connection:
        # accounts are those of limits/postgres.py, queues those of admission/postgres.py, which speak SQL.
        options = {"include_object": lambda _, name, *__: not str(name).startswith(("account", "queue"))}
        assert compare_metadata(MigrationContext.configure(connection, opts=options), metadata) == []
