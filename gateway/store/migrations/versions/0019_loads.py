"""Make the functions again (see 0013), with PostgreSQL: a request that is not let in is told a time that counts the
loads of models. One function takes more arguments for that."""

from pathlib import Path

from alembic import op

from gateway import store

revision = "0019"
down_revision = "0018"

BEFORE = """DROP FUNCTION IF EXISTS stack_enter(text, integer, text, double precision, double precision, text, text,
    integer, double precision, integer, boolean, bigint)"""


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.get_bind().exec_driver_sql(BEFORE)
        op.get_bind().exec_driver_sql(Path(store.__file__).with_name("functions.sql").read_text())
