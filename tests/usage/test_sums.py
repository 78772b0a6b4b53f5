"""Sums of hours and days say what the rows say, whatever is written twice, amended, deleted or restored."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from gateway.cli import backup
from gateway.keys.book import Keybook
from gateway.keys.entries import KeyFields, NewKeyFields
from gateway.store.store import SqliteStore, Store
from gateway.usage.rows import UsageBook
from gateway.usage.sums import BYS, DAY, HOUR, KEY_HOURS, Span, Sums, begins, sums

START = 20_000 * DAY


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    yield from opened(tmp_path / "stack.db")


def opened(file: Path) -> Iterator[Store]:
    file.touch()
    store = SqliteStore(file)
    store.migrate()
    yield store
    store.close()


def row(number: int, **more: Any) -> dict[str, Any]:
    """A row in the hour of its number."""
    it = {"id": f"r{number}", "at": START + number * HOUR, "request_id": f"q{number}", "key_id": "k", "model": "m"}
    end = {"engine": "e", "outcome": "finished", "tokens_in": 3, "tokens_out": 4, "duration_ms": 100, "ttft_ms": 10}
    return it | end | more


DAYS = Span("day", tuple(range(START, START + 4 * DAY, DAY)), DAY)
MONTH = Span("month", (begins("month", START),), DAY)


def span(hours: int = 100, part: int = HOUR) -> Span:
    return Span("hour", tuple(range(START, START + hours * HOUR, HOUR)), part)


def told(store: Store, by: Any = "all", *, of: Span | None = None) -> list[tuple[str, int, int, int, int]]:
    found = Sums(store).top(by, of or span(), 10)
    return [(it.name, it.requests, it.finished, it.failed, it.tokens_out) for it in found]


def everything(store: Store) -> list[tuple[Any, ...]]:
    with store.read() as connection:
        return sorted(tuple(it) for it in connection.execute(sa.select(sums)))


def test_rows_are_added_up_by_each_name_with_the_most_requests_first(store: Store) -> None:
    UsageBook(store).add(
        [row(1), row(2, model="n"), row(3), row(4, key_id=None, engine=None, outcome="engine_timeout")]
    )
    assert told(store) == [("", 4, 3, 1, 16)]
    assert told(store, "model") == [("m", 3, 2, 1, 12), ("n", 1, 1, 0, 4)]
    assert told(store, "engine") == [("e", 3, 3, 0, 12), ("", 1, 0, 1, 4)]


def test_a_client_that_left_is_no_failure(store: Store) -> None:
    UsageBook(store).add([row(1, outcome="client_left")])
    assert told(store) == [("", 1, 0, 0, 4)]


def test_an_amended_row_stays_with_the_owner_that_the_key_had(store: Store) -> None:
    entry, _ = Keybook(store).create(NewKeyFields(name="one", owner="Ann"))
    it = row(1, key_id=entry.id, owner="Ann")
    UsageBook(store).add([it])
    Keybook(store).change(entry.id, KeyFields(owner="Bob"))
    UsageBook(store).add([it | {"outcome": "client_left", "tokens_out": 1, "amends": True}])
    assert told(store, "owner") == [("Ann", 1, 0, 0, 1)]


def test_owners_are_those_that_the_keys_had_then(store: Store) -> None:
    entry, _ = Keybook(store).create(NewKeyFields(name="one", owner="Ann"))
    other, _ = Keybook(store).create(NewKeyFields(name="two", owner="Ann"))
    UsageBook(store).add([row(1, key_id=entry.id), row(2, key_id=other.id), row(3)])
    Keybook(store).change(entry.id, KeyFields(owner="Bob"))
    assert told(store, "owner") == [("Ann", 2, 2, 0, 8), ("", 1, 1, 0, 4)]
    assert [it.label for it in Sums(store).top("key", span(), 10) if it.name == entry.id] == ["one"]


def test_there_may_be_more_names_than_a_query_can_hold(store: Store) -> None:
    count = 33_000
    UsageBook(store).add([row(1, id=f"r{number}", key_id=f"k{number}") for number in range(count)])
    assert len(Sums(store).top("key", span(), 100_000)) == count
    assert len(Sums(store).top("key", span(), 100)) == 100


def test_what_is_saved_twice_counts_once(store: Store) -> None:
    book = UsageBook(store)
    book.add([row(1), row(1), row(2)])
    book.add([row(2), row(3)])
    assert told(store) == [("", 3, 3, 0, 12)]


def test_an_amended_row_counts_as_amended(store: Store) -> None:
    book = UsageBook(store)
    book.add([row(1), row(1, outcome="client_left", tokens_out=1, amends=True), row(2)])
    book.add([row(2, outcome="client_left", tokens_out=2, amends=True)])
    assert told(store) == [("", 2, 0, 0, 3)]


def test_the_parts_of_a_span_are_told_apart(store: Store) -> None:
    UsageBook(store).add([row(0), row(5), row(6, duration_ms=300, ttft_ms=None)])
    found = Sums(store).over_time("all", span(part=6 * HOUR), [""])[""]
    assert [(at - START) // HOUR for at in sorted(found)] == [0, 6]
    assert [(it.requests, it.mean_ms, it.mean_ttft_ms) for _, it in sorted(found.items())] == [
        (2, 100, 10),
        (1, 300, None),
    ]
    assert found[START].longest_ms == 100


def test_hours_days_and_months_agree(store: Store) -> None:
    UsageBook(store).add([row(number) for number in range(60)])
    for longer in (DAYS, MONTH):
        assert [told(store, by, of=longer) for by in BYS] == [told(store, by) for by in BYS]


def test_deleted_rows_leave_with_their_hours(store: Store) -> None:
    book = UsageBook(store)
    book.add([row(number) for number in range(48)])
    assert sum(book.prune(START + 24 * HOUR)) == 24
    assert told(store) == [("", 24, 24, 0, 96)]
    assert told(store, of=DAYS) == [("", 24, 24, 0, 96)]


def test_the_hours_of_keys_are_given_up_before_their_days(store: Store) -> None:
    """By now the rows of these tests are old."""
    book = UsageBook(store)
    book.add([row(1)])
    assert KEY_HOURS > DAY
    list(book.prune(START))
    assert told(store, "key") == []
    assert told(store, "key", of=DAYS) == [("k", 1, 1, 0, 4)]
    assert told(store) == [("", 1, 1, 0, 4)]


def test_a_restored_backup_has_the_same_sums(store: Store, tmp_path: Path) -> None:
    UsageBook(store).add([row(number, model=f"m{number % 3}") for number in range(60)])
    file = tmp_path / "backup"
    with file.open("wb") as out:
        backup.write(store, out)
    before = everything(store)
    for other in opened(tmp_path / "other.db"):
        UsageBook(other).add([row(1000)])
        backup.restore(other, file)
        assert everything(other) == before
