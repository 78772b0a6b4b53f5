"""Add the number of documents that a request had ranked to its usage row."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    op.add_column("usage", sa.Column("documents", sa.BigInteger))
