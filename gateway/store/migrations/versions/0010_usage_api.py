"""Add the API that a request's caller used to its usage row."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.add_column("usage", sa.Column("api", sa.Text))
