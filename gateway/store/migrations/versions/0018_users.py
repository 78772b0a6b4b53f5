"""The users of a key: its signing secret and their limits, their usage, their stored responses, and their turns in the
queues. With PostgreSQL the functions are made again (see 0013)."""

from pathlib import Path

import sqlalchemy as sa
from alembic import op

from gateway import store

revision = "0018"
down_revision = "0017"


def upgrade() -> None:
    op.add_column("keys", sa.Column("signing", sa.String(200)))
    op.add_column("keys", sa.Column("user_limits", sa.JSON(none_as_null=True)))
    op.add_column("responses", sa.Column("user_id", sa.String(16), nullable=False, server_default=""))
    op.add_column("usage", sa.Column("user_id", sa.Text))
    given = sa.text("user_id IS NOT NULL")
    op.create_index("usage_user", "usage", ["user_id", "at"], sqlite_where=given, postgresql_where=given)
    if op.get_bind().dialect.name == "postgresql":
        op.add_column("queue_places", sa.Column("user_id", sa.Text, nullable=False, server_default=""))
        op.add_column("queue_places", sa.Column("turn", sa.Double, nullable=False, server_default="0"))
        op.get_bind().exec_driver_sql(Path(store.__file__).with_name("functions.sql").read_text())
