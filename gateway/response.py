"""Response: how an answer is written to its connection.

uvicorn writes the head of a response and the first piece of its body one after the other, each with a call of the
kernel, and looks at every header with two regular expressions. Here they go out together, and what could make two
headers of one is looked for once. And what ASGI has coroutines for, each of them some microseconds of a token's way, a
Client does by plain calls: it takes a piece of a body, and says that it hung up.
"""

from collections.abc import Callable
from typing import Any, Protocol

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle


class Client(Protocol):
    """Who waits for a response."""

    def watch(self, hung_up: Callable[[], None] | None) -> None:
        """Have that called when it hangs up before it has the whole response, or now if it has; None: no longer."""

    @property
    def takes(self) -> bool:
        """Whether it takes more of a body that has begun, at once."""

    def push(self, data: bytes) -> None:
        """Send a piece of the body, not the last one, where it `takes` more."""


class Cycle(RequestResponseCycle):
    """One request and its response, as the application sees them: uvicorn's, with a `send` of our own. A Client."""

    _head = b""  # not written yet
    _hung_up: Callable[[], None] | None = None

    def watch(self, hung_up: Callable[[], None] | None) -> None:
        """See Client.watch."""
        self._hung_up = hung_up
        if self.disconnected:
            self.hang_up()
        elif hung_up is not None:
            self.flow.resume_reading()  # a large body stopped it, and who isn't read from hangs up unnoticed

    def hang_up(self) -> None:
        """The connection is lost."""
        if self._hung_up is not None and not self.response_complete:
            self._hung_up()

    @property
    def takes(self) -> bool:
        """See Client.takes."""
        begun = self.response_started and not self._head and not self.response_complete
        return begun and bool(self.chunked_encoding) and not (self.flow.write_paused or self.disconnected)

    def push(self, data: bytes) -> None:
        """See Client.push."""
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    async def send(self, message: Any) -> None:
        """Take a part of the response. Raises RuntimeError for one that is out of turn, or not what was announced."""
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        if self.response_complete or (message["type"] == "http.response.start") == self.response_started:
            raise RuntimeError(f"{message['type']} is out of turn")
        if not self.response_started:
            self._start(message["status"], message.get("headers", ()))
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        if self.chunked_encoding:
            data = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            data += b"" if more else b"0\r\n\r\n"
        elif self.scope["method"] == "HEAD":
            data = b""
        else:
            data = body
            self.expected_content_length -= len(body)
            if self.expected_content_length < 0 or (self.expected_content_length and not more):
                raise RuntimeError("the body is not as long as its Content-Length")
        if self._head:
            data, self._head = self._head + data, b""
        self.transport.write(data)
        if not more:
            self.response_complete = True
            self.message_event.set()
            if not self.keep_alive:
                self.transport.close()
            self.on_response()

    def _start(self, status: int, headers: Any) -> None:
        lines = [STATUS_LINE[status][:-2]]
        self.chunked_encoding = self.scope["method"] != "HEAD" and status not in (204, 304)
        closes = False
        for name, value in (*self.default_headers, *headers):
            lines.append(b"%b: %b" % (name, value))
            if name == b"content-length":
                self.expected_content_length = int(value)
                self.chunked_encoding = False
            elif name == b"connection":
                closes = b"close" in value.lower()
        if closes:
            self.keep_alive = False
        elif not self.keep_alive:
            lines.append(b"connection: close")
        if self.chunked_encoding:
            lines.append(b"transfer-encoding: chunked")
        head = b"\r\n".join(lines)
        if head.count(b"\n") != len(lines) - 1 or head.count(b"\r") != len(lines) - 1 or b"\0" in head:
            raise RuntimeError("a header of the response has a line break in it")
        self._head = head + b"\r\n\r\n"
        self.response_started = True
        self.waiting_for_100_continue = False
