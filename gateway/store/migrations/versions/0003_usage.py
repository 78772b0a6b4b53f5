"""Add usage: a row for each request for which an engine was asked."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "usage",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("request_id", sa.Text),
        sa.Column("key_id", sa.Text),
        sa.Column("kind", sa.Text),
        sa.Column("model", sa.Text),
        sa.Column("arm", sa.Text),
        sa.Column("engine", sa.Text),
        sa.Column("stream", sa.Boolean),
        sa.Column("outcome", sa.Text),
        sa.Column("status", sa.BigInteger),
        sa.Column("tokens_in", sa.BigInteger),
        sa.Column("tokens_out", sa.BigInteger),
        sa.Column("cached", sa.BigInteger),
        sa.Column("exact", sa.Boolean),
        sa.Column("queued_ms", sa.BigInteger),
        sa.Column("ttft_ms", sa.BigInteger),
        sa.Column("duration_ms", sa.BigInteger),
        sa.Column("attempts", sa.BigInteger),
        sa.Column("resumes", sa.BigInteger),
    )
    op.create_index("usage_at", "usage", ["at"])
    op.create_index("usage_key", "usage", ["key_id", "at"])
