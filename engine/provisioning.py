"""Provisioning: the retries and the reports that every provisioner shares.

A provisioner reports its progress in its log and in a file for the gateway. At the end it reports that the model is
there, for which the engine waits, or the reason of a failure. This module needs only the standard library, because the
images have nothing else.
"""

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

# Holds the model's name when the model is complete; HOME in the images is /models
PROVISIONED = Path.home() / "provisioned"
PROGRESS = Path(os.environ.get("PROGRESS_FILE", "/progress/model.json"))  # read by gateway/upstream/progress.py
# Attempts in a row without one new byte, after which the download fails
ATTEMPTS = int(os.environ.get("PROVISION_ATTEMPTS", "5"))
PAUSE = float(os.environ.get("PROVISION_PAUSE", "2"))  # seconds before the second attempt; the pause doubles each time
# Seconds without one byte, after which a new attempt begins
SILENCE = float(os.environ.get("PROVISION_SILENCE", "600"))
WRITE_EVERY = 0.5  # seconds between two updates of the file
SAY_EVERY = 2.0  # seconds between two lines in the log
# Seconds between two updates of the file's time, because checking a large file takes minutes without progress
ALIVE_EVERY = 10.0
FULL_DISK = "the disk is full: free some space where Docker keeps its volumes"


class Report:
    """Report the download of one model while it runs. The time of the file shows that the process is alive."""

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
        """Report `completed` of `total` bytes. It may be called as often as the caller likes."""
        self.completed = completed
        now = time.monotonic()
        if now - self._written_at >= WRITE_EVERY:
            self._written_at = now
            self._write(state="fetching", completed=completed, total=total)
        if now - self._said_at >= SAY_EVERY:
            self._said_at = now
            self.say(f"{completed / 1e9:.2f} of {total / 1e9:.2f} GB ({100 * completed // max(total, 1)}%)")

    def interrupted(self, reason: str) -> None:
        """Report that another attempt follows. The first progress of that attempt is reported at once."""
        self.say(reason)
        self._said_at = self._written_at = float("-inf")

    def ready(self) -> None:
        """Report that the model is complete, so that the engine may start. Raises OSError."""
        replace(PROVISIONED, self.model + "\n")
        self._write(state="ready")

    def failed(self, reason: str, detail: object) -> None:
        """Report that the model cannot be fetched. `reason` says what to do. `detail` is only for the log, because it
        may have paths and addresses."""
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
            # The file is overwritten, because a full disk, which must be reported too, has no space for a second file.
            with suppress(OSError), PROGRESS.open("r+") as file:
                file.write(text.ljust(PROGRESS.stat().st_size))


def provision(model: str, fetch: Callable[[Report], None], meaning: Callable[[Exception], tuple[str, bool]]) -> int:
    """Fetch the model, and try again while an attempt brings new bytes. Returns the exit status.

    `meaning` describes an error for a person, and says whether another attempt may help.
    """
    report = Report(model)
    attempt = most = 0
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
            # Only more bytes than ever before are progress. Bytes that were dropped for their wrong content and fetched
            # again are not.
            attempt = 1 if report.completed > most else attempt + 1
            most = max(most, report.completed)
            if not again or attempt >= ATTEMPTS:
                report.failed(reason, exc)
                return 1
            pause = PAUSE * 2 ** (attempt - 1)
            report.interrupted(f"interrupted ({exc}); continuing in {pause:g} s")
            time.sleep(pause)
        else:
            return 0


def provisioned(model: str) -> bool:
    """Return whether an earlier run has fetched this model."""
    return PROVISIONED.exists() and PROVISIONED.read_text().strip() == model


def weights(model: str) -> Path:
    """Return the directory of a model's files, for an engine that has no storage of its own."""
    return Path.home() / "weights" / model.replace("/", "--") / "files"


def replace(path: Path, text: str) -> None:
    """Write a file in one step: a reader sees the old text or the new one."""
    temporary = path.with_suffix(".new")
    temporary.write_text(text)
    temporary.replace(path)
