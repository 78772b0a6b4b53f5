"""What every provisioner shares: its patience, and what it tells. How far it is, in its log and in a file for the
gateway; at the end that the model is there, for which the engine waits, or one sentence why not. From the standard
library: the images promise no more."""

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

PROVISIONED = Path.home() / "provisioned"  # holds the model's name once it is there; the images' HOME is /models
PROGRESS = Path(os.environ.get("PROGRESS_FILE", "/progress/model.json"))  # read by gateway/progress.py
ATTEMPTS = int(os.environ.get("PROVISION_ATTEMPTS", "5"))  # in a row that bring not one byte; then it is given up
PAUSE = float(
    os.environ.get("PROVISION_PAUSE", "2")
)  # seconds before the second attempt, twice that before the third …
SILENCE = float(os.environ.get("PROVISION_SILENCE", "600"))  # seconds that bring not one byte; then a new attempt
WRITE_EVERY = 0.5  # seconds between two states of the file,
SAY_EVERY = 2.0  # and between two lines in the log
ALIVE_EVERY = 10.0  # seconds between two signs of life: the checking of a large file takes minutes without a word
FULL_DISK = "the disk is full: make room where Docker keeps its volumes"


class Report:
    """The fetching of one model, told as it happens. While the process lives, the file's time is never old."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.completed = 0  # bytes
        self._line = ""
        self._said_at = self._written_at = float("-inf")
        self._write(state="fetching")
        threading.Thread(target=self._live, daemon=True).start()

    def say(self, line: str) -> None:
        """Write a line to the log, unless it was the last one too."""
        if line != self._line:
            print(f"{self.model}: {line}", flush=True)
            self._line = line

    def fetching(self, completed: int, total: int) -> None:
        """So many bytes of so many. Called as often as one likes."""
        self.completed = completed
        now = time.monotonic()
        if now - self._written_at >= WRITE_EVERY:
            self._written_at = now
            self._write(state="fetching", completed=completed, total=total)
        if now - self._said_at >= SAY_EVERY:
            self._said_at = now
            self.say(f"{completed / 1e9:.2f} of {total / 1e9:.2f} GB ({100 * completed // max(total, 1)}%)")

    def interrupted(self, reason: str) -> None:
        """Another attempt follows, and its first bytes are told at once."""
        self.say(reason)
        self._said_at = self._written_at = float("-inf")

    def ready(self) -> None:
        """The model is there: the engine may start. Raises OSError."""
        replace(PROVISIONED, self.model + "\n")
        self._write(state="ready")

    def failed(self, reason: str, detail: object) -> None:
        """It can't be had. The reason says what to do; the detail, for the log alone, may name paths and addresses."""
        sentence = f"The model {self.model} could not be fetched: {reason}, then run 'make up' again."
        self._write(state="failed", message=sentence)
        print(f"{sentence} ({' '.join(str(detail).split())})", flush=True)

    def _live(self) -> None:
        while True:
            time.sleep(ALIVE_EVERY)
            with suppress(OSError):
                os.utime(PROGRESS)

    def _write(self, **state: Any) -> None:
        text = json.dumps({"model": self.model, **state})
        try:
            replace(PROGRESS, text)
        except OSError:
            # A full disk, which is to be told of too, has no room for a second file; the first one's block is there.
            with suppress(OSError), PROGRESS.open("r+") as file:
                file.write(text.ljust(PROGRESS.stat().st_size))


def provision(model: str, fetch: Callable[[Report], None], meaning: Callable[[Exception], tuple[str, bool]]) -> int:
    """Fetch, again and again while that brings anything. Returns the exit status.

    `meaning` puts what went wrong into words for a person, and says whether another attempt may help.
    """
    report = Report(model)
    attempt = before = 0
    while True:
        try:
            if provisioned(model):
                report.say("already here")
            else:
                fetch(report)
            report.ready()
        except Exception as exc:  # noqa: BLE001 - whatever a library raises, somebody waits for the sentence
            full = isinstance(exc, OSError) and exc.errno == errno.ENOSPC
            reason, again = (FULL_DISK, False) if full else meaning(exc)
            attempt = 1 if report.completed > before else attempt + 1
            before = report.completed
            if not again or attempt >= ATTEMPTS:
                report.failed(reason, exc)
                return 1
            pause = PAUSE * 2 ** (attempt - 1)
            report.interrupted(f"interrupted ({exc}); going on in {pause:g} s")
            time.sleep(pause)
        else:
            return 0


def provisioned(model: str) -> bool:
    """Whether an earlier run brought this very model."""
    return PROVISIONED.exists() and PROVISIONED.read_text().strip() == model


def weights(model: str) -> Path:
    """The directory of a model's files, for an engine that keeps none of its own."""
    return Path.home() / "weights" / model.replace("/", "--") / "files"


def replace(path: Path, text: str) -> None:
    """Write a file in one step: whoever reads it sees the old text or the new one."""
    temporary = path.with_suffix(".new")
    temporary.write_text(text)
    temporary.replace(path)
