"""Response: how an answer is written to its connection.

uvicorn writes the head of a response and the first piece of its body one after the other, each with a call of the
kernel, and looks at every header with two regular expressions. Here they go out together, and what could make two
headers of one is looked for once.
"""

from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle


class Cycle(RequestResponseCycle):
    """One request and its response, as the application sees them: uvicorn's, with a `send` of our own."""

    _head = b""  # not written yet

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
