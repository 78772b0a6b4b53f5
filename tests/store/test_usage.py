"""Usage: one row for each request that an engine was asked, whatever its end, in either database."""

import csv
import datetime as dt
import io
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from gateway.cli.main import app
from gateway.usage.rows import DAY, STEP
from tests.support.command import Command, empty_store
from tests.support.keys import ADMIN
from tests.support.kills import kills
from tests.support.processes import (
    AUTH,
    KEY,
    MESSAGES,
    NO_TLS,
    FakeEngine,
    GatewayProcess,
    running_gateway,
    wait_for,
)
from tests.support.rows import Rows
from tests.support.usage import CHAT, ask

START = [["role"], ["token", "one"], ["token", " two"]]
FINISH = [["finish", "stop"], ["usage"], ["done"], ["end"]]


@dataclass(frozen=True)
class Served:
    """A gateway, the command on its store, and its usage."""

    gateway: GatewayProcess
    stack: Command
    rows: Rows
    data: Path


@contextmanager
def serving(log: Path, engine: FakeEngine, settings: dict[str, str]) -> Iterator[Served]:
    more = {"STACK_ADMIN_KEYS": ADMIN, "STACK_RESUME": "3"}
    with running_gateway(log, engine.url, **more, **settings) as gateway, closing(Rows(settings)) as rows:
        yield Served(gateway, Command(**settings), rows, Path(settings["STACK_DATA_DIR"]))


@pytest.fixture(scope="module")
def served(
    engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory, lasting_settings: dict[str, str]
) -> Iterator[Served]:
    """For all tests that say of which requests their rows are."""
    with serving(tmp_path_factory.mktemp("served") / "log", engine, lasting_settings) as served:
        yield served


@pytest.fixture
def stack(store_settings: dict[str, str]) -> Command:
    return Command(**store_settings)


@pytest.fixture
def rows(store_settings: dict[str, str]) -> Iterator[Rows]:
    with closing(Rows(store_settings)) as rows:
        yield rows


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
    "no count": (
        {"script": [["json", [200, {"choices": [{"message": {"content": "one two three"}}]}]]]},
        {"outcome": "finished", "tokens_out": 3, "exact": False},
    ),
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


def test_a_row_for_each_end(served: Served, mark: str) -> None:
    gateway, rows, began = served.gateway, served.rows, now()
    for name, (fields, _) in ENDS.items():
        ask(gateway, name.replace(" ", "-"), user=mark + name, **fields)
    ask(gateway, "embedding", "/v1/embeddings", input="x")
    ask(gateway, "not-an-exchange", messages=3)
    with hanging(gateway, "left"):
        pass
    with pytest.raises(httpx.ReadTimeout):  # of what the engine made meanwhile nobody tells: it is estimated
        ask(gateway, "unanswered", script=[["hang"]], patience=0.5)
    found = {name: rows.of(name.replace(" ", "-")) for name in [*ENDS, "embedding", "left", "unanswered"]}
    for name, (_, expected) in ENDS.items():
        assert expected.items() <= found[name].items(), name
    assert found["failed"]["attempts"] > 1
    left = {"outcome": "client_left", "status": 499, "tokens_out": 2, "exact": False, "kind": "chat", "stream": True}
    assert left.items() <= found["left"].items()
    unanswered = {"outcome": "client_left", "exact": False, "stream": False}
    assert unanswered.items() <= found["unanswered"].items()
    assert found["unanswered"]["tokens_out"] > 0
    for name in ("no count", "nonsense", "left", "unanswered"):
        assert found[name]["tokens_in"] > 0, name
    assert (found["embedding"]["kind"], found["embedding"]["tokens_in"]) == ("embedding", 7)
    for row in found.values():
        assert (row["model"], row["engine"], row["arm"]) == ("fake-model", "engine", None)
        assert began <= row["at"] <= now()
        assert 0 <= row["duration_ms"] < 30_000
        assert (row["ttft_ms"] is not None) == (row["stream"] is True)
        assert len(row["key_id"]) == 8
        assert KEY not in str(row)
    assert sum(row["at"] >= began for row in rows.all()) == len(found)


def test_nothing_is_lost_or_doubled_or_held_for_ever_by_kills(store_settings: dict[str, str], tmp_path: Path) -> None:
    figures, failures = kills(tmp_path, 6, seed=7, **store_settings)
    assert not failures, (figures, failures)


def test_the_usage_of_a_killed_worker_has_its_tokens(served: Served) -> None:
    gateway, rows, told = served.gateway, served.rows, served.data / "journal"
    assert ask(gateway, "before").status_code == 200
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


# -- what becomes of the rows -----------------------------------------------------------------------------------------


def now() -> int:
    return time.time_ns() // 1_000_000


def some(count: int, *, name: str, at: int, **fields: Any) -> list[dict[str, Any]]:
    row = {"key_id": "ann", "model": "m", "outcome": "finished", "tokens_in": 2, "tokens_out": 1, "exact": True}
    return [row | fields | {"id": f"{name}-{number}", "at": at} for number in range(count)]


def test_old_rows_are_deleted_automatically(engine: FakeEngine, tmp_path: Path, store_settings: dict[str, str]) -> None:
    stack = Command(**store_settings)
    assert stack("usage") == "There is no usage in that time.\n"
    with closing(Rows(store_settings)) as rows:
        rows.book.add(some(STEP + 5, name="old", at=now() - 33 * DAY) + some(3, name="young", at=now() - 31 * DAY))
        settings = store_settings | {"STACK_USAGE_RETENTION_DAYS": "32"}
        with running_gateway(tmp_path / "log", engine.url, **settings):
            wait_for(lambda: len(rows.all()) == 3)
        assert stack("usage", "prune", "--before", "31d", "--yes").startswith("Deleted 3 rows from before ")
        assert rows.all() == []


NOTHING = {"finished": 0, "cached": 0, "documents": 0, "audio_ms": 0, "characters": 0, "counted": 0}


def test_usage_is_summed_up(stack: Command, rows: Rows) -> None:
    ann = stack.json("keys", "create", "Ann")["key"]["id"]
    first = 1_772_323_200_000  # 2026-03-01
    rows.book.add(
        [
            *some(2, name="a", at=first - 1, key_id=ann),
            *some(2, name="b", at=first, key_id=ann, cached=2),
            *some(1, name="ranked", at=first, key_id=ann, cached=2, documents=5),
            *some(4, name="c", at=first + DAY - 1, model="other", outcome="client_left", exact=False),
            *some(5, name="d", at=first + DAY),
        ]
    )
    march = ["--from", "2026-03-01", "--to", "2026-03-01"]
    sums = NOTHING | {"requests": 3, "finished": 3, "tokens_in": 6, "tokens_out": 3, "cached": 6, "documents": 5}
    left = NOTHING | {"requests": 4, "tokens_in": 8, "tokens_out": 4, "counted": 4}
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
    assert table.splitlines()[-1].split() == ["7", "3", "14", "7", "6", "5", "0", "0", "4"]


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
        (["usage", "--by", "key,colour"], "give one or several of key, model, day"),
        (["usage", "--by", "key,key"], "give one or several of key, model, day"),
        (["usage", "--from", "yesterday"], "write it as 90m, 12h, 30d or 8w"),
        (["usage", "--to", "2026-02-30"], "the day 2026-02-30 does not exist"),
        (["usage", "--to", "31d"], "--from 30d is after --to 31d"),
        (["usage", "--from", "2027-02-01", "--to", "2027-01-30"], "--from 2027-02-01 is after --to 2027-01-30"),
        (["usage", "--csv", "--json"], "not both"),
        (["usage", "--key", "nosuch"], "No key has or had the id 'nosuch'"),
        (["usage", "prune"], "--before"),
        (["usage", "prune", "--before", "2199-01-01", "--yes"], "the quotas of this month are counted from the usage"),
        (
            ["usage", "prune", "--before", "0", "--yes"],
            f"'before' can be at most {dt.datetime.now(dt.UTC).date().replace(day=1)}",
        ),
        (["usage", "prune", "--before", "30d"], "use --yes"),
    ],
)
def test_the_command_refuses_invalid_arguments(tmp_path: Path, words: Sequence[str], sentence: str) -> None:
    environment = {"STACK_DATA_DIR": empty_store(tmp_path), "COLUMNS": "200"}
    done = CliRunner().invoke(app, words, env=environment)
    assert done.exit_code in (1, 2)
    assert sentence in " ".join(done.output.replace("│", " ").split())


def test_usage_keeps_the_names_of_keys(engine: FakeEngine, tmp_path: Path, store_settings: dict[str, str]) -> None:
    """Also of those that were deleted, through a backup too; and those of STACK_API_KEYS have that of the setting."""
    with serving(tmp_path / "log", engine, store_settings) as served:
        _names_are_kept(served, tmp_path)


def _names_are_kept(served: Served, tmp_path: Path) -> None:
    gateway, stack, rows = served.gateway, served.stack, served.rows
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
        assert (answer.status_code, "is a key of the setting STACK_API_KEYS" in answer.json()["error"]["message"]) == (
            404,
            True,
        )
    assert [it["name"] for it in stack.json("usage", "--by", "key", "--key", listed)] == ["STACK_API_KEYS"]
    assert stack("usage", "--key", bob) == "There is no usage in that time.\n"
    assert "No key has or had the id 'Ann'" in stack.run("usage", "--key", "Ann").stderr
    assert "is a key of the setting STACK_API_KEYS" in stack.run("keys", "show", listed).stderr


def test_usage_over_http(served: Served) -> None:
    gateway, stack, rows = served.gateway, served.stack, served.rows
    count = len(rows.all())
    rows.book.add(some(3, name="a", at=1_772_323_200_000))
    headers = {"authorization": f"Bearer {ADMIN}"}
    with httpx.Client(base_url=gateway.url, headers=headers, timeout=30, verify=NO_TLS) as client:
        found = client.get("/admin/usage", params={"by": "key,day", "from": "2026-03-01", "to": "2026-03-01"}).json()
        assert found["data"] == stack.json("usage", "--by", "key,day", "--from", "2026-03-01", "--to", "2026-03-01")
        march = {"from": "1772323200", "to": "2026-03-01"}
        lines = client.get("/admin/usage", params={"by": "model", "format": "csv", **march})
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
        assert len(rows.all()) == count + 3
        assert client.delete("/admin/usage").json()["error"]["param"] == "before"
        with hanging(gateway, "watched"):
            wait_for(lambda: [it["tokens"] for it in client.get("/admin/running").json()["data"]] == [2])
        assert client.delete("/admin/usage", params={"before": "2026-03-02"}).json() == {"rows": 3}
    for method, path in (("GET", "/admin/usage"), ("DELETE", "/admin/usage?before=1"), ("GET", "/admin/running")):
        assert httpx.request(method, gateway.url + path, headers=AUTH).status_code == 401


def test_top_shows_the_running_requests(served: Served) -> None:
    gateway, stack = served.gateway, served.stack
    made = stack.json("keys", "create", "Ann")
    wait_for(lambda: stack.json("top") == [])
    with hanging(gateway, "watched", key=made["secret"]):
        found = wait_for(lambda: [it for it in stack.json("top") if it["tokens"]])
        assert len(found) == 1
        seen = {"key_id": made["key"]["id"], "name": "Ann", "model": "fake-model", "engine": "engine", "tokens": 2}
        assert seen.items() <= found[0].items()
        assert found[0]["generating"] <= found[0]["seconds"]
        table = stack("top")
        assert all(word in table for word in ("Ann", "fake-model", "1 running"))
    wait_for(lambda: stack.json("top") == [])
