"""Console: what the commands of `stack` have in common: the store they work on, words for times, printing."""

import datetime as dt
import json
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from typing import Annotated, Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from gateway.errors import StackError, StoreUnavailable
from gateway.keybook import YEAR
from gateway.settings import Settings, SettingsError, load
from gateway.store import Store, missing, new_store, open_store

UNITS = {"m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
PADDING = 2  # rich's, of a column
FOLDED = 12  # characters that a column has at least before it folds

Json = Annotated[bool, typer.Option("--json", help="print JSON")]
# What isn't for a terminal is not cut to the width of one.
out = Console(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else 1000)


@contextmanager
def opened(*, new: bool = False) -> Iterator[tuple[Store, Settings]]:
    """The store of the settings, ready to be used. Only a gateway's start makes one, and who asks for a `new` one where
    there is none: an empty file in the place of one that was moved away would be the truth to the gateway that runs.
    Exits 1 with a sentence where something can't be done."""
    try:
        settings = load()
        with _store(settings, new=new) as store:
            store.migrate()
            yield store, settings
    except StoreUnavailable as exc:
        cause = exc.__cause__ and (exc.__cause__.__cause__ or exc.__cause__)
        sys.exit(f"The gateway's store can't be used right now: {open_store(settings).told(cause)}")
    except StackError as exc:
        sys.exit(exc.message)
    except UnicodeEncodeError as exc:
        sys.exit(f"{exc.object!a} is not UTF-8: nothing here has such a name.")
    except SettingsError as exc:
        sys.exit(str(exc))


def _store(settings: Settings, *, new: bool) -> AbstractContextManager[Store]:
    file = missing(settings)
    if file and not new:
        raise SettingsError(
            f"There is no store at {file}. Start the gateway once, which makes it, or set STACK_DATA_DIR to the "
            "gateway's data directory."
        )
    return new_store(settings) if file else closing(open_store(settings))


def confirmed(question: str, *, yes: bool) -> bool:
    """Whether it was answered, beforehand or just now, with yes."""
    return yes or (sys.stdin.isatty() and typer.confirm(question))


def day(words: str) -> int | None:
    """'2027-01-31' → when that day begins in UTC, in seconds since 1970; None if the words aren't of that form."""
    if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", words):
        return None
    try:
        return int(dt.datetime.fromisoformat(words).replace(tzinfo=dt.UTC).timestamp())
    except ValueError:
        raise typer.BadParameter(f"there is no day {words}") from None


def seconds(words: str, *, years: int) -> int:
    """'90m', '12h', '30d', '8w' or '0'; at most so many years."""
    match = re.fullmatch(r"([0-9]{1,9})([mhdw]?)", words)
    if not match or (match[1] != "0" and not match[2]):
        raise typer.BadParameter(f"'{words}' is no time: write 90m, 12h, 30d or 8w")
    found = int(match[1]) * UNITS.get(match[2], 1)
    if found > years * YEAR:
        raise typer.BadParameter(f"'{words}' is too long: at most {years * 366}d")
    return found


def whole(table: Table, *folding: str) -> Table:
    """The same, for a terminal however narrow: nothing is cut. The columns named fold, and are then read with ease."""
    for column in table.columns:
        widest = max(cell_len(str(it)) for it in (column.header, column.footer, *column.cells))
        if column.header in folding:
            column.overflow, column.min_width = "fold", min(widest, FOLDED)
        else:
            column.no_wrap, column.min_width = True, widest
    least = sum((column.min_width or 0) + PADDING for column in table.columns)
    if least > out.width:  # the terminal breaks the lines, then
        table.width = least
    return table


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")
