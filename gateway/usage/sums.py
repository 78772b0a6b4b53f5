"""Sums: keep the usage of each hour, day and month added up, in all and by key, owner, model and engine.

A look at a month therefore does not read a million rows. A row's sums are written in the transaction that writes the
row. An owner is the one that the key had when the request came. Times are milliseconds since 1970, in UTC.
"""

import datetime as dt
import operator
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import sqlalchemy as sa

from gateway.keys import secret
from gateway.keys.tables import deleted_keys, keys
from gateway.store.revisions import metadata
from gateway.store.store import Store

HOUR, DAY = 3_600_000, 86_400_000  # milliseconds
KEY_HOURS = 3 * DAY  # for how long the hours of single keys and users are kept; their days are kept like all others
Step = Literal["hour", "day", "month"]
By = Literal["all", "key", "owner", "model", "engine", "user"]
STEPS: tuple[Step, ...] = get_args(Step)
BYS: tuple[By, ...] = get_args(By)

_COUNTS = "requests", "finished", "failed", "tokens_in", "tokens_out", "duration_ms", "ttfts", "ttft_ms", "longest_ms"
_LONGEST = _COUNTS.index("longest_ms")
_PLACE = "step", "by", "at", "name"
_Place = tuple[Step, By, int, str]
_Found = dict[_Place, list[int]]

# In SQLite its rows are in the order of the primary key, so that those of one time are together.
sums = sa.Table(
    "usage_sums",
    metadata,
    sa.Column("step", sa.Text, primary_key=True),
    sa.Column("by", sa.Text, primary_key=True),  # what the name is of
    sa.Column("at", sa.BigInteger, primary_key=True, autoincrement=False),  # when the hour, day or month begins
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("requests", sa.BigInteger, nullable=False),
    sa.Column("finished", sa.BigInteger, nullable=False),
    sa.Column("failed", sa.BigInteger, nullable=False),  # neither finished nor left by their client
    sa.Column("tokens_in", sa.BigInteger, nullable=False),
    sa.Column("tokens_out", sa.BigInteger, nullable=False),
    sa.Column("duration_ms", sa.BigInteger, nullable=False),  # of all requests together
    sa.Column("ttfts", sa.BigInteger, nullable=False),  # requests that had a first token
    sa.Column("ttft_ms", sa.BigInteger, nullable=False),  # of those together
    sa.Column("longest_ms", sa.BigInteger, nullable=False),
    sqlite_with_rowid=False,
)
_NAMES = ", ".join(f'"{it}"' for it in (*_PLACE, *_COUNTS))
_UPSERT = (
    f"INSERT INTO usage_sums ({_NAMES}) VALUES ({{marks}}) "  # noqa: S608  names of ours
    'ON CONFLICT ("step", "by", "at", "name") DO UPDATE SET '
    + ", ".join(f"{it} = usage_sums.{it} + excluded.{it}" for it in _COUNTS if it != "longest_ms")
    + ", longest_ms = CASE WHEN excluded.longest_ms > usage_sums.longest_ms"
    " THEN excluded.longest_ms ELSE usage_sums.longest_ms END"
)


def _added(name: str) -> sa.ColumnElement[int]:
    """That count of all rows together. PostgreSQL's sums would be decimals."""
    added = sa.func.max(sums.c[name]) if name == "longest_ms" else sa.func.sum(sums.c[name])
    return sa.cast(added, sa.BigInteger).label(name)


_COLUMNS = [_added(it) for it in _COUNTS]


def begins(step: Step, at: int) -> int:
    """Return when the hour, day or month of that moment began."""
    if step == "month":
        return _month(at // DAY)
    return at // HOUR * HOUR if step == "hour" else at // DAY * DAY


@lru_cache(maxsize=512)
def _month(day: int) -> int:
    first = dt.datetime.fromtimestamp(day * DAY // 1000, dt.UTC).replace(day=1)
    return int(first.timestamp()) * 1000


class Total(NamedTuple):
    """The usage of one name, or of all, in a span of time. Durations are in milliseconds."""

    name: str
    label: str = ""  # what a person calls it
    requests: int = 0  # from here on in the order of _COUNTS
    finished: int = 0
    failed: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    duration_ms: int = 0
    ttfts: int = 0
    ttft_ms: int = 0
    longest_ms: int = 0

    @property
    def mean_ms(self) -> float | None:
        """The mean duration of a request; None if there was no request."""
        return self.duration_ms / self.requests if self.requests else None

    @property
    def mean_ttft_ms(self) -> float | None:
        """The mean time to the first token; None if no request had one."""
        return self.ttft_ms / self.ttfts if self.ttfts else None


@dataclass(frozen=True, slots=True)
class Span:
    """The hours, days or months that begin at these moments. For plots they are put together in parts of `part`."""

    step: Step
    begins: tuple[int, ...]
    part: int

    def parts(self) -> list[int]:
        """Return when each part begins."""
        return sorted({it // self.part * self.part for it in self.begins})


def add(connection: sa.Connection, records: Collection[Mapping[str, Any]], sign: int = 1) -> None:
    """Add those usage rows to the sums, or take them away again with a `sign` of -1. A row counts for its `owner`. A
    row without that field counts for the owner that the key has now."""
    found = _by_day_and_month(_by_hour(connection, _alike(records, sign)))
    if found:
        mark = "%s" if connection.dialect.name == "postgresql" else "?"
        statement = _UPSERT.format(marks=", ".join([mark] * len((*_PLACE, *_COUNTS))))
        # In one order everywhere, so that two writers never wait for each other.
        connection.exec_driver_sql(statement, [(*place, *values) for place, values in sorted(found.items())])


_Alike = dict[tuple[int, str, str, str, str, str | None], list[int]]


def _alike(records: Iterable[Mapping[str, Any]], sign: int) -> _Alike:
    """The counts of the rows that differ in nothing else: by hour, key, model, engine, user and owner."""
    found: _Alike = {}
    for it in records:
        names = (it.get(name) or "" for name in ("key_id", "model", "engine", "user_id"))
        of = it["at"] // HOUR * HOUR, *names, it.get("owner")
        counts = found.get(of)
        if counts is None:
            counts = found[of] = [0] * len(_COUNTS)
        outcome, ttft, duration = it.get("outcome"), it.get("ttft_ms"), it.get("duration_ms") or 0
        counts[0] += sign
        if outcome == "finished":
            counts[1] += sign
        elif outcome != "client_left":
            counts[2] += sign
        counts[3] += sign * (it.get("tokens_in") or 0)
        counts[4] += sign * (it.get("tokens_out") or 0)
        counts[5] += sign * duration
        if ttft is not None:
            counts[6] += sign
            counts[7] += sign * ttft
        if sign > 0 and duration > counts[_LONGEST]:
            counts[_LONGEST] = duration
    return found


def _by_hour(connection: sa.Connection, alike: _Alike) -> _Found:
    owners = _owners(connection, {key for _, key, _, _, _, owner in alike if owner is None})
    found: _Found = {}
    for (at, key, model, engine, user, told), counts in alike.items():
        owner = owners.get(key, "") if told is None else told
        for by, name in zip(BYS, ("", key, owner, model, engine, user), strict=True):
            if by != "user" or user:
                _merge(found, ("hour", by, at, f"{key}/{user}" if by == "user" else name), counts)
    return found


def _by_day_and_month(hours: _Found) -> _Found:
    """The sums of hours, together with those of their days and months."""
    found = dict(hours)
    for (_, by, at, name), counts in hours.items():
        _merge(found, ("day", by, begins("day", at), name), counts)
        _merge(found, ("month", by, begins("month", at), name), counts)
    return found


def _merge(found: _Found, place: _Place, counts: list[int]) -> None:
    sofar = found.get(place)
    if sofar is None:
        found[place] = counts
    else:
        longest = max(sofar[_LONGEST], counts[_LONGEST])
        found[place] = [*map(operator.add, sofar, counts)]
        found[place][_LONGEST] = longest


def _owners(connection: sa.Connection, ids: set[str]) -> dict[str, str]:
    found = connection.execute(sa.select(keys.c.id, keys.c.owner).where(keys.c.id.in_(ids)))
    return {it.id: it.owner for it in found}


def forget(connection: sa.Connection, before: int, now: int) -> None:
    """Delete the sums of hours, days and months that were over at that moment, and old hours of single keys."""
    for step in STEPS:
        connection.execute(sa.delete(sums).where(sums.c.step == step, sums.c.at < begins(step, before)))
    hours = sums.c.step == "hour", sums.c.by.in_(("key", "user")), sums.c.at < now - KEY_HOURS
    connection.execute(sa.delete(sums).where(*hours))


class Sums:
    """Read the sums in a store. Raises StoreUnavailable."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def top(self, by: By, span: Span, most: int, only: str | None = None) -> list[Total]:
        """Return the totals of that span by name: at most `most`, the one with the most requests first. With `only`,
        return only that name."""
        where = _within(by, span)
        # To rank 100,000 names by one number takes a third of the time.
        which = sums.c.name == only if only is not None else sums.c.name.in_(_first(where, most, len(span.begins) == 1))
        query = sa.select(sums.c.name, *_COLUMNS).where(*where, which)
        query = query.group_by(sums.c.name).order_by(sa.desc("requests"), sums.c.name)
        with self._store.read() as connection:
            if by in ("key", "user"):
                named = connection.execute(_named(query))
                return [Total(name, _label(name, called), *counts) for name, *counts, called in named]
            return [Total(name, name, *counts) for name, *counts in connection.execute(query)]

    def over_time(self, by: By, span: Span, names: Collection[str]) -> dict[str, dict[int, Total]]:
        """Return the totals of each part of the span that has any, by name and by the part's beginning."""
        part = (sums.c.at // sa.literal_column(str(span.part), sa.BigInteger)).label("part")
        query = sa.select(sums.c.name, part, *_COLUMNS)
        query = query.where(*_within(by, span), sums.c.name.in_(names)).group_by(sums.c.name, part)
        found: dict[str, dict[int, Total]] = {it: {} for it in names}
        with self._store.read() as connection:
            for name, at, *counts in connection.execute(query):
                found[name][int(at) * span.part] = Total(name, name, *counts)
        return found


def _within(by: By, span: Span) -> list[sa.ColumnElement[bool]]:
    return [sums.c.step == span.step, sums.c.by == by, sums.c.at.in_(span.begins)]


def _first(where: list[sa.ColumnElement[bool]], most: int, alone: bool) -> sa.Select[str]:
    """The names with the most requests. `alone`: each has one row."""
    query = sa.select(sums.c.name).where(*where).limit(most)
    if alone:
        return query.order_by(sums.c.requests.desc(), sums.c.name)
    return query.group_by(sums.c.name).order_by(sa.func.sum(sums.c.requests).desc(), sums.c.name)


def _named(query: sa.Select[Any]) -> sa.Select[Any]:
    """The same rows, each with the name of its key, or NULL. The key's id is the beginning of the row's name."""
    found = query.subquery()
    key = sa.func.substr(found.c.name, 1, secret.ID)
    named = found.outerjoin(keys, keys.c.id == key).outerjoin(deleted_keys, deleted_keys.c.id == key)
    called = sa.func.coalesce(keys.c.name, deleted_keys.c.name)
    return sa.select(found, called).select_from(named).order_by(found.c.requests.desc(), found.c.name)


def _label(name: str, called: str | None) -> str:
    """Return what a person calls a key or user. A user is called by the key's name and the pseudonym."""
    key, slash, user = name.partition("/")
    return (called or (user and key)) + slash + user
