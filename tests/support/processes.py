"""Real processes for tests: the gateway as it runs in production, and the fake engine. Tests wait for an event with a
deadline, and never for a fixed time."""

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.support import forkserver

ROOT = Path(__file__).parents[2]
KEY = "sk-test-0123456789abcdef"
CONSOLE = "stack-console"  # what the kernel calls the process that makes the pages of the console
AUTH = {"authorization": f"Bearer {KEY}"}
JSON = {"content-type": "application/json"}
MESSAGES = [{"role": "user", "content": "Hello"}]
# As Docker's client configuration can set it in every container. Nothing listens there, so a request to it fails.
# Python does not understand a network in no_proxy.
PROXIED = dict.fromkeys(("HTTP_PROXY", "http_proxy"), "http://127.0.0.1:9") | {"no_proxy": "127.0.0.0/8"}
# Without it, httpx reads the system's certificates at each call, which takes 24 ms
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
T = TypeVar("T")
_DATA = tempfile.TemporaryDirectory(prefix="stack-test-")  # removed with this process


def wait_for(what: Callable[[], T], *, deadline: float = 30.0, message: str = "") -> T:
    """Call `what` until it returns something true, and return that. Fails after `deadline` seconds.

    The pause between two calls grows to a tenth of a second, because other processes need the CPU meanwhile.
    """
    end, pause = time.monotonic() + deadline, 0.005
    while True:
        value = what()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(message or f"did not happen within {deadline} s; last value: {value!r}")
        time.sleep(pause)
        pause = min(0.1, pause * 1.3)


def wait_read(raw: socket.socket) -> None:
    """Wait until a gateway of this machine has read all that was sent to it."""
    ends = [f":{end[1]:04X}" for end in (raw.getpeername(), raw.getsockname())]

    def unread() -> str:
        rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines())
        return next(row[4].partition(":")[2] for row in rows if [row[1][-5:], row[2][-5:]] == ends)

    wait_for(lambda: int(unread(), 16) == 0)


def descriptors(pid: int) -> list[str]:
    """Return what the open files of a process are. One that is closed meanwhile is left out."""
    found = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(str(fd.readlink()))
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class FakeEngine:
    """tests/support/fakes/engine.py in a process of its own."""

    def __init__(self, port: int, process: subprocess.Popen[bytes]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.process = process

    def all_seen(self) -> dict[str, Any]:
        answer: dict[str, Any] = self._ask("/_seen")
        return answer

    def seen(self, mark: str | None = None) -> list[dict[str, Any]]:
        """Return the requests so far; with a `mark`, those whose `user` is this mark."""
        if mark is None:
            return list(self.all_seen()["seen"])
        found: list[dict[str, Any]] = self._ask(f"/_seen/{quote(mark, safe='')}")
        return found

    def wait_seen(self, mark: str, state: str | None = None) -> dict[str, Any]:
        """Wait for the request with this mark, and for this state of it, and return the request."""

        def find() -> dict[str, Any] | None:
            found = self.seen(mark)
            return found[-1] if found and state in (None, found[-1]["state"]) else None

        result = wait_for(find, message=f"the engine saw {self.seen(mark)}, waiting for {state}")
        assert result is not None
        return result

    def running(self) -> int:
        """The number of requests on which it is working."""
        return int(self._ask("/_running")["running"])

    def release(self, gate: str) -> None:
        self._ask(f"/_release/{quote(gate, safe='')}", "POST")

    def peak(self) -> int:
        """The largest number of requests that it answered at a time since the last call."""
        return int(self._ask("/_running")["peak"])

    def asked(self, path: str) -> list[dict[str, Any]]:
        """Return the requests to a path of an engine with a dialect since its state was last set: the `body`, and what
        it `took` of it."""
        return [it for it in self._ask("/_dialect") if it["path"] == path]

    def taken(self, path: str) -> list[dict[str, Any]]:
        """Return what `asked` returns, and have the engine forget it."""
        return [it for it in self._ask("/_dialect", "POST", {}) if it["path"] == path]

    def set(self, **state: Any) -> None:
        """Set the state of an engine with a dialect: see tests/support/fakes/dialects.py."""
        self._ask("/_dialect", "POST", state)

    def health(self, status: int) -> None:
        self._ask(f"/_health/{status}", "POST")

    def _ask(self, path: str, method: str = "GET", body: Any = None) -> Any:
        """Call the fake's own endpoints for tests. Without httpx, whose client takes 5 ms, because this is polled."""
        with closing(HTTPConnection("127.0.0.1", int(self.url.rpartition(":")[2]), timeout=30)) as connection:
            connection.request(method, path, None if body is None else json.dumps(body))
            answer = connection.getresponse()
            assert answer.status == 200, (path, answer.status)
            return json.load(answer)


@contextmanager
def fake_engine(
    port: int | None = None, dialect: str = "", *, gpu: str = "", under: Sequence[str] = ()
) -> Iterator[FakeEngine]:
    """Run a fake engine. `under` is another Python, such as one in a container whose port 8000 is `port` of this
    machine. `gpu`: see tests/support/fakes/gpu.py."""
    port = port or free_port()
    python, address = (under, "0.0.0.0:8000") if under else ([sys.executable], str(port))
    command = [*python, "-m", "tests.support.fakes.engine", address, *filter(None, [dialect, gpu])]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout
    with process, process.stdout:
        assert process.stdout.readline() == b"ready\n"
        try:
            yield FakeEngine(port, process)
        finally:
            process.kill()


RESTART = 1.0  # the least number of seconds until a container is started again and its model is loaded


class Undying(FakeEngine):
    """A fake engine that is started again when it dies, like a container with a restart policy. `deaths` counts its
    deaths."""

    def __init__(self, port: int, dialect: str) -> None:
        self.deaths = 0
        self._command = [sys.executable, "-m", "tests.support.fakes.engine", str(port), *filter(None, [dialect])]
        super().__init__(port, self._start())
        self._stopped = threading.Event()
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(self._command, cwd=ROOT, stdout=subprocess.PIPE)
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        return process

    def _keep(self) -> None:
        while True:
            self.process.wait()
            assert self.process.stdout
            self.process.stdout.close()
            if self._stopped.is_set():
                return
            self.deaths += 1
            time.sleep(RESTART)
            self.process = self._start()

    def stop(self) -> None:
        self._stopped.set()
        self.process.kill()
        self._keeper.join()


@contextmanager
def undying_engine(dialect: str = "") -> Iterator[Undying]:
    engine = Undying(free_port(), dialect)
    try:
        yield engine
    finally:
        engine.stop()


class GatewayProcess:
    """`python -m gateway` with its own settings, port and log."""

    def __init__(self, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.process = process
        self.log_path = log

    def log(self) -> list[dict[str, Any]]:
        """Return every complete line so far, parsed. A line that is not JSON fails the test."""
        whole, _, _ = self.log_path.read_text().rpartition("\n")  # an incomplete last line is still being written
        return [json.loads(line) for line in whole.splitlines()]

    def told(self, message: str, count: int = 1) -> list[dict[str, Any]]:
        """Wait for so many lines with this `msg`, because a thread writes them, and return all of them."""

        def find() -> list[dict[str, Any]]:
            found = [line for line in self.log() if line["msg"] == message]
            return found if len(found) >= count else []

        return wait_for(find, message=f"not {count} lines '{message}'")

    def lines(self, request_id: str, last: str = "request") -> list[dict[str, Any]]:
        """Wait for the `last` line of a request, and return all its lines."""

        def find() -> list[dict[str, Any]]:
            whole, _, _ = self.log_path.read_text().rpartition("\n")  # an incomplete last line is still being written
            found = [json.loads(line) for line in whole.splitlines() if f'"{request_id}"' in line]
            found = [line for line in found if line.get("request_id") == request_id]
            return found if found and found[-1]["msg"] == last else []

        return wait_for(find, message=f"no '{last}' line for {request_id}")

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=AUTH | JSON, timeout=30, verify=NO_TLS, **options)

    def workers(self) -> list[int]:
        """The pids of the workers."""
        return [pid for pid, name in self._children() if name != CONSOLE]

    def consoles(self) -> list[int]:
        """The pids of the processes that make the console's pages: one, or for a moment two."""
        return [pid for pid, name in self._children() if name == CONSOLE]

    def _children(self) -> list[tuple[int, str]]:
        """The pids and names of the master's children. They are read again if one exits meanwhile, because the kernel
        may then leave out another."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        found = children.read_text()
        while found != (again := children.read_text()):
            found = again
        return [(int(pid), name) for pid in found.split() if (name := _name(pid)) is not None]

    def stop(self, deadline: float = 60) -> int:
        """Send SIGTERM and return the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(deadline)


def _name(pid: str) -> str | None:
    with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return None


def environment(engine_url: str, **settings: str) -> dict[str, str]:
    """Return an environment for a gateway, without the machine's own settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("STACK_", "LLM_", "OTEL_"))}
    return kept | {
        "LLM_BACKEND": "vllm",
        "LLM_BASE_URL": engine_url,
        "LLM_MODEL": "fake-model",
        "LLM_SLOTS": "256",  # test_admission.py sets fewer
        "STACK_API_KEYS": f"{KEY},sk-second-0123456789abcdef",
        "STACK_CONFIG": "/nonexistent",
        "STACK_RESUME": "0",  # off, so that faults are visible; test_resume.py turns it on
        "STACK_DATA_DIR": tempfile.mkdtemp(dir=_DATA.name),  # each gateway has its own
        "STACK_DRAIN_DELAY": "0",
        "STACK_GRACE": "10",
        **settings,
    }


@contextmanager
def only(gateway: GatewayProcess, worker: int) -> Iterator[None]:
    """Let only this worker accept connections during the block."""
    others = [it for it in gateway.workers() if it != worker]
    for other in others:
        os.kill(other, signal.SIGSTOP)
    try:
        yield
    finally:
        for other in others:
            with suppress(ProcessLookupError):  # a test killed it
                os.kill(other, signal.SIGCONT)


def _beginning(log: Path) -> str:
    with log.open(errors="replace") as file:
        return file.read(100_000)


@contextmanager
def running_gateway(
    log: Path, engine_url: str, *, under: Sequence[str] = (), tree: Path = ROOT, **settings: str
) -> Iterator[GatewayProcess]:
    """Run a gateway. `tree` is the directory that holds the package `gateway`."""
    port = free_port()
    env = environment(engine_url, STACK_BIND=f"127.0.0.1:{port}", **settings)
    with (
        log.open("wb") as out,
        forkserver.popen(
            [*under, sys.executable, "-m", "gateway"], cwd=tree, env=env, stdout=out, stderr=out
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

            wait_for(alive, deadline=150)  # on a busy machine it takes half a minute
            wait_for(lambda: len(gateway.workers()) >= int(env.get("STACK_WORKERS", "2")))  # one answers before all run
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


def post(client: httpx.Client, path: str, **options: Any) -> httpx.Response:
    """Send a request and return the response as far as it came. `was_cut` says whether the connection ended inside its
    body."""
    content, cut = b"", False
    with client.stream("POST", path, **options) as answer:
        try:
            for piece in answer.iter_raw():
                content += piece
        except httpx.RemoteProtocolError:
            cut = True
    return httpx.Response(
        answer.status_code, headers=answer.headers, content=content, request=answer.request, extensions={"cut": cut}
    )


def was_cut(answer: httpx.Response) -> bool:
    return bool(answer.extensions["cut"])


def text_of(chunks: list[Any]) -> str:
    """Return the text of a stream's events."""
    deltas = [choice["delta"] for it in chunks if isinstance(it, dict) for choice in it.get("choices", ())]
    return "".join(delta.get("content") or "" for delta in deltas)


class Samples:
    """The samples of a scrape."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.all = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def total(self, name: str, **labels: str) -> float:
        """The sum of the samples of that name that have these labels."""
        return sum(it.value for it in self.all if it.name == name and labels.items() <= it.labels.items())

    def by(self, name: str, label: str) -> dict[str, float]:
        """Return the sums of the samples of that name by the values of a label, without zeros."""
        values = {it.labels[label] for it in self.all if it.name == name}
        sums = {value: self.total(name, **{label: value}) for value in values}
        return {value: number for value, number in sums.items() if number}


def scrape(port: int) -> Samples:
    with closing(HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        text = answer.read().decode()
    assert answer.status == 200, text
    return Samples(text)
