"""Clone: a copy of the tree as a new user has it, the output of its scripts, and the result of its compose files."""

import atexit
import functools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from tests import READ_BY_THE_STACK
from tests.support.processes import ROOT

OVERRIDES = {"ollama": [], "tiny": ["compose.tiny.yaml"], "vllm": ["compose.gpu.yaml"]}
NOT_NEEDED = ("tests/", "bench/")
OURS = (*READ_BY_THE_STACK, "PYTHON_IMAGE")


def clean_environment(**extra: str) -> dict[str, str]:
    """Return this process's environment without the stack's settings, and with the given ones."""
    return {name: value for name, value in os.environ.items() if not name.startswith(OURS)} | extra


@dataclass
class Tree:
    """A fresh clone, with a Compose project of its own."""

    path: Path
    project: str = field(default_factory=lambda: f"stack-test-{uuid4().hex[:8]}")

    def run(self, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the tree. Both output streams are in stdout."""
        environment = clean_environment(COMPOSE_PROJECT_NAME=self.project, **env)
        return subprocess.run(
            command, cwd=self.path, env=environment, text=True, check=False, timeout=280,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, umask=0o077,
        )  # fmt: skip

    @contextmanager
    def running(self, *command: str) -> Iterator[Iterator[str]]:
        """Run a command that does not end by itself, and yield its lines. It is stopped at the end."""
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
        """Remove containers, networks, volumes and built images, for any engine. Another name keeps the images' layers
        until this process ends, because Docker takes seconds to write them again for the next test."""
        mine = ("--quiet", "--filter", f"label=com.docker.compose.project={self.project}")
        self._remove(("rm", "--force"), "ps", "--all", *mine)
        for kind in ("network", "volume"):
            self._remove((kind, "rm"), kind, "ls", *mine)
        listing = "docker", "image", "ls", "--format={{.ID}} {{.Repository}}:{{.Tag}}", *mine[1:]
        for image, name in map(str.split, self.run(*listing).stdout.splitlines()):
            self.run("docker", "tag", image, f"{_layers()}:{image}")
            self.run("docker", "rmi", name)

    def _remove(self, how: tuple[str, ...], *listing: str) -> None:
        if found := self.run("docker", *listing).stdout.split():
            self.run("docker", *how, *dict.fromkeys(found))


@functools.cache
def _layers() -> str:
    """Return a name for images that keep layers. They are removed when this process has ended, however it ends."""
    name = f"stack-test-layers-{uuid4().hex[:8]}"
    removal = ["sh", "-c", 'cat; docker rmi --force $(docker image ls --quiet "$1")', "sh", name]
    silent = subprocess.DEVNULL
    remover = subprocess.Popen(removal, stdin=subprocess.PIPE, stdout=silent, stderr=silent, start_new_session=True)
    atexit.register(remover.communicate)
    return name


def clone(directory: Path, mask: int = 0o077) -> Tree:
    """Make a fresh clone of the tree as it is now, without ignored files, .env, keys and config.

    Only its owner can read it, as under umask 077, unless another mask is given.
    """
    listing = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in names:
        if name and not name.startswith(NOT_NEEDED) and (ROOT / name).exists():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, directory / name)
    for path in (directory, *directory.rglob("*")):
        path.chmod(path.stat().st_mode & ~mask)
    return Tree(directory)


def write_program(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)


def refuses(tree: Tree, *parts: str, **env: str) -> None:
    """Check that `make up` fails, that its last line is a sentence with these parts, and that it recorded nothing."""
    before = tree.dotenv.read_text() if tree.dotenv.exists() else None
    ran = tree.run("scripts/up", **({"STACK_PUBLISH": "127.0.0.1:0"} | env))
    last = ran.stdout.rstrip().splitlines()[-1]
    assert ran.returncode == 1, ran.stdout
    assert last.startswith("stack: "), ran.stdout
    assert last.endswith((".", ".)")), last
    for part in parts:
        assert part in last, last
    assert (tree.dotenv.read_text() if tree.dotenv.exists() else None) == before


Config = dict[str, Any]


def merged(engine: str, *overrides: str, **env: str) -> Config:
    """Return the compose configuration of a fresh clone: no .env, nothing set."""
    files = [option for file in ["compose.yaml", *OVERRIDES[engine], *overrides] for option in ("-f", file)]
    command = ["docker", "compose", "--env-file", "/dev/null", *files, "config", "--format", "json"]
    answer = subprocess.run(command, cwd=ROOT, env=clean_environment(**env), capture_output=True, check=True)
    config: Config = json.loads(answer.stdout)
    return config
