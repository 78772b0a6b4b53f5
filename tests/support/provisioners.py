"""Provisioners: the programs that fetch models, as plain processes in front of stand-ins for Ollama and the hub."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.clone import clean_environment
from tests.support.processes import ROOT, free_port

HERE = ROOT / "tests/bundle"


@dataclass
class Provisioner:
    engine: str
    home: Path
    settings: dict[str, str] = field(default_factory=dict)

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, str(ROOT / f"engine/{self.engine}/provision.py"), *arguments]

    def environment(self, model: str, **env: str) -> dict[str, str]:
        own = {
            "HOME": str(self.home),
            "PATH": f"{HERE / 'ollama'}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT / "engine"),
            "PROGRESS_FILE": str(self.home / "model.json"),
            "HF_TOKEN_PATH": "/dev/null",
            "LLM_MODEL": model,
            "OLLAMA_HOST": f"127.0.0.1:{free_port()}",
            "OLLAMA_NOPRUNE": "1",
            "PROVISION_SILENCE": "0.5",
            "PROVISION_PAUSE": "0.1",
            "PROVISION_ATTEMPTS": "2",
        }
        return clean_environment() | own | self.settings | env

    def run(self, model: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        environment = self.environment(model, **env)
        return subprocess.run(
            self.command(*arguments), env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    def run_and_stop(self, model: str, far: str) -> int:
        """Run until it is so far, then SIGTERM, as `docker stop` sends it. Returns the exit status."""
        environment = self.environment(model)
        with subprocess.Popen(self.command(), env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            assert any(far in line for line in process.stdout)
            process.send_signal(signal.SIGTERM)
            return process.wait(30)

    def run_on_a_disk_of(self, size: str, model: str, **env: str) -> subprocess.CompletedProcess[str]:
        """With everything on one disk of that size. What it tells the gateway is in stderr."""
        small = (
            f'mount -t tmpfs -o size={size} none "$HOME" && cd "$HOME" || exit 9; "$@"; status=$?; '
            'cat "$PROGRESS_FILE" >&2; exit $status'
        )
        return subprocess.run(
            ["unshare", "--map-root-user", "--mount", "sh", "-c", small, "sh", *self.command()],
            env=self.environment(model, **env), capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    @property
    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads((self.home / "model.json").read_text())
        return report

    def ended_well(self, model: str) -> bool:
        told = self.report == {"model": model, "state": "ready"}
        return told and model in (self.home / "provisioned").read_text().splitlines()

    def failed(self, ran: subprocess.CompletedProcess[str], model: str, reason: str) -> bool:
        """The sentence is in the log and in what the gateway reads."""
        sentence = f"The model {model} could not be fetched: {reason}, then run 'make up' again."
        assert ran.returncode == 1, ran.stdout + ran.stderr
        assert ran.stdout.splitlines()[-1].startswith(sentence + " ("), ran.stdout
        return self.report == {"model": model, "state": "failed", "message": sentence}


def ollama_provisioner(home: Path) -> Provisioner:
    # Beside the stand-in's program has to be frames.py, as in its image.
    beside = os.pathsep.join(str(ROOT / it) for it in ("engine", "tests/support/fakes"))
    return Provisioner("ollama", home, {"PYTHONPATH": beside})


@contextmanager
def running_hub() -> Iterator[str]:
    """Run the stand-in for the model hub, and yield its address."""
    with subprocess.Popen(
        [sys.executable, str(HERE / "vllm/hub")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        process.kill()


def vllm_provisioner(home: Path, hub: str) -> Provisioner:
    return Provisioner("vllm", home, {"HF_ENDPOINT": hub, "HF_HOME": str(home)})
