"""Add what an engine has loaded (gateway/admission/swaps.py), and the functions that use it: PostgreSQL only."""

from pathlib import Path

from alembic import op

from gateway import store

revision = "0017"
down_revision = "0016"

COLUMNS = """
ALTER TABLE queue_engines ADD COLUMN loads jsonb, ADD COLUMN target bigint NOT NULL DEFAULT 0;
ALTER TABLE queue_places ADD COLUMN model bigint NOT NULL DEFAULT 0;
"""


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.get_bind().exec_driver_sql(COLUMNS)
        op.get_bind().exec_driver_sql(Path(store.__file__).with_name("functions.sql").read_text())
