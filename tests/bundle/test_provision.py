"""The provisioners as plain processes in front of stand-ins: silences, drops, refusals, a full disk, a second run."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.bundle.conftest import ROOT, clean_environment
from tests.processes import free_port

HERE = Path(__file__).parent
GATED = (
    "its owner asks who you are: request access on its page and put the file of a token into HF_TOKEN_FILE, "
    "or set LLM_MODEL to one that needs none, such as Qwen/Qwen3-8B"
)


@dataclass
class Provisioner:
    engine: str
    home: Path

    def run(self, model: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        path = [str(ROOT / "engine"), str(HERE / "vllm")]
        own = {
            "HOME": str(self.home),
            "PATH": f"{HERE / 'ollama'}:{os.environ['PATH']}",
            "PYTHONPATH": ":".join(path),
            "PROGRESS_FILE": str(self.home / "model.json"),
            "HF_TOKEN_PATH": "/dev/null",
            "LLM_MODEL": model,
            "OLLAMA_HOST": f"127.0.0.1:{free_port()}",
            "OLLAMA_NOPRUNE": "1",
            "PROVISION_SILENCE": "0.5",
        }
        program = [sys.executable, str(ROOT / f"engine/{self.engine}/provision.py"), *arguments]
        environment = clean_environment() | own | {"HF_HOME": str(self.home)} | env
        return subprocess.run(program, env=environment, capture_output=True, text=True, timeout=60, check=False)

    @property
    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads((self.home / "model.json").read_text())
        return report

    def ended_well(self, model: str) -> bool:
        told = self.report == {"model": model, "state": "ready"}
        return told and (self.home / "provisioned").read_text() == model + "\n"


@pytest.fixture
def ollama(tmp_path: Path) -> Provisioner:
    return Provisioner("ollama", tmp_path)


@pytest.fixture
def vllm(tmp_path: Path) -> Provisioner:
    return Provisioner("vllm", tmp_path)


@pytest.mark.parametrize("model", ["dropped:1", "refused:1", "silent:1"])
def test_ollama_a_download_that_breaks_off_goes_on_where_it_stopped(ollama: Provisioner, model: str) -> None:
    ran = ollama.run(model)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[:2] == [f"{model}: pulling manifest", f"{model}: 1.00 of 5.00 GB (20%)"]
    (interruption,) = (index for index, line in enumerate(lines) if f"{model}: interrupted (" in line)
    assert lines[interruption].endswith("going on in 2 s")
    assert lines[interruption + 1 :][:2] == [f"{model}: pulling manifest", f"{model}: 3.00 of 5.00 GB (60%)"]
    assert ollama.ended_well(model)


def test_ollama_a_second_run_fetches_nothing(ollama: Provisioner) -> None:
    assert "GB" in ollama.run("some:1").stdout
    assert ollama.run("some:1").stdout == "some:1: already here\n"
    assert ollama.ended_well("some:1")


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("missing:1", "Ollama's library has no such model: correct LLM_MODEL"),
        ("full:1", "the disk is full: make room where Docker keeps its volumes"),
    ],
)
def test_ollama_what_patience_does_not_help_ends_with_a_sentence(ollama: Provisioner, model: str, reason: str) -> None:
    ran = ollama.run(model)
    assert ran.returncode == 1
    sentence = f"The model {model} could not be fetched: {reason}, then run 'make up' again."
    assert ran.stdout.splitlines()[-1].startswith(sentence + " (")
    assert ollama.report == {"model": model, "state": "failed", "message": sentence}
    assert not (ollama.home / "provisioned").exists()


def test_ollama_says_how_much_is_here_already(ollama: Provisioner) -> None:
    assert ollama.run("full:1", "--present").stdout == "0\n"
    ollama.run("full:1")
    assert ollama.run("full:1", "--present").stdout == "8192\n"
    ollama.run("some:1")
    assert ollama.run("some:1", "--present").stdout == "all\n"


def test_vllm_fetches_once(vllm: Provisioner) -> None:
    ran = vllm.run("org/model")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert vllm.ended_well("org/model")
    assert vllm.run("org/model").stdout == "org/model: already here\n"
    assert vllm.run("org/model", "--present").stdout == "all\n"


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("missing/model", "the hub has no such model: correct LLM_MODEL"),
        ("llama3.1:8b", "the hub has no such model: correct LLM_MODEL"),
        ("org/full", "the disk is full: make room where Docker keeps its volumes"),
        ("org/broken", "the download broke off; check this machine's way to the model hub"),
        ("org/gated", GATED),
    ],
)
def test_vllm_ends_with_a_sentence(vllm: Provisioner, model: str, reason: str) -> None:
    ran = vllm.run(model)
    assert ran.returncode == 1, ran.stderr
    sentence = f"The model {model} could not be fetched: {reason}, then run 'make up' again."
    assert ran.stdout.splitlines()[-1].startswith(sentence + " (")
    assert vllm.report == {"model": model, "state": "failed", "message": sentence}


def test_vllm_a_token_opens_a_gated_model(vllm: Provisioner, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("hf_right\n")
    assert vllm.run("org/gated", HF_TOKEN_PATH=str(token)).returncode == 0
    missing = vllm.run("org/other", HF_TOKEN_PATH=str(tmp_path / "nothing"))
    assert "the file of HF_TOKEN_FILE can't be read by uid" in missing.stdout
    assert "hf_right" not in missing.stdout


def test_vllm_says_how_much_is_here_and_goes_on_from_there(vllm: Provisioner) -> None:
    assert vllm.run("org/full", "--present").stdout == "0\n"
    vllm.run("org/full")
    assert vllm.run("org/full", "--present").stdout == "8192\n"
    assert "goes on after part 2" in vllm.run("org/full").stdout
