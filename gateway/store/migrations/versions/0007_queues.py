"""Slots and queues of engines for gateways on several hosts (gateway/admission/postgres.py): PostgreSQL only.

Its functions are made by 0013.
"""

from alembic import op

revision = "0007"
down_revision = "0006"

# Owners and the clock are those of 0004. Moments here are the database's own, in seconds since 1970: all are short.
TABLES = """
CREATE TABLE queue_engines (
    name text PRIMARY KEY,
    slots integer NOT NULL DEFAULT 1,
    virtual double precision NOT NULL DEFAULT 0,
    seconds double precision NOT NULL DEFAULT 0,
    seen integer NOT NULL DEFAULT 0,
    horizon double precision NOT NULL DEFAULT 0
);
CREATE TABLE queue_keys (
    engine text,
    key_id text,
    finish double precision NOT NULL DEFAULT 0,
    line double precision NOT NULL DEFAULT 0,
    PRIMARY KEY (engine, key_id)
);
CREATE TABLE queue_places (
    id bigserial PRIMARY KEY,
    engine text NOT NULL,
    owner text NOT NULL REFERENCES account_owners ON DELETE CASCADE,
    key_id text NOT NULL,
    held boolean NOT NULL,
    tag double precision NOT NULL,
    cost double precision NOT NULL,
    since double precision NOT NULL,
    until double precision NOT NULL
);
CREATE INDEX queue_places_engine ON queue_places (engine);
CREATE INDEX queue_places_owner ON queue_places (owner);
CREATE TABLE queue_promises (
    id bigserial PRIMARY KEY,
    engine text NOT NULL,
    mark text NOT NULL,
    due double precision NOT NULL
);
CREATE INDEX queue_promises_due ON queue_promises (engine, due);
CREATE INDEX queue_promises_mark ON queue_promises (engine, mark);
"""


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.get_bind().exec_driver_sql(TABLES)
