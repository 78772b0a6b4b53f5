"""The functions in PostgreSQL, as gateway/store/functions.sql has them: PostgreSQL only.

A change of that file needs a migration like this one, which makes the functions again. Older functions that have no
place there stay in databases of before 0013: gateways of the version before may still run. They are `stack_admit`, and
`stack_leave` with three arguments.
"""

from pathlib import Path

from alembic import op

from gateway import store

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.get_bind().exec_driver_sql(Path(store.__file__).with_name("functions.sql").read_text())
