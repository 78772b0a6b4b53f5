"""The length of a sound that a request had transcribed, and of a text that it had spoken, in its usage."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    op.add_column("usage", sa.Column("audio_ms", sa.BigInteger))
    op.add_column("usage", sa.Column("characters", sa.BigInteger))
