"""Real processes for tests: the gateway as it is run in production, and the fake engine. Everything is awaited by
event or by a deadline, never by a fixed sleep."""

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parent.parent
KEY = "sk-test-0123456789abcdef"
AUTH = {"authorization": f"Bearer {KEY}"}
MESSAGES = [{"role": "user", "content": "Hello"}]
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # httpx would read the system's certificates at each call: 24 ms
T = TypeVar("T")
_DATA = tempfile.TemporaryDirectory(prefix="stack-test-")  # removed with this process


def wait_for(what: Callable[[], T], *, deadline: float = 30.0, message: str = "") -> T:
    """Poll until `what` returns something true, and return it. Fails after `deadline` seconds."""
    end = time.monotonic() + deadline
    while True:
        value = what()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(message or f"did not happen within {deadline} s; last value: {value!r}")
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class FakeEngine:
    """tests/fakes/engine.py in a process of its own."""

    def __init__(self, port: int, process: subprocess.Popen[bytes]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.process = process

    def all_seen(self) -> dict[str, Any]:
        answer: dict[str, Any] = httpx.get(self.url + "/_seen", verify=NO_TLS).json()
        return answer

    def seen(self, mark: str | None = None) -> list[dict[str, Any]]:
        """The requests so far; those whose `user` is `mark`, if given."""
        return [it for it in self.all_seen()["seen"] if mark is None or it["body"].get("user") == mark]

    def wait_seen(self, mark: str, state: str | None = None) -> dict[str, Any]:
        """The request marked so, once it has come, and is in that state."""

        def find() -> dict[str, Any] | None:
            found = self.seen(mark)
            return found[-1] if found and state in (None, found[-1]["state"]) else None

        result = wait_for(find, message=f"the engine saw {self.seen(mark)}, waiting for {state}")
        assert result is not None
        return result

    def running(self) -> int:
        """How many requests it is at work on."""
        number: int = httpx.get(self.url + "/_running", verify=NO_TLS).json()["running"]
        return number

    def release(self, gate: str) -> None:
        httpx.post(f"{self.url}/_release/{gate}", verify=NO_TLS).raise_for_status()

    def peak(self) -> int:
        """How many requests it was answering at most, since this was last asked."""
        return int(httpx.get(self.url + "/_running", verify=NO_TLS).json()["peak"])

    def asked(self, path: str) -> list[dict[str, Any]]:
        """What was asked at a path of an engine with a dialect since its state was last set: `body`, and what it `took`
        of that."""
        return [it for it in httpx.get(f"{self.url}/_dialect", verify=False).json() if it["path"] == path]

    def set(self, **state: Any) -> None:
        """Set what an engine with a dialect is like: see tests/fakes/dialects.py."""
        httpx.post(f"{self.url}/_dialect", json=state, verify=False).raise_for_status()

    def health(self, status: int) -> None:
        httpx.post(f"{self.url}/_health/{status}", verify=NO_TLS).raise_for_status()


@contextmanager
def fake_engine(port: int | None = None, dialect: str = "", *, under: Sequence[str] = ()) -> Iterator[FakeEngine]:
    """`under` is a Python somewhere else, as in a container, whose port 8000 is `port` of this machine."""
    port = port or free_port()
    python, address = (under, "0.0.0.0:8000") if under else ([sys.executable], str(port))
    command = [*python, "-m", "tests.fakes.engine", address, *filter(None, [dialect])]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout
    with process, process.stdout:
        assert process.stdout.readline() == b"ready\n"
        try:
            yield FakeEngine(port, process)
        finally:
            process.kill()


class GatewayProcess:
    """`python -m gateway` with its own settings, port and log."""

    def __init__(self, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.process = process
        self.log_path = log

    def log(self) -> list[dict[str, Any]]:
        """Every line so far, parsed: a line that isn't JSON fails the test."""
        return [json.loads(line) for line in self.log_path.read_text().splitlines()]

    def lines(self, request_id: str, last: str = "request") -> list[dict[str, Any]]:
        """A request's lines, once its last one is there."""

        def find() -> list[dict[str, Any]]:
            found = [line for line in self.log() if line.get("request_id") == request_id]
            return found if found and found[-1]["msg"] == last else []

        return wait_for(find, message=f"no '{last}' line for {request_id}")

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=AUTH, timeout=30, verify=NO_TLS, **options)

    def workers(self) -> list[int]:
        """Their pids. Where one exits while they are read, the kernel may leave out another: so it is read again."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        found = children.read_text()
        while found != (again := children.read_text()):
            found = again
        return [int(pid) for pid in found.split()]

    def stop(self, deadline: float = 60) -> int:
        """SIGTERM; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(deadline)


def environment(engine_url: str, **settings: str) -> dict[str, str]:
    """A clean environment for a gateway: nothing of the machine's own settings leaks in."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("STACK_", "LLM_"))}
    return kept | {
        "LLM_BACKEND": "vllm",
        "LLM_BASE_URL": engine_url,
        "LLM_MODEL": "fake-model",
        "LLM_SLOTS": "256",  # test_admission.py sets fewer
        "STACK_API_KEYS": f"{KEY},sk-second-0123456789abcdef",
        "STACK_CONFIG": "/nonexistent",
        "STACK_RESUME": "0",  # the faults themselves are seen; test_resume.py turns it on
        "STACK_DATA_DIR": tempfile.mkdtemp(dir=_DATA.name),  # each gateway has its own
        "STACK_DRAIN_DELAY": "0",
        "STACK_GRACE": "10",
        **settings,
    }


def _beginning(log: Path) -> str:
    with log.open(errors="replace") as file:
        return file.read(100_000)


@contextmanager
def running_gateway(
    log: Path, engine_url: str, *, under: Sequence[str] = (), **settings: str
) -> Iterator[GatewayProcess]:
    port = free_port()
    env = environment(engine_url, STACK_BIND=f"127.0.0.1:{port}", **settings)
    with (
        log.open("wb") as out,
        subprocess.Popen(
            [*under, sys.executable, "-m", "gateway"], cwd=ROOT, env=env, stdout=out, stderr=out
        ) as process,
    ):
        gateway = GatewayProcess(port, process, log)
        try:

            def alive() -> bool:
                assert process.poll() is None, _beginning(log)
                try:
                    return httpx.get(gateway.url + "/livez", verify=NO_TLS).status_code == 200
                except httpx.TransportError:
                    return False

            wait_for(alive)
            yield gateway
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()


def events(text: str) -> list[Any]:
    """The data of a stream's events, parsed; '[DONE]' as it is."""
    data = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return [it if it == "[DONE]" else json.loads(it) for it in data]


def text_of(chunks: list[Any]) -> str:
    """The text a list of stream events adds up to."""
    deltas = [choice["delta"] for it in chunks if isinstance(it, dict) for choice in it.get("choices", ())]
    return "".join(delta.get("content") or "" for delta in deltas)


class Samples:
    """What a scrape found."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.all = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def total(self, name: str, **labels: str) -> float:
        """The sum of the samples of that name that have these labels."""
        return sum(it.value for it in self.all if it.name == name and labels.items() <= it.labels.items())

    def by(self, name: str, label: str) -> dict[str, float]:
        """The sums of that name by the values of a label, zeros left out."""
        values = {it.labels[label] for it in self.all if it.name == name}
        sums = {value: self.total(name, **{label: value}) for value in values}
        return {value: number for value, number in sums.items() if number}


def scrape(port: int) -> Samples:
    answer = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=10, verify=NO_TLS)
    assert answer.status_code == 200, answer.text
    return Samples(answer.text)
