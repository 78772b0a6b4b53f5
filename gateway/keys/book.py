"""Keybook: create, read, change and delete stored keys, for the `stack` command and the admin API.

Times are whole seconds since 1970 in UTC. A key is identified by its id. Of its secrets (two for a while after a
rotation), only digests are stored.
"""

import time
from collections.abc import Collection
from typing import Any, NamedTuple

import sqlalchemy as sa

from gateway.errors import BadRequest, NotFound
from gateway.keys import rows, secret
from gateway.keys.entries import Changes, Contents, Entry, KeyFields, NewKeyFields
from gateway.keys.limit_fields import LimitFields
from gateway.keys.tables import default_limits, deleted_keys, keys, secrets
from gateway.responses.tables import forget
from gateway.store import revisions
from gateway.store.store import Store


class Page(NamedTuple):
    """One page of keys, and the ids of those on it whose rows are damaged. `last`: if there are more keys, the creation
    time and id of the page's last one."""

    keys: list[Entry]
    damaged: list[str]
    last: tuple[int, str] | None


class Keybook:
    """The keys in a store. Raises NotFound for an unknown id, and StoreUnavailable. `listed` are the ids of the keys in
    STACK_API_KEYS, which are not in the store."""

    def __init__(self, store: Store, listed: Collection[str] = ()) -> None:
        self._store = store
        self._listed = listed

    def create(self, asked: NewKeyFields) -> tuple[Entry, str]:
        """Create a key. Returns the key and its secret, which cannot be read again. If the key tells its users apart,
        their secret is the entry's `signing`."""
        now = int(time.time())
        key_id = secret.new_id()
        text = secret.new_secret(key_id)
        row = asked.model_dump(exclude={"users"}) | {
            "id": key_id,
            "created_at": now,
            "limits": asked.limits.model_dump(exclude_none=True),
            "user_limits": asked.user_limits.model_dump(exclude_none=True),
            "signing": secret.new_signing_secret() if asked.users else None,
        }
        with self._store.change("key", key_id) as connection:
            connection.execute(keys.insert().values(row))
            connection.execute(secrets.insert().values(_secret_row(key_id, text, now)))
        return self.show(key_id), text

    def page(self, search: str, before: tuple[int, str] | None, most: int) -> Page:
        """Return one page of the keys that match `search`, the newest first.

        A key matches if its id begins with `search`, or if its name or owner contains it, in capital or small letters.
        A page has at most `most` keys. `before` is `last` of the previous page."""
        where: list[sa.ColumnElement[bool]] = []
        if search:
            contains = (self._store.contains(it, search) for it in (keys.c.name, keys.c.owner))
            where.append(sa.or_(keys.c.id.startswith(search, autoescape=True), *contains))
        if before is not None:
            where.append(sa.tuple_(keys.c.created_at, keys.c.id) < sa.tuple_(*map(sa.literal, before)))
        query = sa.select(keys.c.created_at, keys.c.id).where(*where)
        query = query.order_by(keys.c.created_at.desc(), keys.c.id.desc()).limit(most + 1)
        with self._store.read() as connection:
            read = [(at, key_id) for at, key_id in connection.execute(query)]
            ids = [key_id for _, key_id in read[:most]]
            found = rows.read_keys(connection, keys.c.id.in_(ids))[0]
        sound = {it.id for it in found}
        return Page(found[::-1], [it for it in ids if it not in sound], read[most - 1] if len(read) > most else None)

    def called(self, ids: Collection[str]) -> dict[str, tuple[str, str]]:
        """Return the name and owner of each of those keys that is in the store, by id."""
        query = sa.select(keys.c.id, keys.c.name, keys.c.owner).where(keys.c.id.in_(ids))
        with self._store.read() as connection:
            return {it.id: (it.name, it.owner) for it in connection.execute(query)}

    def list(self) -> list[Entry]:
        """Return all keys whose rows are valid, the oldest first."""
        with self._store.read() as connection:
            return rows.read_keys(connection)[0]

    def show(self, key_id: str) -> Entry:
        with self._store.read() as connection:
            return self._entry(connection, key_id)

    def name(self, key_id: str) -> str:
        """Return the key's name, or its id if its row is invalid."""
        with self._store.read() as connection:
            return self._name(connection, key_id)

    def change(self, key_id: str, asked: KeyFields) -> Entry:
        """Change the fields that `asked` sets; limits are set one by one. Disabling a key ends the old secrets of a
        rotation: after it is enabled again, only its newest secret works."""
        values = asked.model_dump(include=asked.model_fields_set)
        with self._store.change("key", key_id) as connection:
            there = self._entry(connection, key_id)
            for name in values.keys() & {"limits", "user_limits"}:
                limits = getattr(there, name).model_copy(update=getattr(asked, name).model_dump(exclude_unset=True))
                values[name] = limits.model_dump(exclude_none=True)
            if values:
                connection.execute(keys.update().where(keys.c.id == key_id).values(values))
            if values.get("disabled"):
                connection.execute(
                    secrets.delete().where(secrets.c.key_id == key_id, secrets.c.expires_at.is_not(None))
                )
        return self.show(key_id)

    def tell_users_apart(self, key_id: str, *, on: bool) -> Entry:
        """Create a new secret for the users of a key, which replaces the one there is; it is the entry's `signing`. Or,
        if not `on`, do not tell them apart any more."""
        with self._store.change("key", key_id) as connection:
            self._entry(connection, key_id)
            signing = secret.new_signing_secret() if on else None
            connection.execute(keys.update().where(keys.c.id == key_id).values(signing=signing))
        return self.show(key_id)

    def rotate(self, key_id: str, grace: int) -> tuple[Entry, str]:
        """Create a new secret. The existing ones work for `grace` more seconds. Those of a disabled key end at once,
        because they may be stolen. Raises BadRequest for an expired key."""
        now = int(time.time())
        text = secret.new_secret(key_id)
        with self._store.change("key", key_id) as connection:
            entry = self._entry(connection, key_id)
            _check_not_over(entry)
            if entry.disabled:
                grace = 0
            ends = sa.func.coalesce(secrets.c.expires_at, now + grace)
            earlier = sa.case((ends < now + grace, ends), else_=now + grace)
            connection.execute(secrets.update().where(secrets.c.key_id == key_id).values(expires_at=earlier))
            connection.execute(secrets.delete().where(secrets.c.expires_at <= now))
            connection.execute(secrets.insert().values(_secret_row(key_id, text, now)))
        return self.show(key_id), text

    def delete(self, key_id: str) -> None:
        """Delete a key permanently, with its stored responses. Its usage stays, under its id and name."""
        with self._store.change("key", key_id) as connection:
            name = self._name(connection, key_id)
            if connection.execute(keys.delete().where(keys.c.id == key_id)).rowcount:
                connection.execute(deleted_keys.insert().values(id=key_id, name=name))
                forget(connection, key_id)

    def defaults(self) -> LimitFields:
        """Return the limits of keys that have none of their own. None: the setting applies."""
        with self._store.read() as connection:
            return rows.read_defaults(connection)

    def set_defaults(self, asked: LimitFields) -> LimitFields:
        """Change the default limits that `asked` sets."""
        values = asked.model_dump(include=asked.model_fields_set)
        with self._store.change("limits") as connection:
            connection.execute(default_limits.delete().where(default_limits.c.name.in_(values)))
            given = [{"name": name, "value": value} for name, value in values.items() if value is not None]
            if given:
                connection.execute(default_limits.insert().values(given))
            return rows.read_defaults(connection)

    def contents(self) -> Contents:
        """Return everything that a worker keeps in memory."""
        with self._store.read() as connection:
            number = revisions.number(connection)
            found, broken = rows.read_secrets(connection)
            defaults = rows.read_defaults(connection, broken)
            return Contents(number, defaults, found, rows.damages(broken), revisions.mark(connection, number))

    def changes(self, since: int, mark: int | None) -> Changes | None:
        """Return what has changed since the revision `since`, which had that mark. None: everything has to be read,
        because too much has changed, or this is not known."""
        with self._store.read() as connection:
            noted = revisions.since(connection, since, mark)
            if noted is None:
                return None
            ids = frozenset(it.key_id for it in noted if it.of == "key")
            found, broken = rows.read_secrets(connection, ids) if ids else ({}, {})
            defaults = rows.read_defaults(connection, broken)
            last, prompts = noted[-1], any(it.of == "prompts" for it in noted)
            return Changes(last.number, last.mark, ids, defaults, found, rows.damages(broken), prompts)

    def _name(self, connection: sa.Connection, key_id: str) -> str:
        _, broken = rows.read_keys(connection, keys.c.id == key_id)
        return key_id if broken else self._entry(connection, key_id).name

    def _entry(self, connection: sa.Connection, key_id: str) -> Entry:
        found, broken = rows.read_keys(connection, keys.c.id == key_id)
        if found:
            return found[0]
        for which, why in broken.items():
            raise BadRequest(
                f"The store's data of {which} is damaged ({why}). Delete the key, and then create a new one."
            )
        if key_id in self._listed:
            raise NotFound(
                f"'{key_id}' is a key of the setting STACK_API_KEYS, and is not in the store. To change or remove "
                "this key, edit that setting."
            )
        name = connection.execute(sa.select(deleted_keys.c.name).where(deleted_keys.c.id == key_id)).scalar()
        if name is not None:
            raise NotFound(f"The key '{key_id}' ({name}) was deleted.")
        raise unknown(key_id)


def _check_not_over(entry: Entry) -> None:
    if entry.expires_at is not None and entry.expires_at <= time.time():
        raise BadRequest(
            f"The key '{entry.id}' has expired, so none of its secrets works. First set a later expiry: `expires_at`, "
            "or `stack keys set --expires`."
        )


def _secret_row(key_id: str, text: str, now: int) -> dict[str, Any]:
    return {"digest": secret.digest(text.encode()).hex(), "key_id": key_id, "created_at": now, "expires_at": None}


def exists(connection: sa.Connection, key_id: str) -> bool:
    return connection.execute(sa.select(keys.c.id).where(keys.c.id == key_id)).first() is not None


def unknown(key_id: str) -> NotFound:
    return NotFound(f"There is no key '{key_id[:64]}'. `stack keys list` lists all keys.")
