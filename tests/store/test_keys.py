"""Keys: made with the command or the admin API, known to every worker within a second, in either database."""

import gzip
import re
import socket
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from typer.testing import CliRunner

from gateway.cli.main import app
from gateway.keys import secret
from gateway.keys.book import Keybook
from gateway.keys.entries import NewKeyFields
from gateway.settings import Settings
from gateway.store.store import open_store
from tests.support.command import Command, empty_store
from tests.support.console import visiting
from tests.support.containers import PASSWORD, Postgres
from tests.support.keys import ADMIN, admin, ask, status
from tests.support.processes import KEY, NO_TLS, FakeEngine, GatewayProcess, running_gateway, wait_for

CHAT = "/v1/chat/completions"


@pytest.fixture
def empty(store_settings: dict[str, str]) -> Command:
    """On a store of its own."""
    return Command(**store_settings)


def test_a_keys_life_with_the_command(gateway: GatewayProcess, stack: Command) -> None:
    made = stack.json("keys", "create", "billing", "--owner", "Ann", "--label", "team=red", "--expires", "30d")
    key_id, text = made["key"]["id"], made["secret"]
    assert status(gateway, text) == {200}  # at once, on every worker
    assert text not in stack("keys", "list") + stack("keys", "show", key_id)
    shown = stack.json("keys", "show", key_id)
    assert (shown["name"], shown["owner"], shown["labels"], shown["state"]) == (
        "billing",
        "Ann",
        {"team": "red"},
        "active",
    )
    assert 29 * 86_400 < shown["expires_at"] - time.time() <= 30 * 86_400

    stack("keys", "disable", key_id)
    wait_for(lambda: status(gateway, text) == {401}, deadline=5)
    assert "disabled" in ask(gateway, text).json()["error"]["message"]
    stack("keys", "enable", key_id)
    wait_for(lambda: status(gateway, text) == {200}, deadline=5)

    again = stack.json("keys", "rotate", key_id, "--grace", "1h")["secret"]
    assert status(gateway, again) == status(gateway, text) == {200}
    last = stack.json("keys", "rotate", key_id, "--grace", "0")["secret"]
    wait_for(lambda: status(gateway, text) == status(gateway, again) == {401}, deadline=5)
    assert status(gateway, last) == {200}

    assert "is deleted" in stack("keys", "delete", key_id, "--yes")
    wait_for(lambda: status(gateway, last) == {401}, deadline=5)
    assert key_id not in stack("keys", "list")
    assert f"'{key_id}' (billing) was deleted" in stack.run("keys", "show", key_id).stderr
    assert status(gateway, KEY) == {200}  # those of STACK_API_KEYS are there beside
    log = gateway.log_path.read_text()
    assert not any(it in log for it in (text, again, last, ADMIN, KEY))


def test_a_key_has_its_models_and_its_end(
    gateway: GatewayProcess, stack: Command, engine: FakeEngine, mark: str
) -> None:
    text = stack.json("keys", "create", "limited", "--model", "other/model:1b")["secret"]
    assert ask(gateway, text, model="other/model:1b").status_code == 200
    for fields in ({"model": "fake-model"}, {}):
        answer = ask(gateway, text, user=mark, **fields)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
        assert "other/model:1b" in answer.json()["error"]["message"]
    assert engine.seen(mark) == []
    with admin(gateway, text) as client:
        assert [it["id"] for it in client.get("/v1/models").json()["data"]] == ["other/model:1b"]
        assert client.get("/v1/models/fake-model").status_code == 404
    with admin(gateway) as client:
        ends = int(time.time()) + 2
        made = client.post("/admin/keys", json={"name": "short", "expires_at": ends}).json()
        wait_for(lambda: ask(gateway, made["secret"]).status_code == 401)
        assert time.time() >= ends
        assert "expired" in ask(gateway, made["secret"]).json()["error"]["message"]
        again = client.post(f"/admin/keys/{made['key']['id']}/rotate")
        assert (again.status_code, "has expired" in again.json()["error"]["message"]) == (400, True)


def test_keys_that_are_none(gateway: GatewayProcess) -> None:
    unknown = secret.new_secret("0123456789")
    for key in (unknown, unknown[:-1] + ("a" if unknown[-1] != "a" else "b"), "sk-stack-", "x", unknown * 20):
        answer = ask(gateway, key)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")


def test_a_keys_life_over_http(gateway: GatewayProcess) -> None:
    with admin(gateway) as client:
        answer = client.post(
            "/admin/keys", json={"name": "app", "limits": {"concurrent": 99, "tokens_per_day": 9_000_000}}
        )
        assert answer.status_code == 201
        key, text = answer.json()["key"], answer.json()["secret"]
        assert status(gateway, text) == {200}
        changed = client.patch(f"/admin/keys/{key['id']}", json={"limits": {"concurrent": None}, "owner": "Bob"}).json()
        assert (changed["limits"]["concurrent"], changed["limits"]["tokens_per_day"]) == (None, 9_000_000)
        assert (changed["owner"], changed["name"]) == ("Bob", "app")
        rotated = client.post(f"/admin/keys/{key['id']}/rotate", json={"grace_seconds": 0}).json()
        assert client.get(f"/admin/keys/{key['id']}").json() in client.get("/admin/keys").json()["data"]
        assert text not in client.get("/admin/keys").text
        wait_for(lambda: status(gateway, text) == {401}, deadline=5)
        assert status(gateway, rotated["secret"]) == {200}
        client.patch(f"/admin/keys/{key['id']}", json={"disabled": True})
        wait_for(lambda: status(gateway, rotated["secret"]) == {401}, deadline=5)
        assert client.delete(f"/admin/keys/{key['id']}").status_code == 204
        assert client.get(f"/admin/keys/{key['id']}").status_code == 404


WRONG: dict[str, tuple[Any, str | None]] = {
    "no name": ({}, "name"),
    "empty name": ({"name": ""}, "name"),
    "a name with a newline": ({"name": "a\nb"}, "name"),
    "a field nobody knows": ({"name": "a", "nmae": 1}, "nmae"),
    "a limit below one": ({"name": "a", "limits": {"concurrent": 0}}, "limits.concurrent"),
    "a limit that is text": ({"name": "a", "limits": {"concurrent": "3"}}, "limits.concurrent"),
    "a limit that is a fraction": ({"name": "a", "limits": {"concurrent": 1.5}}, "limits.concurrent"),
    "an unknown limit": ({"name": "a", "limits": {"per_year": 1}}, "limits.per_year"),
    "no models at all": ({"name": "a", "models": []}, "models"),
    "no name but null": ({"name": None}, "name"),
    "a name of spaces": ({"name": "  \u3000"}, "name"),
    "an end that is in the past": ({"name": "a", "expires_at": 1}, "expires_at"),
    "a limit beyond any": ({"name": "a", "limits": {"concurrent": 10**16}}, "limits.concurrent"),
    "limits that are a number": ({"name": "a", "limits": 3}, "limits"),
    "priority too high": ({"name": "a", "priority": 101}, "priority"),
    "labels that are a list": ({"name": "a", "labels": ["x"]}, "labels"),
    "an end beyond any calendar": ({"name": "a", "expires_at": 1 << 40}, "expires_at"),
    "a name twice": (b'{"name": "a", "name": "b"}', "name"),
    "a list": ([], None),
    "not JSON": (b"{", None),
    "too large": (b'{"name": "' + b"x" * 300_000 + b'"}', None),
}


FOUND = ("Ökologie", "ökoLOGIE", "ángel", "ÁNGEL", "жук", "]c[", "D*E?", "^b", "(x%_\\Y")
NOT_FOUND = ("Okologie", "%k", "_kologie", "c.d", "d.*e", "Ök*ie")


def test_keys_are_found_by_names_and_owners_of_any_script(gateway: GatewayProcess, stack: Command) -> None:
    key_id = stack.json("keys", "create", "Ökologie ^b]C[d*e?(x%_\\y", "--owner", "ÁNGEL Жук")["key"]["id"]
    with visiting(gateway) as visit:
        for typed in (*FOUND, *NOT_FOUND):
            page = visit.get("/console/keys", params={"q": typed})
            assert (f"/console/keys/{key_id}" in page.text) is (typed in FOUND), typed


def test_keys_are_found_in_a_database_whose_locale_knows_only_ascii(postgres: Postgres) -> None:
    with psycopg.connect(postgres.url(), autocommit=True) as connection:
        connection.execute("CREATE DATABASE plain TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'")
    store = open_store(Settings(stack_store_url=postgres.url("plain")))
    store.migrate()
    book = Keybook(store)
    made, _ = book.create(NewKeyFields(name="Ökologie", owner="Жук"))
    assert [book.page(it, None, 1)[0] for it in ("ÖKO", "öko", "ЖУК", "Oko")] == [[made], [made], [made], []]
    store.close()


def test_a_body_of_the_admin_api_is_read_as_any_other(gateway: GatewayProcess) -> None:
    encoded = {"content-encoding": "gzip"}
    with admin(gateway) as client:
        made = client.post("/admin/keys", content=gzip.compress(b'{"name": "encoded"}'), headers=encoded)
        assert (made.status_code, made.json()["key"]["name"]) == (201, "encoded")
        bomb = client.post("/admin/keys", content=gzip.compress(b" " * 10_000_000), headers=encoded)
        assert bomb.status_code == 413
    head = f"POST /admin/keys HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {ADMIN}\r\n"
    body = '{"name": "whole, in a body that breaks"}'
    with socket.create_connection(("127.0.0.1", gateway.port)) as raw:
        raw.sendall(f"{head}transfer-encoding: chunked\r\n\r\n{len(body):x}\r\n{body}\r\nno size\r\n".encode())
        assert raw.makefile("rb").readline().startswith(b"HTTP/1.1 400 ")
    with admin(gateway) as client:
        assert "that breaks" not in client.get("/admin/keys").text


def test_what_the_admin_api_refuses(gateway: GatewayProcess) -> None:
    with admin(gateway) as client:
        for what, (body, param) in WRONG.items():
            content = {"content": body} if isinstance(body, bytes) else {"json": body}
            answer = client.post("/admin/keys", **content)  # type: ignore[arg-type]
            assert answer.status_code == (413 if what == "too large" else 400), what
            assert answer.json()["error"]["param"] == param, what
            message = answer.json()["error"]["message"]
            assert message, what
            assert not any(it in message for it in ("^[", "Input", "should", "Extra", "Field", "Value")), message
        made = client.post("/admin/keys", json={"name": "a"}).json()["key"]["id"]
        answer = client.patch(f"/admin/keys/{made}", json={"expires_at": 5})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "expires_at")
        assert client.get(f"/admin/keys/{made}/limits?of=x").json()["error"]["param"] == "of"
        limits = client.patch(f"/admin/keys/{made}", json={"limits": {"tokens_per_day": 7}}).json()["limits"]
        told = client.get(f"/admin/keys/{made}/limits").json()
        assert (told["own"], told["used"]) == (limits, {"tokens_per_day": 0, "tokens_per_month": 0})
        assert told["in_force"]["tokens_per_day"] == 7
        assert "possible fields: name, owner, " in client.post("/admin/keys", json={"nmae": "a", "name": "a"}).text
        for path in ("/admin/keys/nobody", "/admin/keys/..%2f..", "/admin/nothing"):
            assert client.get(path).status_code == 404
        for path, allowed in {"/admin/keys": "GET, HEAD, POST", "/admin/keys/x": "DELETE, GET, HEAD, PATCH"}.items():
            answer = client.put(path)
            assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
            assert f"use {allowed}." in answer.json()["error"]["message"]


def test_only_an_admin_key_opens_the_admin_api_and_nothing_else(gateway: GatewayProcess, stack: Command) -> None:
    text = stack.json("keys", "create", "plain")["secret"]
    paths = httpx.get(gateway.url + "/openapi.json", verify=NO_TLS).json()["paths"]
    found = {(method, re.sub("{.*?}", "x", path)) for path in paths if "/admin/" in path for method in paths[path]}
    assert {("post", "/admin/keys"), ("patch", "/admin/limits"), ("get", "/admin/usage")} < found
    schema = paths["/admin/keys"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert (schema["required"], schema["properties"]["name"]["type"]) == (["name"], "string")
    for key in (text, KEY, "wrong"):
        with admin(gateway, key) as client:
            for method, path in found:
                assert client.request(method, path).status_code == 401, (key, method, path)
    assert status(gateway, ADMIN) == {401}


def test_without_an_admin_key_there_is_no_admin_api(engine: FakeEngine, tmp_path: Path) -> None:
    with running_gateway(tmp_path / "log", engine.url) as gateway, admin(gateway) as client:
        assert client.get("/admin/keys").status_code == 404
        assert "/admin/keys" not in client.get("/openapi.json").json()["paths"]


REFUSED = [
    (["keys", "create"], "Missing argument"),
    (["keys", "create", "x", "--expires", "30x"], "is not a duration"),
    (["keys", "create", "x", "--expires", "2020-01-01"], "is in the past"),
    (["keys", "create", "x", "--expires", "2027-02-30"], "does not exist"),
    (["keys", "create", "x", "--expires", "999999w"], "is too long"),
    (["keys", "create", "x", "--label", "red"], "NAME=VALUE"),
    (["keys", "create", "x", "--concurrent", "0"], "limits.concurrent"),
    (["keys", "create", "x", "--concurrent", "many"], "whole number"),
    (["keys", "create", "x", "--requests-per-minute", "1" + "0" * 21], "at most 1,000,000,000,000,000"),
    (["keys", "create", "x", "--expires", "0"], "it is in the past"),
    (["keys", "create", " "], "only spaces"),
    (["keys", "create", "x", "--model", "a", "--model", "all"], "cannot be combined"),
    (["keys", "create", "a\nb"], "name: it must not have line breaks, tabs or other control characters"),
    (["keys", "create", "a\x9b31m"], "name"),
    (["keys", "create", "x" * 201], "name"),
    (["keys", "show", "nobody"], "no key 'nobody'"),
    (["keys", "set", "nobody"], "name at least one field to change"),
    (["keys", "rotate", "nobody", "--grace", "5"], "is not a duration"),
    (["keys", "rotate", "nobody", "--grace", "53w"], "is too long"),
    (["keys", "delete", "nobody"], "no key 'nobody'"),
    (["limits", "--concurrent", "0"], "limits.concurrent"),
    (["limits", "nobody"], "no key 'nobody'"),
]


def test_what_the_command_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STACK_DATA_DIR", empty_store(tmp_path))
    for words, sentence in REFUSED:
        done = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
        assert done.exit_code in (1, 2), words
        assert sentence in done.output, words


def test_what_is_written_is_shown_as_it_is(tmp_path: Path) -> None:
    stack = Command(STACK_DATA_DIR=empty_store(tmp_path))
    made = stack.json("keys", "create", "[/red] [bold]x", "--expires", "5200w")
    assert "[/red] [bold]x" in stack("keys", "list")
    assert "[/red] [bold]x" in stack("keys", "show", made["key"]["id"])


def test_words_that_are_no_text_and_terminals_that_cant_show_it(empty: Command) -> None:
    empty("keys", "create", "張三")
    none = "\udcff"  # a byte that is no UTF-8
    for words in (
        ["keys", "show", none],
        ["usage", "--key", none],
        ["usage", "--model", none],
        ["keys", "create", none],
    ):
        done = empty.run(*words)
        assert (done.returncode in (1, 2), "UTF-8" in done.stderr, "Traceback" in done.stderr) == (True, True, False)
    done = empty.run("keys", "list", PYTHONIOENCODING="latin-1")
    assert (done.returncode, "u5f35" in done.stdout) == (0, True)


def test_what_cannot_be_read_or_written_is_said_without_a_traceback(tmp_path: Path) -> None:
    data = empty_store(tmp_path)
    full, closed = (Command("sh", "-c", f'exec "$@" {to}', "sh", STACK_DATA_DIR=data) for to in (">/dev/full", ">&-"))
    stack = Command(STACK_DATA_DIR=data)
    done = full.run("keys", "create", "x", "--json")
    (key,) = stack.json("keys", "list")  # its secret was lost without a word
    assert (done.returncode, f"stack keys rotate {key['id']} --grace 0" in done.stderr) == (1, True)
    for command, words, sentence in [
        (full, ["keys", "list"], "Reading or writing failed: No space left on device."),
        (full, ["backup", "-"], "The backup cannot be written: No space left on device."),
        (closed, ["keys", "list"], "Standard output is closed."),
        (stack, ["backup", "."], "The backup cannot be written: Is a directory."),
        (stack, ["backup", ""], "The backup cannot be written: Is a directory."),
    ]:
        done = command.run(*words)
        assert (done.returncode, done.stderr) == (1, sentence + "\n"), words
    done = stack.run("prompts", "set", "x", "-", stdin=b"a\xff")
    assert (done.returncode, done.stderr) == (1, b"The file with the template is not UTF-8 text.\n")


def test_backups_to_one_file_do_not_meet(tmp_path: Path) -> None:
    """Both had the same name aside, and one published what the other one had begun."""
    stack = Command(STACK_DATA_DIR=empty_store(tmp_path / "data"))
    aside = tmp_path / ".backup.part"
    aside.write_text("another run's")
    stack("backup", str(tmp_path / "backup"))
    assert {it.name for it in tmp_path.iterdir()} == {"data", "backup", ".backup.part"}
    assert aside.read_text() == "another run's"


def test_a_disabled_key_is_rotated_before_it_is_enabled(empty: Command) -> None:
    """It may be that somebody else has its old secret."""
    key_id = empty.json("keys", "create", "x", "--label", "a=b")["key"]["id"]
    empty("keys", "disable", key_id)
    assert f"stack keys enable {key_id}" in empty("keys", "rotate", key_id, "--grace", "0")
    assert len(empty.json("keys", "show", key_id)["secrets"]) == 1
    assert empty.json("keys", "set", key_id, "--label", "none")["labels"] == {}


def test_limits_are_shown_and_set(empty: Command) -> None:
    key_id = empty.json("keys", "create", "x", "--requests-per-minute", "10")["key"]["id"]
    empty("limits", key_id, "--concurrent", "4", "--requests-per-minute", "default")
    assert empty.json("limits", key_id)["own"] == {"concurrent": 4}
    assert "the key" in empty("limits", key_id)


DAMAGE = {
    "a limit that is text": 'UPDATE keys SET limits = \'{"concurrent": "x"}\'',
    "no JSON": "UPDATE keys SET labels = '{'",
    "an object for a list": "UPDATE keys SET models = '{}'",
    "priority 0": "UPDATE keys SET priority = 0",
    "neither true nor false": "UPDATE keys SET disabled = 'maybe'",
    "a date that is text": "UPDATE keys SET expires_at = 'soon'",
    "no name": "UPDATE keys SET name = ''",
    "a digest that is none": "UPDATE secrets SET digest = 'zz'",
    "a secret's date that is text": "UPDATE secrets SET expires_at = 'soon'",
    "an unknown default limit": "INSERT INTO default_limits VALUES ('per_year', 1)",
    "a prompt that isn't there": "INSERT INTO prompt_uses VALUES ('model', 'other', 'gone', 1)",
}


def test_a_row_that_can_not_be_used_keeps_no_other_from_the_workers(engine: FakeEngine, tmp_path: Path) -> None:
    """Its key is as one that was taken back, and the log and /readyz say so."""
    data, stack = tmp_path / "data", Command(STACK_DATA_DIR=str(tmp_path / "data"))
    options = {"STACK_DATA_DIR": str(data), "STACK_ADMIN_KEYS": ADMIN}
    with running_gateway(tmp_path / "log", engine.url, **options) as gateway, admin(gateway) as client:
        keys = {name: client.post("/admin/keys", json={"name": name}).json() for name in (*DAMAGE, "good")}
        ids = {name: it["key"]["id"] for name, it in keys.items()}
        assert {ask(gateway, it["secret"]).status_code for it in keys.values()} == {200}
        with closing(sqlite3.connect(data / "stack.db")) as database, database:
            for name, change in DAMAGE.items():
                column = "key_id" if "secrets" in change else "id"
                whose = f" WHERE {column} = '{ids[name]}'" if change.startswith("UPDATE") else ""
                database.execute(change + whose)
            database.execute("UPDATE revision SET number = number + 1")
        young = client.post("/admin/keys", json={"name": "young"}).json()
        works = {"good", *(name for name, change in DAMAGE.items() if change.startswith("INSERT"))}

        def found() -> set[str]:
            with ThreadPoolExecutor(len(keys)) as pool:  # a refusal takes half a second
                answers = pool.map(lambda it: ask(gateway, it["secret"]), keys.values())
                return {name for name, it in zip(keys, answers, strict=True) if it.status_code == 200}

        wait_for(lambda: found() == works)
        assert status(gateway, young["secret"]) == {200}
        assert httpx.get(gateway.url + "/readyz", verify=NO_TLS).json()["store"] == "damaged"
        wait_for(lambda: any("rows of the store are damaged" in it["msg"] for it in gateway.log()))
        listed = {it["name"] for it in client.get("/admin/keys").json()["data"]}
        assert listed == works | {"young", "a digest that is none"}
        shown = client.get(f"/admin/keys/{ids['priority 0']}").json()["error"]["message"]
        assert f"the key {ids['priority 0']} is damaged (priority: it must be at least 1)" in shown
        for name in DAMAGE:
            if name != "no JSON":
                assert client.delete(f"/admin/keys/{ids[name]}").status_code == 204, name
        stack("keys", "delete", ids["no JSON"], "--yes")
        client.patch(f"/admin/keys/{ids['good']}", json={"disabled": True}).raise_for_status()
        wait_for(lambda: status(gateway, keys["good"]["secret"]) == {401})


def test_any_number_may_start_at_once_on_an_empty_store(bare_settings: dict[str, str]) -> None:
    stack = Command(**bare_settings)
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda _: stack.json("keys", "list"), range(6))) == [[]] * 6


def test_a_store_from_the_future_is_left_alone(empty: Command, store_settings: dict[str, str]) -> None:
    empty("keys", "list")
    change = "UPDATE alembic_version SET version_num = '9999'"
    if url := store_settings.get("STACK_STORE_URL"):
        with psycopg.connect(url) as postgres:
            postgres.execute(change)
    else:
        with closing(sqlite3.connect(store_settings["STACK_DATA_DIR"] + "/stack.db")) as lite, lite:
            lite.execute(change)
    done = empty.run("keys", "list")
    assert done.returncode == 1
    assert "newer version of stack" in done.stderr


def test_a_locked_store_is_said_to_be_so_and_keys_go_on(engine: FakeEngine, tmp_path: Path) -> None:
    stack = Command(STACK_DATA_DIR=empty_store(tmp_path / "data"))
    text = stack.json("keys", "create", "x")["secret"]
    with (
        running_gateway(tmp_path / "log", engine.url, STACK_DATA_DIR=str(tmp_path / "data")) as gateway,
        closing(sqlite3.connect(tmp_path / "data/stack.db", isolation_level=None)) as other,
    ):
        other.execute("BEGIN IMMEDIATE")
        done = stack.run("keys", "create", "y")
        assert (done.returncode, f"{tmp_path}/data/stack.db: database is locked" in done.stderr) == (1, True)
        assert status(gateway, text) == {200}
        other.execute("ROLLBACK")
        stack("keys", "create", "y")


def test_known_keys_outlive_the_database(engine: FakeEngine, tmp_path: Path, postgres: Postgres) -> None:
    settings = {"STACK_DATA_DIR": str(tmp_path / "data"), "STACK_STORE_URL": postgres.new_database()}
    stack = Command(**settings)
    known, taken = (stack.json("keys", "create", name) for name in ("known", "taken"))
    with running_gateway(tmp_path / "log", engine.url, STACK_STORE_GRACE="6", **settings) as gateway:
        stack("keys", "disable", taken["key"]["id"])
        wait_for(lambda: status(gateway, taken["secret"]) == {401}, deadline=5)
        assert status(gateway, known["secret"]) == {200}
        postgres.stop()
        try:
            unknown = secret.new_secret("0123456789")
            wait_for(lambda: status(gateway, unknown) == {503}, deadline=25)  # not a false 401
            answer = ask(gateway, unknown)
            assert answer.json()["error"]["code"] == "store_unavailable"
            assert answer.headers["retry-after"]
            assert status(gateway, taken["secret"]) == {401}
            assert status(gateway, "sk-nonsense") == {401}
            ready = httpx.get(gateway.url + "/readyz", verify=NO_TLS)
            assert (ready.status_code, ready.json()["store"]) == (200, "store_unavailable")
            done = stack.run("keys", "list")
            assert (done.returncode, "store cannot be used" in done.stderr) == (1, True)
            assert "STACK_STORE_URL (the database '" in done.stderr
            assert (done.stderr.count("\n"), PASSWORD in done.stderr) == (1, False)
            wait_for(lambda: status(gateway, known["secret"]) == {503})  # the stated time is over
            assert status(gateway, KEY) == {200}  # needs no store
        finally:
            postgres.start()
        wait_for(lambda: status(gateway, known["secret"]) == {200})
        assert status(gateway, unknown) == {401}
        assert httpx.get(gateway.url + "/readyz", verify=NO_TLS).json()["store"] == "ok"
        new = stack.json("keys", "create", "new")["secret"]
        assert status(gateway, new) == {200}


def test_a_gateway_starts_without_its_database_and_finds_it_later(
    engine: FakeEngine, tmp_path: Path, postgres: Postgres
) -> None:
    settings = {"STACK_DATA_DIR": str(tmp_path / "data"), "STACK_STORE_URL": postgres.empty_database()}
    postgres.stop()
    try:
        with running_gateway(tmp_path / "log", engine.url, **settings) as gateway:
            assert status(gateway, KEY) == {200}
            postgres.start()
            text = Command(**settings).json("keys", "create", "x")["secret"]
            wait_for(lambda: status(gateway, text) == {200})
    finally:
        postgres.start()
