"""Add what changed with each revision, so that workers read only that."""

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"


def upgrade() -> None:
    table = op.create_table(
        "changes",
        sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("mark", sa.BigInteger, nullable=False),
        sa.Column("of", sa.String(8), nullable=False),
        sa.Column("key_id", sa.String(16)),
    )
    number = op.get_bind().execute(sa.text("SELECT number FROM revision")).scalar_one()
    op.bulk_insert(table, [{"number": number, "mark": secrets.randbits(62), "of": "all", "key_id": None}])
