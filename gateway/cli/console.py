"""Console: what the commands of `stack` share: opening the store, reading times, and printing."""

import datetime as dt
import json
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel, ValidationError
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from gateway import validation
from gateway.errors import StackError, StoreUnavailable
from gateway.keys.entries import YEAR
from gateway.settings import Settings, SettingsError, load
from gateway.store.store import Store, missing, new_store, open_store

Fields = TypeVar("Fields", bound=BaseModel)

UNITS = {"m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
PADDING = 2  # the padding that rich adds to a column
FOLDED = 12  # the least width of a column that folds, in characters

Json = Annotated[bool, typer.Option("--json", help="print JSON")]
# Output that does not go to a terminal is not cut to a terminal's width.
out = Console(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout and sys.stdout.isatty() else 1000)


@contextmanager
def opened(*, new: bool = False) -> Iterator[tuple[Store, Settings]]:
    """Open the store of the settings, migrated and ready. Exits with 1 and a message if that is impossible.

    Only a gateway's start and a `new` store create a missing one. Otherwise a running gateway whose file was moved away
    would use an empty store.
    """
    try:
        settings = load()
        with _store(settings, new=new) as store:
            store.migrate()
            yield store, settings
    except StoreUnavailable as exc:
        cause = exc.__cause__ and (exc.__cause__.__cause__ or exc.__cause__)
        sys.exit(f"The gateway's store cannot be used right now: {open_store(settings).told(cause)}")
    except StackError as exc:
        sys.exit(exc.message)
    except UnicodeEncodeError as exc:
        sys.exit(f"{exc.object!a} is not UTF-8 text. Names in the store must be UTF-8 text.")
    except SettingsError as exc:
        sys.exit(str(exc))


def _store(settings: Settings, *, new: bool) -> AbstractContextManager[Store]:
    file = missing(settings)
    if file and not new:
        raise SettingsError(
            f"There is no store at {file}. Start the gateway once, which creates it, or set STACK_DATA_DIR to the "
            "gateway's data directory."
        )
    return new_store(settings) if file else closing(open_store(settings))


def confirmed(question: str, *, yes: bool) -> bool:
    """Return whether the user agrees, by --yes or by an answer on the terminal."""
    return yes or (sys.stdin.isatty() and typer.confirm(question))


def day(words: str) -> int | None:
    """Read a day such as '2027-01-31': its start in UTC, in seconds since 1970; None if the words do not have this
    form. Raises typer.BadParameter if the day does not exist."""
    try:
        return validation.day(words)
    except ValueError:
        raise typer.BadParameter(f"the day {words} does not exist") from None


def seconds(words: str, *, years: int) -> int:
    """Read a duration such as '90m', '12h', '30d', '8w' or '0', in seconds. Raises typer.BadParameter if it is
    malformed, or longer than that many years."""
    match = re.fullmatch(r"([0-9]{1,9})([mhdw]?)", words)
    if not match or (match[1] != "0" and not match[2]):
        raise typer.BadParameter(f"'{words}' is not a duration: write it as 90m, 12h, 30d or 8w")
    found = int(match[1]) * UNITS.get(match[2], 1)
    if found > years * YEAR:
        raise typer.BadParameter(f"'{words}' is too long: write at most {years * 366}d")
    return found


def whole(table: Table, *folding: str) -> Table:
    """Return the table, set up so that no terminal cuts it. The named columns fold, and the others keep their full
    width."""
    for column in table.columns:
        widest = max(cell_len(str(it)) for it in (column.header, column.footer, *column.cells))
        if column.header in folding:
            column.overflow, column.min_width = "fold", min(widest, FOLDED)
        else:
            column.no_wrap, column.min_width = True, widest
    least = sum((column.min_width or 0) + PADDING for column in table.columns)
    if least > out.width:  # the terminal then breaks the lines
        table.width = least
    return table


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def valid(model: type[Fields], fields: dict[str, Any]) -> Fields:
    """Return the checked fields. Raises typer.BadParameter with the first mistake."""
    try:
        return model.model_validate(fields)
    except ValidationError as exc:
        raise typer.BadParameter(": ".join(validation.first(exc, model))) from None


def when(moment: int | None) -> str:
    """Write a moment in seconds since 1970; None is never."""
    if moment is None:
        return "never"
    return dt.datetime.fromtimestamp(moment, dt.UTC).strftime("%Y-%m-%d %H:%M UTC")
