"""Rows: read keys from the store, and check each row.

An invalid row must not make the other keys unusable. It is left out, and what is wrong with it is returned.
"""

from collections.abc import Collection
from typing import Any

import orjson
import sqlalchemy as sa
from pydantic import BaseModel, ValidationError

from gateway import validation
from gateway.keys.entries import DEFAULT, KEY, SECRET, Entry, KeptDefault, KeptSecret
from gateway.keys.limit_fields import LimitFields
from gateway.keys.tables import default_limits, keys, secrets

_Times = dict[str, list[dict[str, int | None]]]  # of a key's secrets: when each was created, and when it ends


def read_keys(connection: sa.Connection, *where: sa.ColumnElement[bool]) -> tuple[list[Entry], dict[str, str]]:
    """Return the same as `_bare`, with the times of the keys' secrets."""
    times: _Times = {}
    theirs = [secrets.c.key_id.in_(sa.select(keys.c.id).where(*where))] if where else []
    query = sa.select(secrets.c.key_id, secrets.c.created_at, secrets.c.expires_at).where(*theirs)
    for row in connection.execute(query.order_by(secrets.c.created_at)):
        times.setdefault(row.key_id, []).append({"created_at": row.created_at, "expires_at": row.expires_at})
    found, broken = _bare(connection, times, *where)
    return list(found.values()), broken


def read_secrets(
    connection: sa.Connection, ids: Collection[str] | None = None
) -> tuple[dict[bytes, tuple[Entry, int | None]], dict[str, str]]:
    """Return the valid secrets of these keys, or of all keys: each secret's digest, its key, and when it ends. Also
    return what is wrong with each invalid row."""
    by_id, broken = _bare(connection, {}, *([] if ids is None else [keys.c.id.in_(ids)]))
    query = sa.select(secrets) if ids is None else sa.select(secrets).where(secrets.c.key_id.in_(ids))
    names = secrets.columns.keys()
    found = {}
    for row in connection.execute(query):
        try:
            it = KeptSecret.model_validate(dict(zip(names, row, strict=True)))
        except ValidationError as exc:
            broken[f"{SECRET}{row.key_id}"] = _told(exc, KeptSecret)
            continue
        if it.key_id in by_id:
            found[bytes.fromhex(it.digest)] = by_id[it.key_id], it.expires_at
    return found, broken


def read_defaults(connection: sa.Connection, broken: dict[str, str] | None = None) -> LimitFields:
    """Return the default limits. An invalid one is noted in `broken`, and the setting applies in its place."""
    found = {}
    for row in connection.execute(sa.select(default_limits)).mappings():
        try:
            it = KeptDefault.model_validate(dict(row))
        except ValidationError as exc:
            if broken is not None:
                broken[f"{DEFAULT}{str(row['name'])[:40]}"] = _told(exc, KeptDefault)
        else:
            found[it.name] = it.value
    return LimitFields.model_validate(found)


def damages(broken: dict[str, str]) -> tuple[str, ...]:
    return tuple(f"{name} ({why})" for name, why in broken.items())


def _bare(
    connection: sa.Connection, times: _Times, *where: sa.ColumnElement[bool]
) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return the keys whose rows are valid by their ids, and for each other key what is wrong with its row. An invalid
    row must not make the other keys unusable, so values are converted only here."""
    found, broken = {}, {}
    query = sa.select(*(_raw(it) for it in keys.columns)).where(*where).order_by(keys.c.created_at, keys.c.id)
    names = keys.columns.keys()
    for row in connection.execute(query):
        values = dict(zip(names, row, strict=True))
        key_id = values["id"]
        try:
            found[key_id] = _kept(values, times.get(key_id, []))
        except ValidationError as exc:
            broken[f"{KEY}{key_id}"] = _told(exc, Entry)
        except ValueError:
            broken[f"{KEY}{key_id}"] = "damaged JSON"
    return found, broken


def _raw(column: sa.Column[Any]) -> sa.ColumnElement[Any]:
    """Return the column without conversion: JSON as text, and SQLite's own values for true and false."""
    if isinstance(column.type, sa.JSON):
        return sa.cast(column, sa.Text).label(column.name)
    return sa.type_coerce(column, sa.types.NULLTYPE).label(column.name)


def _kept(values: dict[str, Any], times: list[dict[str, int | None]]) -> Entry:
    """Return a checked key. Raises ValueError."""
    for name in ("models", "limits", "user_limits", "labels"):
        values[name] = None if values[name] is None else orjson.loads(values[name])
    if values["disabled"] in (0, 1):
        values["disabled"] = bool(values["disabled"])
    return Entry.model_validate(values | {"secrets": times}, strict=True)


def _told(exc: ValidationError, model: type[BaseModel]) -> str:
    return ": ".join(filter(None, validation.first(exc, model)))
