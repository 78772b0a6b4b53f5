"""Live: what each worker is at, in a small file beside its journal, written once a second while there is something."""

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import orjson

from gateway.exchange import Running

STALE = 5.0  # seconds after which a file says nothing any more: its worker is dead, or hangs
FILE = "running.json"


def tell(directory: Path, running: Sequence[Running]) -> None:
    """Write down what runs in this worker, whose journal is there. Raises OSError."""
    line = orjson.dumps({"at": time.monotonic(), "running": running}) + b"\n"
    file = os.open(directory / FILE, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        # In place: a file that is replaced is one that the disk has to write. A reader may meet a line half written.
        os.pwrite(file, line, 0)
        os.ftruncate(file, len(line))
    finally:
        os.close(file)


def read(directory: Path, *, within: float = float("inf")) -> list[Running]:
    """What that worker said last, if that isn't older than `within` seconds."""
    with suppress(OSError, orjson.JSONDecodeError):
        said = orjson.loads((directory / FILE).read_bytes().partition(b"\n")[0])
        if time.monotonic() - said["at"] < within:
            return [Running(**it) for it in said["running"]]
    return []


def look(home: Path) -> list[Running]:
    """What runs in all workers, the oldest first."""
    directories = list(home.iterdir()) if home.is_dir() else []
    found = [it for directory in directories for it in read(directory, within=STALE)]
    return sorted(found, key=lambda it: -it.seconds)
