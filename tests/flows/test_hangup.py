"""A client that leaves stops its generation, whenever and however it leaves. The stated bound is 2 s; the tests wait
for the event with five times that."""

import json
import socket
from typing import Any

import pytest

from tests.processes import AUTH, MESSAGES, FakeEngine, GatewayProcess, wait_for

BOUND = 5 * 2.0


def send_and_leave(gateway: GatewayProcess, body: dict[str, Any], *, after: bytes | None, reset: bool = False) -> None:
    """Send a chat request on a bare socket, read until `after` appears (None: nothing), and go."""
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: {AUTH['authorization']}\r\n"
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=30) as raw:
        raw.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        FOUND[body["user"]]()
        got = b""
        while after is not None and after not in got:
            got += raw.recv(65536)
        if reset:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")


FOUND: dict[str, Any] = {}  # how to wait until the engine has a request

CASES = {
    "streaming, before the first byte": ([["hang"]], True, None),
    "streaming, while pings are sent": ([["hang"]], True, b": ping"),
    "streaming, in the middle": ([["role"], ["token", "here"], ["hang"]], True, b"here"),
    "blocking": ([["hang"]], False, None),
    "blocking, after the engine's head": ([["head", [200, {}]], ["text", "{"], ["hang"]], False, None),
}


@pytest.mark.parametrize("reset", [False, True], ids=["closes", "resets"])
@pytest.mark.parametrize("case", CASES)
def test_the_engine_is_let_go(gateway: GatewayProcess, engine: FakeEngine, mark: str, case: str, reset: bool) -> None:
    script, stream, after = CASES[case]
    FOUND[mark] = lambda: engine.wait_seen(mark)
    body = {"messages": MESSAGES, "stream": stream, "user": mark, "script": script}
    send_and_leave(gateway, body, after=after, reset=reset)
    wait_for(lambda: engine.seen(mark)[-1]["state"] == "hung_up", deadline=BOUND)
    assert len(engine.seen(mark)) == 1  # a client's leaving is never retried
    request_id = engine.seen(mark)[0]["headers"]["x-request-id"]
    lines = gateway.lines(request_id)
    assert lines[1]["outcome"] == "client_left"
    assert (lines[2]["msg"], lines[2]["status"]) == ("request", 499)


def test_leaving_while_sending_the_body_reaches_no_engine(
    gateway: GatewayProcess, engine: FakeEngine, mark: str
) -> None:
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n"
        f"authorization: {AUTH['authorization']}\r\nx-request-id: {mark}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=30) as raw:
        raw.sendall(head.encode() + b'{"messages": ')
    assert gateway.lines(mark)[-1]["status"] == 499
    assert not [it for it in engine.seen() if it["headers"].get("x-request-id") == mark]


def test_a_client_that_never_reads_is_given_up(gateway: GatewayProcess, engine: FakeEngine, mark: str) -> None:
    """Its backlog is bounded (the engine is not read on), and after the write timeout (8 s here) it is dropped."""
    script = [["role"], ["tokens", [10_000, 60_000]], ["finish", "stop"], ["done"], ["end"]]
    body = {"messages": MESSAGES, "stream": True, "user": mark, "script": script}
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: {AUTH['authorization']}\r\n"
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(("127.0.0.1", gateway.port))
        raw.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        wait_for(lambda: engine.wait_seen(mark)["state"] == "hung_up", deadline=60)
    request_id = engine.seen(mark)[0]["headers"]["x-request-id"]
    assert gateway.lines(request_id)[1]["outcome"] == "client_left"
