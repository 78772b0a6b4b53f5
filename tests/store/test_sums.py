"""The console's queries say the same of both databases: sums, pages of keys, and a request's row."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from gateway.console.usage import WORDS, asked
from gateway.keys.book import Keybook
from gateway.keys.entries import NewKeyFields
from gateway.settings import Settings
from gateway.store.store import Store, open_store, prepare
from gateway.usage.rows import UsageBook
from gateway.usage.sums import BYS, Sums, sums


@pytest.fixture
def store(store_settings: dict[str, str]) -> Iterator[Store]:
    values: dict[str, Any] = {name.lower(): value for name, value in store_settings.items()}
    settings = Settings(**values)
    prepare(settings)
    store = open_store(settings)
    yield store
    store.close()


def fill(store: Store, users: tuple[str | None, ...] = (None,)) -> list[str]:
    """Five keys and sixty requests of three of them, some of them written twice or amended. They are those of the keys'
    `users` in turn."""
    ids = [Keybook(store).create(NewKeyFields(name=f"N{number}%", owner="Ann"))[0].id for number in range(5)]
    now = int(time.time() * 1000)
    rows = [
        {"id": f"r{it}", "at": now, "request_id": f"q{it}", "key_id": ids[it % 3], "model": "m", "engine": "e"}
        | {
            "user_id": users[it % len(users)],
            "outcome": "finished",
            "tokens_in": 3,
            "tokens_out": 4,
            "duration_ms": 100 + it,
            "ttft_ms": 10,
        }
        for it in range(60)
    ]
    book = UsageBook(store)
    book.add(rows)
    book.add(rows[:10])
    book.add([rows[5] | {"outcome": "client_left", "tokens_out": 1, "amends": True}])
    return ids


def everything(store: Store) -> list[tuple[Any, ...]]:
    with store.read() as connection:
        return sorted(tuple(it) for it in connection.execute(sa.select(sums)))


def test_sums_are_right_and_read_by_every_name_and_span(store: Store) -> None:
    ids, reads = fill(store, ("u", None, None)), Sums(store)
    for by in BYS:
        for span in WORDS:
            if by in ("key", "user") and span == "year":
                continue
            it = asked({"by": by, "span": span})
            found = reads.top(by, it.table, 10)
            told = [(of.name, of.requests, of.finished, of.failed, of.tokens_out, of.longest_ms) for of in found]
            names = {"all": "", "owner": "Ann", "model": "m", "engine": "e"}
            if span == "last":
                assert told == []
            elif by == "key":
                assert {name: requests for name, requests, *_ in told} == dict.fromkeys(ids[:3], 20)
                assert {of.label for of in found} == {"N0%", "N1%", "N2%"}
            elif by == "user":
                assert [(of.name, of.label, of.requests) for of in found] == [(f"{ids[0]}/u", "N0%/u", 20)]
            else:
                assert told == [(names[by], 60, 59, 0, 237, 159)]
            parts = reads.over_time(by, it.plots, [of.name for of in found])
            count = 0 if span == "last" else 20 if by == "user" else 60
            assert sum(part.requests for of in parts.values() for part in of.values()) == count


def test_the_migration_adds_up_what_is_there(store: Store) -> None:
    fill(store)
    before = everything(store)
    with store.write() as connection:
        for table in ("usage_sums", "changes"):
            connection.exec_driver_sql(f"DROP TABLE {table}")
        for index in ("usage_request", "keys_by_age", "secrets_key", "usage_user"):
            connection.exec_driver_sql(f"DROP INDEX {index}")
        later = ["keys.signing", "keys.user_limits", "responses.user_id", "usage.user_id"]
        if connection.dialect.name == "postgresql":
            later += ["queue_places.user_id", "queue_places.turn", "queue_places.model"]
            later += ["queue_engines.loads", "queue_engines.target"]
        for table, column in (it.split(".") for it in later):
            connection.exec_driver_sql(f"ALTER TABLE {table} DROP COLUMN {column}")
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0014'")
    store.migrate()
    assert everything(store) == before


def test_keys_are_paged_and_found_and_a_request_by_its_id(store: Store) -> None:
    ids, book = fill(store), Keybook(store)
    first, _, last = book.page("", None, 3)
    assert last == (first[-1].created_at, first[-1].id)
    second, _, following = book.page("", last, 3)
    assert (len(first), len(second), following) == (3, 2, None)
    assert {it.id for it in first + second} == set(ids)
    assert [it.name for it in book.page("n3%", None, 9)[0]] == ["N3%"]
    assert book.page("nobody", None, 9) == ([], [], None)
    assert book.called(ids[:1]) == {ids[0]: ("N0%", "Ann")}
    row = UsageBook(store).of_request("q7")
    assert row
    assert row["id"] == "r7"
