"""Store: the database of what must last (keys, prompts, usage), SQLite or PostgreSQL, through one interface.

Everything here waits for the database: the event loop calls it through `asyncio.to_thread`. Tables are declared where
they are used, on `metadata`; `migrations/` brings a database to them.
"""

import fcntl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import alembic.command
import alembic.config
import alembic.util
import sqlalchemy as sa
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from gateway.errors import StoreUnavailable
from gateway.settings import Settings, SettingsError

WAIT = 5.0  # seconds for a lock, a connection or a statement; then the store is said to be unavailable
_MIGRATIONS = Path(__file__).parent / "migrations"
_MIGRATING = 7_822_537  # PostgreSQL's advisory lock: any number that nobody else takes in this database

metadata = sa.MetaData()

# One row: a number that grows with every change that workers have to learn of (keys, prompts).
revision = sa.Table("revision", metadata, sa.Column("number", sa.BigInteger, nullable=False))


class Store:
    """One database. Threads may share it; a forked process makes its own. Raises StoreUnavailable, everywhere."""

    def __init__(self, url: str) -> None:
        self.url = sa.make_url(url)
        self._lite = self.url.get_backend_name() == "sqlite"
        if self._lite:
            self._engine = sa.create_engine(self.url, connect_args={"timeout": WAIT})
            sa.event.listen(self._engine, "connect", _prepare_sqlite)
            sa.event.listen(self._engine, "begin", _begin_sqlite)
        else:
            options = f"-c statement_timeout={int(WAIT * 1000)} -c lock_timeout={int(WAIT * 1000)} -c timezone=UTC"
            arguments = {"connect_timeout": int(WAIT), "options": options}
            self._engine = sa.create_engine(
                self.url.set(drivername="postgresql+psycopg"),
                connect_args=arguments,
                pool_size=2,
                pool_timeout=WAIT,
                pool_pre_ping=True,
                pool_recycle=1800,
            )

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A transaction that writes: committed at the end, rolled back by any exception. One at a time in SQLite."""
        with _translated(), self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def read(self, *, steady: bool = False) -> Iterator[sa.Connection]:
        """A transaction that only reads; it waits for no writer. `steady`: it sees the store as of one moment."""
        reading = self._engine.execution_options(stack_reads=True)
        if steady and not self._lite:  # SQLite's are
            reading = reading.execution_options(isolation_level="REPEATABLE READ")
        with _translated(), reading.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def change(self, *, patient: bool = False) -> Iterator[sa.Connection]:
        """A transaction that changes what workers hold in memory: they learn of it, see `number`. `patient`: each of
        its statements may take as long as it needs."""
        with self.write() as connection:
            if patient and not self._lite:
                connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
            yield connection
            connection.execute(sa.update(revision).values(number=revision.c.number + 1))

    def number(self) -> int:
        """The revision of what workers hold in memory."""
        with self.read() as connection:
            return self.number_in(connection)

    def number_in(self, connection: sa.Connection) -> int:
        """The same, as of that transaction."""
        return int(connection.execute(sa.select(revision.c.number)).scalar_one())

    def migrate(self) -> None:
        """Bring the tables to this version's. Any number of processes may do so at once; one does it, the others wait.

        Raises SettingsError where a newer version of the gateway has been here: there is no way back.
        """
        config = alembic.config.Config()
        config.set_main_option("script_location", str(_MIGRATIONS))
        with self.read() as connection:  # mostly there is nothing to do, and then nobody need wait for a writer
            there = MigrationContext.configure(connection).get_current_revision()
        if there == ScriptDirectory.from_config(config).get_current_head():
            return
        with _translated(), self._alone(), self._engine.connect() as connection:
            config.attributes["connection"] = connection
            try:
                alembic.command.upgrade(config, "head")
            except alembic.util.CommandError as exc:
                raise SettingsError(
                    f"STACK_STORE_URL: this database was last used by a newer version of stack ({exc}). "
                    "Run that version, or restore a backup made before it."
                ) from exc
            connection.commit()

    def close(self) -> None:
        """Drop all connections. The store may be used again."""
        self._engine.dispose()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if self._lite:
            with Path(f"{self.url.database}.migrating").open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield
        else:
            with self._engine.connect() as connection:
                connection.execute(sa.select(sa.func.pg_advisory_lock(_MIGRATING)))
                yield
                connection.execute(sa.select(sa.func.pg_advisory_unlock(_MIGRATING)))


def open_store(settings: Settings) -> Store:
    """The store of the settings: STACK_STORE_URL, or a file in STACK_DATA_DIR. Nothing is connected yet."""
    return Store(settings.store_url)


def prepare(settings: Settings) -> None:
    """Once before the workers are forked: make the data directory, and bring the store to this version where it can be
    reached (where not, the workers go on trying). Raises SettingsError."""
    directory = settings.stack_data_dir
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as exc:
        raise SettingsError(
            f"STACK_DATA_DIR: {directory} can't be written ({exc.strerror}). Name one that this user may write, "
            "such as STACK_DATA_DIR=.data, or mount a volume there."
        ) from None
    store = open_store(settings)
    with suppress(StoreUnavailable):
        store.migrate()
    store.close()


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except IntegrityError:
        raise  # the caller's matter: what it wants to write contradicts what is there
    except (DBAPIError, PoolTimeoutError) as exc:
        raise StoreUnavailable("The gateway's store can't be used right now.") from exc
    except (SQLAlchemyError, OSError) as exc:
        raise StoreUnavailable("The gateway's store can't be used.") from exc


def _prepare_sqlite(connection: Any, _: object) -> None:
    connection.isolation_level = None  # transactions are begun below and nowhere else
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: sa.Connection) -> None:
    """A transaction that will write takes its lock first: one that finds out later can't wait for it."""
    reads = connection.get_execution_options().get("stack_reads", False)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")
