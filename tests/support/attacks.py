"""Attacks: a gateway under attack, requests on a bare socket, and checks of the answers."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.processes import KEY, FakeEngine, GatewayProcess, fake_engine, running_gateway

CHAT = "/v1/chat/completions"
READ = 1  # seconds; STACK_READ_TIMEOUT of the attacked gateway
CANARY = "canary-9c4e"
HOST = "host: localhost\r\n"
CLOSE = "connection: close\r\n"
KEYED = f"{HOST}authorization: Bearer {KEY}\r\ncontent-type: application/json\r\n"
BODY = '{"messages":[{"role":"user","content":"Hello"}]}'

reaches_the_engine = pytest.mark.usefixtures("mark")  # a request that is let through on purpose


def connect(gateway: GatewayProcess) -> socket.socket:
    return socket.create_connection(("127.0.0.1", gateway.port), timeout=30)


def send(raw: socket.socket, data: bytes) -> None:
    """Send the data. The gateway may close the connection before the end."""
    with suppress(ConnectionError, TimeoutError):
        raw.sendall(data)


def rest(raw: socket.socket) -> bytes:
    """Read to the end of the connection, which must come."""
    got = b""
    while data := raw.recv(65536):
        got += data
    return got


def answer(got: bytes) -> tuple[int, dict[str, str], bytes]:
    head, _, body = got.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(first.split()[1]), headers, body


def check_refusal(got: bytes, status: int, code: str | None = None) -> str:
    """Check for one complete answer in the gateway's envelope, and return the request's id."""
    seen, headers, body = answer(got)
    assert seen == status, got
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert code is None or error["code"] == code
    return headers["x-request-id"]


def assert_refused(gateway: GatewayProcess, got: bytes, status: int, code: str | None = None) -> None:
    """Check for one complete answer in the gateway's envelope, and one line in the log."""
    lines = gateway.lines(check_refusal(got, status, code))
    assert [(line["msg"], line["status"]) for line in lines] == [("request", status)]


def get(target: str, version: str = "1.1") -> str:
    return f"GET {target} HTTP/{version}\r\n{KEYED}\r\n"


def post(headers: str = "", body: str = BODY, target: str = CHAT) -> str:
    return f"POST {target} HTTP/1.1\r\n{KEYED}{headers}content-length: {len(body)}\r\n\r\n{body}"


def chunked(body: str, headers: str = "transfer-encoding: chunked\r\n", version: str = "1.1") -> str:
    return f"POST {CHAT} HTTP/{version}\r\n{KEYED}{headers}\r\n{body}"


WHOLE = f"{len(BODY):x}\r\n{BODY}\r\n"  # the body as a chunk


@dataclass(frozen=True)
class Attacked:
    """A gateway with an engine of its own, which must see nothing of an attack."""

    gateway: GatewayProcess
    engine: FakeEngine

    @contextmanager
    def unharmed(self, *, reached: bool) -> Iterator[None]:
        """Check that the gateway still serves after the block, and, unless `reached`, that the engine saw
        none of it."""
        before = len(self.engine.seen())
        yield
        if not reached:
            assert len(self.engine.seen()) == before
        with self.gateway.client() as client:
            assert client.get("/livez").status_code == 200


@contextmanager
def attacked(log: Path) -> Iterator[Attacked]:
    """Start a gateway, and check at the end that its workers are the same processes and that its log has no traceback
    and no secret."""
    settings = {
        "STACK_READ_TIMEOUT": str(READ),
        "STACK_MAX_BODY_BYTES": "1000000",
        "STACK_LOG_LEVEL": "DEBUG",
    }
    with fake_engine() as engine, running_gateway(log, engine.url, **settings) as gateway:
        workers = gateway.workers()
        yield Attacked(gateway, engine)
        assert gateway.workers() == workers
        text = log.read_text()
        assert "Traceback" not in text
        for secret in (CANARY, KEY, "\x1b"):
            assert secret not in text
