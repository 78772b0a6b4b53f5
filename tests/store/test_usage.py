"""Usage: one row for each request that an engine was asked, whatever its end, in either database."""

import csv
import datetime as dt
import io
import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from gateway.usage import DAY, STEP
from tests.containers import Postgres
from tests.kills import kills
from tests.processes import (
    AUTH,
    KEY,
    MESSAGES,
    NO_TLS,
    ROOT,
    FakeEngine,
    GatewayProcess,
    free_port,
    running_gateway,
    scrape,
    wait_for,
)
from tests.store.rows import Rows
from tests.store.stack import Command, empty_store

ADMIN = "sk-admin-0123456789abcdef"
CHAT = "/v1/chat/completions"
START = [["role"], ["token", "one"], ["token", " two"]]
FINISH = [["finish", "stop"], ["usage"], ["done"], ["end"]]


@pytest.fixture
def gateway(engine: FakeEngine, tmp_path: Path, store_settings: dict[str, str]) -> Iterator[GatewayProcess]:
    settings = {"STACK_ADMIN_KEYS": ADMIN, "STACK_RESUME": "3", **store_settings}
    with running_gateway(tmp_path / "log", engine.url, **settings) as gateway:
        yield gateway


@pytest.fixture
def stack(store_settings: dict[str, str]) -> Command:
    return Command(**store_settings)


@pytest.fixture
def rows(store_settings: dict[str, str]) -> Iterator[Rows]:
    with closing(Rows(store_settings)) as rows:
        yield rows


def ask(
    gateway: GatewayProcess, request_id: str, path: str = CHAT, *, patience: float = 30, **fields: Any
) -> httpx.Response:
    """What breaks is not resumed, but for `resumed`."""
    body = fields if path != CHAT else {"messages": MESSAGES, **fields}
    headers = AUTH | {"x-request-id": request_id} | ({} if request_id == "resumed" else {"x-stack-resume": "off"})
    return httpx.post(gateway.url + path, json=body, headers=headers, timeout=patience, verify=NO_TLS)


def ask_many(gateway: GatewayProcess, name: str, count: int) -> set[str]:
    """Their ids; every one is answered."""
    names = [f"{name}-{number}" for number in range(count)]
    with ThreadPoolExecutor(8) as pool:
        assert {it.status_code for it in pool.map(lambda it: ask(gateway, it), names)} == {200}
    return set(names)


@contextmanager
def hanging(gateway: GatewayProcess, request_id: str, key: str = KEY) -> Iterator[None]:
    """A stream whose client has two tokens of it; at the end the client leaves."""
    body = {"messages": MESSAGES, "stream": True, "script": [*START, ["hang"]]}
    headers = {"x-request-id": request_id, "authorization": f"Bearer {key}"}
    with gateway.client() as client, client.stream("POST", CHAT, json=body, headers=headers) as answer:
        lines = answer.iter_lines()
        next(it for it in lines if "two" in it)
        yield


def said(usage: dict[str, Any]) -> list[Any]:
    return [["json", [200, {"choices": [], "usage": usage}]]]


CACHED = {"prompt_tokens": 70, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 64}}
WHOLE = {"outcome": "finished", "status": 200, "tokens_in": 7, "tokens_out": 3, "exact": True, "attempts": 1}
ENDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "blocking": ({}, WHOLE | {"stream": False}),
    "stream": ({"stream": True}, WHOLE | {"stream": True}),
    "cached": ({"script": said(CACHED)}, {"tokens_in": 70, "tokens_out": 1, "cached": 64, "exact": True}),
    "no count": ({"script": [["json", [200, {"choices": []}]]]}, {"outcome": "finished", "exact": False}),
    "nonsense": (
        {"script": said({"prompt_tokens": 2**63, "completion_tokens": -1})},
        {"outcome": "finished", "exact": False},
    ),
    "broken": (
        {"stream": True, "script": [*START, ["close"]]},
        {"outcome": "engine_broken_stream", "status": 200, "tokens_out": 2, "exact": False},
    ),
    "resumed": (
        {"stream": True, "script": [["answer", {"dialect": "vllm", "pieces": ["one", " two", " three"], "cuts": [3]}]]},
        {"outcome": "finished", "status": 200, "tokens_out": 3, "resumes": 1},
    ),
    "refused": (
        {"script": [["json", [422, {"error": {"message": "m"}}]]]},
        {"outcome": "engine_refused", "status": 422, "tokens_out": 0, "attempts": 1},
    ),
    "failed": (
        {"script": [["json", [500, {"error": {"message": "CUDA"}}]]]},
        {"outcome": "engine_error", "status": 502, "tokens_in": 0, "tokens_out": 0},
    ),
}


def test_a_row_for_each_end(gateway: GatewayProcess, rows: Rows, mark: str) -> None:
    began = now()
    for name, (fields, _) in ENDS.items():
        ask(gateway, name.replace(" ", "-"), user=mark + name, **fields)
    ask(gateway, "embedding", "/v1/embeddings", input="x")
    ask(gateway, "not-an-exchange", messages=3)
    with hanging(gateway, "left"):
        pass
    with pytest.raises(httpx.ReadTimeout):  # it had its prompt read, and no more
        ask(gateway, "unanswered", script=[["hang"]], patience=0.5)
    found = {name: rows.of(name.replace(" ", "-")) for name in [*ENDS, "embedding", "left", "unanswered"]}
    for name, (_, expected) in ENDS.items():
        assert expected.items() <= found[name].items(), name
    assert found["failed"]["attempts"] > 1
    left = {"outcome": "client_left", "status": 499, "tokens_out": 2, "exact": False, "kind": "chat", "stream": True}
    assert left.items() <= found["left"].items()
    unanswered = {"outcome": "client_left", "tokens_out": 0, "exact": False, "stream": False}
    assert unanswered.items() <= found["unanswered"].items()
    for name in ("no count", "nonsense", "left", "unanswered"):
        assert found[name]["tokens_in"] > 0, name
    assert found["no count"]["tokens_out"] > 0
    assert (found["embedding"]["kind"], found["embedding"]["tokens_in"]) == ("embedding", 7)
    for row in found.values():
        assert (row["model"], row["engine"], row["arm"]) == ("fake-model", "engine", None)
        assert began <= row["at"] <= now()
        assert 0 <= row["duration_ms"] < 30_000
        assert (row["ttft_ms"] is not None) == (row["stream"] is True)
        assert len(row["key_id"]) == 8
        assert KEY not in str(row)
    assert len(rows.all()) == len(found)


def test_nothing_is_lost_or_doubled_or_held_for_ever_by_kills(store_settings: dict[str, str], tmp_path: Path) -> None:
    figures, failures = kills(tmp_path, 10, seed=7, **store_settings)
    assert not failures, (figures, failures)


def test_what_a_lost_worker_had_made_is_known(
    gateway: GatewayProcess, rows: Rows, store_settings: dict[str, str]
) -> None:
    assert ask(gateway, "before").status_code == 200
    told = Path(store_settings["STACK_DATA_DIR"], "journal")
    try:
        with hanging(gateway, "lost"):
            wait_for(lambda: any('"tokens":2' in it.read_text() for it in told.glob("*/running.json")))
            for pid in gateway.workers():
                os.kill(pid, signal.SIGKILL)
    except httpx.TransportError:
        pass
    lost = {"outcome": "worker_lost", "status": None, "tokens_out": 2, "exact": False, "engine": "engine"}
    assert lost.items() <= rows.of("lost").items()
    assert rows.of("before")["outcome"] == "finished"


# -- the store's faults -----------------------------------------------------------------------------------------------


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
        sent |= ask_many(disk.gateway, f"full-{len(sent)}", 20)
    filler.unlink()
    after = ask_many(disk.gateway, "after", 10)
    wait_for(lambda: disk.rows() + disk.dropped() == len(sent | after))
    assert disk.dropped() <= len(sent)
    assert sum(line["count"] for line in disk.gateway.log() if line["msg"] == "usage_dropped") == disk.dropped()


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


# -- what becomes of the rows -----------------------------------------------------------------------------------------


def now() -> int:
    return time.time_ns() // 1_000_000


def some(count: int, *, name: str, at: int, **fields: Any) -> list[dict[str, Any]]:
    row = {"key_id": "ann", "model": "m", "outcome": "finished", "tokens_in": 2, "tokens_out": 1, "exact": True}
    return [row | fields | {"id": f"{name}-{number}", "at": at} for number in range(count)]


def test_old_rows_go_by_themselves(engine: FakeEngine, tmp_path: Path, store_settings: dict[str, str]) -> None:
    stack = Command(**store_settings)
    assert stack("usage") == "Nothing was used in that time.\n"
    with closing(Rows(store_settings)) as rows:
        rows.book.add(some(STEP + 5, name="old", at=now() - 33 * DAY) + some(3, name="young", at=now() - 31 * DAY))
        settings = store_settings | {"STACK_USAGE_RETENTION_DAYS": "32"}
        with running_gateway(tmp_path / "log", engine.url, **settings):
            wait_for(lambda: len(rows.all()) == 3)
        assert stack("usage", "prune", "--before", "31d", "--yes").startswith("Deleted 3 rows of before ")
        assert rows.all() == []


def test_usage_is_summed_up(stack: Command, rows: Rows) -> None:
    ann = stack.json("keys", "create", "Ann")["key"]["id"]
    first = 1_772_323_200_000  # 2026-03-01
    rows.book.add(
        [
            *some(2, name="a", at=first - 1, key_id=ann),
            *some(3, name="b", at=first, key_id=ann, cached=2),
            *some(4, name="c", at=first + DAY - 1, model="other", outcome="client_left", exact=False),
            *some(5, name="d", at=first + DAY),
        ]
    )
    march = ["--from", "2026-03-01", "--to", "2026-03-01"]
    sums = {"requests": 3, "finished": 3, "tokens_in": 6, "tokens_out": 3, "cached": 6, "counted": 0}
    left = {"requests": 4, "finished": 0, "tokens_in": 8, "tokens_out": 4, "cached": 0, "counted": 4}
    found = stack.json("usage", *march)
    assert {"key": ann, "name": "Ann", "model": "m"} | sums in found
    assert {"key": "ann", "name": None, "model": "other"} | left in found
    days = stack.json("usage", "--by", "day", "--from", "2026-02-01", "--to", "2026-03-02")
    assert [(it["day"], it["requests"]) for it in days] == [("2026-02-28", 2), ("2026-03-01", 7), ("2026-03-02", 5)]
    assert stack.json("usage", "--by", "outcome", *march, "--key", "ann", "--model", "other") == [
        {"outcome": "client_left"} | left
    ]
    lines = list(csv.DictReader(io.StringIO(stack("usage", *march, "--csv"))))
    assert {it["name"]: (it["tokens_in"], it["counted"]) for it in lines} == {"Ann": ("6", "0"), "": ("8", "4")}
    table = stack("usage", *march)
    assert all(word in table for word in ("Ann", "other", "tokens in"))
    assert table.splitlines()[-1].split() == ["7", "3", "14", "7", "6", "4"]


def test_a_narrow_terminal_cuts_nothing(stack: Command, rows: Rows) -> None:
    made = stack.json("keys", "create", "A name of many words, which may fold", "--model", "org/" + "m" * 60)["key"][
        "id"
    ]
    rows.book.add(some(3, name="a", at=now(), key_id=made, model="org/" + "m" * 60, tokens_in=123_456_789))
    today = dt.datetime.now(dt.UTC).date().isoformat()
    for columns in (40, 60, 80):
        keys, used = (
            stack.on_terminal(columns, "keys", "list"),
            stack.on_terminal(columns, "usage", "--by", "day,key,model"),
        )
        assert all(word in used for word in (made, today, "370,370,367", "many words", "org/mmmmmmmm")), used
        assert made in keys
        assert "many words" in keys
        assert "…" not in keys + used


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["usage", "--by", "key,colour"], "name some of key, model, day"),
        (["usage", "--by", "key,key"], "name some of key, model, day"),
        (["usage", "--from", "yesterday"], "write 90m, 12h, 30d or 8w"),
        (["usage", "--to", "2026-02-30"], "there is no day 2026-02-30"),
        (["usage", "--to", "31d"], "--from 30d is after --to 31d"),
        (["usage", "--from", "2027-02-01", "--to", "2027-01-30"], "--from 2027-02-01 is after --to 2027-01-30"),
        (["usage", "--csv", "--json"], "not both"),
        (["usage", "--key", "nosuch"], "No key has or had the id 'nosuch'"),
        (["usage", "prune"], "--before"),
        (["usage", "prune", "--before", "2199-01-01", "--yes"], "This month's quotas are counted from its usage"),
        (
            ["usage", "prune", "--before", "0", "--yes"],
            f"'before' can be {dt.datetime.now(dt.UTC).date().replace(day=1)}",
        ),
        (["usage", "prune", "--before", "30d"], "say --yes"),
    ],
)
def test_what_the_command_refuses(tmp_path: Path, words: Sequence[str], sentence: str) -> None:
    done = Command(STACK_DATA_DIR=empty_store(tmp_path)).run(*words)
    assert done.returncode != 0
    assert sentence in " ".join(done.stderr.replace("│", " ").split())


def test_usage_keeps_the_names_of_keys(gateway: GatewayProcess, stack: Command, rows: Rows, tmp_path: Path) -> None:
    """Also of those that were deleted, through a backup too; and those of STACK_API_KEYS have that of the setting."""
    ann, bob = (stack.json("keys", "create", name)["key"]["id"] for name in ("Ann", "Bob"))
    rows.book.add(some(2, name="a", at=now(), key_id=ann))
    ask(gateway, "listed")
    listed = rows.of("listed")["key_id"]
    for key_id in (ann, bob):
        stack("keys", "delete", key_id, "--yes")
    stack("backup", str(tmp_path / "backup"))
    stack("restore", str(tmp_path / "backup"), "--yes")

    expected = {ann: "Ann", listed: "STACK_API_KEYS"}
    assert {it["key"]: it["name"] for it in stack.json("usage", "--by", "key")} == expected
    with httpx.Client(base_url=gateway.url, headers={"authorization": f"Bearer {ADMIN}"}, verify=NO_TLS) as client:
        found = client.get("/admin/usage", params={"by": "key"}).json()["data"]
        assert {it["key"]: it["name"] for it in found} == expected
        answer = client.get(f"/admin/keys/{listed}")
        assert (answer.status_code, "is one of STACK_API_KEYS" in answer.json()["error"]["message"]) == (404, True)
    assert [it["name"] for it in stack.json("usage", "--by", "key", "--key", listed)] == ["STACK_API_KEYS"]
    assert stack("usage", "--key", bob) == "Nothing was used in that time.\n"
    assert "No key has or had the id 'Ann'" in stack.run("usage", "--key", "Ann").stderr
    assert "is one of STACK_API_KEYS" in stack.run("keys", "show", listed).stderr


def test_usage_over_http(gateway: GatewayProcess, stack: Command, rows: Rows) -> None:
    rows.book.add(some(3, name="a", at=1_772_323_200_000))
    headers = {"authorization": f"Bearer {ADMIN}"}
    with httpx.Client(base_url=gateway.url, headers=headers, timeout=30, verify=NO_TLS) as client:
        found = client.get("/admin/usage", params={"by": "key,day", "from": "2026-03-01", "to": "2026-03-01"}).json()
        assert found["data"] == stack.json("usage", "--by", "key,day", "--from", "2026-03-01", "--to", "2026-03-01")
        lines = client.get("/admin/usage", params={"by": "model", "format": "csv", "from": "1772323200"})
        assert lines.headers["content-type"].startswith("text/csv")
        assert [it["requests"] for it in csv.DictReader(io.StringIO(lines.text))] == ["3"]
        wrong = {"by": "colour", "from": "tomorrow", "to": "2026-02-30", "format": "xml", "key": "a\0", "model": "\0"}
        for name, value in wrong.items():
            answer = client.get("/admin/usage", params={name: value})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
        wrong = {"since": "2026-03-01", "key": "nosuch", "to": "2026-02-01&from=2026-03-01"}
        for name, value in wrong.items():
            answer = client.get(f"/admin/usage?{name}={value}")
            param = "from" if name == "to" else name
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
            assert param in answer.json()["error"]["message"]
        answer = client.get("/admin/keys?owner=Ann")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "owner")
        for before in ("2199-01-01", str(now() // 1000)):
            answer = client.delete("/admin/usage", params={"before": before})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "before")
        assert len(rows.all()) == 3
        assert client.delete("/admin/usage").json()["error"]["param"] == "before"
        with hanging(gateway, "watched"):
            wait_for(lambda: [it["tokens"] for it in client.get("/admin/running").json()["data"]] == [2])
        assert client.delete("/admin/usage", params={"before": "2026-03-02"}).json() == {"rows": 3}
    for method, path in (("GET", "/admin/usage"), ("DELETE", "/admin/usage?before=1"), ("GET", "/admin/running")):
        assert httpx.request(method, gateway.url + path, headers=AUTH).status_code == 401


def test_top_shows_who_is_answered(gateway: GatewayProcess, stack: Command) -> None:
    made = stack.json("keys", "create", "Ann")
    assert stack.json("top") == []
    with hanging(gateway, "watched", key=made["secret"]):
        found = wait_for(lambda: [it for it in stack.json("top") if it["tokens"]])
        assert len(found) == 1
        seen = {"key_id": made["key"]["id"], "name": "Ann", "model": "fake-model", "engine": "engine", "tokens": 2}
        assert seen.items() <= found[0].items()
        assert found[0]["generating"] <= found[0]["seconds"]
        table = stack("top")
        assert all(word in table for word in ("Ann", "fake-model", "1 running"))
    wait_for(lambda: stack.json("top") == [])
