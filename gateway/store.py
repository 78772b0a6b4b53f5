"""Store: the database of what must last (keys, prompts, usage), SQLite or PostgreSQL, through one interface.

Everything here waits for the database: the event loop calls it through `asyncio.to_thread`. Tables are declared where
they are used, on `metadata`; `migrations/` brings a database to them.
"""

import os
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import alembic.command
import alembic.config
import alembic.util
import psycopg
import sqlalchemy as sa
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from gateway.errors import StoreUnavailable
from gateway.settings import Settings, SettingsError

WAIT = 5.0  # seconds for a lock, a connection or a statement; then the store is said to be unavailable
_MIGRATIONS = Path(__file__).parent / "migrations"
_MIGRATING = 7_822_537  # PostgreSQL's advisory lock: any number that nobody else takes in this database

metadata = sa.MetaData()

# One row: a number that grows with every change that workers have to learn of (keys, prompts).
revision = sa.Table("revision", metadata, sa.Column("number", sa.BigInteger, nullable=False))


class Store(ABC):
    """One database. Threads may share it; a forked process makes its own. Raises StoreUnavailable, everywhere."""

    def __init__(self, engine: sa.Engine, reading: sa.Engine) -> None:
        self._engine = engine
        self._reading = reading

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A transaction that writes: committed at the end, rolled back by any exception. One at a time in SQLite."""
        with _translated(), self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A transaction that only reads, all of it of one moment; it waits for no writer."""
        with _translated(), self._reading.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def change(self, *, patient: bool = False) -> Iterator[sa.Connection]:
        """A transaction that changes what workers hold in memory: they learn of it, see `number`. `patient`: its
        statements may take as long as they need."""
        with self.write() as connection:
            if patient:
                self._be_patient(connection)
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
        with self.write() as connection:
            self._be_alone(connection)
            config.attributes["connection"] = connection
            try:
                alembic.command.upgrade(config, "head")
            except alembic.util.CommandError as exc:
                raise SettingsError(
                    f"STACK_STORE_URL: this database was last used by a newer version of stack ({exc}). "
                    "Run that version, or restore a backup made before it."
                ) from exc

    def close(self) -> None:
        """Drop all connections. The store may be used again."""
        self._engine.dispose()

    @abstractmethod
    def told(self, cause: BaseException | None) -> str:
        """Which database it is, and why it can't be used: a line without secrets."""

    @abstractmethod
    def _be_patient(self, connection: sa.Connection) -> None:
        """Let this transaction's statements take their time."""

    @abstractmethod
    def _be_alone(self, connection: sa.Connection) -> None:
        """The same, and have every other process that comes here wait for it."""


class SqliteStore(Store):
    """A file, which must be there: one that has gone is not made anew, and empty."""

    def __init__(self, file: Path) -> None:
        self.file = file
        engine = sa.create_engine(
            f"sqlite:///file:{quote(str(file))}?mode=rw&uri=true", connect_args={"timeout": WAIT}, hide_parameters=True
        )
        sa.event.listen(engine, "connect", self._on_connect)
        sa.event.listen(engine, "checkout", self._on_checkout)
        sa.event.listen(engine, "begin", _on_begin)
        sa.event.listen(engine, "handle_error", _on_error)
        super().__init__(engine, engine.execution_options(stack_reads=True))

    def told(self, cause: BaseException | None) -> str:
        return f"{self.file.absolute()}: {_line(cause)}"

    def _be_patient(self, connection: sa.Connection) -> None:
        pass  # all are

    def _be_alone(self, connection: sa.Connection) -> None:
        pass  # whoever writes is, see _on_begin

    def _on_connect(self, connection: Any, record: Any) -> None:
        record.info["file"] = self._identity()
        connection.isolation_level = None  # transactions are begun below and nowhere else
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            connection.execute(f"PRAGMA {pragma}")

    def _on_checkout(self, _: object, record: Any, __: object) -> None:
        """A file that was removed or replaced lives on for whoever has it open; what is there now counts."""
        if record.info["file"] != self._identity():
            raise sa.exc.DisconnectionError("the database is another file now")

    def _identity(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self.file)  # noqa: PTH116  at every use: a third of the time
        except OSError:
            return None
        return found.st_dev, found.st_ino


class PostgresStore(Store):
    """A database on a server."""

    def __init__(self, url: str) -> None:
        milliseconds = int(WAIT * 1000)
        options = f"-c statement_timeout={milliseconds} -c lock_timeout={milliseconds} -c timezone=UTC"
        self._url = sa.make_url(url)
        engine = sa.create_engine(
            self._url.set(drivername="postgresql+psycopg"),
            connect_args={"connect_timeout": int(WAIT), "options": options},
            hide_parameters=True,
            pool_size=2,
            pool_timeout=WAIT,
            pool_pre_ping=True,
            pool_recycle=1800,
        )
        sa.event.listen(engine, "do_connect", _connect)
        super().__init__(engine, engine.execution_options(isolation_level="REPEATABLE READ"))

    def told(self, cause: BaseException | None) -> str:
        words = _line(cause)
        query = [value for name, value in self._url.query.items() if "password" in name]
        for password in (self._url.password, *query):
            words = words.replace(str(password), "***") if password else words
        return f"STACK_STORE_URL (the database '{self._url.database}' on {self._url.host}): {words}"

    def _be_patient(self, connection: sa.Connection) -> None:
        connection.execute(sa.text("SET LOCAL statement_timeout = 0"))
        cast("_Connection", connection.connection.driver_connection).patience = None
        connection.detach()  # nobody else gets such a patient one

    def _be_alone(self, connection: sa.Connection) -> None:
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATING)))
        self._be_patient(connection)


def open_store(settings: Settings) -> Store:
    """The store of the settings: STACK_STORE_URL, or a file in STACK_DATA_DIR. Nothing is connected yet."""
    url = settings.store_url
    return PostgresStore(url) if url else SqliteStore(settings.stack_data_dir / "stack.db")


def missing(settings: Settings) -> Path | None:
    """SQLite's file where it should be and is not."""
    store = open_store(settings)
    if isinstance(store, SqliteStore):
        try:
            store.file.stat()
        except (FileNotFoundError, NotADirectoryError):
            return store.file.absolute()
        except OSError:
            pass  # whoever opens it is told why it can't be
    return None


def prepare(settings: Settings) -> None:
    """Once before the workers are forked: make the data directory, and bring the store to this version where it can be
    reached (where not, the workers go on trying). Raises SettingsError."""
    store = open_store(settings)
    with data_directory(settings):
        if isinstance(store, SqliteStore):
            store.file.touch(0o600)
    with suppress(StoreUnavailable):
        store.migrate()
    store.close()


@contextmanager
def data_directory(settings: Settings) -> Iterator[Path]:
    """Make it, if need be. Raises SettingsError where it, or a file in it, can't be written."""
    directory = settings.stack_data_dir
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
        yield directory
    except OSError as exc:
        raise SettingsError(
            f"STACK_DATA_DIR: {directory} can't be written ({exc.strerror}). Name one that this user may write, "
            "such as STACK_DATA_DIR=.data, or mount a volume there."
        ) from None


@contextmanager
def new_store(settings: Settings) -> Iterator[Store]:
    """A file for SQLite that takes its place at the end, unless something was raised: no gateway sees it empty, or half
    full. Raises SettingsError."""
    with data_directory(settings) as directory, tempfile.TemporaryDirectory(prefix=".new-", dir=directory) as aside:
        store, place = SqliteStore(Path(aside, "stack.db")), directory / "stack.db"
        if (log := place.with_name("stack.db-wal")).exists():
            raise SettingsError(f"{log} is of a store that isn't there. Put {place} back, or move both away.")
        store.file.touch(0o600)
        try:
            yield store
            with store.write() as connection:  # a number that no worker has seen, whatever it knew before
                connection.execute(sa.update(revision).values(number=time.time_ns()))
        finally:
            store.close()
        place.hardlink_to(store.file)  # never in the place of one that has come meanwhile


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except IntegrityError:
        raise  # the caller's matter: what it wants to write contradicts what is there
    except (SQLAlchemyError, OSError) as exc:
        raise StoreUnavailable("The gateway's store can't be used right now.") from exc


def _line(cause: BaseException | None) -> str:
    return " ".join(str(cause or "it does not answer").split())


def _on_begin(connection: sa.Connection) -> None:
    """A transaction that will write takes its lock first: one that finds out later can't wait for it."""
    reads = connection.get_execution_options().get("stack_reads", False)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def _on_error(context: sa.engine.ExceptionContext) -> None:
    """A connection that was opened while the disk was read-only would stay so."""
    name = getattr(context.original_exception, "sqlite_errorname", "")
    context.is_disconnect = context.is_disconnect or name.startswith("SQLITE_READONLY")


class _Connection(psycopg.Connection[Any]):
    """One that waits for an answer no longer than `patience`, in seconds: the server's own timeouts are no help where
    it stands still."""

    patience: float | None = WAIT + 1

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        try:
            return super().wait(gen, interval, self.patience if timeout is None else timeout)
        except psycopg.errors._WaitTimeout:  # noqa: SLF001
            self.close()
            raise psycopg.OperationalError("the server does not answer") from None


def _connect(_: object, __: object, arguments: Any, options: Any) -> _Connection:
    return _Connection.connect(*arguments, **options)
