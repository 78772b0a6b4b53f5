"""Sums of the usage by hour, day and month; indexes of keys by age, secrets by key, and usage by request."""

import datetime as dt
from collections.abc import Iterator

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"

HOUR, DAY = 3_600_000, 86_400_000  # milliseconds
_COUNTS = "requests", "finished", "failed", "tokens_in", "tokens_out", "duration_ms", "ttfts", "ttft_ms", "longest_ms"
_NAMES = {
    "all": "CAST('' AS TEXT)",
    "key": "COALESCE(key_id, '')",
    "owner": "COALESCE((SELECT owner FROM keys WHERE keys.id = usage.key_id), '')",
    "model": "COALESCE(model, '')",
    "engine": "COALESCE(engine, '')",
}


def upgrade() -> None:
    op.create_table(
        "usage_sums",
        sa.Column("step", sa.Text, primary_key=True),
        sa.Column("by", sa.Text, primary_key=True),
        sa.Column("at", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("name", sa.Text, primary_key=True),
        *(sa.Column(name, sa.BigInteger, nullable=False) for name in _COUNTS),
        sqlite_with_rowid=False,
    )
    for by, name in _NAMES.items():
        _add_up("hour", by, name, f"at / {HOUR} * {HOUR}")
        _add_up("day", by, name, f"at / {DAY} * {DAY}")
        for begin, end in _months():
            _add_up("month", by, name, f"CAST({begin} AS BIGINT)", f"WHERE at >= {begin} AND at < {end}")
    op.create_index("usage_request", "usage", ["request_id"])
    op.create_index("keys_by_age", "keys", ["created_at", "id"])
    op.create_index("secrets_key", "secrets", ["key_id"])


def _add_up(step: str, by: str, name: str, begins: str, where: str = "") -> None:
    op.execute(
        f"""
        INSERT INTO usage_sums (step, "by", at, name, {", ".join(_COUNTS)})
        SELECT CAST('{step}' AS TEXT), CAST('{by}' AS TEXT), {begins}, {name}, COUNT(*),
            SUM(CASE WHEN outcome = 'finished' THEN 1 ELSE 0 END),
            SUM(CASE WHEN outcome IN ('finished', 'client_left') THEN 0 ELSE 1 END),
            COALESCE(SUM(tokens_in), 0), COALESCE(SUM(tokens_out), 0), COALESCE(SUM(duration_ms), 0),
            COUNT(ttft_ms), COALESCE(SUM(ttft_ms), 0), COALESCE(MAX(duration_ms), 0)
        FROM usage {where} GROUP BY 3, 4
        """  # noqa: S608  names and numbers of ours
    )


def _months() -> Iterator[tuple[int, int]]:
    """When each calendar month that has usage began and ended, in milliseconds since 1970."""
    first, last = op.get_bind().execute(sa.text("SELECT MIN(at), MAX(at) FROM usage")).one()
    if first is None:
        return
    begin = dt.datetime.fromtimestamp(first // DAY * DAY // 1000, dt.UTC).replace(day=1)
    while begin.timestamp() * 1000 <= last:
        end = (begin + dt.timedelta(days=32)).replace(day=1)
        yield int(begin.timestamp()) * 1000, int(end.timestamp()) * 1000
        begin = end
