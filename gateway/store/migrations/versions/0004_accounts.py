"""Accounts of limits for gateways on several hosts (gateway/limits/postgres.py): PostgreSQL only.

Its functions are made by 0013.
"""

from alembic import op

revision = "0004"
down_revision = "0003"

# Times are seconds of the replicas' own clock, see stack_beat. `seen` is when an account was last charged.
TABLES = """
CREATE TABLE account_clock (now double precision NOT NULL, wall timestamptz NOT NULL);
INSERT INTO account_clock VALUES (0, clock_timestamp());
CREATE TABLE account_owners (id text PRIMARY KEY, beat double precision NOT NULL);
CREATE TABLE accounts (
    key_id text PRIMARY KEY,
    seen double precision NOT NULL,
    requests_full double precision NOT NULL,
    tokens_full double precision NOT NULL,
    day bigint NOT NULL,
    day_tokens bigint NOT NULL,
    month bigint NOT NULL,
    month_tokens bigint NOT NULL
);
CREATE TABLE account_leases (
    key_id text,
    owner text REFERENCES account_owners ON DELETE CASCADE,
    active integer NOT NULL,
    PRIMARY KEY (key_id, owner)
);
"""


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.get_bind().exec_driver_sql(TABLES)
