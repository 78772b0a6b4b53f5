"""Running: write the running requests of each worker to a small file beside its journal, once a second, and read these
files."""

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import orjson

from gateway.exchange import Running

STALE = 5.0  # seconds after which a file is not used any more: its worker is dead, or hangs
FILE = "running.json"


def tell(directory: Path, running: Sequence[Running]) -> None:
    """Write the running requests of this worker into its journal's directory. Raises OSError."""
    line = orjson.dumps({"at": time.monotonic(), "running": running}) + b"\n"
    file = os.open(directory / FILE, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        # The file is overwritten, because a replacement would be a write to the disk. A reader may find an incomplete
        # line.
        os.pwrite(file, line, 0)
        os.ftruncate(file, len(line))
    finally:
        os.close(file)


def read(directory: Path, *, within: float = float("inf")) -> list[Running]:
    """Return what a worker reported last, if that is not older than `within` seconds."""
    with suppress(OSError, orjson.JSONDecodeError):
        said = orjson.loads((directory / FILE).read_bytes().partition(b"\n")[0])
        if time.monotonic() - said["at"] < within:
            return [Running(**it) for it in said["running"]]
    return []


def look(home: Path) -> list[Running]:
    """Return the running requests of all workers, the oldest first."""
    directories = list(home.iterdir()) if home.is_dir() else []
    found = [it for directory in directories for it in read(directory, within=STALE)]
    return sorted(found, key=lambda it: -it.seconds)
