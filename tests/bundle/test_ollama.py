"""The unaltered compose.yaml with a stand-in for Ollama's image: the model is fetched, waited for, served, and kept."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from tests.bundle.conftest import Tree
from tests.bundle.test_up import post, said_by

STAND_IN = Path(__file__).parent / "ollama"


@pytest.fixture(scope="module")
def image(python_image: str) -> Iterator[str]:
    name = f"stack-test-ollama:{uuid4().hex[:8]}"
    build = ["docker", "build", "--quiet", "--build-arg", f"PYTHON_IMAGE={python_image}", "--tag", name, str(STAND_IN)]
    subprocess.run(build, check=True, capture_output=True, env={**os.environ, "DOCKER_BUILDKIT": "1"})
    yield name
    subprocess.run(["docker", "rmi", "--force", name], check=True, capture_output=True)


def test_from_fetching_the_model_to_switching_the_engine(tree: Tree, image: str, python_image: str) -> None:
    """A download that breaks off goes on where it stopped; a second `up` fetches nothing; ENGINE=tiny takes over."""
    settings = {"OLLAMA_IMAGE": image, "PYTHON_IMAGE": python_image, "LLM_MODEL": "flaky:1"}
    ran = tree.run("scripts/up", STACK_PUBLISH="127.0.0.1:0", **settings)
    assert ran.returncode == 0, ran.stdout
    assert "==> waiting: model: flaky:1: " in ran.stdout
    assert "COMPOSE_FILE=compose.yaml" in tree.dotenv.read_text().splitlines()

    log = tree.run("docker", "compose", "logs", "--no-log-prefix", "provision", **settings).stdout
    assert "flaky:1: 1.00 of 5.00 GB (20%)" in log
    assert "flaky:1: interrupted (read: connection reset by peer)" in log
    assert log.count("(20%)") == 1
    assert "flaky:1: 3.00 of 5.00 GB (60%)" in log
    assert "waiting for the model flaky:1" in tree.run("docker", "compose", "logs", "engine", **settings).stdout

    status, text = post(*said_by(ran.stdout), "/chat/completions", messages=[{"role": "user", "content": "Who?"}])
    assert (status, "I am flaky:1." in text) == (200, True), text

    down = tree.run("docker", "compose", "down", **settings)
    assert down.returncode == 0, down.stdout
    again = tree.run("scripts/up", STACK_PUBLISH="127.0.0.1:0", **settings)
    assert again.returncode == 0, again.stdout
    log = tree.run("docker", "compose", "logs", "--no-log-prefix", "provision", **settings).stdout
    assert "flaky:1: already here" in log
    assert "pulling" not in log

    tiny = tree.run("scripts/up", STACK_PUBLISH="127.0.0.1:0", ENGINE="tiny", PYTHON_IMAGE=python_image)
    assert tiny.returncode == 0, tiny.stdout
    running = tree.run("docker", "ps", "--all", "--filter", f"name={tree.project}", "--format", "{{.Names}}").stdout
    assert set(running.split()) == {f"{tree.project}-engine-1", f"{tree.project}-gateway-1"}
    assert "COMPOSE_FILE=compose.yaml:compose.tiny.yaml" in tree.dotenv.read_text().splitlines()


def test_a_model_that_does_not_exist_ends_with_a_sentence(tree: Tree, image: str, python_image: str) -> None:
    settings = {"OLLAMA_IMAGE": image, "PYTHON_IMAGE": python_image, "LLM_MODEL": "missing:1"}
    ran = tree.run("scripts/up", STACK_PUBLISH="127.0.0.1:0", **settings)
    assert ran.returncode == 1
    assert "Ollama's library has no such model: correct LLM_MODEL" in ran.stdout.splitlines()[-1]
