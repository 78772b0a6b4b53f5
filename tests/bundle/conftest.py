"""Fixtures of the bundle's tests: copies of the tree, which leave this clone's .env and a stack that is up alone."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import pytest

ROOT = Path(__file__).parents[2]
OVERRIDES = {"ollama": [], "tiny": ["compose.tiny.yaml"], "vllm": ["compose.gpu.yaml"]}
NOT_COPIED = shutil.ignore_patterns(".git", ".venv*", ".env", ".secrets", "*_cache", "__pycache__", "tests", "bench")
# What the scripts use of a system.
NEEDED = "bash env dirname sed awk grep tail head tr id sort df cat mktemp mv ss sleep rm".split()  # noqa: SIM905
OURS = ("STACK_", "LLM_", "COMPOSE_", "OLLAMA_", "VLLM_", "HF_", "ENGINE", "PYTHON_IMAGE", "MAKE", "MFLAGS")


def clean_environment(**extra: str) -> dict[str, str]:
    """This process's environment without anything the stack reads, and with what is given."""
    return {name: value for name, value in os.environ.items() if not name.startswith(OURS)} | extra


@dataclass
class Tree:
    """A fresh clone, with a Compose project of its own."""

    path: Path
    project: str = field(default_factory=lambda: f"stack-test-{uuid4().hex[:8]}")

    def run(self, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command in it. What it says, on either stream, is in stdout."""
        environment = clean_environment(COMPOSE_PROJECT_NAME=self.project, **env)
        return subprocess.run(
            command, cwd=self.path, env=environment, text=True, check=False, timeout=280,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    @contextmanager
    def running(self, *command: str) -> Iterator[Iterator[str]]:
        """A command that does not end by itself, as the lines it says; it is stopped at the end."""
        environment = clean_environment(COMPOSE_PROJECT_NAME=self.project)
        with subprocess.Popen(command, cwd=self.path, env=environment, text=True, stdout=subprocess.PIPE) as process:
            assert process.stdout
            try:
                yield iter(process.stdout.readline, "")
            finally:
                process.terminate()

    @property
    def dotenv(self) -> Path:
        return self.path / ".env"

    def remove_everything(self) -> None:
        """Containers, networks, volumes and the images that were built, whatever the engine was."""
        mine = ("--quiet", "--filter", f"label=com.docker.compose.project={self.project}")
        self._remove(("rm", "--force"), "ps", "--all", *mine)
        for kind in ("network", "volume"):
            self._remove((kind, "rm"), kind, "ls", *mine)
        self._remove(("rmi", "--force"), "image", "ls", *mine)

    def _remove(self, how: tuple[str, ...], *listing: str) -> None:
        if found := self.run("docker", *listing).stdout.split():
            self.run("docker", *how, *dict.fromkeys(found))


@pytest.fixture(scope="module")
def python_image() -> str:
    """The base of the images built here; scripts/test has seen to it that it is there."""
    return os.environ.get("PYTHON_IMAGE", "stack-base:trixie")


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Tree]:
    tree = Tree(shutil.copytree(ROOT, tmp_path / "clone", ignore=NOT_COPIED))
    yield tree
    if tree.dotenv.exists():  # only `make up`, shortly before it starts something, writes one
        tree.remove_everything()


@pytest.fixture
def black_hole() -> Iterator[str]:
    """The address of a registry that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as hole:
        yield f"127.0.0.1:{hole.getsockname()[1]}"


@pytest.fixture
def closed_port() -> str:
    """An address of this machine where nothing listens: a registry that does not exist."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A directory for PATH with what the scripts use of a system, and no docker: tests add what they need."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for name in NEEDED:
        if program := shutil.which(name):
            (directory / name).symlink_to(program)
    return directory


def write_program(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
