"""Lasting attacks: slow senders, several requests on one connection, and headers and keys of the caller's choosing."""

import json
import time
from collections import Counter
from contextlib import suppress
from typing import Any

import pytest

from tests.support.attacks import (
    CANARY,
    CHAT,
    CLOSE,
    HOST,
    KEYED,
    READ,
    WHOLE,
    answer,
    assert_refused,
    check_refusal,
    chunked,
    connect,
    post,
    reaches_the_engine,
    rest,
    send,
)
from tests.support.processes import KEY, MESSAGES, FakeEngine, GatewayProcess, wait_for, wait_read

SWEEP = 1  # a bound is kept to within this


SLOW = {
    # name: what is sent at once, what is then sent every tenth of a second, the answer (None: closed without one)
    "silence": (b"", b"", None),
    "empty lines": (b"", b"\r\n", None),
    "half a request line": (b"GET /li", b"", 408),
    "a dripped target": (b"GET /", b"a", 408),
    "dripped headers": (f"GET /livez HTTP/1.1\r\n{HOST}".encode(), b"x: y\r\n", 408),
    "a dripped header": (f"GET /livez HTTP/1.1\r\n{HOST}x: ".encode(), b"y", 408),
    "no body": (f"POST {CHAT} HTTP/1.1\r\n{KEYED}content-length: 9000\r\n\r\n".encode(), b"", 408),
    "a dripped body": (f"POST {CHAT} HTTP/1.1\r\n{KEYED}content-length: 9000\r\n\r\n".encode(), b" ", 408),
    "dripped chunks": (chunked("").encode(), b"1\r\n \r\n", 408),
    "dripped trailers": (chunked(WHOLE + "0\r\n").encode(), b"x: y\r\n", 408),
    "a dripped body that nobody waits for": (
        f"POST /v1/nope HTTP/1.1\r\n{KEYED}content-length: 9000\r\n\r\n".encode(),
        b" ",
        404,
    ),
}


class Slow:
    """A slow connection of one of the kinds above, and what it got until it was closed."""

    def __init__(self, gateway: GatewayProcess, name: str) -> None:
        self.name, self.got = name, b""
        first, self._drip, status = SLOW[name]
        self._raw = connect(gateway)
        self._raw.setblocking(False)
        self._raw.send(first)
        # The limit is READ + SWEEP, or LINGER after an answer; the test waits five times as long.
        self.deadline = time.monotonic() + 5 * (5 + SWEEP if status == 404 else READ + SWEEP)

    def is_closed(self) -> bool:
        """Read what came. If the connection is still open, drip once more."""
        try:
            data = self._raw.recv(65536)
            self.got += data
            closed = not data
        except BlockingIOError:
            closed = False
        except ConnectionError:  # it dripped into the closed connection
            closed = True
        if closed:
            self._raw.close()
        elif self._drip:
            with suppress(OSError):
                self._raw.send(self._drip)
        return closed


def test_slow_connections_are_closed_and_other_clients_are_served(gateway: GatewayProcess) -> None:
    """Fifty connections of each kind, all at once."""
    since = len(gateway.log())
    all_of_them = [Slow(gateway, name) for name in SLOW for _ in range(50)]
    open_ones = all_of_them
    with gateway.client() as others:
        while open_ones := [it for it in open_ones if not it.is_closed()]:
            late = Counter(it.name for it in open_ones if time.monotonic() > it.deadline)
            assert not late, f"still open: {late}"
            assert others.get("/livez").status_code == 200
            time.sleep(0.1)  # the pace of the drip
    refused: Counter[int] = Counter()
    for name, (_, _, status) in SLOW.items():
        answers = [it.got for it in all_of_them if it.name == name]
        if status is None:
            assert not any(answers), name
            continue
        refused[status] += len(answers)
        told = list(filter(None, answers))  # a reset may have overtaken the answer where the client went on sending
        assert len(told) > 40, name
        for got in told:
            check_refusal(got, status, "request_timeout" if status == 408 else None)
    wait_for(lambda: logged(gateway, since) >= refused)
    assert logged(gateway, since) == refused


def logged(gateway: GatewayProcess, since: int) -> Counter[int]:
    """How many refusals the log tells of since that line, by status. Of many in a second, some are only counted."""
    found: Counter[int] = Counter()
    ids: Counter[str] = Counter()
    for line in gateway.log()[since:]:
        if line["msg"] == "request" and line["status"] >= 400:
            found[line["status"]] += 1
            ids[line["request_id"]] += 1
        elif line["msg"] == "requests_not_logged":
            found[line["status"]] += line["count"]
    assert set(ids.values()) <= {1}
    return found


@reaches_the_engine
def test_a_body_that_makes_progress_is_waited_for(gateway: GatewayProcess, engine: FakeEngine, mark: str) -> None:
    body = json.dumps({"messages": MESSAGES, "user": mark, "x": "y" * 30_000}).encode()
    with connect(gateway) as raw:
        send(raw, f"POST {CHAT} HTTP/1.1\r\n{KEYED}{CLOSE}content-length: {len(body)}\r\n\r\n".encode())
        for start in range(0, len(body), 1000):  # three seconds, three times the timeout
            time.sleep(0.1)  # the sender's own pace is what is tested
            raw.sendall(body[start : start + 1000])
        assert answer(rest(raw))[0] == 200
    assert engine.wait_seen(mark)


def stream_head(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    return f"POST {CHAT} HTTP/1.1\r\n{KEYED}content-length: {len(content)}\r\n\r\n".encode() + content


@reaches_the_engine
@pytest.mark.parametrize(
    "second",
    [b"\0\0\0\0", b"GET http://x/ HTTP/1.1\r\n\r\n", b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n" * 10_000],
)
def test_a_pipelined_request_never_gets_into_the_running_stream(
    gateway: GatewayProcess, engine: FakeEngine, mark: str, second: bytes
) -> None:
    script = [["role"], ["token", "A"], ["gate", mark], ["token", "B"], ["finish", "stop"], ["done"], ["end"]]
    with connect(gateway) as raw:
        raw.sendall(stream_head({"messages": MESSAGES, "stream": True, "user": mark, "script": script}))
        got = b""
        while b'"A"' not in got:
            got += raw.recv(65536)
        raw.settimeout(1)  # the flood fills the buffers: the rest is never read
        send(raw, second)
        raw.settimeout(30)
        engine.release(mark)
        try:
            got += rest(raw)
        except ConnectionResetError:  # there was more of the flood to come
            assert len(second) > 100
    first, _, after = got.partition(b"0\r\n\r\n")
    assert b'"B"' in first
    assert first.count(b"HTTP/1.1") == 1
    assert after.count(b"HTTP/1.1 200") <= 9  # what may wait in line
    assert after.count(b"HTTP/1.1 40") == 1
    assert after.rstrip().endswith(b"}")


@reaches_the_engine
@pytest.mark.parametrize("cut", [None, 20, 150], ids=["in one piece", "cut in the first line", "cut in the headers"])
def test_an_offer_to_upgrade_is_ignored(
    gateway: GatewayProcess, engine: FakeEngine, mark: str, cut: int | None
) -> None:
    """Java's client offers h2c with every first request; the parser would take the body for HTTP/2."""
    offer = (
        "connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAA\r\n"
    )
    body = json.dumps({"messages": MESSAGES, "user": mark})
    data = post(offer, body).encode()
    with connect(gateway) as raw:
        if cut:
            raw.sendall(data[:cut])
            wait_read(raw)
        raw.sendall(data[cut or 0 :])
        got = b""
        while b"x_engine_extra" not in got:
            got += raw.recv(65536)
        raw.sendall(f"GET /livez HTTP/1.1\r\n{HOST}{CLOSE}\r\n".encode())  # the connection can be used again
        assert rest(raw).endswith(b'{"status":"ok"}')
    assert engine.wait_seen(mark)


@reaches_the_engine
def test_no_header_of_the_callers_reaches_the_engine(gateway: GatewayProcess, engine: FakeEngine, mark: str) -> None:
    headers = {
        "x-api-key": CANARY,
        "cookie": CANARY,
        "proxy-authorization": CANARY,
        "proxy-connection": CANARY,
        "connection": "x-named",
        "x-named": CANARY,
        "x-forwarded-for": CANARY,
        "x-request-id": f"{CANARY} \\ evil",
        "x-data-parallel-rank": "1",
    }
    with gateway.client() as client:
        got = client.post(CHAT, json={"messages": MESSAGES, "user": mark}, headers=headers)
    seen = engine.wait_seen(mark)["headers"]
    expected = {"host", "content-type", "accept-encoding", "user-agent", "x-request-id", "content-length"}
    assert set(seen) == expected
    assert seen["accept-encoding"] == "identity"
    assert CANARY not in str(seen)
    assert CANARY not in str(got.headers)
    assert KEY not in str(seen)


@pytest.mark.parametrize("key", [CANARY, "' OR 1=1 --", "x" * 20_000, "\xff\xfe", "", "${jndi:ldap://x}", f"{KEY} x"])
def test_malformed_keys_are_refused(gateway: GatewayProcess, key: str) -> None:
    with connect(gateway) as raw:
        send(raw, f"GET /v1/models HTTP/1.1\r\n{HOST}{CLOSE}authorization: Bearer {key}\r\n\r\n".encode("latin-1"))
        got = rest(raw)
    assert_refused(gateway, got, 401, "invalid_api_key")
    assert not key or key.encode("latin-1") not in got
