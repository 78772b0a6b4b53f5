"""/metrics for operators: refusals by limit, keys near a quota, the build, the download, the journal and the store."""

import json
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx

from gateway import __version__
from tests.support.keys import admin, status
from tests.support.metered import CHAT, metered
from tests.support.processes import MESSAGES, FakeEngine, wait_for

LIMITS = {"requests_per_minute": 1, "tokens_per_minute": 20, "tokens_per_day": 1, "tokens_per_month": 1}
ADMIN = "admin-0123456789abcdef"


def test_a_refusal_is_counted_by_the_limit_that_was_reached(engine: FakeEngine, tmp_path: Path, mark: str) -> None:
    with metered(tmp_path / "log", engine.url, STACK_ADMIN_KEYS=ADMIN, STACK_WORKERS="1") as own:

        def key(**limits: int) -> dict[str, str]:
            admin = {"authorization": f"Bearer {ADMIN}"}
            made = httpx.post(own.gateway.url + "/admin/keys", json={"name": "x", "limits": limits}, headers=admin)
            return {"authorization": f"Bearer {made.raise_for_status().json()['secret']}"}

        def wait_known(headers: dict[str, str]) -> None:
            wait_for(lambda: httpx.get(own.gateway.url + "/v1/models", headers=headers).status_code == 200)

        def ask(headers: dict[str, str], **fields: Any) -> int:
            body = {"messages": MESSAGES, "max_tokens": 10} | fields
            return httpx.post(own.gateway.url + CHAT, json=body, headers=headers).status_code

        keys = {name: key(**{name: limit}) for name, limit in (LIMITS | {"concurrent": 1}).items()}
        with (
            ThreadPoolExecutor() as pool
        ):  # at the same time, because unknown keys are looked up twice a second at most
            list(pool.map(wait_known, keys.values()))
        expected: dict[str, float] = {}
        for name in LIMITS:
            headers = keys[name]
            statuses = [ask(headers) for _ in range(4)]
            assert (statuses[0], statuses[3]) == (200, 429), name
            expected[name] = statuses.count(429)
        headers = keys["concurrent"]
        with ThreadPoolExecutor(1) as pool:
            script = [["gate", mark], ["json", [200, {"choices": []}]]]
            first = pool.submit(ask, headers, user=mark, script=script)
            engine.wait_seen(mark, "running")
            assert ask(headers) == 429
            engine.release(mark)
            assert first.result() == 200
        assert own.scrape().by("stack_limit_rejections_total", "limit") == expected | {"concurrent": 1}


def test_keys_that_have_nearly_used_a_quota_are_counted_and_named_in_the_log(
    engine: FakeEngine, tmp_path: Path
) -> None:
    settings = {"STACK_LIMIT_TOKENS_PER_DAY": "100", "STACK_LIMIT_TOKENS_PER_MONTH": "1000", "STACK_WORKERS": "1"}
    with metered(tmp_path / "log", engine.url, **settings) as own:

        def near() -> dict[str, float]:
            return own.scrape().by("stack_keys_near_quota", "percent")

        for number in range(10):  # each takes ten tokens, and a key is looked at when it comes
            assert own.ask(max_tokens=3).status_code == 200
            assert near() == ({} if number < 8 else {"75": 1})
        assert own.ask(max_tokens=3).status_code == 429
        assert near() == {"75": 1, "95": 1}
        assert own.scrape().total("stack_keys_near_quota", quota="tokens_per_month") == 0

        told = own.gateway.told("quota_near", 2)
        assert [(it["quota"], it["percent"], it["level"]) for it in told] == [
            ("tokens_per_day", 75, "warning"),
            ("tokens_per_day", 95, "warning"),
        ]
        assert {it["key"] for it in told} == {it["key"] for it in own.gateway.log() if it["msg"] == "chat_started"}


def test_a_key_near_a_quota_is_counted_no_more_when_it_ends_or_its_quota_is_raised(
    engine: FakeEngine, tmp_path: Path
) -> None:
    with metered(tmp_path / "log", engine.url, STACK_ADMIN_KEYS=ADMIN) as own, admin(own.gateway, ADMIN) as api:
        made = [api.post("/admin/keys", json={"name": "x", "limits": {"tokens_per_month": 8}}).json() for _ in range(3)]
        for key in made:
            wait_for(lambda key=key: status(own.gateway, key["secret"]) == {429})  # so both workers have looked

        def near(keys: int) -> bool:
            return own.scrape().by("stack_keys_near_quota", "percent") == ({"75": keys, "95": keys} if keys else {})

        wait_for(lambda: near(3))
        ids = [it["key"]["id"] for it in made]
        assert api.delete(f"/admin/keys/{ids[0]}").status_code == 204
        wait_for(lambda: near(2))
        assert api.patch(f"/admin/keys/{ids[1]}", json={"limits": {"tokens_per_month": 1000}}).status_code == 200
        wait_for(lambda: near(1))
        assert api.patch(f"/admin/keys/{ids[2]}", json={"disabled": True}).status_code == 200
        wait_for(lambda: near(0))


def test_the_build_the_models_fetching_and_the_journal_are_told_at_each_scrape(
    engine: FakeEngine, tmp_path: Path
) -> None:
    file = tmp_path / "model.json"
    with metered(tmp_path / "log", engine.url, STACK_PROGRESS_FILE=str(file)) as own:
        first = own.scrape()
        assert first.total("stack_build_info", version=__version__) == 1
        assert first.total("stack_usage_journal_limit_bytes") > first.total("stack_usage_journal_bytes") >= 0
        assert "stack_model_fetched_ratio" not in first.text
        for report, share, failed in (
            ({"state": "fetching"}, 0, 0),
            ({"state": "fetching", "completed": 1, "total": 4}, 0.25, 0),
            ({"state": "failed", "message": "the disk is full"}, 0, 1),
            ({"state": "ready"}, 1, 0),
        ):
            file.write_text(json.dumps({"model": "fake-model"} | report))
            samples = own.scrape()
            assert samples.total("stack_model_fetched_ratio", model="fake-model") == share
            assert samples.total("stack_model_fetch_failed", model="fake-model") == failed
        file.write_text("{")
        assert "stack_model_fetched_ratio" not in own.scrape().text


def test_a_store_in_trouble_is_told_while_it_lasts(engine: FakeEngine, tmp_path: Path) -> None:
    data = tmp_path / "data"
    with metered(tmp_path / "log", engine.url, STACK_DATA_DIR=str(data), STACK_WORKERS="1") as own:
        database = next(data.glob("*.db"))
        with closing(sqlite3.connect(database, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            own.ask()
            own.wait("stack_store_trouble_workers", 1)
            assert own.scrape().total("stack_usage_journal_bytes") > 0
            other.execute("ROLLBACK")
        own.wait("stack_store_trouble_workers", 0)
