"""Store: keep keys, prompts and usage in SQLite or PostgreSQL, through one interface.

Everything here waits for the database, so the event loop calls it through `asyncio.to_thread`. Each table is declared
beside its use, on `metadata`. `migrations/` brings a database to these tables.
"""

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from gateway.errors import StoreUnavailable
from gateway.settings import Settings, SettingsError
from gateway.store import revisions
from gateway.store.revisions import Of

WAIT = 5.0  # seconds for a lock, a connection or a statement; after that, the store is unavailable
_MIGRATIONS = Path(__file__).parent / "migrations"

_version = sa.table("alembic_version", sa.column("version_num"))  # alembic owns this table


class Store(ABC):
    """Use one database. Threads may share it, and a forked process makes its own. All methods raise
    StoreUnavailable.
    """

    def __init__(self, engine: sa.Engine, reading: sa.Engine) -> None:
        self._engine = engine
        self._reading = reading

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Open a transaction that writes. It is committed at the end, and rolled back by any exception. SQLite runs one
        at a time."""
        with _translated(), self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """Open a transaction that only reads. All of it shows one moment, and it waits for no writer."""
        with _translated(), self._reading.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def change(self, of: Of = "all", key_id: str | None = None, *, patient: bool = False) -> Iterator[sa.Connection]:
        """Open a transaction that changes what workers keep in memory. They notice the change by `number`, and read
        only what it is `of`. `patient`: its statements may take as long as they need."""
        with self.write() as connection:
            if patient:
                self._be_patient(connection)
            # The first statement, because it takes a lock: each change then sees the result of the one before.
            revisions.begin(connection, of, key_id)
            yield connection

    def number(self) -> int:
        """Return the revision of what workers keep in memory."""
        with self.read() as connection:
            return revisions.number(connection)

    def migrate(self) -> None:
        """Bring the tables to this version's. If several processes do so at once, one migrates and the others wait.

        Raises SettingsError if a newer version of the gateway has migrated the database, because there is no way back.
        """
        with self.read() as connection:  # mostly there is nothing to do, and this transaction waits for no writer
            made = sa.inspect(connection).has_table(_version.name)
            there = connection.execute(sa.select(_version.c.version_num)).scalars().all() if made else []
        if there == [max(it.name[:4] for it in (_MIGRATIONS / "versions").glob("[0-9]*.py"))]:
            return
        from gateway.store.migrating import upgrade  # noqa: PLC0415  alembic is slow to import

        with self.write() as connection:
            self._be_alone(connection)
            upgrade(connection, _MIGRATIONS)

    def close(self) -> None:
        """Drop all connections. The store may be used again."""
        self._engine.dispose()

    @abstractmethod
    def contains(self, column: sa.Column[str], text: str) -> sa.ColumnElement[bool]:
        """Return whether the column contains the text, in capital or small letters. The databases' own lower() knows
        only the letters of ASCII, or those of the server's locale."""

    @abstractmethod
    def told(self, cause: BaseException | None) -> str:
        """Return which database this is and why it cannot be used, in one line without secrets."""

    @abstractmethod
    def _be_patient(self, connection: sa.Connection) -> None:
        """Remove the time limit of this transaction's statements."""

    @abstractmethod
    def _be_alone(self, connection: sa.Connection) -> None:
        """Remove the time limit, and make every other process that migrates wait for this transaction."""


class SqliteStore(Store):
    """Use a file, which must exist. A missing file is not created again, because it would be empty."""

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

    def contains(self, column: sa.Column[str], text: str) -> sa.ColumnElement[bool]:
        each = (it if it == "^" else f"[{cases(it)}]" for it in text)  # [^] would be the beginning of another pattern
        return column.op("GLOB", is_comparison=True)(f"*{''.join(each)}*")

    def told(self, cause: BaseException | None) -> str:
        return f"{self.file.absolute()}: {told_line(cause)}"

    def _be_patient(self, connection: sa.Connection) -> None:
        pass  # SQLite's transactions have no time limit

    def _be_alone(self, connection: sa.Connection) -> None:
        pass  # a writing transaction is alone already, see _on_begin

    def _on_connect(self, connection: Any, record: Any) -> None:
        record.info["file"] = self._identity()
        connection.isolation_level = None  # only _on_begin begins transactions
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            connection.execute(f"PRAGMA {pragma}")

    def _on_checkout(self, _: object, record: Any, __: object) -> None:
        """Replace a connection to a file that was removed or replaced. The connection would still use the old file."""
        if record.info["file"] != self._identity():
            raise sa.exc.DisconnectionError("the database file was replaced")

    def _identity(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self.file)  # noqa: PTH116  called at every use, and pathlib takes three times as long
        except OSError:
            return None
        return found.st_dev, found.st_ino


def open_store(settings: Settings) -> Store:
    """Return the store of the settings: STACK_STORE_URL, or a file in STACK_DATA_DIR. It does not connect yet."""
    if settings.store_url:
        from gateway.store.postgres_store import PostgresStore  # noqa: PLC0415  psycopg is slow to import

        return PostgresStore(settings.store_url)
    return SqliteStore(settings.stack_data_dir / "stack.db")


def missing(settings: Settings) -> Path | None:
    """Return the path of SQLite's file if the file is missing, otherwise None."""
    store = open_store(settings)
    if isinstance(store, SqliteStore):
        try:
            store.file.stat()
        except (FileNotFoundError, NotADirectoryError):
            return store.file.absolute()
        except OSError:
            pass  # the error comes when the file is opened
    return None


def prepare(settings: Settings) -> None:
    """Make the data directory and migrate the store, once before the workers are forked. If the store is unreachable,
    the workers try again. Raises SettingsError."""
    store = open_store(settings)
    with data_directory(settings):
        if isinstance(store, SqliteStore):
            store.file.touch(0o600)
    with suppress(StoreUnavailable):
        store.migrate()
    store.close()


@contextmanager
def data_directory(settings: Settings) -> Iterator[Path]:
    """Make the data directory if it is missing. Raises SettingsError if the directory, or a file in it, cannot be
    written."""
    directory = settings.stack_data_dir
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
        yield directory
    except OSError as exc:
        raise SettingsError(
            f"STACK_DATA_DIR: {directory} is not writable ({exc.strerror}). Name a directory to which this user may "
            "write, such as STACK_DATA_DIR=.data, or mount a volume there."
        ) from None


@contextmanager
def new_store(settings: Settings) -> Iterator[Store]:
    """Make a new SQLite file, which takes its place at the end of the block, unless the block raises. No gateway
    therefore sees it empty or incomplete. Raises SettingsError."""
    with data_directory(settings) as directory, tempfile.TemporaryDirectory(prefix=".new-", dir=directory) as aside:
        store, place = SqliteStore(Path(aside, "stack.db")), directory / "stack.db"
        if (log := place.with_name("stack.db-wal")).exists():
            raise SettingsError(f"{log} belongs to a store that is missing. Put {place} back, or remove {log}.")
        store.file.touch(0o600)
        try:
            yield store
            with store.write() as connection:
                revisions.begin_anew(connection)
        finally:
            store.close()
        place.hardlink_to(store.file)  # fails if another file has appeared there meanwhile


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except IntegrityError:
        raise  # the caller handles it: its rows contradict the rows in the store
    except (SQLAlchemyError, OSError) as exc:
        raise StoreUnavailable("The gateway's store is unreachable right now.") from exc


def cases(character: str) -> str:
    """Return a character in capital and small letters, as far as each of these is one character."""
    return "".join(sorted(it for it in {character, character.lower(), character.upper()} if len(it) == 1))


def told_line(cause: BaseException | None) -> str:
    """Return a database's message in one line."""
    return " ".join(str(cause or "it does not answer").split())


def _on_begin(connection: sa.Connection) -> None:
    """Begin a transaction. One that will write takes its lock first, because SQLite cannot wait for a lock later."""
    reads = connection.get_execution_options().get("stack_reads", False)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def _on_error(context: sa.engine.ExceptionContext) -> None:
    """Drop a connection after a read-only error, because it would stay read-only after the disk is writable again."""
    name = getattr(context.original_exception, "sqlite_errorname", "")
    context.is_disconnect = context.is_disconnect or name.startswith("SQLITE_READONLY")
