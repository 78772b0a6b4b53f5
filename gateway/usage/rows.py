"""Usage: hold one row for each request that reached an engine, however it ended. usage/recorder.py writes the rows."""

import csv
import datetime as dt
import io
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Annotated, Any, Literal, get_args

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field

from gateway.errors import BadRequest
from gateway.exchange import MOST
from gateway.keys.entries import LAST
from gateway.keys.tables import deleted_keys, keys
from gateway.store.revisions import metadata
from gateway.store.store import Store
from gateway.usage import sums

DAY = 86_400_000  # milliseconds
_FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # what a formula begins with
LISTED = "STACK_API_KEYS"  # the name of the keys in that setting
STEP = 1000  # rows that are deleted at a time: meanwhile no other process can write to SQLite

usage = sa.Table(
    "usage",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("at", sa.BigInteger, nullable=False),  # when an engine was first asked, in milliseconds since 1970
    sa.Column("request_id", sa.Text),
    sa.Column("key_id", sa.Text),
    sa.Column("user_id", sa.Text),  # the pseudonym of the key's user; null: the key does not tell its users apart
    sa.Column("kind", sa.Text),
    sa.Column("api", sa.Text),  # the API that its caller used; null: a row from the time when each kind had one API
    sa.Column("model", sa.Text),  # the route's name
    sa.Column("arm", sa.Text),  # the arm of a split
    sa.Column("engine", sa.Text),  # the last engine asked
    sa.Column("stream", sa.Boolean),
    sa.Column("outcome", sa.Text),  # finished, client_left, …: exchange.Ending.outcome; or worker_lost
    sa.Column("status", sa.BigInteger),  # the HTTP status
    sa.Column("tokens_in", sa.BigInteger),
    sa.Column("tokens_out", sa.BigInteger),
    sa.Column("cached", sa.BigInteger),  # the part of tokens_in that came from the engine's cache
    sa.Column("documents", sa.BigInteger),  # documents to rank; null: not a rerank request
    sa.Column("audio_ms", sa.BigInteger),  # of a sound that was transcribed; null: none, or nobody said
    sa.Column("characters", sa.BigInteger),  # of a text that was spoken; null: none
    # Whether the tokens are the engine's count; otherwise the gateway counted and estimated them
    sa.Column("exact", sa.Boolean),
    sa.Column("queued_ms", sa.BigInteger),  # how long the request waited for a slot
    sa.Column("ttft_ms", sa.BigInteger),  # only for streams
    sa.Column("duration_ms", sa.BigInteger),
    sa.Column("attempts", sa.BigInteger),
    sa.Column("resumes", sa.BigInteger),
    sa.Index("usage_at", "at"),
    sa.Index("usage_key", "key_id", "at"),
    sa.Index(
        "usage_user",
        "user_id",
        "at",
        sqlite_where=sa.text("user_id IS NOT NULL"),
        postgresql_where=sa.text("user_id IS NOT NULL"),
    ),
    sa.Index("usage_request", "request_id"),
)

Number = Annotated[int, Field(ge=0, le=MOST)] | None
Word = Annotated[str, Field(max_length=1000, pattern=r"^[^\x00]*$")] | None


class UsageRow(BaseModel):
    """The values of one row. Their sums must fit into 64 bits."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: Annotated[str, Field(min_length=1, max_length=1000, pattern=r"^[^\x00]*$")]
    at: Annotated[int, Field(ge=0, le=LAST * 1000)]
    request_id: Word
    key_id: Word
    user_id: Word = None  # a backup of older versions has none
    kind: Word
    api: Word = None  # a backup of older versions has none
    model: Word
    arm: Word
    engine: Word
    stream: bool | None
    outcome: Word
    status: Number
    tokens_in: Number
    tokens_out: Number
    cached: Number
    documents: Number = None  # a backup of older versions has none
    audio_ms: Number = None
    characters: Number = None
    exact: bool | None
    queued_ms: Number
    ttft_ms: Number
    duration_ms: Number
    attempts: Number
    resumes: Number


Dimension = Literal["key", "model", "day", "engine", "arm", "outcome", "api", "user"]
DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)
SUMS = ("requests", "finished", "tokens_in", "tokens_out", "cached", "documents", "audio_ms", "characters", "counted")

_NAMES = tuple(usage.c.keys())
_SKIP = " ON CONFLICT (id) DO NOTHING"
_REPLACE = " ON CONFLICT (id) DO UPDATE SET " + ", ".join(f"{name} = excluded.{name}" for name in _NAMES[1:])
_TOKENS = sa.func.coalesce(usage.c.tokens_in, 0) + sa.func.coalesce(usage.c.tokens_out, 0)
_GROUPS: dict[str, sa.ColumnElement[Any]] = {
    "key": usage.c.key_id,
    "user": usage.c.user_id,
    "day": usage.c.at // sa.literal_column(str(DAY), sa.BigInteger),
}


def check_prunable(before: int) -> None:
    """Check that rows from before this moment (milliseconds since 1970) may be deleted. Raises BadRequest if they are
    of the current month (UTC), because quotas are counted from them."""
    month = dt.datetime.now(dt.UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    if before > month.timestamp() * 1000:
        raise BadRequest(
            f"'before' can be at most {month.date()} (UTC), because the quotas of this month are counted from the "
            "usage since then.",
            param="before",
        )


def dimensions(words: str) -> list[Dimension]:
    """Read the columns by which usage is summed up: 'key,model'. Raises ValueError with a message."""
    asked = [word.strip() for word in words.split(",")]
    found = [name for word in asked for name in DIMENSIONS if name == word]
    if len(found) < len(asked) or len(set(found)) < len(found):
        raise ValueError(f"'{words[:100]}': give one or several of {', '.join(DIMENSIONS)}, separated by commas")
    return found


def to_csv(by: Collection[Dimension], rows: list[dict[str, Any]]) -> str:
    """Write the result of UsageBook.totals as CSV, with a line of names first. A text that a spreadsheet would read as
    a formula gets an apostrophe in front."""
    text = io.StringIO()
    lines = csv.DictWriter(text, [*names(by), *SUMS], lineterminator="\n")
    lines.writeheader()
    lines.writerows({name: inert(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def inert(value: object) -> object:
    """Return the value as a spreadsheet may have it: a text that it would take for a formula gets an apostrophe."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULAS) else value


def names(by: Collection[Dimension]) -> list[str]:
    """Return the names of a totals row's columns before its SUMS."""
    return [name for group in by for name in ((group, "name") if group == "key" else (group,))]


class UsageBook:
    """Read and write the rows in a store. Times are milliseconds since 1970. `listed` are the ids of the keys in
    STACK_API_KEYS, which the store does not know. Raises StoreUnavailable.
    """

    def __init__(self, store: Store, listed: Collection[str] = ()) -> None:
        self._store = store
        self._listed = listed

    def add(self, records: list[dict[str, Any]]) -> None:
        """Add the records that the store does not have yet. A record with `amends` replaces an existing one. A missing
        column is null, and an unknown field is left out. The sums of each record's hour and day are updated too."""
        with self._store.write() as connection:
            mark = "%s" if connection.dialect.name == "postgresql" else "?"
            _add_up(connection, mark, records)
            # Without SQLAlchemy's statements, which take 18 µs more for each row.
            insert = f"INSERT INTO usage ({', '.join(_NAMES)}) VALUES ({', '.join([mark] * len(_NAMES))})"  # noqa: S608
            rows: dict[str, list[tuple[Any, ...]]] = {_SKIP: [], _REPLACE: []}
            for it in records:
                rows[_REPLACE if it.get("amends") else _SKIP].append(tuple(map(it.get, _NAMES)))
            for ending, some in rows.items():
                if some:
                    connection.exec_driver_sql(insert + ending, some)

    def spent(self, account: str, since: int, until: int) -> int:
        """Return the tokens, in and out, of the requests of a key, or of one of its users (keys.known.Key.account),
        that came from `since` on and before `until`."""
        return self.spent_since(account, [since], until)[0]

    def spent_since(self, account: str, moments: Sequence[int], until: int) -> list[int]:
        """Return the same as `spent` for each of several beginnings, all as of one moment."""
        key_id, _, user_id = account.partition("/")
        query = sa.select(sa.func.sum(_TOKENS)).where(usage.c.key_id == key_id, usage.c.at < until)
        if user_id:
            query = query.where(usage.c.user_id == user_id)
        with self._store.read() as connection:
            found = [connection.execute(query.where(usage.c.at >= since)).scalar_one() for since in moments]
        return [int(it or 0) for it in found]

    def tokens(self, row: str) -> int:
        """Return the tokens, in and out, of the row with this id; 0 if there is none."""
        query = sa.select(_TOKENS).where(usage.c.id == row)
        with self._store.read() as connection:
            return int(connection.execute(query).scalar_one_or_none() or 0)

    def totals(
        self,
        by: Collection[Dimension],
        since: int,
        until: int,
        key_id: str | None = None,
        model: str | None = None,
        user_id: str | None = None,
    ) -> list[dict[str, Any]]:
        """Return the sums of the requests that came in that time, grouped and ordered by `by`. Each row has SUMS, and
        the key's `name` if it is grouped by key. `counted` is the number of requests whose tokens are not the engine's
        own count. Raises BadRequest for an id that no key has or had."""
        columns: dict[str, sa.ColumnElement[Any]] = {it: _GROUPS[it] if it in _GROUPS else usage.c[it] for it in by}
        groups = list(columns.values())
        if "key" in by:
            columns["name"] = sa.func.coalesce(sa.func.max(keys.c.name), sa.func.max(deleted_keys.c.name))
        sums = [
            sa.func.count(),
            sa.func.count().filter(usage.c.outcome == "finished"),
            *(sa.func.coalesce(sa.func.sum(usage.c[name]), 0) for name in SUMS[2:-1]),
            sa.func.count().filter(usage.c.exact.is_not(True)),
        ]
        columns |= dict(zip(SUMS, sums, strict=True))
        query = sa.select(*(column.label(name) for name, column in columns.items()))
        whose = usage.outerjoin(keys, keys.c.id == usage.c.key_id)
        whose = whose.outerjoin(deleted_keys, deleted_keys.c.id == usage.c.key_id)
        query = query.select_from(whose).group_by(*groups).order_by(*groups)
        only = (usage.c.key_id, key_id), (usage.c.model, model), (usage.c.user_id, user_id)
        where = [column == value for column, value in only if value is not None]
        query = query.where(usage.c.at >= since, usage.c.at < until, *where)
        with self._store.read() as connection:
            if key_id is not None and not self._knows(connection, key_id):
                raise BadRequest(
                    f"No key has or had the id '{key_id[:64]}'. `stack keys list` shows the ids. A name is not an id.",
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
        """Delete the rows of requests that came before this moment, in small steps. Yields the number of deleted rows
        after each step. See `check_prunable`."""
        oldest = sa.select(usage.c.id).where(usage.c.at < before).limit(STEP)
        with self._store.write() as connection:
            sums.forget(connection, before, time.time_ns() // 1_000_000)
        deleted = STEP
        while deleted == STEP:
            with self._store.write() as connection:
                deleted = connection.execute(sa.delete(usage).where(usage.c.id.in_(oldest))).rowcount
            yield deleted

    def of_request(self, request_id: str, row_id: str | None = None) -> dict[str, Any] | None:
        """Return the newest row with this request id; None if there is none. Callers may use an id for several
        requests: with `row_id`, it is the row with that id."""
        wanted = usage.c.request_id == request_id if row_id is None else usage.c.id == row_id
        query = sa.select(usage).where(wanted).order_by(usage.c.at.desc()).limit(1)
        with self._store.read() as connection:
            row = connection.execute(query).mappings().first()
        return None if row is None else dict(row)


def _add_up(connection: sa.Connection, mark: str, records: list[dict[str, Any]]) -> None:
    """Change the sums as `records` will change the rows. What a killed process has saved is saved again: it is there
    already, and counts once."""
    ids = tuple({it["id"] for it in records})
    select = f"SELECT {', '.join(_NAMES)} FROM usage WHERE id IN ({', '.join([mark] * len(ids))})"  # noqa: S608
    there = {it["id"]: dict(it) for it in connection.exec_driver_sql(select, ids).mappings()} if ids else {}
    newest: dict[str, dict[str, Any]] = {}
    for it in records:
        if it.get("amends") or not (it["id"] in newest or it["id"] in there):
            newest[it["id"]] = it
    # A row does not have the owner, but the record that amends it began as the row did.
    old = [there[it] | {"owner": newest[it].get("owner")} for it in newest if it in there]
    sums.add(connection, old, sign=-1)
    sums.add(connection, list(newest.values()))
