"""Stack: the whole stack in containers while it runs, and long streams through it."""

import os
import threading
from typing import Any
from uuid import uuid4

import docker
import httpx
from docker.models.containers import Container
from testcontainers.compose import DockerCompose

from tests.support.processes import AUTH, KEY, events, wait_for

QUICK = {"RES_OPTIONS": "timeout:1 attempts:1"}  # a name that does not exist fails at once
FILES = ["compose.yaml", "compose.tiny.yaml"]


class Stack:
    """A running stack: its address and its containers."""

    def __init__(self, compose: DockerCompose, project: str) -> None:
        self.compose = compose
        self.project = project
        self.docker = docker.from_env()
        self._find()

    def _find(self) -> None:
        (published,) = self.container("gateway").ports["9000/tcp"]
        self.port = int(published["HostPort"])
        self.url = f"http://127.0.0.1:{self.port}"

    def container(self, service: str) -> Container:
        """The container of a service, running or not."""
        about = {"project": self.project, "service": service, "oneoff": "False"}
        labels = [f"com.docker.compose.{name}={value}" for name, value in about.items()]
        (found,) = self.docker.containers.list(all=True, filters={"label": labels})
        return found

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
        """The environment with which scripts act on this stack."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("STACK_", "LLM_"))}
        return kept | {"COMPOSE_PROJECT_NAME": self.project, "COMPOSE_FILE": ":".join(FILES)}

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=AUTH, timeout=200)

    def wait_until_ready(self) -> None:
        """Wait until the gateway answers. A restarted gateway has a new port if Docker chose the host's port."""

        def ready() -> bool:
            try:
                self._find()
                return httpx.get(self.url + "/readyz").status_code == 200
            except Exception:  # noqa: BLE001  Docker and HTTP each have their own ways of saying "not yet"
                return False

        wait_for(ready, deadline=120, message="the stack did not become ready again")


QUESTION: Any = [{"role": "user", "content": "Count from 1 to 5."}]
BUSY = (
    "import json, urllib.request as u;"
    "print(sum(s['is_processing'] for s in json.load(u.urlopen('http://127.0.0.1:8080/slots'))))"
)


LONG = {
    "messages": [{"role": "user", "content": "Write a very long story about a dragon."}],
    "stream": True,
    "temperature": 0,
    "ignore_eos": True,
}


class Stream(threading.Thread):
    """A long streaming answer, read in a thread."""

    def __init__(self, stack: Stack, max_tokens: int, *, begun: bool = True, key: str = KEY) -> None:
        super().__init__(daemon=True)
        # No resume, so that the failure is visible
        self.headers = {"authorization": f"Bearer {key}", "x-stack-resume": "off"}
        self.url = stack.url + "/v1/chat/completions"
        # Each request is different, because copies of one request that see several engines die are suspected as the
        # reason.
        self.body: dict[str, Any] = LONG | {"max_tokens": max_tokens, "user": uuid4().hex}
        self.text = self.request_id = ""
        self.error: Exception | None = None
        self._closed = threading.Event()
        self.start()
        if begun:
            wait_for(lambda: '"content":"' in self.text, deadline=60)

    def run(self) -> None:
        try:
            with httpx.stream("POST", self.url, json=self.body, headers=self.headers, timeout=120) as answer:
                self.request_id = answer.headers.get("x-request-id", "")
                for piece in answer.iter_text():
                    self.text += piece
                    if self._closed.is_set():
                        return
        except httpx.HTTPError as exc:
            # The gateway's error event, and then the cut
            if not self.text.rpartition("data: ")[2].startswith('{"error"'):
                self.error = exc

    def close(self) -> None:
        """Disconnect, if it has not ended yet."""
        self._closed.set()
        self.join(120)

    def wait(self) -> str:
        """Return all of it. Fails if the gateway's error event is missing."""
        self.join(120)
        assert not self.is_alive()
        assert self.error is None, self.error
        return self.text

    def chunks(self) -> list[Any]:
        return events(self.wait())
