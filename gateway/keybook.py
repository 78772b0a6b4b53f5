"""Keybook: the keys as they are kept. Whoever hands them out (the `stack` command, the admin API) comes here.

Times are whole seconds since 1970 in UTC. A key is made, looked at, changed and deleted by its id. Of its secrets, two
for a while after a rotation, only digests are kept.
"""

import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple

import sqlalchemy as sa
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from gateway import secret
from gateway.complaints import NO_CONTROLS
from gateway.errors import BadRequest, NotFound
from gateway.store import Store, metadata


def _to_come(moment: int) -> int:
    if moment <= time.time():
        raise ValueError("that moment is over; to end a key now, disable it")
    return moment


def _visible(name: str) -> str:
    if not name.strip():
        raise ValueError("it must not be empty, nor only spaces")
    return name


Text = Annotated[str, Field(max_length=200, pattern=NO_CONTROLS)]
Name = Annotated[Text, Field(min_length=1), AfterValidator(_visible)]
Count = Annotated[int, Field(ge=1, le=10**15)] | None
YEAR = 366 * 86_400
LAST = 253_402_300_799  # the last second of the year 9999, beyond which no calendar goes

keys = sa.Table(
    "keys",
    metadata,
    sa.Column("id", sa.String(16), primary_key=True),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("owner", sa.String(200), nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("expires_at", sa.BigInteger),
    sa.Column("disabled", sa.Boolean, nullable=False),
    sa.Column("models", sa.JSON(none_as_null=True)),  # null: all
    sa.Column("limits", sa.JSON, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("labels", sa.JSON, nullable=False),
)
secrets = sa.Table(
    "secrets",
    metadata,
    sa.Column("digest", sa.String(64), primary_key=True),
    sa.Column("key_id", sa.String(16), sa.ForeignKey("keys.id", ondelete="CASCADE"), nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("expires_at", sa.BigInteger),  # null: as long as its key
)

# Whose usage it was, of keys that are no more.
deleted_keys = sa.Table(
    "deleted_keys",
    metadata,
    sa.Column("id", sa.String(16), primary_key=True),
    sa.Column("name", sa.String(200), nullable=False),
)

# Those of keys that have none of their own; what isn't here is a setting.
default_limits = sa.Table(
    "default_limits",
    metadata,
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("value", sa.BigInteger, nullable=False),
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a key may use; None is no limit. Per minute: token buckets. Quotas: calendar days and months in UTC."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None


class LimitFields(BaseModel):
    """The same as somebody may ask for it."""

    model_config = ConfigDict(extra="forbid")

    requests_per_minute: Count = None
    tokens_per_minute: Count = None
    concurrent: Count = None
    tokens_per_day: Count = None
    tokens_per_month: Count = None

    def over(self, defaults: Limits) -> Limits:
        """These, and where there is none that of `defaults`."""
        return replace(defaults, **self.model_dump(exclude_none=True))


class KeyFields(BaseModel):
    """What may be said of a key. In a change, what is left out stays as it is."""

    model_config = ConfigDict(extra="forbid")

    name: Name = ""
    owner: Text = ""
    expires_at: Annotated[int, Field(ge=0, le=LAST), AfterValidator(_to_come)] | None = Field(
        None, description="Seconds since 1970, a moment to come; null: never."
    )
    models: Annotated[list[Annotated[Text, Field(min_length=1)]], Field(min_length=1, max_length=200)] | None = Field(
        None, description="Model names it may use, as callers write them; null: all."
    )
    limits: LimitFields = LimitFields()
    priority: Annotated[int, Field(ge=1, le=100)] = Field(1, description="Its weight in the queue of a busy engine.")
    labels: Annotated[dict[Annotated[Text, Field(min_length=1)], Text], Field(max_length=50)] = {}
    disabled: bool = False


class NewKeyFields(KeyFields):
    """What may be said of a key that is to be made."""

    name: Name


class Entry(BaseModel):
    """A key as it is kept."""

    id: str
    name: str
    owner: str
    created_at: int
    expires_at: int | None
    disabled: bool
    models: list[str] | None
    limits: LimitFields
    priority: int
    labels: dict[str, str]
    secrets: list[dict[str, int | None]] = Field([], description="When each was made, and when it ends.")

    @property
    def state(self) -> str:
        """In a word: active, disabled or expired."""
        if self.disabled:
            return "disabled"
        return "expired" if self.expires_at is not None and self.expires_at <= time.time() else "active"


class Contents(NamedTuple):
    """Everything that a worker holds in memory: each secret's digest, its key, and when it ends. `number` is the
    revision of the store that this is of."""

    number: int
    defaults: LimitFields
    secrets: dict[bytes, tuple[Entry, int | None]]


class Keybook:
    """The keys in a store. Raises NotFound for an id that is none, StoreUnavailable. `listed` are the ids of those of
    STACK_API_KEYS, of which it knows no more."""

    def __init__(self, store: Store, listed: Collection[str] = ()) -> None:
        self._store = store
        self._listed = listed

    def create(self, asked: NewKeyFields) -> tuple[Entry, str]:
        """Make a key; returns it and its secret, which can't be had again."""
        now = int(time.time())
        key_id = secret.new_id()
        text = secret.new_secret(key_id)
        row = asked.model_dump() | {"id": key_id, "created_at": now, "limits": _without_nulls(asked.limits)}
        with self._store.change() as connection:
            connection.execute(keys.insert().values(row))
            connection.execute(secrets.insert().values(_secret_row(key_id, text, now)))
        return self.show(key_id), text

    def list(self) -> list[Entry]:
        """All, the oldest first."""
        with self._store.read() as connection:
            return _entries(connection)

    def show(self, key_id: str) -> Entry:
        with self._store.read() as connection:
            return self._entry(connection, key_id)

    def change(self, key_id: str, asked: KeyFields) -> Entry:
        """Change what `asked` says explicitly; limits one by one."""
        values = asked.model_dump(include=asked.model_fields_set)
        with self._store.change() as connection:
            there = self._entry(connection, key_id)
            if "limits" in values:
                limits = there.limits.model_copy(update=asked.limits.model_dump(exclude_unset=True))
                values["limits"] = _without_nulls(limits)
            if values:
                connection.execute(keys.update().where(keys.c.id == key_id).values(values))
        return self.show(key_id)

    def rotate(self, key_id: str, grace: int) -> tuple[Entry, str]:
        """Make a new secret. The ones there are work for `grace` more seconds. Of a disabled key as well: one that
        somebody else has got hold of is in force again only when its old secret is none. Raises BadRequest for a key
        that has expired."""
        now = int(time.time())
        text = secret.new_secret(key_id)
        with self._store.change() as connection:
            _check_not_over(self._entry(connection, key_id))
            ends = sa.func.coalesce(secrets.c.expires_at, now + grace)
            earlier = sa.case((ends < now + grace, ends), else_=now + grace)
            connection.execute(secrets.update().where(secrets.c.key_id == key_id).values(expires_at=earlier))
            connection.execute(secrets.delete().where(secrets.c.expires_at <= now))
            connection.execute(secrets.insert().values(_secret_row(key_id, text, now)))
        return self.show(key_id), text

    def delete(self, key_id: str) -> None:
        """For good. What it used stays in the usage, under its id and name."""
        with self._store.change() as connection:
            name = self._entry(connection, key_id).name
            if connection.execute(keys.delete().where(keys.c.id == key_id)).rowcount:
                connection.execute(deleted_keys.insert().values(id=key_id, name=name))

    def defaults(self) -> LimitFields:
        """The limits of keys that have none of their own; None: as the settings say."""
        with self._store.read() as connection:
            return _defaults(connection)

    def set_defaults(self, asked: LimitFields) -> LimitFields:
        """Change those that `asked` says explicitly."""
        values = asked.model_dump(include=asked.model_fields_set)
        with self._store.change() as connection:
            connection.execute(default_limits.delete().where(default_limits.c.name.in_(values)))
            rows = [{"name": name, "value": value} for name, value in values.items() if value is not None]
            if rows:
                connection.execute(default_limits.insert().values(rows))
            return _defaults(connection)

    def contents(self) -> Contents:
        with self._store.read() as connection:
            number = self._store.number_in(connection)
            by_id = {entry.id: entry for entry in _entries(connection)}
            rows = connection.execute(sa.select(secrets.c.digest, secrets.c.key_id, secrets.c.expires_at))
            found = {bytes.fromhex(it.digest): (by_id[it.key_id], it.expires_at) for it in rows}
            return Contents(number, _defaults(connection), found)

    def _entry(self, connection: sa.Connection, key_id: str) -> Entry:
        if found := _entries(connection, keys.c.id == key_id):
            return found[0]
        if key_id in self._listed:
            raise NotFound(f"'{key_id}' is one of STACK_API_KEYS: it is not kept in the store, but in that setting.")
        name = connection.execute(sa.select(deleted_keys.c.name).where(deleted_keys.c.id == key_id)).scalar()
        if name is not None:
            raise NotFound(f"The key '{key_id}' ({name}) was deleted.")
        raise unknown(key_id)


def _defaults(connection: sa.Connection) -> LimitFields:
    rows = connection.execute(sa.select(default_limits))
    return LimitFields.model_validate({it.name: it.value for it in rows})


def _entries(connection: sa.Connection, *where: sa.ColumnElement[bool]) -> list[Entry]:
    by_key: dict[str, list[dict[str, int | None]]] = {}
    columns = (secrets.c.key_id, secrets.c.created_at, secrets.c.expires_at)
    for row in connection.execute(sa.select(*columns).order_by(secrets.c.created_at)):
        by_key.setdefault(row.key_id, []).append({"created_at": row.created_at, "expires_at": row.expires_at})
    rows = connection.execute(sa.select(keys).where(*where).order_by(keys.c.created_at, keys.c.id)).mappings()
    return [Entry.model_validate({**row, "secrets": by_key.get(row["id"], [])}) for row in rows]


def _check_not_over(entry: Entry) -> None:
    if entry.expires_at is not None and entry.expires_at <= time.time():
        raise BadRequest(
            f"The key '{entry.id}' has expired, and no secret of it works. Give it a later end first: expires_at, "
            "`stack keys set --expires`."
        )


def _secret_row(key_id: str, text: str, now: int) -> dict[str, Any]:
    return {"digest": secret.digest(text.encode()).hex(), "key_id": key_id, "created_at": now, "expires_at": None}


def _without_nulls(limits: LimitFields) -> dict[str, int]:
    return limits.model_dump(exclude_none=True)


def exists(connection: sa.Connection, key_id: str) -> bool:
    return connection.execute(sa.select(keys.c.id).where(keys.c.id == key_id)).first() is not None


def unknown(key_id: str) -> NotFound:
    return NotFound(f"There is no key '{key_id[:64]}'. `stack keys list` shows those there are.")
