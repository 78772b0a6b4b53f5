"""Backup: save and restore everything in the store except stored responses, in one form for both databases, while
gateways run.

The form is JSON lines in gzip. The first line says what the file is, the last line has the number of rows, and each
other line is a row with its table's name. A backup holds the keys' digests, from which nobody can read a key, and the
signing secrets of their front ends, which nobody can use without the key.
"""

import gzip
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import groupby, islice
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import sqlalchemy as sa
from pydantic import BaseModel, ValidationError
from sqlalchemy.exc import IntegrityError

from gateway import __version__, validation
from gateway.keys.entries import Entry, KeptDefault, KeptName, KeptSecret
from gateway.keys.tables import default_limits, deleted_keys, keys, secrets
from gateway.prompts.book import Holds, Kept, uses, versions
from gateway.responses.tables import forget_all
from gateway.settings import Settings
from gateway.store.store import Store
from gateway.usage import sums
from gateway.usage.rows import UsageRow, usage

FORMAT = 1
MARK = "last-backup"  # an empty file in the data directory; its time is that of the last backup
TABLES = {
    str(table.name): table for table in (keys, secrets, deleted_keys, default_limits, versions, uses, usage)
}  # in an order in which each row finds the rows that it refers to
# The check of each table's rows. It is the check of the command and the API.
KEPT: dict[str, type[BaseModel]] = {
    "keys": Entry,
    "secrets": KeptSecret,
    "deleted_keys": KeptName,
    "default_limits": KeptDefault,
    "prompts": Kept,
    "prompt_uses": Holds,
    "usage": UsageRow,
}
BATCH = 1000  # rows written at a time


class BadBackup(Exception):
    """Say that a backup cannot be restored. The message gives the reason to the person who has the file."""


def write(store: Store, file: BinaryIO) -> Counter[str]:
    """Write everything, as of one moment. Returns the number of rows of each table. Raises StoreUnavailable,
    OSError."""
    counts: Counter[str] = Counter()
    with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=6) as lines, store.read() as connection:
        lines.write(_line({"stack_backup": FORMAT, "version": __version__, "at": int(time.time())}))
        for name, table in TABLES.items():
            columns = [str(column.name) for column in table.columns]
            for row in connection.execution_options(yield_per=BATCH).execute(sa.select(table)):
                lines.write(_line([name, dict(zip(columns, row, strict=True))]))
                counts[name] += 1
        lines.write(_line({"rows": counts}))
    return counts


def note(settings: Settings) -> None:
    """Note that a backup was written now, for `last`. A backup is worth no less if that fails."""
    with suppress(OSError):
        (settings.stack_data_dir / MARK).touch(0o600)


def last(settings: Settings) -> float | None:
    """Return when the last backup was written, in seconds since 1970; None if there was none."""
    try:
        return (settings.stack_data_dir / MARK).stat().st_mtime
    except OSError:
        return None


def restore(store: Store, path: Path) -> Counter[str]:
    """Replace everything in the store by the rows of the backup. All of it is checked first. Returns the number of rows
    of each table. Running gateways notice the change within a second.

    Raises BadBackup, StoreUnavailable or OSError; nothing has changed then.
    """
    prompts: set[tuple[str, int | None]] = set()
    used = []
    ids: dict[str, set[str]] = {"keys": set(), "deleted_keys": set()}
    for number, (name, row) in enumerate(_rows(path), 2):
        _check(name, row, number)
        if name == "prompts":
            prompts |= {(row["name"], None), (row["name"], row["version"])}
        elif name == "prompt_uses":
            used.append((row["name"], row.get("version")))
        elif name in ids:
            ids[name].add(row["id"])
    if both := ids["keys"] & ids["deleted_keys"]:
        raise BadBackup(f"The backup contradicts itself: the key '{min(both)}' is there, and is deleted.")
    if missing := set(used) - prompts:
        raise BadBackup(
            f"The backup contradicts itself: a version of the prompt '{min(missing, key=str)[0]}' is missing."
        )
    counts: Counter[str] = Counter()
    try:
        with store.change(patient=True) as connection:
            # A backup holds no responses, because it would keep prompts for longer than the operator allowed
            forget_all(connection)
            for table in (sums.sums, *reversed(TABLES.values())):
                connection.execute(sa.delete(table))
            for name, group in groupby(_rows(path), key=lambda it: it[0]):
                names = TABLES[name].columns.keys()
                rows = ({column: row.get(column) for column in names} for _, row in group)
                while batch := list(islice(rows, BATCH)):
                    connection.execute(sa.insert(TABLES[name]), batch)
                    if name == "usage":
                        sums.add(connection, batch)
                    counts[name] += len(batch)
    except IntegrityError as exc:
        raise BadBackup(f"The backup contradicts itself: {exc.orig}.") from None
    return counts


def _line(value: object) -> bytes:
    return orjson.dumps(value) + b"\n"


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows with their tables' names. Raises BadBackup if the file is incomplete or damaged."""
    counts: Counter[str] = Counter()
    ended = False  # the file's own checksum follows the last line
    for number, value in enumerate(_values(path), 1):
        match value:
            case {"stack_backup": form} if number == 1:
                if form != FORMAT:
                    raise BadBackup("The backup was made by another version of stack. Restore it with that version.")
            case [str(name), dict(row)] if number > 1 and not ended:
                yield name, row
                counts[name] += 1
            case {"rows": dict(rows)} if number > 1 and not ended:
                if Counter(rows) != counts:
                    raise BadBackup("The backup is incomplete: rows are missing.")
                ended = True
            case _:
                raise BadBackup(f"The file is not a backup of stack, or is damaged (line {number}).")
    if not ended:
        raise BadBackup("The backup is incomplete: its end is missing.")


def _values(path: Path) -> Iterator[Any]:
    try:
        with gzip.open(path) as lines:
            for line in lines:
                yield orjson.loads(line)
    except (EOFError, gzip.BadGzipFile, zlib.error, orjson.JSONDecodeError) as exc:
        raise BadBackup(f"The file is not a backup of stack, or is damaged: {exc}.") from None


def _check(name: str, row: dict[str, Any], number: int) -> None:
    """Check that a row can be one of that table. Raises BadBackup."""
    table = TABLES.get(name)
    if table is None or not row.keys() <= set(table.columns.keys()):
        raise BadBackup(
            f"The backup was made by a newer version of stack (line {number}). Restore it with that version."
        )
    kept = KEPT[name]
    try:
        kept.model_validate({it: row.get(it) for it in table.columns.keys()}, strict=True)  # noqa: SIM118  no dict
    except ValidationError as exc:
        field, why = validation.first(exc, kept)
        raise BadBackup(f"The backup is damaged (line {number}): '{field}' has an impossible value: {why}.") from None
