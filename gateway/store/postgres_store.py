"""Postgres store: keep keys, prompts and usage in a database on a server."""

import re
from typing import Any, cast

import psycopg
import sqlalchemy as sa
from psycopg.conninfo import conninfo_to_dict

from gateway.store.postgres import with_options
from gateway.store.store import WAIT, Store, cases, told_line

_MIGRATING = 7_822_537  # an advisory lock: any number that no other program uses in this database


class PostgresStore(Store):
    """Use a database on a server."""

    def __init__(self, url: str) -> None:
        milliseconds = int(WAIT * 1000)
        options = f"-c statement_timeout={milliseconds} -c lock_timeout={milliseconds} -c timezone=UTC"
        self._conninfo = with_options(url, options)
        engine = sa.create_engine(
            "postgresql+psycopg://",  # SQLAlchemy does not read the URL: libpq reads it in all places
            connect_args={"connect_timeout": int(WAIT)},
            hide_parameters=True,
            pool_size=2,
            pool_timeout=WAIT,
            pool_pre_ping=True,
            pool_recycle=1800,
        )
        sa.event.listen(engine, "do_connect", self._connect)
        sa.event.listen(engine, "handle_error", _wait_once)
        super().__init__(engine, engine.execution_options(isolation_level="REPEATABLE READ"))

    def contains(self, column: sa.Column[str], text: str) -> sa.ColumnElement[bool]:
        each = (f"[{found}]" if len(found := cases(it)) > 1 else re.escape(it) for it in text)
        return column.regexp_match("".join(each))

    def told(self, cause: BaseException | None) -> str:
        words = told_line(cause)
        read = conninfo_to_dict(self._conninfo)
        for password in (value for name, value in read.items() if "password" in name and value):
            words = words.replace(str(password), "***")
        return f"STACK_STORE_URL (the database '{read.get('dbname')}' on {read.get('host')}): {words}"

    def _connect(self, _: object, __: object, ___: object, options: Any) -> "_Connection":
        return _Connection.connect(self._conninfo, **options)

    def _be_patient(self, connection: sa.Connection) -> None:
        connection.execute(sa.text("SET LOCAL statement_timeout = 0"))
        cast("_Connection", connection.connection.driver_connection).patience = None
        connection.detach()  # no later transaction gets a connection without a time limit

    def _be_alone(self, connection: sa.Connection) -> None:
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATING)))
        self._be_patient(connection)


class _Connection(psycopg.Connection[Any]):
    """A connection that waits for an answer for at most `patience` seconds. The server's own timeouts do not help if
    the server hangs."""

    patience: float | None = WAIT + 1

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        try:
            return super().wait(gen, interval, self.patience if timeout is None else timeout)
        except psycopg.errors._WaitTimeout:  # noqa: SLF001
            self.close()
            raise _SilentError("the server does not answer") from None


class _SilentError(psycopg.OperationalError):
    """The server has not answered in time."""


def _wait_once(context: sa.ExceptionContext) -> None:
    """Have no new connection made, and waited for, when a server that hangs has not answered the pool's check of an old
    one."""
    if context.is_pre_ping and isinstance(context.original_exception, _SilentError):
        context.is_disconnect = False
