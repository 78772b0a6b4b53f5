"""What every provisioner tells: how far it is, in its log and in a file for the gateway; at the end, that the model is
there, for which the engine waits, or one sentence why not. From the standard library: the images promise no more."""

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

PROVISIONED = Path.home() / "provisioned"  # holds the model's name once it is there; the images' HOME is /models
PROGRESS = Path(os.environ.get("PROGRESS_FILE", "/progress/model.json"))  # read by gateway/progress.py
WRITE_EVERY = 0.5  # seconds between two states of the file,
SAY_EVERY = 2.0  # and between two lines in the log
ALIVE_EVERY = 10.0  # seconds between two signs of life: the checking of a large file takes minutes without a word


class Report:
    """The fetching of one model, told as it happens. While the process lives, the file's time is never old."""

    def __init__(self, model: str) -> None:
        self.model = model
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

    def ready(self) -> int:
        """The model is there: the engine may start. Returns the exit status."""
        replace(PROVISIONED, self.model + "\n")
        self._write(state="ready")
        return 0

    def failed(self, reason: str, detail: object) -> int:
        """It can't be had. The reason says what to do; the detail, for the log alone, may name paths and addresses."""
        sentence = f"The model {self.model} could not be fetched: {reason}, then run 'make up' again."
        self._write(state="failed", message=sentence)
        print(f"{sentence} ({detail})", flush=True)
        return 1

    def _live(self) -> None:
        while True:
            time.sleep(ALIVE_EVERY)
            os.utime(PROGRESS)

    def _write(self, **state: Any) -> None:
        replace(PROGRESS, json.dumps({"model": self.model, **state}))


def provisioned(model: str) -> bool:
    """Whether an earlier run brought this very model."""
    return PROVISIONED.exists() and PROVISIONED.read_text().strip() == model


def replace(path: Path, text: str) -> None:
    """Write a file in one step: whoever reads it sees the old text or the new one."""
    temporary = path.with_suffix(".new")
    temporary.write_text(text)
    temporary.replace(path)
