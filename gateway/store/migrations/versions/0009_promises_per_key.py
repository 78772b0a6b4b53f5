"""A key's promises are a line of its own, as in gateway/admission/memory.py: PostgreSQL only."""

from alembic import op

revision = "0009"
down_revision = "0008"

WEIGHT = "ALTER TABLE queue_keys ADD COLUMN weight double precision NOT NULL DEFAULT 1"


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.get_bind().exec_driver_sql(WEIGHT)
