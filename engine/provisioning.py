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
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

# Holds the name of each complete model, one in a line; HOME in the images is /models
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


class Reports:
    """Report the downloads of all models in one file. The time of the file shows that the process is alive."""

    def __init__(self, models: Sequence[str]) -> None:
        self._states: dict[str, dict[str, Any]] = {it: {"model": it, "state": "fetching"} for it in models}
        self.failures: list[str] = []  # a sentence for each model that could not be fetched
        self._write()
        threading.Thread(target=self._live, daemon=True).start()

    def tell(self, model: str, **state: Any) -> None:
        """Replace the report on one model."""
        self._states[model] = {"model": model, **state}
        self._write()

    def _live(self) -> None:
        while True:
            time.sleep(ALIVE_EVERY)
            with suppress(OSError):
                os.utime(PROGRESS)

    def _write(self) -> None:
        states = list(self._states.values())
        text = json.dumps(states[0] if len(states) == 1 else {"models": states})
        try:
            replace(PROGRESS, text)
        except OSError:
            # The file is overwritten, because a full disk, which must be reported too, has no space for a second file.
            with suppress(OSError), PROGRESS.open("r+") as file:
                file.write(text.ljust(PROGRESS.stat().st_size))


class Report:
    """Report the download of one model while it runs."""

    def __init__(self, model: str, reports: Reports) -> None:
        self.model = model
        self.completed = 0  # bytes
        self._reports = reports
        self._line = ""
        self._said_at = self._written_at = float("-inf")

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
            self._reports.tell(self.model, state="fetching", completed=completed, total=total)
        if now - self._said_at >= SAY_EVERY:
            self._said_at = now
            self.say(f"{completed / 1e9:.2f} of {total / 1e9:.2f} GB ({100 * completed // max(total, 1)}%)")

    def interrupted(self, reason: str) -> None:
        """Report that another attempt follows. The first progress of that attempt is reported at once."""
        self.say(reason)
        self._said_at = self._written_at = float("-inf")

    def ready(self) -> None:
        """Report that the model is complete, so that an engine may start with it. Raises OSError."""
        if not provisioned(self.model):
            replace(PROVISIONED, "".join(f"{it}\n" for it in (*complete(), self.model)))
        self._reports.tell(self.model, state="ready")

    def failed(self, reason: str, detail: object) -> None:
        """Report that the model cannot be fetched. `reason` says what to do. `detail` is only for the log, because it
        may have paths and addresses."""
        sentence = f"The model {self.model} could not be fetched: {reason}, then run 'make up' again."
        self._reports.tell(self.model, state="failed", message=sentence)
        self._reports.failures.append(f"{sentence} ({' '.join(str(detail).split())})")
        print(self._reports.failures[-1], flush=True)


def provision(fetch: Callable[[Report], None], meaning: Callable[[Exception], tuple[str, bool]]) -> int:
    """Fetch all wanted models, one after another. A model that cannot be fetched does not keep the others from being
    fetched. Returns the exit status.

    `meaning` describes an error for a person, and says whether another attempt may help.
    """
    models = wanted()
    reports = Reports(models)
    for model in models:
        _provision(Report(model, reports), fetch, meaning)
    if reports.failures and len(models) > 1:  # the last line of the log is what `make up` shows
        print(" ".join(reports.failures), flush=True)
    return 1 if reports.failures else 0


def wanted() -> list[str]:
    """Return the names in LLM_MODELS, each once, or the one in LLM_MODEL."""
    several = [name.strip() for name in os.environ.get("LLM_MODELS", "").split(",") if name.strip()]
    return list(dict.fromkeys(several)) or [os.environ["LLM_MODEL"]]


def _provision(
    report: Report, fetch: Callable[[Report], None], meaning: Callable[[Exception], tuple[str, bool]]
) -> None:
    """Fetch one model, and try again while an attempt brings new bytes."""
    attempt = most = 0
    while True:
        try:
            if provisioned(report.model):
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
                return report.failed(reason, exc)
            pause = PAUSE * 2 ** (attempt - 1)
            report.interrupted(f"interrupted ({exc}); continuing in {pause:g} s")
            time.sleep(pause)
        else:
            return None


def provisioned(model: str) -> bool:
    """Return whether an earlier run has fetched this model."""
    return model in complete()


def complete() -> list[str]:
    """Return the names of the models that are complete, in the order in which they were fetched."""
    return PROVISIONED.read_text().split() if PROVISIONED.exists() else []


def forget(models: Sequence[str]) -> None:
    """Take models out of those that are complete, because their files are removed. Raises OSError."""
    replace(PROVISIONED, "".join(f"{it}\n" for it in complete() if it not in models))


def weights(model: str) -> Path:
    """Return the directory of a model's files, for an engine that has no storage of its own."""
    return Path.home() / "weights" / model.replace("/", "--") / "files"


def replace(path: Path, text: str) -> None:
    """Write a file in one step: a reader sees the old text or the new one."""
    temporary = path.with_suffix(".new")
    temporary.write_text(text)
    temporary.replace(path)
