"""What the tests of the ordinary engines share: an image of the engine, and the clone that uses it.

The image is the fake beside this file, or the real one with ENGINE=ollama or ENGINE=vllm `make test`. Tests that need a
fake (to hold a download at a chosen point) are then skipped by name.
"""

import http.client
import json
import os
import shutil
import subprocess
import tempfile
import threading
import urllib.error
import urllib.request
import zipapp
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.support.clone import Tree, clean_environment
from tests.support.processes import ROOT, wait_for

HERE = Path(__file__).parents[1] / "bundle"


@dataclass
class Engine:
    """One engine and its image. `real`: it is the public image. `model` is small enough to fetch in a test."""

    name: str
    image: str
    model: str
    real: bool

    @property
    def variable(self) -> str:
        return f"{self.name.upper()}_IMAGE"


@contextmanager
def engine_image(name: str, real_model: str, python_image: str) -> Iterator[Engine]:
    """Yield the engine to test with. A fake is built and removed."""
    if os.environ.get("TEST_ENGINE") == name:
        yield _real(name, real_model)
        return
    tag = f"stack-test-{name}:{uuid4().hex[:8]}"
    base = ["--build-arg", f"PYTHON_IMAGE={python_image}"]
    with tempfile.TemporaryDirectory() as context:
        shutil.copytree(HERE / name, context, dirs_exist_ok=True)
        shutil.copy(ROOT / "requirements/hub.txt", context)
        _pack(Path(context, name))
        build = ["docker", "build", "--quiet", *base, "--tag", tag, context]
        subprocess.run(build, check=True, capture_output=True, env={**os.environ, "DOCKER_BUILDKIT": "1"})
    try:
        yield Engine(name, tag, "org/some-1B" if name == "vllm" else "some:1b", real=False)
    finally:
        subprocess.run(["docker", "rmi", "--force", tag], check=True, capture_output=True)


def _pack(program: Path) -> None:
    """Make a fake and frames.py one executable file, because the gateway's image for Ollama takes only one program."""
    with tempfile.TemporaryDirectory() as parts:
        shutil.move(program, f"{parts}/__main__.py")
        shutil.copy2(
            ROOT / "tests/support/fakes/frames.py", parts
        )  # with its time, so that the next archive is the same
        zipapp.create_archive(parts, program, interpreter="/usr/bin/env python3")
    program.chmod(0o755)


def _real(name: str, model: str) -> Engine:
    files = ["-f", "compose.yaml", *(["-f", "compose.gpu.yaml"] if name == "vllm" else [])]
    command = ["docker", "compose", "--env-file", "/dev/null", *files, "config", "--format", "json"]
    answer = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, check=True)
    variable = f"{name.upper()}_IMAGE"
    default: str = json.loads(answer.stdout)["services"]["engine"]["build"]["args"][variable]
    image = os.environ.get(variable, default)
    here = subprocess.run(["docker", "image", "inspect", image], capture_output=True, check=False)
    if here.returncode and subprocess.run(["docker", "pull", "--quiet", image], check=False).returncode:
        pytest.fail(
            f"{image} is not here, and no registry hands it out: without ENGINE a stand-in is taken", pytrace=False
        )
    return Engine(name, image, model, real=True)


@dataclass
class Up:
    """`make up`, or another command that brings the stack up: its output so far, and its exit status."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    def wait_said(self, part: str) -> None:
        wait_for(lambda: any(part in line for line in self.lines) or self._over(), deadline=200, message=self.said)
        assert any(part in line for line in self.lines), self.said

    def ended(self) -> int:
        return self.process.wait(250)

    @property
    def said(self) -> str:
        return "".join(self.lines)

    def _over(self) -> bool:
        return self.process.poll() is not None


@contextmanager
def running_up(tree: Tree, *command: str, **env: str) -> Iterator[Up]:
    environment = clean_environment(COMPOSE_PROJECT_NAME=tree.project, **env)
    with subprocess.Popen(
        command or ["scripts/up"], cwd=tree.path, env=environment, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        up = Up(process)
        assert process.stdout
        reader = threading.Thread(target=lambda: up.lines.extend(iter(process.stdout.readline, "")))
        reader.start()
        try:
            yield up
        finally:
            process.terminate()
            reader.join(20)


def send(tree: Tree, path: str, body: Any = None, **env: str) -> tuple[int, Message, str]:
    """Send a GET or POST to the published port of the tree's gateway. Return status, headers and text."""
    port = tree.run("docker", "compose", "port", "gateway", "9000", **env).stdout.rpartition(":")[2].strip()
    headers = {"Authorization": "Bearer dev-key", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            try:
                return answer.status, answer.headers, answer.read().decode()
            except http.client.IncompleteRead as cut:  # the stream has failed
                return answer.status, answer.headers, cut.partial.decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read().decode()


def ask(tree: Tree, path: str, body: Any = None, **env: str) -> tuple[int, dict[str, Any]]:
    """Send a request as `send` does. Return the status and the JSON."""
    status, _, text = send(tree, path, body, **env)
    said: dict[str, Any] = json.loads(text)
    return status, said


def error_of(tree: Tree, path: str, body: Any = None, **env: str) -> tuple[int, str, str, str]:
    """Return the status, Retry-After, code and message of a refused request."""
    status, headers, text = send(tree, path, body, **env)
    error = json.loads(text)["error"]
    return status, headers["retry-after"], error["code"], error["message"]


def log_of(tree: Tree, service: str, **env: str) -> str:
    """Return the log of a service, without the escape sequence that Compose adds."""
    return tree.run("docker", "compose", "logs", "--no-log-prefix", service, **env).stdout.replace("\x1b[2K", "")


def wait_until_healthy(tree: Tree, service: str, **env: str) -> None:
    """Wait until Docker reports the service as healthy, which takes the interval of a health check."""
    container = tree.run("docker", "compose", "ps", "--quiet", service, **env).stdout.strip()
    ask_docker = ["docker", "inspect", "--format", "{{.State.Health.Status}}", container]
    wait_for(lambda: tree.run(*ask_docker).stdout == "healthy\n", deadline=60)
