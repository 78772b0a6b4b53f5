"""Limits on what an engine may send: every read has a limit in bytes while it is read, and a timeout."""

import gzip
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import MESSAGES, FakeEngine, GatewayProcess, fake_engine, running_gateway, wait_for

CHAT = "/v1/chat/completions"
MB = 1_000_000
HEAD = "HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + "transfer-encoding: chunked\r\ncontent-type: text/event-stream\r\n\r\n"
pytestmark = pytest.mark.timeout(120)


def memory(gateway: GatewayProcess) -> int:
    """The most bytes that its worker has used so far."""
    status = Path(f"/proc/{gateway.workers()[0]}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024


@pytest.fixture(scope="module")
def engine() -> Iterator[FakeEngine]:
    with fake_engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def gateway(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    settings = {
        "STACK_WORKERS": "1",
        "STACK_MAX_ANSWER_BYTES": str(2 * MB),
        "LLM_IDLE_TIMEOUT": "5",
        "LLM_FIRST_TOKEN_TIMEOUT": "10",
    }
    with running_gateway(tmp_path_factory.mktemp("bounds") / "log", engine.url, **settings) as gateway:
        yield gateway


ANSWERS: dict[str, list[list[Any]]] = {
    "a header without end": [["raw", HEAD + "x: "], ["flood", 30 * MB]],
    "a name of a header without end": [["raw", HEAD], ["flood", 30 * MB]],
    "a first line without end": [["raw", "HTTP/1.1 200 "], ["flood", 30 * MB]],
    "many headers": [["raw", HEAD + "".join(f"x{number}: {'y' * 90}\r\n" for number in range(20_000))], ["hang"]],
    "informational answers without end": [*[["raw", "HTTP/1.1 103 Early Hints\r\n\r\n"]] * 5000, ["hang"]],
    "an extension of a chunk without end": [["raw", CHUNKED + "5;x="], ["flood", 30 * MB]],
    "a size of a chunk without end": [["raw", CHUNKED + "0" * 200_000], ["hang"]],
    "a trailer without end": [["raw", CHUNKED + "0\r\nx: "], ["flood", 30 * MB]],
    "a body that is too long": [["raw", HEAD + f"content-length: {100 * MB}\r\n\r\n"], ["flood", 30 * MB]],
    "a body without a length": [["raw", HEAD + "\r\n"], ["flood", 30 * MB]],
    "a refusal that is too long": [
        ["raw", f"HTTP/1.1 500 Oh\r\ncontent-length: {100 * MB}\r\n\r\n"],
        ["flood", 30 * MB],
    ],
    "a compressed answer": [
        ["raw", HEAD + "content-encoding: gzip\r\ncontent-length: 9\r\n\r\n"],
        ["text", "123456789"],
        ["hang"],
    ],
}


@pytest.mark.parametrize("stream", [False, True], ids=["blocking", "streaming"])
@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_without_bounds_is_an_error_of_the_engine(gateway: GatewayProcess, name: str, stream: bool) -> None:
    before = memory(gateway)
    body = {"messages": MESSAGES, "stream": stream, "script": ANSWERS[name]}
    with gateway.client() as client:
        got = client.post(CHAT, json=body)
    assert got.status_code in (502, 504), got.text
    assert "error" in got.json()
    assert memory(gateway) - before < 20 * MB


class Trap:
    """An engine whose health and list of models are answered as a test says."""

    def __init__(self) -> None:
        self.well()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._run, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def well(self) -> None:
        self.health = _whole(b"{}")
        self.models = _whole(b'{"data":[{"id":"fake-model"}]}')

    def _run(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=[client], daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            request = client.recv(65536)
            pieces = self.models if b"/v1/models" in request else self.health
            for piece, pause in pieces:
                client.sendall(piece)
                time.sleep(pause)


Pieces = list[tuple[bytes, float]]


def _whole(body: bytes, more: str = "", status: str = "200 OK") -> Pieces:
    return [(f"HTTP/1.1 {status}\r\n{more}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body, 0)]


@contextmanager
def trapped(directory: Path) -> Iterator[tuple[GatewayProcess, Trap]]:
    """A gateway before a trap."""
    with (
        closing(Trap()) as trap,
        running_gateway(directory / f"{id(trap)}.log", trap.url, STACK_WORKERS="1") as gateway,
    ):
        yield gateway, trap


BOMB = gzip.compress(bytes(200 * MB))
FLOOD = [(b"x" * MB, 0.0)] * 30
CONTROL: dict[str, Pieces] = {
    "is compressed": _whole(BOMB, "content-encoding: gzip\r\n"),
    "drips": [(f"{HEAD}content-length: 100000\r\n\r\n".encode(), 0), *[(b"x", 0.3)] * 300],
    "drips its head": [(HEAD.encode(), 0), *[(b"x: y\r\n", 0.3)] * 300],
    "is long": [(f"{HEAD}content-length: {100 * MB}\r\n\r\n".encode(), 0), *FLOOD],
    "is long, in chunks": [(CHUNKED.encode(), 0), *[(b"100000\r\n" + b"x" * (1 << 20) + b"\r\n", 0.0)] * 100],
    "has a header without end": [(HEAD.encode() + b"x: ", 0), *FLOOD],
    "is informational without end": [(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 10_000, 0.1)] * 100,
    "has an extension of a chunk without end": [(CHUNKED.encode() + b"5;x=", 0), *FLOOD],
    "refuses with a long text": _whole(b'{"error":{"code":"%s","message":"no"}}' % (b"x" * MB), status="400 No"),
}


def test_readiness_is_told_in_time_whatever_an_engine_answers(tmp_path: Path) -> None:
    """A control call may take five seconds, and two of them are made. Five times that is waited."""
    cases = list(enumerate(CONTROL))  # the slow ones go to different gateways

    def try_some(which: list[tuple[int, str]]) -> None:
        with trapped(tmp_path) as (gateway, trap):
            for number, name in which:
                try_one(gateway, trap, name, ("health", "models")[number % 2])

    with ThreadPoolExecutor(4) as pool:
        for tried in [pool.submit(try_some, cases[start::4]) for start in range(4)]:
            tried.result()


def try_one(gateway: GatewayProcess, trap: Trap, name: str, which: str) -> None:
    before = memory(gateway)
    setattr(trap, which, CONTROL[name])
    with gateway.client() as client:
        wait_for(lambda: client.get("/readyz", timeout=50).status_code == 503, deadline=50, message=name)
        assert memory(gateway) - before < 20 * MB, name
        assert len(client.get("/readyz", timeout=50).content) < 10_000, name
        trap.well()
        wait_for(lambda: client.get("/readyz", timeout=50).status_code == 200, deadline=50, message=name)
