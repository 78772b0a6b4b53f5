"""Add the stored responses of the Responses API, and the number of bytes of each key's responses."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    op.create_table(
        "responses",
        sa.Column("key_id", sa.String(16), primary_key=True),
        sa.Column("id", sa.String(160), primary_key=True),
        sa.Column("previous_id", sa.String(160)),
        sa.Column("kept_at", sa.BigInteger, nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("input", sa.LargeBinary, nullable=False),
        sa.Column("response", sa.LargeBinary, nullable=False),
    )
    op.create_index("responses_by_age", "responses", ["kept_at"])
    op.create_table(
        "response_totals",
        sa.Column("key_id", sa.String(16), primary_key=True),
        sa.Column("bytes", sa.BigInteger, nullable=False),
    )
