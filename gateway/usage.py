"""Usage: who used what: a row for each request that an engine was asked, whatever its end. recorder.py writes them."""

import csv
import datetime as dt
import io
from collections.abc import Collection, Iterator
from typing import Any, Literal, get_args

import sqlalchemy as sa

from gateway.errors import BadRequest
from gateway.keybook import deleted_keys, keys
from gateway.store import Store, metadata

DAY = 86_400_000  # milliseconds
LISTED = "STACK_API_KEYS"  # the name of the keys of that setting
STEP = 1000  # rows that are deleted at a time: for some milliseconds nobody else can write to SQLite

usage = sa.Table(
    "usage",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("at", sa.BigInteger, nullable=False),  # when it came, in milliseconds since 1970
    sa.Column("request_id", sa.Text),
    sa.Column("key_id", sa.Text),
    sa.Column("kind", sa.Text),
    sa.Column("model", sa.Text),  # the route's name
    sa.Column("arm", sa.Text),  # of a split
    sa.Column("engine", sa.Text),  # the last one asked
    sa.Column("stream", sa.Boolean),
    sa.Column("outcome", sa.Text),  # finished, client_left, …: exchange.Ending.outcome; or worker_lost
    sa.Column("status", sa.BigInteger),  # HTTP's
    sa.Column("tokens_in", sa.BigInteger),
    sa.Column("tokens_out", sa.BigInteger),
    sa.Column("cached", sa.BigInteger),  # of tokens_in
    sa.Column("exact", sa.Boolean),  # the engine's own count; else what the gateway saw, and its estimate of the prompt
    sa.Column("queued_ms", sa.BigInteger),  # it waited for a slot
    sa.Column("ttft_ms", sa.BigInteger),  # of a stream
    sa.Column("duration_ms", sa.BigInteger),
    sa.Column("attempts", sa.BigInteger),
    sa.Column("resumes", sa.BigInteger),
    sa.Index("usage_at", "at"),
    sa.Index("usage_key", "key_id", "at"),
)

Dimension = Literal["key", "model", "day", "engine", "arm", "outcome"]
DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)
SUMS = ("requests", "finished", "tokens_in", "tokens_out", "cached", "counted")

_NAMES = tuple(usage.c.keys())
_SKIP = " ON CONFLICT (id) DO NOTHING"
_REPLACE = " ON CONFLICT (id) DO UPDATE SET " + ", ".join(f"{name} = excluded.{name}" for name in _NAMES[1:])
_GROUPS: dict[str, sa.ColumnElement[Any]] = {
    "key": usage.c.key_id,
    "day": usage.c.at // sa.literal_column(str(DAY), sa.BigInteger),
}


def check_prunable(before: int) -> None:
    """Raises BadRequest where rows of before that moment, in milliseconds, still count: those of this month in UTC."""
    month = dt.datetime.now(dt.UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    if before > month.timestamp() * 1000:
        raise BadRequest(
            f"This month's quotas are counted from its usage: 'before' can be {month.date()} (UTC) at most.",
            param="before",
        )


def dimensions(words: str) -> list[Dimension]:
    """'key,model' → what to sum up by. Raises ValueError with a sentence."""
    asked = [word.strip() for word in words.split(",")]
    found = [name for word in asked for name in DIMENSIONS if name == word]
    if len(found) < len(asked) or len(set(found)) < len(found):
        raise ValueError(f"'{words[:100]}': name some of {', '.join(DIMENSIONS)}, with commas between them")
    return found


def to_csv(by: Collection[Dimension], rows: list[dict[str, Any]]) -> str:
    """What UsageBook.totals returned, with a line of names above it."""
    text = io.StringIO()
    lines = csv.DictWriter(text, [*names(by), *SUMS], lineterminator="\n")
    lines.writeheader()
    lines.writerows(rows)
    return text.getvalue()


def names(by: Collection[Dimension]) -> list[str]:
    """What a row of UsageBook.totals has before its SUMS."""
    return [name for group in by for name in ((group, "name") if group == "key" else (group,))]


class UsageBook:
    """The rows in a store. Times are milliseconds since 1970. Raises StoreUnavailable. `listed` are the ids of keys of
    STACK_API_KEYS, of which the store doesn't know."""

    def __init__(self, store: Store, listed: Collection[str] = ()) -> None:
        self._store = store
        self._listed = listed

    def add(self, records: list[dict[str, Any]]) -> None:
        """Add those that aren't there yet; a record that `amends` takes the place of one that is. What is missing in
        one is null, and what it has too much is left out."""
        with self._store.write() as connection:
            mark = "%s" if connection.dialect.name == "postgresql" else "?"
            # Past SQLAlchemy, whose statements of many rows take 18 µs more of each.
            insert = f"INSERT INTO usage ({', '.join(_NAMES)}) VALUES ({', '.join([mark] * len(_NAMES))})"  # noqa: S608
            rows: dict[str, list[tuple[Any, ...]]] = {_SKIP: [], _REPLACE: []}
            for it in records:
                rows[_REPLACE if it.get("amends") else _SKIP].append(tuple(map(it.get, _NAMES)))
            for ending, some in rows.items():
                if some:
                    connection.exec_driver_sql(insert + ending, some)

    def spent(self, key_id: str, since: int, until: int) -> int:
        """The tokens, in and out, of a key's requests that came from `since` on and before `until`."""
        tokens = sa.func.coalesce(usage.c.tokens_in, 0) + sa.func.coalesce(usage.c.tokens_out, 0)
        query = sa.select(sa.func.sum(tokens)).where(usage.c.key_id == key_id, usage.c.at >= since, usage.c.at < until)
        with self._store.read() as connection:
            return int(connection.execute(query).scalar_one() or 0)

    def totals(
        self, by: Collection[Dimension], since: int, until: int, key_id: str | None = None, model: str | None = None
    ) -> list[dict[str, Any]]:
        """The sums of the requests that came in that time, for each value of `by`, in their order: with SUMS, and the
        key's `name` where they are by key. `counted` are those whose tokens aren't the engine's own count. Raises
        BadRequest for an id that no key has or had."""
        columns: dict[str, sa.ColumnElement[Any]] = {}
        for name in by:
            columns[name] = _GROUPS[name] if name in _GROUPS else usage.c[name]
        groups = list(columns.values())
        if "key" in by:
            columns["name"] = sa.func.coalesce(sa.func.max(keys.c.name), sa.func.max(deleted_keys.c.name))
        sums = [
            sa.func.count(),
            sa.func.count().filter(usage.c.outcome == "finished"),
            *(sa.func.coalesce(sa.func.sum(usage.c[name]), 0) for name in ("tokens_in", "tokens_out", "cached")),
            sa.func.count().filter(usage.c.exact.is_not(True)),
        ]
        columns |= dict(zip(SUMS, sums, strict=True))
        query = sa.select(*(column.label(name) for name, column in columns.items()))
        whose = usage.outerjoin(keys, keys.c.id == usage.c.key_id)
        whose = whose.outerjoin(deleted_keys, deleted_keys.c.id == usage.c.key_id)
        query = query.select_from(whose).group_by(*groups)
        query = query.where(usage.c.at >= since, usage.c.at < until).order_by(*groups)
        if key_id is not None:
            query = query.where(usage.c.key_id == key_id)
        if model is not None:
            query = query.where(usage.c.model == model)
        with self._store.read() as connection:
            if key_id is not None and not self._knows(connection, key_id):
                raise BadRequest(
                    f"No key has or had the id '{key_id[:64]}'. `stack keys list` shows the ids; names are none.",
                    param="key",
                )
            found = [dict(row) for row in connection.execute(query).mappings()]
        for row in found:
            if "key" in by and row["key"] in self._listed:
                row["name"] = LISTED
            row |= {name: int(row[name]) for name in SUMS}  # PostgreSQL's sums are decimals
            if "day" in by:
                row["day"] = dt.datetime.fromtimestamp(row["day"] * DAY // 1000, dt.UTC).date().isoformat()
        return found

    def _knows(self, connection: sa.Connection, key_id: str) -> bool:
        columns = keys.c.id, deleted_keys.c.id, usage.c.key_id
        seen = (connection.execute(sa.select(it).where(it == key_id).limit(1)).first() for it in columns)
        return key_id in self._listed or any(seen)

    def prune(self, before: int) -> Iterator[int]:
        """Delete the rows of requests that came before, in small steps: how many, after each. See `check_prunable`."""
        oldest = sa.select(usage.c.id).where(usage.c.at < before).limit(STEP)
        deleted = STEP
        while deleted == STEP:
            with self._store.write() as connection:
                deleted = connection.execute(sa.delete(usage).where(usage.c.id.in_(oldest))).rowcount
            yield deleted
