"""The store's faults: what callers see meanwhile, and that all is well afterwards without anybody's doing."""

import os
import pickle
import shutil
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx
import psycopg
import pytest

from gateway.errors import StoreUnavailable
from gateway.keys import keepsake, secret
from gateway.keys.book import Keybook
from gateway.keys.entries import LAST, NewKeyFields
from gateway.keys.limit_fields import LimitFields
from gateway.settings import Settings
from gateway.shared_memory import Keepsake
from gateway.store.store import open_store, prepare
from tests.support.command import Command, empty_store
from tests.support.console import visiting
from tests.support.containers import Postgres
from tests.support.keys import ADMIN, ask, status
from tests.support.processes import KEY, NO_TLS, FakeEngine, running_gateway, wait_for


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
            with ThreadPoolExecutor() as pool:  # each of these waits for the server as long as it may
                listing = pool.submit(stack.run, "keys", "list")
                answer = ask(gateway, secret.new_secret("0123456789"))
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
                assert status(gateway, text) == {200}
                ready = gateway.url + "/readyz"
                wait_for(lambda: httpx.get(ready, verify=NO_TLS).json()["store"] == "store_unavailable")
                done = listing.result()
            assert (done.returncode, "store cannot be used" in done.stderr) == (1, True)
        finally:
            subprocess.run(["docker", "unpause", postgres.container], check=True, capture_output=True)
        wait_for(lambda: status(gateway, secret.new_secret("0123456789")) == {401})
        stack("keys", "list")


def test_the_options_of_the_databases_url_count_beside_the_gateways_own(
    engine: FakeEngine, tmp_path: Path, postgres: Postgres
) -> None:
    """They were dropped: the tables came into the schema `public`, whatever the URL said. The scheme in capitals had
    the password logged, and each gateway count by itself."""
    url = postgres.empty_database()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA apart")
        given = url.replace("postgresql", "POSTGRESQL", 1) + "?options=-csearch_path%3Dapart"
        with running_gateway(tmp_path / "log", engine.url, STACK_STORE_URL=given, LLM_SLOTS="1") as gateway:
            answer = ask(gateway, KEY)
            assert answer.status_code == 200
            query = "SELECT DISTINCT schemaname FROM pg_stat_user_tables WHERE relname IN ('keys', 'account_owners')"
            assert connection.execute(query).fetchall() == [("apart",)]
            wait_for(lambda: connection.execute("SELECT count(*) FROM apart.account_owners").fetchone() != (0,))
            assert "cannot be used" not in gateway.log_path.read_text()


def test_a_server_that_stands_still_is_waited_for_once(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller waited for the check of an old connection, and then as long again for a new one."""
    monkeypatch.setenv("STACK_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("STACK_STORE_URL", postgres.new_database())
    monkeypatch.setattr("gateway.store.postgres_store._Connection.patience", 1)
    with closing(open_store(Settings())) as store:
        number = store.number()
        subprocess.run(["docker", "pause", postgres.container], check=True, capture_output=True)
        try:
            with pytest.raises(StoreUnavailable) as told:
                store.number()
        finally:
            subprocess.run(["docker", "unpause", postgres.container], check=True, capture_output=True)
        # A new connection would have said so in other words.
        assert "the server does not answer" in store.told(told.value.__cause__)
        assert store.number() == number


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


def test_who_signs_out_of_the_console_while_the_store_is_away_is_out(engine: FakeEngine, tmp_path: Path) -> None:
    """Whether the key is valid cannot be known then, and need not be. A page says so, and the session goes on."""
    data = tmp_path / "data"
    key = Command(STACK_DATA_DIR=empty_store(data)).json("keys", "create", "x")["secret"]
    settings = {"STACK_DATA_DIR": str(data), "STACK_ADMIN_KEYS": ADMIN, "STACK_STORE_GRACE": "0.1"}
    with (
        running_gateway(tmp_path / "log", engine.url, **settings) as gateway,
        visiting(gateway, key) as one,
        visiting(gateway, key) as other,
    ):
        token, kept = one.token("/console/try"), one.http.cookies["stack_console"]
        (data / "stack.db").rename(tmp_path / "away")
        for path in ("/console", "/console/own"):
            wait_for(lambda it=path: "store has been unreachable for too long" in other.get(it).text)  # type: ignore[misc]
        assert other.get("/console/own").status_code == 503
        assert one.post("/console/sign-out", {"form_token": "0" * 64}).status_code == 403
        answer = one.post("/console/sign-out", {"form_token": token})
        assert (answer.status_code, answer.headers["location"]) == (303, "/console/sign-in")
        (tmp_path / "away").rename(data / "stack.db")
        wait_for(lambda: other.get("/console/own").status_code == 200)
        again = httpx.get(gateway.url + "/console/own", cookies={"stack_console": kept}, verify=NO_TLS)
        assert (again.status_code, again.headers["location"]) == (303, "/console/sign-in")


@pytest.mark.parametrize("content", ["pickle", "cut short", "other keys' JSON"])
def test_a_kept_file_with_other_content_is_ignored_and_nothing_in_it_is_run(
    engine: FakeEngine, tmp_path: Path, content: str
) -> None:
    data, temporary, trap = tmp_path / "data", tmp_path / "t", tmp_path / "trap"
    temporary.mkdir()
    stack = Command(STACK_DATA_DIR=empty_store(data))
    kept = stack.json("keys", "create", "kept")["secret"]
    settings = {"STACK_DATA_DIR": str(data), "STACK_WORKERS": "1", "TMPDIR": str(temporary)}
    with running_gateway(tmp_path / "log", engine.url, **settings) as gateway:
        assert status(gateway, kept) == {200}
        (file,) = temporary.glob("stack-*/keepsake")
        there = file.read_bytes()
        head = Keepsake.HEAD.size
        assert len(there) > head, "a worker has kept what it read"
        others = {
            "pickle": pickle.dumps(Trap(trap)),
            "cut short": there[head:-5],
            "other keys' JSON": b'{"number": 1000000, "entries": {}, "secrets": "none"}',
        }
        (data / "stack.db").rename(tmp_path / "away")
        wait_for(lambda: httpx.get(gateway.url + "/readyz", verify=NO_TLS).json()["store"] == "store_unavailable")
        file.write_bytes(there[:head] + others[content])
        for pid in gateway.workers():
            os.kill(pid, signal.SIGKILL)
        told = "the keys of the other workers cannot be read"
        wait_for(lambda: any(it["msg"] == told for it in gateway.log()))
        assert status(gateway, KEY) == {200}, "the keys of the settings work"
        assert status(gateway, kept) == {503}, "nobody can tell whether this is a key"
        (tmp_path / "away").rename(data / "stack.db")
        wait_for(lambda: status(gateway, kept) == {200})
    assert not trap.exists()


class Trap:
    """An object whose pickle writes a file when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.write_text, (self.file, "caught")


def test_what_is_kept_of_keys_comes_back_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STACK_DATA_DIR", str(tmp_path))
    settings = Settings()
    prepare(settings)
    store = open_store(settings)
    book = Keybook(store)
    limits = LimitFields(tokens_per_day=10**15)
    made, _ = book.create(NewKeyFields(name='"ä\u2028', limits=limits, models=["a"], labels={"team": "é"}, priority=7))
    book.rotate(made.id, 3600)
    book.create(NewKeyFields(name="other", expires_at=LAST, disabled=True))
    book.set_defaults(LimitFields(concurrent=3))
    contents = book.contents()
    store.close()
    assert len(contents.secrets) == 3
    assert keepsake.load(keepsake.dump(contents, b"\x00\xff")) == (contents, b"\x00\xff")


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
