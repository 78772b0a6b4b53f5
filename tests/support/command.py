"""The `stack` command in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support import forkserver
from tests.support.processes import ROOT, environment


def empty_store(data: Path) -> str:
    """Make a data directory with an empty store, as the start of a gateway does, because the command makes none."""
    data.mkdir(exist_ok=True)
    (data / "stack.db").touch()
    return str(data)


class Command:
    """`stack` with a gateway's settings."""

    def __init__(self, *under: str, **settings: str) -> None:
        self._under = under
        self._env = environment("http://127.0.0.1:1", **settings) | {"COLUMNS": "200"}

    def run(self, *words: str, stdin: str | bytes = "", **env: str) -> subprocess.CompletedProcess[Any]:
        """Run the command. Its output is text, or bytes if `stdin` is bytes."""
        command = [*self._under, sys.executable, "-m", "gateway.cli", *words]
        return forkserver.run(command, stdin=stdin, cwd=ROOT, env=self._env | env)

    def on_terminal(self, columns: int, *words: str) -> str:
        """Return what the command shows on a terminal of that width. It must succeed."""
        ours, its = os.openpty()
        command = [sys.executable, "-m", "gateway.cli", *words]
        env = self._env | {"COLUMNS": str(columns), "TERM": "dumb"}
        with os.fdopen(ours, "rb", buffering=0) as screen, os.fdopen(its, "wb", buffering=0) as terminal:
            with forkserver.popen(command, cwd=ROOT, env=env, stdout=terminal) as process:
                assert process.wait(60) == 0
            os.set_blocking(ours, False)
            return (screen.read(1 << 20) or b"").decode()

    def __call__(self, *words: str) -> str:
        """Return the output of the command. It must succeed."""
        done = self.run(*words)
        assert done.returncode == 0, done.stderr + done.stdout
        return str(done.stdout)

    def json(self, *words: str) -> Any:
        return json.loads(self(*words, "--json"))
