"""Callers: one request on a connection of its own, and the ways in which callers send, read and leave."""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from uuid import uuid4

from tests.support.faults.outcome import LOST, WHOLE, Outcome
from tests.support.processes import AUTH, MESSAGES, FakeEngine, wait_for
from tests.support.streams import CHAT, sse


class Call(threading.Thread):
    """One request on a connection of its own, and what came of it. `id` is its request id and its mark."""

    def __init__(
        self, engine: FakeEngine, port: int, caller: "Caller", *, stream: bool, fields: dict[str, Any]
    ) -> None:
        super().__init__(daemon=True)
        self.id = uuid4().hex
        self.engine = engine
        self.port = port
        self.stream = stream
        self.body = json.dumps({"messages": MESSAGES, "stream": stream, "user": self.id} | fields).encode()
        self.head = (
            f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nx-request-id: {self.id}\r\n"
            f"authorization: {AUTH['authorization']}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(self.body)}\r\n\r\n"
        ).encode()
        self.got = b""  # as it came
        self.text = ""  # its body, once the outcome is known
        self.blind = False  # the caller doesn't see how it ends
        self.from_port = 0
        self._caller = caller
        self._trouble: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            with socket.socket() as raw:
                raw.settimeout(60)
                self._caller(self, raw)
        except Exception as exc:  # noqa: BLE001  told to whoever asks for the outcome
            self._trouble = exc

    def open(self, raw: socket.socket) -> None:
        raw.connect(("127.0.0.1", self.port))
        self.from_port = raw.getsockname()[1]
        raw.sendall(self.head + self.body)

    def read(self, raw: socket.socket, until: bytes | None = None) -> None:
        """Read on to the end, or until `until` has come."""
        while until is None or until not in self.got:
            data = raw.recv(65536)
            if not data:
                assert until is None, f"the answer ended early: {self.got[-500:]!r}"
                return
            self.got += data

    def outcome(self) -> Outcome | None:
        """What the caller saw once all is over; None if it can't know. Every frame that came is whole and valid."""
        self.join(60)
        assert not self.is_alive(), f"it hangs: {self.got[-500:]!r}"
        if self._trouble is not None:
            if isinstance(self._trouble, OSError):
                return LOST
            raise self._trouble
        if self.blind:
            return None
        if not self.got:
            return LOST
        head, _, body = self.got.partition(b"\r\n\r\n")
        status = int(head[9:12])
        whole, ends = self._unframed(head.lower(), body)
        self.text = whole.decode()
        chunks = sse(self.text) if b"text/event-stream" in head else []
        if not ends and not (chunks and "error" in chunks[-1]):
            return LOST
        if status != 200:
            trouble = json.loads(self.text)["error"]
            assert set(trouble) == {"message", "type", "param", "code"}
            return Outcome(status, trouble["code"])
        if not self.stream:
            assert isinstance(json.loads(self.text), dict)
            return WHOLE
        if not ends:
            assert "[DONE]" not in chunks
            assert set(chunks[-1]["error"]) == {"message", "type", "param", "code"}
            return Outcome(200, chunks[-1]["error"]["code"])
        assert chunks[-1] == "[DONE]"
        assert chunks.count("[DONE]") == 1
        assert not any("error" in it for it in chunks)
        return WHOLE

    def _unframed(self, head: bytes, body: bytes) -> tuple[bytes, bool]:
        """The body without its framing, and whether it came to its end."""
        if b"transfer-encoding: chunked" in head:
            parts = []
            while body:
                size, _, rest = body.partition(b"\r\n")
                parts.append(rest[: int(size, 16)])
                if not int(size, 16):
                    return b"".join(parts), True
                body = rest[int(size, 16) + 2 :]
            return b"".join(parts), False
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        return body, len(body) == length


Caller = Callable[[Call, socket.socket], None]


def reads(call: Call, raw: socket.socket) -> None:
    """As callers do: send, and read to the end."""
    call.open(raw)
    call.read(raw)


def is_let_go_at_once(call: Call, raw: socket.socket) -> None:
    """A caller whose connection ends within 100 ms of [DONE]; five times that is waited."""
    call.open(raw)
    call.read(raw, b"[DONE]")
    done = time.monotonic()
    call.read(raw)
    assert time.monotonic() - done < 5 * 0.1


def leaves(at: bytes = b"", *, reset: bool = False, ahead: bytes = b"") -> Caller:
    """A caller that goes once it has read `at`, or once the engine has its request; by closing or by a reset, having
    sent `ahead` of its next request."""

    def leave(call: Call, raw: socket.socket) -> None:
        call.blind = True
        if ahead:
            call.head = call.head.replace(b"connection: close\r\n", b"")
        call.open(raw)
        raw.sendall(ahead)
        call.engine.wait_seen(call.id)
        if at:
            call.read(raw, at)
        if reset:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return leave


def leaves_while_sending(call: Call, raw: socket.socket) -> None:
    """A caller that goes in the midst of its own request."""
    call.blind = True
    raw.connect(("127.0.0.1", call.port))
    raw.sendall(call.head + call.body[:20])


def sees_pings(call: Call, raw: socket.socket) -> None:
    """A caller for whom the engine begins to answer only once two pings have come."""
    call.open(raw)
    call.read(raw, b": ping\n")
    call.read(raw, b": ping\n\r\n7\r\n: ping\n")
    call.engine.release("prefill")
    call.read(raw)


def never_reads(call: Call, raw: socket.socket) -> None:
    """A caller that takes next to nothing of its answer, until it is dropped."""
    call.blind = True
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    call.open(raw)
    raw.settimeout(0)
    wait_for(lambda: raw.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), message="the connection is still held")


def drips(call: Call, raw: socket.socket) -> None:
    """A caller whose body comes at some bytes a second."""
    raw.connect(("127.0.0.1", call.port))
    raw.sendall(call.head)
    raw.settimeout(0.1)
    while not call.got:
        raw.sendall(call.body[:1])
        with suppress(TimeoutError):
            call.got = raw.recv(65536)
    raw.settimeout(60)
    with suppress(ConnectionError):  # it was still sending
        call.read(raw)
