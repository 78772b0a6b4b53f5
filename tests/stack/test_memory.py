"""Memory: the gateway's image under the limits of compose.yaml, attacked in every way at once, ends nobody's stream."""

import json
import os
import subprocess
import sys
import threading
import time
from uuid import uuid4

import docker
import httpx
import pytest

from tests.support.containers import build, container
from tests.support.processes import AUTH, KEY, MESSAGES, NO_TLS, ROOT, events, fake_engine, free_port, wait_for

SECONDS = float(os.environ.get("ATTACK_SECONDS", "10"))  # `make soak` takes a minute
SECOND = "sk-second-0123456789abcdef"
STREAMS = 20
TOKENS = 20
FIRST_TOKEN = 5.0  # seconds: five times what is promised
CHAT = "/v1/chat/completions"
SCRIPT = [step for _ in range(TOKENS) for step in (["token", "x"], ["pause", 0.1])]
BODY = {"messages": MESSAGES, "stream": True, "script": [*SCRIPT, ["finish", "stop"], ["done"], ["end"]]}
CONFIG = """
engines:
  engine: {{dialect: vllm, slots: 256, base_url: "{url}"}}
  slow: {{dialect: vllm, slots: 1, base_url: "{slow}"}}
models:
  fake-model: {{targets: [{{engine: engine, model: fake-model}}]}}
  slow: {{targets: [{{engine: slow, model: fake-model}}]}}
default_model: fake-model
"""


class Streams:
    """Clients of a real key that ask for one stream after another."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(STREAMS)]
        self.waits: list[float] = []  # seconds until each stream's first token
        self.failures: list[str] = []
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Have each come to its end."""
        self._over.set()
        for thread in self._threads:
            thread.join(60)

    def _run(self) -> None:
        with httpx.Client(base_url=self._url, headers=AUTH, timeout=60, verify=NO_TLS) as client:
            while not self._over.is_set():
                try:
                    self._one(client)
                except httpx.HTTPError as exc:
                    self.failures.append(repr(exc))

    def _one(self, client: httpx.Client) -> None:
        since, text = time.monotonic(), ""
        with client.stream("POST", CHAT, json=BODY) as response:
            for piece in response.iter_text():
                if not text:
                    self.waits.append(time.monotonic() - since)
                text += piece
        if response.status_code != 200 or events(text)[-1:] != ["[DONE]"] or text.count('"x"') != TOKENS:
            self.failures.append(f"{response.status_code} {text[-300:]}")


def limits() -> dict[str, str]:
    """The gateway's service as compose.yaml limits it."""
    command = ["docker", "compose", "-f", "compose.yaml", "config", "--format", "json"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("STACK_", "LLM_", "COMPOSE_"))}
    done = subprocess.run(command, cwd=ROOT, env=kept, check=True, capture_output=True, text=True)
    service = json.loads(done.stdout)["services"]["gateway"]
    assert service["read_only"]
    return {"memory": service["mem_limit"], "pids-limit": str(service["pids_limit"]), "tmpfs": service["tmpfs"][0]}


@pytest.mark.timeout(600)
def test_no_stream_is_cut_while_memory_is_attacked(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory, port, name = tmp_path_factory.mktemp("attacked"), free_port(), f"stack-test-{uuid4().hex[:8]}"
    bounds = limits()
    with fake_engine() as engine, fake_engine() as slow:
        (directory / "stack.yaml").write_text(CONFIG.format(url=engine.url, slow=slow.url))
        directory.chmod(0o755)
        settings = {
            "STACK_BIND": f"127.0.0.1:{port}",
            "STACK_API_KEYS": f"{KEY},{SECOND}",
            "STACK_DATA_DIR": "/tmp/data",
            "STACK_DRAIN_DELAY": "0",
        }
        words = [f"--{option}={value}" for option, value in bounds.items()]
        words += [word for item in settings.items() for word in ("--env", "=".join(item))]
        words += ["--network=host", "--read-only", f"--volume={directory}:/etc/stack:ro", build("gateway")]
        with container(name, *words):
            wait_for(lambda: _answers(port), deadline=60)
            box = docker.from_env().containers.get(name)
            before = _workers(box)
            streams, most = Streams(f"http://127.0.0.1:{port}"), 0
            command = [sys.executable, "-m", "tests.support.attackers", str(port), str(SECONDS), SECOND]
            with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as attackers:
                while attackers.poll() is None:
                    most = max(most, _used(box))
                assert attackers.stdout
                ways = attackers.stdout.read()
            streams.end()
            print(f"{len(streams.waits)} streams, first token after {max(streams.waits):.2f} s at most, ", end="")
            print(f"{most / 1e6:.0f} MB of {int(bounds['memory']) / 1e6:.0f} MB at most; {ways}")
            after = _workers(box)
            box.reload()
            logged = box.logs().decode()
    assert not streams.failures
    assert len(streams.waits) > STREAMS
    assert max(streams.waits) < FIRST_TOKEN
    assert len(before) >= 3
    assert after == before, "a worker was killed"
    assert not box.attrs["State"]["OOMKilled"]
    assert most < int(bounds["memory"]) * 0.9
    assert "Traceback" not in logged


def _workers(box: docker.models.containers.Container) -> set[str]:
    """The pids of the gateway's processes, without those of health checks, which come and go."""
    return {line[1] for line in box.top()["Processes"] if line[-1].endswith("-m gateway")}


def _used(box: docker.models.containers.Container) -> int:
    """Bytes of memory that can't be taken away from it, as `docker stats` counts them."""
    found = box.stats(stream=False)["memory_stats"]
    held = found["stats"]
    return int(found["usage"]) - int(held.get("inactive_file") or held.get("total_inactive_file") or 0)


def _answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/livez", verify=NO_TLS).status_code == 200
    except httpx.TransportError:
        return False
