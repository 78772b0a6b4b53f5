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

import docker
import httpx
import openai
import pytest
from docker.models.containers import Container
from testcontainers.compose import DockerCompose

from tests.processes import AUTH, KEY, ROOT, wait_for

QUICK = {"RES_OPTIONS": "timeout:1 attempts:1"}  # a name that nobody resolves is found out about at once
FILES = ["compose.yaml", "compose.tiny.yaml"]


class Stack:
    """A running stack: where it is, and its containers."""

    def __init__(self, compose: DockerCompose, project: str) -> None:
        self.compose = compose
        self.project = project
        self.docker = docker.from_env()
        self.port = int(compose.get_service_port("gateway", 9000) or 0)
        self.url = f"http://127.0.0.1:{self.port}"

    def container(self, service: str) -> Container:
        container_id = self.compose.get_container(service, include_all=True).ID
        assert container_id
        return self.docker.containers.get(container_id)

    def address(self, service: str, network: str) -> str:
        networks = self.container(service).attrs["NetworkSettings"]["Networks"]
        address: str = networks[f"{self.project}_{network}"]["IPAddress"]
        assert address
        return address

    def python(self, service: str, code: str) -> str:
        """Run Python in a service's container and return what it prints."""
        status, output = self.container(service).exec_run(["python", "-c", code], environment=QUICK)
        assert status == 0, output.decode()
        text: str = output.decode().strip()
        return text

    def environment(self) -> dict[str, str]:
        """Where scripts mean this stack."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("STACK_", "LLM_"))}
        return kept | {"COMPOSE_PROJECT_NAME": self.project, "COMPOSE_FILE": ":".join(FILES)}

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=AUTH, timeout=200)

    def wait_until_ready(self) -> None:
        """A restarted gateway has a new port when the host's was chosen by Docker."""

        def ready() -> bool:
            try:
                self.port = int(self.compose.get_service_port("gateway", 9000) or 0)
                self.url = f"http://127.0.0.1:{self.port}"
                return httpx.get(self.url + "/readyz").status_code == 200
            except Exception:  # noqa: BLE001  Docker and HTTP each have their own ways of saying "not yet"
                return False

        wait_for(ready, deadline=120, message="the stack did not become ready again")


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    project = f"stack-test-{uuid4().hex[:8]}"
    env_file = tmp_path_factory.mktemp("stack") / "env"
    settings = {
        "COMPOSE_PROJECT_NAME": project,
        "STACK_PUBLISH": "127.0.0.1:0",
        "STACK_API_KEYS": KEY,
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
def client(stack: Stack) -> openai.OpenAI:
    """The official client with base URL and key, and nothing else."""
    return openai.OpenAI(base_url=stack.url + "/v1", api_key=KEY)
