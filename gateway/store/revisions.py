"""Revisions: number each change of what workers keep in memory (keys, prompts), and note what it changed.

A worker compares the number with its own. If the store is the one that it knows, and few changes have followed, the
worker reads only what these changed.
"""

import secrets
import time
from collections.abc import Sequence
from typing import Any, Literal

import sqlalchemy as sa

Of = Literal["key", "limits", "prompts", "all"]
KEPT = 1000  # revisions whose changes are known

metadata = sa.MetaData()

# One row: the number of the last change.
revision = sa.Table("revision", metadata, sa.Column("number", sa.BigInteger, nullable=False))

# What each of the last revisions changed. The mark is random, so that a revision of another database has another one.
changes = sa.Table(
    "changes",
    metadata,
    sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("mark", sa.BigInteger, nullable=False),
    sa.Column("of", sa.String(8), nullable=False),
    sa.Column("key_id", sa.String(16)),
)


def begin(connection: sa.Connection, of: Of, key_id: str | None) -> None:
    """Begin the next revision. This is the first statement of a transaction, because it takes a lock: each change then
    sees the result of the one before."""
    grown = sa.update(revision).values(number=revision.c.number + 1).returning(revision.c.number)
    _note(connection, connection.execute(grown).scalar_one(), of, key_id)


def begin_anew(connection: sa.Connection) -> None:
    """Begin a revision whose number no worker has seen before."""
    number = time.time_ns()
    connection.execute(sa.update(revision).values(number=number))
    _note(connection, number, "all", None)


def _note(connection: sa.Connection, number: int, of: Of, key_id: str | None) -> None:
    # A later row is of a future that was lost, for example when the database was restored.
    connection.execute(sa.delete(changes).where((changes.c.number <= number - KEPT) | (changes.c.number >= number)))
    row = {"number": number, "mark": secrets.randbits(62), "of": of, "key_id": key_id}
    connection.execute(sa.insert(changes).values(row))


def number(connection: sa.Connection) -> int:
    """Return the revision as of this transaction."""
    return int(connection.execute(sa.select(revision.c.number)).scalar_one())


def mark(connection: sa.Connection, of_number: int) -> int | None:
    """Return the mark of a revision. None: an older version of the gateway made it, and it has none."""
    found: int | None = connection.execute(sa.select(changes.c.mark).where(changes.c.number == of_number)).scalar()
    return found


def since(connection: sa.Connection, last: int, its_mark: int | None) -> Sequence[sa.Row[Any]] | None:
    """Return the changes that followed the revision `last`, which had that mark, the oldest first. None: they are not
    known, because they are too many, or of an older version of the gateway, or this is another database; or one of them
    has changed everything."""
    query = sa.select(changes).where(changes.c.number >= last).order_by(changes.c.number).limit(KEPT + 1)
    found = connection.execute(query).all()
    now = number(connection)
    if len(found) < 2 or found[0].mark != its_mark or found[-1].number != now or len(found) != now - last + 1:
        return None
    return None if any(it.of == "all" for it in found[1:]) else found[1:]
