"""Reports: the part of the `stack` command that is about usage: who used what, who does now; backup and restore."""

import datetime as dt
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.live import Live
from rich.table import Table

from gateway import backup as backups
from gateway import live
from gateway.backup import BadBackup
from gateway.console import Json, confirmed, day, opened, out, print_json, seconds, whole
from gateway.errors import BadRequest
from gateway.exchange import Running
from gateway.keybook import Keybook
from gateway.keys import listed_ids
from gateway.store import Store, data_directory
from gateway.usage import DAY, DIMENSIONS, LISTED, SUMS, UsageBook, check_prunable, dimensions, names, to_csv

usage = typer.Typer(help="Who used what.", invoke_without_command=True)

Yes = Annotated[bool, typer.Option("--yes", help="don't ask")]
TIME = "a day (2027-01-31, UTC) or a time ago (12h, 30d)"


@usage.callback()
def show(
    context: typer.Context,
    *,
    by: Annotated[str, typer.Option(help="what to sum up by, of " + ", ".join(DIMENSIONS))] = "key,model",
    since: Annotated[str, typer.Option("--from", help=TIME)] = "30d",
    until: Annotated[str | None, typer.Option("--to", help="likewise; that day is included")] = None,
    key: Annotated[str | None, typer.Option(help="of this key alone, by its id")] = None,
    model: Annotated[str | None, typer.Option(help="of this model alone")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="print CSV")] = False,
    as_json: Json = False,
) -> None:
    """Sum up what was used. `counted` are the requests whose tokens the engine didn't get to say, as the client left or
    something broke: they are what the gateway saw."""
    if context.invoked_subcommand:
        return
    try:
        groups = dimensions(by)
    except ValueError as exc:
        raise typer.BadParameter(f"--by {exc}") from None
    if as_csv and as_json:
        raise typer.BadParameter("say --csv or --json, not both")
    span = _moment(since), _moment(until, end=True) if until else _now() + 1
    if span[0] > span[1]:
        raise typer.BadParameter(f"--from {since} is after " + (f"--to {until}" if until else "now"))
    with opened() as (store, settings):
        rows = UsageBook(store, listed_ids(settings)).totals(groups, *span, key, model)
    if as_json:
        print_json(rows)
    elif as_csv:
        sys.stdout.write(to_csv(groups, rows))
    elif not rows:
        out.print("Nothing was used in that time.")
    else:
        table = Table(*names(groups), box=None, show_footer=len(rows) > 1)
        for name in SUMS:
            footer = f"{sum(row[name] for row in rows):,}"
            table.add_column(name.replace("_", " "), justify="right", footer=footer)
        for row in rows:
            table.add_row(*(str(row[name] or "-") for name in names(groups)), *(f"{row[name]:,}" for name in SUMS))
        out.print(whole(table, "name", "model", "engine", "arm"))


@usage.command()
def prune(
    *, before: Annotated[str, typer.Option(help=f"what came before this is deleted: {TIME}")], yes: Yes = False
) -> None:
    """Delete old rows for good, those of before this month (UTC) at most: its quotas are counted from them. Gateways do
    so by themselves: STACK_USAGE_RETENTION_DAYS."""
    moment = _moment(before)
    try:
        check_prunable(moment)
    except BadRequest as exc:
        sys.exit(exc.message)
    words = f"{dt.datetime.fromtimestamp(moment / 1000, dt.UTC):%Y-%m-%d %H:%M UTC}"
    if not confirmed(f"Delete the usage of before {words} for good?", yes=yes):
        sys.exit("Nothing was deleted: say --yes, or answer y.")
    with opened() as (store, _):
        deleted = sum(UsageBook(store).prune(moment))
    out.print(f"Deleted {deleted:,} rows of before {words}.")


def top(
    *, once: Annotated[bool, typer.Option("--once", help="show it once, and end")] = False, as_json: Json = False
) -> None:
    """Who is being answered right now, by the gateway whose data directory this is. It is a second old at most."""
    with opened() as (store, settings):
        whose = dict.fromkeys(listed_ids(settings), LISTED) | {it.id: it.name for it in Keybook(store).list()}
    if as_json:
        print_json([asdict(it) | {"name": whose.get(it.key_id)} for it in live.look(settings.journals)])
    elif once or not out.is_terminal:
        out.print(_running(live.look(settings.journals), whose))
    else:
        with Live(console=out, auto_refresh=False, screen=True) as screen, suppress(KeyboardInterrupt):
            while True:
                screen.update(_running(live.look(settings.journals), whose), refresh=True)
                time.sleep(1)


def backup(file: Annotated[str, typer.Argument(metavar="FILE", help="- is standard output")]) -> None:
    """Write all keys, prompts and usage to a file, while gateways run. No key can be had from it, but it is no matter
    for others: the file is readable by you alone. What the last second used may not be in it."""
    with opened() as (store, _):
        try:
            counts = backups.write(store, sys.stdout.buffer) if file == "-" else _write(store, Path(file))
        except OSError as exc:
            sys.exit(f"The backup can't be written: {exc.strerror}.")
    sys.stderr.write(f"The backup holds {_told(counts)}.\n")


def restore(
    file: Annotated[str, typer.Argument(metavar="FILE", help="- is standard input")], *, yes: Yes = False
) -> None:
    """Put a backup in the place of all keys, prompts and usage, while gateways run. Keys made since are gone, and keys
    taken back since are back. The file is checked first: where it is no good, nothing changes. Where there is no store
    yet (a new machine, a lost disk), it is made of the backup."""
    if not confirmed("Replace all keys, prompts and usage by the backup's?", yes=yes):
        sys.exit("Nothing was restored: say --yes, or answer y.")
    with (
        opened(new=True) as (store, settings),
        data_directory(settings) as directory,
        tempfile.NamedTemporaryFile(dir=directory) as copy,
    ):
        try:
            if file == "-":  # it is read twice
                shutil.copyfileobj(sys.stdin.buffer, copy)
                copy.flush()
            counts = backups.restore(store, Path(copy.name if file == "-" else file))
        except BadBackup as exc:
            sys.exit(f"{exc} Nothing was changed.")
        except OSError as exc:
            sys.exit(f"The backup can't be read: {exc.strerror}. Nothing was changed.")
    out.print(f"Restored {_told(counts)}.")


def _write(store: Store, path: Path) -> Counter[str]:
    """Into a file that is there when it is whole, and readable by its owner alone."""
    part = path.with_name(f".{path.name}.part")
    with suppress(FileNotFoundError):
        part.unlink()
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            counts = backups.write(store, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return counts


def _told(counts: Counter[str]) -> str:
    return f"{counts['keys']:,} keys and {counts['usage']:,} rows of usage"


def _running(running: list[Running], whose: dict[str, str]) -> Table:
    columns = "key", "name", "model", "engine", "kind", "queue", "seconds", "tokens", "tokens/s"
    speeds = [it.tokens / it.generating if it.generating else 0.0 for it in running]
    table = Table(box=None, show_footer=True)
    for name, footer in zip(columns, (f"{len(running)} running", *[""] * 7, f"{sum(speeds):.0f}"), strict=True):
        table.add_column(
            name, footer, justify="right" if name in ("queue", "seconds", "tokens", "tokens/s") else "left"
        )
    for it, speed in zip(running, speeds, strict=True):
        words = it.key_id, whose.get(it.key_id, "-"), it.model, it.engine or "-", it.kind
        place = "-" if it.position is None else str(it.position)
        table.add_row(*words, place, f"{it.seconds:.0f}", str(it.tokens), f"{speed:.0f}" if it.generating else "-")
    return whole(table, "name", "model", "engine")


# -- from words to values ---------------------------------------------------------------------------------------------


def _moment(words: str, *, end: bool = False) -> int:
    """In milliseconds since 1970; the `end` of a day is the next one's beginning."""
    begins = day(words)
    return begins * 1000 + end * DAY if begins is not None else _now() - seconds(words, years=100) * 1000


def _now() -> int:
    return time.time_ns() // 1_000_000
