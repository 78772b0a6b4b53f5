"""Reports: the commands of `stack` about usage, running requests, backup and restore."""

import datetime as dt
import errno
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Annotated

import typer
from rich.live import Live
from rich.table import Table

from gateway.cli import backup as backups
from gateway.cli.backup import BadBackup
from gateway.cli.console import Json, confirmed, day, opened, out, print_json, seconds, whole
from gateway.cli.output import discard
from gateway.errors import BadRequest
from gateway.exchange import Running
from gateway.keys.book import Keybook
from gateway.keys.configured import listed_ids
from gateway.store.store import Store, data_directory
from gateway.usage import running
from gateway.usage.rows import DAY, DIMENSIONS, LISTED, SUMS, UsageBook, check_prunable, dimensions, names, to_csv

usage = typer.Typer(help="Show how much each key used, or delete old usage.", invoke_without_command=True)

Yes = Annotated[bool, typer.Option("--yes", help="do not ask for confirmation")]
TIME = "a day (2027-01-31, UTC) or how long ago (12h, 30d)"


@usage.callback()
def show(
    context: typer.Context,
    *,
    by: Annotated[str, typer.Option(help="what to group by: one or several of " + ", ".join(DIMENSIONS))] = "key,model",
    since: Annotated[str, typer.Option("--from", help=TIME)] = "30d",
    until: Annotated[str | None, typer.Option("--to", help="as for --from; the day itself is included")] = None,
    key: Annotated[str | None, typer.Option(help="only the usage of this key, given by its id")] = None,
    model: Annotated[str | None, typer.Option(help="only the usage of this model")] = None,
    user: Annotated[
        str | None, typer.Option(help="only the usage of this user of a key, given by the pseudonym")
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="print CSV")] = False,
    as_json: Json = False,
) -> None:
    """Sum up the usage. `counted` is the number of requests whose tokens the gateway counted itself. The engine did not
    report them, because the client disconnected or the answer failed."""
    if context.invoked_subcommand:
        return
    try:
        groups = dimensions(by)
    except ValueError as exc:
        raise typer.BadParameter(f"--by {exc}") from None
    if as_csv and as_json:
        raise typer.BadParameter("give either --csv or --json, not both")
    span = _moment(since), _moment(until, end=True) if until else _now() + 1
    if span[0] > span[1]:
        raise typer.BadParameter(f"--from {since} is after " + (f"--to {until}" if until else "now"))
    with opened() as (store, settings):
        rows = UsageBook(store, listed_ids(settings)).totals(groups, *span, key, model, user)
    if as_json:
        print_json(rows)
    elif as_csv:
        sys.stdout.write(to_csv(groups, rows))
    elif not rows:
        out.print("There is no usage in that time.")
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
    *, before: Annotated[str, typer.Option(help=f"delete the rows from before this time: {TIME}")], yes: Yes = False
) -> None:
    """Delete old usage rows permanently. Rows of this month (UTC) cannot be deleted, because quotas are counted from
    them. Gateways delete old rows by themselves: STACK_USAGE_RETENTION_DAYS."""
    moment = _moment(before)
    try:
        check_prunable(moment)
    except BadRequest as exc:
        sys.exit(exc.message)
    words = f"{dt.datetime.fromtimestamp(moment / 1000, dt.UTC):%Y-%m-%d %H:%M UTC}"
    if not confirmed(f"Delete all usage from before {words} permanently?", yes=yes):
        sys.exit("Nothing was deleted. To delete it, use --yes or answer y.")
    with opened() as (store, _):
        deleted = sum(UsageBook(store).prune(moment))
    out.print(f"Deleted {deleted:,} rows from before {words}.")


def top(
    *, once: Annotated[bool, typer.Option("--once", help="show it once and exit")] = False, as_json: Json = False
) -> None:
    """Show the requests that are running on the gateway with this data directory. The view is at most a second old."""
    with opened() as (store, settings):
        whose = dict.fromkeys(listed_ids(settings), LISTED) | {it.id: it.name for it in Keybook(store).list()}
    if as_json:
        print_json([asdict(it) | {"name": whose.get(it.key_id)} for it in running.look(settings.journals)])
    elif once or not out.is_terminal:
        out.print(_running(running.look(settings.journals), whose))
    else:
        with Live(console=out, auto_refresh=False, screen=True) as screen, suppress(KeyboardInterrupt):
            while True:
                screen.update(_running(running.look(settings.journals), whose), refresh=True)
                time.sleep(1)


def backup(file: Annotated[str, typer.Argument(metavar="FILE", help="the file; - is standard output")]) -> None:
    """Write all keys, prompts and usage to a file, while gateways run. Only you can read the file. It reveals no key,
    but keep it secret, because a changed backup can add keys. The usage of the last second may be missing."""
    with opened() as (store, settings):
        try:
            counts = backups.write(store, sys.stdout.buffer) if file == "-" else _write(store, Path(file))
            sys.stdout.flush()  # here, where a full disk is told
        except OSError as exc:
            discard()
            sys.exit(f"The backup cannot be written: {exc.strerror}.")
        backups.note(settings)
    sys.stderr.write(f"The backup holds {_told(counts)}.\n")


def restore(
    file: Annotated[str, typer.Argument(metavar="FILE", help="the file; - is standard input")], *, yes: Yes = False
) -> None:
    """Replace all keys, prompts and usage by a backup, while gateways run. Keys that were created since are gone, and
    keys that were revoked since work again. The file is checked first, and if it is damaged, nothing changes. If there
    is no store yet (a new machine, a lost disk), it is created from the backup."""
    if not confirmed("Replace all keys, prompts and usage by those of the backup?", yes=yes):
        sys.exit("Nothing was restored. To restore it, use --yes or answer y.")
    with (
        opened(new=True) as (store, settings),
        data_directory(settings) as directory,
        tempfile.NamedTemporaryFile(dir=directory) as copy,
    ):
        try:
            counts = backups.restore(store, _readable_twice(file, copy))
        except BadBackup as exc:
            sys.exit(f"{exc} Nothing was changed.")
        except OSError as exc:
            sys.exit(f"The backup cannot be read: {exc.strerror}. Nothing was changed.")
    out.print(f"Restored {_told(counts)}.")


def _readable_twice(file: str, copy: IO[bytes]) -> Path:
    """Return the path of the backup, or of its copy, because a restore reads it twice, and a pipe can be read only
    once."""
    path = Path(file)
    if file != "-" and (path.is_file() or not path.exists()):
        return path
    with nullcontext(sys.stdin.buffer) if file == "-" else path.open("rb") as source:
        shutil.copyfileobj(source, copy)
    copy.flush()
    return Path(copy.name)


def _write(store: Store, path: Path) -> Counter[str]:
    """Write the backup to a file that appears when it is complete, and that only its owner can read. A pipe or device
    is written to directly, because a file would take its place. A symbolic link stays."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            return backups.write(store, file)
    path = Path(os.path.realpath(path))
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".stack-backup-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            counts = backups.write(store, file)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)
    return counts


def _told(counts: Counter[str]) -> str:
    return f"{counts['keys']:,} keys and {counts['usage']:,} usage rows"


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
        place = str(it.position or it.waits or "-")
        table.add_row(*words, place, f"{it.seconds:.0f}", str(it.tokens), f"{speed:.0f}" if it.generating else "-")
    return whole(table, "name", "model", "engine")


# -- from options to values -------------------------------------------------------------------------------------------


def _moment(words: str, *, end: bool = False) -> int:
    """Read a day or a duration before now, in milliseconds since 1970. With `end`, a day means the start of the next
    one."""
    begins = day(words)
    return begins * 1000 + end * DAY if begins is not None else _now() - seconds(words, years=100) * 1000


def _now() -> int:
    return time.time_ns() // 1_000_000
