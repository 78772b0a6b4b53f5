"""The whole stack in containers: the gateway's image in front of llama.cpp with a real 135M model.

One stack serves all tests of the session, under a Compose project, a port and images of its own; a stack that is
up on this machine is not disturbed. It is removed whatever ends the session.
"""

import os
import signal
import subprocess
from collections.abc import Iterator
from types import FrameType
from typing import Any
from uuid import uuid4

import openai
import pytest
from testcontainers.compose import DockerCompose

from tests.support.keys import ADMIN
from tests.support.processes import KEY, ROOT
from tests.support.stack import FILES, Stack


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    project = f"stack-test-{uuid4().hex[:8]}"
    env_file = tmp_path_factory.mktemp("stack") / "env"
    settings = {
        "COMPOSE_PROJECT_NAME": project,
        "STACK_PUBLISH": "127.0.0.1:0",
        "STACK_API_KEYS": KEY,
        "STACK_ADMIN_KEYS": ADMIN,
        "STACK_DRAIN_DELAY": "1",
        "STACK_GRACE": "100",
        "LLM_IDLE_TIMEOUT": "15",
        "PYTHON_IMAGE": os.environ.get("PYTHON_IMAGE", "stack-base:trixie"),
    }
    env_file.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    saved = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(("STACK_", "LLM_", "COMPOSE_"))}
    compose = DockerCompose(str(ROOT), FILES, build=True, wait=True, env_file=str(env_file))
    previous = signal.signal(signal.SIGTERM, _interrupt)  # so that a terminated session cleans up too
    try:
        try:
            compose.start()
        except subprocess.CalledProcessError as exc:  # testcontainers keeps what Compose said to itself
            pytest.fail(f"the stack did not come up: {exc.stderr.decode()[-3000:]}", pytrace=False)
        stack = Stack(compose, project)
        stack.wait_until_ready()
        yield stack
    finally:
        command = [*compose.compose_command_property, "down", "--volumes", "--rmi", "local", "--timeout", "5"]
        subprocess.run(command, cwd=ROOT, check=False, capture_output=True)
        signal.signal(signal.SIGTERM, previous)
        os.environ.update(saved)


def _interrupt(_: int, __: FrameType | None) -> Any:
    raise KeyboardInterrupt


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    """The official client with base URL and key, and nothing else."""
    with openai.OpenAI(base_url=stack.url + "/v1", api_key=KEY) as client:
        yield client
