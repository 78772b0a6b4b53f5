"""The store's faults: what callers see meanwhile, and that all is well afterwards without anybody's doing."""

import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import httpx
import pytest

from gateway import secret
from gateway.keybook import Keybook, NewKeyFields
from gateway.settings import Settings
from gateway.store import open_store, prepare
from tests.containers import Postgres
from tests.processes import NO_TLS, FakeEngine, running_gateway, wait_for
from tests.store.stack import Command, empty_store
from tests.store.test_keys import ask, status


def test_what_is_read_is_of_one_moment(store_settings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A key made between two queries of one look had no row in the first; the worker that looked died of it."""
    for name, value in store_settings.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    prepare(settings)
    store = open_store(settings)
    book, over = Keybook(store), threading.Event()

    def make_and_delete() -> None:
        while not over.is_set():
            book.delete(book.create(NewKeyFields(name="x"))[0].id)

    maker = threading.Thread(target=make_and_delete)
    maker.start()
    try:
        for _ in range(300):
            book.contents()
    finally:
        over.set()
        maker.join()
        store.close()


def test_a_server_that_stands_still_is_not_waited_for(engine: FakeEngine, tmp_path: Path, postgres: Postgres) -> None:
    settings = {"STACK_DATA_DIR": str(tmp_path / "data"), "STACK_STORE_URL": postgres.new_database()}
    stack = Command(**settings)
    text = stack.json("keys", "create", "x")["secret"]
    with running_gateway(tmp_path / "log", engine.url, **settings) as gateway:
        wait_for(lambda: gateway.log_path.read_text().count("startup complete") == 2)
        subprocess.run(["docker", "pause", postgres.container], check=True, capture_output=True)
        try:
            answer = ask(gateway, secret.new_secret("0123456789"))
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
            assert status(gateway, text) == {200}
            wait_for(lambda: httpx.get(gateway.url + "/readyz", verify=NO_TLS).json()["store"] == "store_unavailable")
            done = stack.run("keys", "list")
            assert (done.returncode, "store can't be used" in done.stderr) == (1, True)
        finally:
            subprocess.run(["docker", "unpause", postgres.container], check=True, capture_output=True)
        wait_for(lambda: status(gateway, secret.new_secret("0123456789")) == {401})
        stack("keys", "list")


def test_a_file_that_is_gone_and_back(engine: FakeEngine, tmp_path: Path) -> None:
    data = tmp_path / "data"
    stack = Command(STACK_DATA_DIR=empty_store(data))
    kept = stack.json("keys", "create", "kept")["secret"]
    taken = stack.json("keys", "create", "taken")
    stack.run("prompts", "set", "polite", "-", stdin="Be polite.")
    stack("prompts", "use", "polite", "--model", "fake-model")
    with running_gateway(tmp_path / "log", engine.url, STACK_DATA_DIR=str(data)) as gateway:
        assert status(gateway, kept) == status(gateway, taken["secret"]) == {200}
        stack("keys", "disable", taken["key"]["id"])
        wait_for(lambda: status(gateway, taken["secret"]) == {401}, deadline=5)
        (data / "stack.db").rename(tmp_path / "away")
        for pid in (0, *gateway.workers()):  # those that start while it is away know what the others knew
            if pid:
                os.kill(pid, signal.SIGKILL)
            wait_for(lambda: status(gateway, secret.new_secret("0123456789")) == {503})
            assert status(gateway, kept) == {200}
            assert status(gateway, taken["secret"]) == {401}
        ask(gateway, kept, user="away")
        assert engine.seen("away")[0]["body"]["messages"][0] == {"role": "system", "content": "Be polite."}
        assert httpx.get(gateway.url + "/readyz", verify=NO_TLS).json()["store"] == "store_unavailable"
        done = stack.run("keys", "list")  # the command makes no empty one in its place
        assert (done.returncode, f"There is no store at {data}/stack.db. Start" in done.stderr) == (1, True)
        assert status(gateway, kept) == {200}
        (tmp_path / "away").rename(data / "stack.db")
        wait_for(lambda: status(gateway, secret.new_secret("0123456789")) == {401})
        new = stack.json("keys", "create", "new")["secret"]
        assert status(gateway, new) == {200}


def test_the_command_makes_no_store(tmp_path: Path) -> None:
    """A data directory that is mistyped, say."""
    for words in (["keys", "list"], ["keys", "create", "x"], ["usage"], ["top"], ["limits"], ["backup", "x"]):
        done = Command(STACK_DATA_DIR=str(tmp_path / "tpyo")).run(*words)
        assert (done.returncode, done.stdout, f"There is no store at {tmp_path}/tpyo" in done.stderr) == (1, "", True)
    assert not list(tmp_path.iterdir())


def test_another_file_in_its_place_is_what_counts(engine: FakeEngine, tmp_path: Path) -> None:
    """One restored from a backup, say: a key that is not in it is none."""
    data = tmp_path / "data"
    stack = Command(STACK_DATA_DIR=empty_store(data))
    kept = stack.json("keys", "create", "kept")["secret"]
    shutil.copytree(data, tmp_path / "backup")
    lost = stack.json("keys", "create", "lost")["secret"]
    with running_gateway(tmp_path / "log", engine.url, STACK_DATA_DIR=str(data)) as gateway:
        assert status(gateway, lost) == {200}
        data.rename(tmp_path / "away")
        (tmp_path / "backup").rename(data)
        wait_for(lambda: status(gateway, lost) == {401})
        assert status(gateway, kept) == {200}


def test_a_change_reaches_the_other_gateways_of_a_database(
    engine: FakeEngine, tmp_path: Path, postgres: Postgres
) -> None:
    settings = {"STACK_DATA_DIR": str(tmp_path / "data"), "STACK_STORE_URL": postgres.new_database()}
    stack = Command(**settings)
    with (
        running_gateway(tmp_path / "log", engine.url, **settings) as one,
        running_gateway(tmp_path / "other", engine.url, **settings) as other,
    ):
        made = stack.json("keys", "create", "x")
        assert status(one, made["secret"]) == status(other, made["secret"]) == {200}
        stack("keys", "disable", made["key"]["id"])
        for gateway in (one, other):
            wait_for(lambda it=gateway: status(it, made["secret"]) == {401}, deadline=5)  # type: ignore[misc]
