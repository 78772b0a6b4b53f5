"""Tables: the stored responses of each key, and how many bytes they take."""

from collections.abc import Collection

import sqlalchemy as sa

from gateway.store.revisions import metadata

MAX_ID = 160  # characters of a response's id

responses = sa.Table(
    "responses",
    metadata,
    sa.Column("key_id", sa.String(16), primary_key=True),
    sa.Column("id", sa.String(MAX_ID), primary_key=True),
    sa.Column("user_id", sa.String(16), nullable=False, server_default=""),  # of the key; empty: it tells none apart
    sa.Column("previous_id", sa.String(MAX_ID)),
    sa.Column("kept_at", sa.BigInteger, nullable=False),  # milliseconds since 1970
    sa.Column("size", sa.BigInteger, nullable=False),  # bytes of JSON, of both values below
    sa.Column("bytes", sa.BigInteger, nullable=False),  # the same, compressed
    sa.Column("input", sa.LargeBinary, nullable=False),  # its own input items: a JSON list, compressed
    sa.Column("response", sa.LargeBinary, nullable=False),  # the response object: JSON, compressed
)
sa.Index("responses_by_age", responses.c.kept_at)

# The sum of `bytes` over the responses of each key. Every change of `responses` changes it in the same transaction.
totals = sa.Table(
    "response_totals",
    metadata,
    sa.Column("key_id", sa.String(16), primary_key=True),
    sa.Column("bytes", sa.BigInteger, nullable=False),
)


def remove(connection: sa.Connection, rows: Collection[tuple[str, str]]) -> int:
    """Delete the responses with these key ids and ids, and return how many there were."""
    keys = sorted({key_id for key_id, _ in rows})
    # Every transaction locks the totals before the responses, so that two of them never wait for each other.
    locked = sa.select(totals).where(totals.c.key_id.in_(keys)).order_by(totals.c.key_id).with_for_update()
    connection.execute(locked).all()
    mine = sa.tuple_(responses.c.key_id, responses.c.id).in_(rows)
    gone = connection.execute(responses.delete().where(mine).returning(responses.c.key_id, responses.c.bytes)).all()
    for key_id in keys:
        freed = sum(size for owner, size in gone if owner == key_id)
        connection.execute(totals.update().where(totals.c.key_id == key_id).values(bytes=totals.c.bytes - freed))
    return len(gone)


def forget(connection: sa.Connection, key_id: str) -> None:
    """Delete all responses of a key."""
    connection.execute(totals.delete().where(totals.c.key_id == key_id))
    connection.execute(responses.delete().where(responses.c.key_id == key_id))


def forget_all(connection: sa.Connection) -> None:
    """Delete the responses of all keys."""
    connection.execute(totals.delete())
    connection.execute(responses.delete())
