"""Make the functions again (see 0013), with PostgreSQL: an account that is days ahead of the clock begins again."""

from pathlib import Path

from alembic import op

from gateway import store

revision = "0020"
down_revision = "0019"


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.get_bind().exec_driver_sql(Path(store.__file__).with_name("functions.sql").read_text())
