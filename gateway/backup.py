"""Backup: everything the store holds, in one form that either database gives and takes back, while gateways run.

A gzip of JSON lines: the first says what it is, each further one is a row with its table's name, and the last says how
many rows there were. It holds keys' digests: not the keys, but what tells a right one from a wrong one.
"""

import gzip
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from gateway import __version__
from gateway.keybook import default_limits, deleted_keys, keys, secrets
from gateway.promptbook import uses, versions
from gateway.store import Store
from gateway.usage import usage

FORMAT = 1
TABLES = {
    str(table.name): table for table in (keys, secrets, deleted_keys, default_limits, versions, uses, usage)
}  # each finds what it refers to
BATCH = 1000  # rows written at a time


class BadBackup(Exception):
    """It can't be restored. The message says why, for who has the file."""


def write(store: Store, file: BinaryIO) -> Counter[str]:
    """Write everything, as of one moment. Returns how many rows of each table. Raises StoreUnavailable, OSError."""
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


def restore(store: Store, path: Path) -> Counter[str]:
    """Put what the backup holds in the place of everything there is. All of it is checked first, and nothing has
    changed where this raises: BadBackup, StoreUnavailable, OSError. Running gateways learn of it within a second."""
    for number, (name, row) in enumerate(_rows(path), 2):
        _check(name, row, number)
    counts: Counter[str] = Counter()
    try:
        with store.change(patient=True) as connection:
            for table in reversed(TABLES.values()):
                connection.execute(sa.delete(table))
            for name, group in groupby(_rows(path), key=lambda it: it[0]):
                names = TABLES[name].columns.keys()
                rows = ({column: row.get(column) for column in names} for _, row in group)
                while batch := list(islice(rows, BATCH)):
                    connection.execute(sa.insert(TABLES[name]), batch)
                    counts[name] += len(batch)
    except IntegrityError as exc:
        raise BadBackup(f"The backup contradicts itself: {exc.orig}.") from None
    return counts


def _line(value: object) -> bytes:
    return orjson.dumps(value) + b"\n"


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Its rows with their tables' names. Raises BadBackup where it isn't whole."""
    counts: Counter[str] = Counter()
    ended = False  # though the file's own checksum comes after
    for number, value in enumerate(_values(path), 1):
        match value:
            case {"stack_backup": form} if number == 1:
                if form != FORMAT:
                    raise BadBackup("The backup is of another version of stack: restore it with that one.")
            case [str(name), dict(row)] if number > 1 and not ended:
                yield name, row
                counts[name] += 1
            case {"rows": dict(rows)} if number > 1 and not ended:
                if Counter(rows) != counts:
                    raise BadBackup("The backup is not whole: rows are missing.")
                ended = True
            case _:
                raise BadBackup(f"This is no backup of stack, or a damaged one (line {number}).")
    if not ended:
        raise BadBackup("The backup is not whole: its end is missing.")


def _values(path: Path) -> Iterator[Any]:
    try:
        with gzip.open(path) as lines:
            for line in lines:
                yield orjson.loads(line)
    except (EOFError, gzip.BadGzipFile, zlib.error, orjson.JSONDecodeError) as exc:
        raise BadBackup(f"This is no backup of stack, or a damaged one: {exc}.") from None


def _check(name: str, row: dict[str, Any], number: int) -> None:
    """Raises BadBackup where a row can't be one of that table."""
    table = TABLES.get(name)
    if table is None or not row.keys() <= set(table.columns.keys()):
        raise BadBackup(f"The backup is of a newer version of stack (line {number}): restore it with that one.")
    for column in table.columns:
        if not _fits(row.get(column.name), column):
            raise BadBackup(f"The backup is damaged (line {number}): '{column.name}' can't be that.")


def _fits(value: object, column: sa.Column[Any]) -> bool:
    if value is None:
        return bool(column.nullable)
    match column.type:
        case sa.JSON():
            return True
        case sa.Boolean():
            return isinstance(value, bool)
        case sa.Integer():
            return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63
        case sa.String(length=length):
            return isinstance(value, str) and "\0" not in value and (length is None or len(value) <= length)
    return False
