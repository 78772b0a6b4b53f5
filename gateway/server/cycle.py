"""Cycle: write a response to its connection.

uvicorn writes the head of a response and the first piece of its body in two system calls, and checks each header with
two regular expressions. Here both go out together, and one check covers all headers. ASGI uses coroutines for several
steps, each of which costs some microseconds of a token. A Client uses plain calls: it takes a piece of a body, and
reports a disconnect.

A body with a length is written as fast as its client takes it. An event of a stream is written as a whole: another one
may follow at any moment.

A body ends in one of three ways: after the bytes of its Content-Length, with a last chunk, or, for a client of
HTTP/1.0, with the connection. A body that is `cut` must look like none of these.
"""

import asyncio
import fcntl
import socket
import struct
import termios
import time
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

FLUSH = 1.0  # seconds for a client of HTTP/1.0 to take its answer, before its connection is reset
LOOK = 0.01  # seconds between two checks whether it has
PIECE = 64 * 1024  # bytes of a body with a length that are written at once


class Cycle(RequestResponseCycle):
    """One request and its response, as the application sees them: uvicorn's cycle with another `send`. It is
    a Client."""

    _head = b""  # the head, while it is not written yet
    known = False  # its key is known, so its connection is not closed in favour of a new one
    _lasts = False  # the end of the connection ends the body
    _hung_up: Callable[[], None] | None = None

    def watch(self, hung_up: Callable[[], None] | None) -> None:
        """See Client.watch."""
        self._hung_up = hung_up
        if self.disconnected:
            self.hang_up()
        elif hung_up is not None:
            self.flow.resume_reading()  # a large body stopped the reading, but only reading notices a disconnect

    def hang_up(self) -> None:
        """Note that the connection is lost."""
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

    async def cut(self) -> None:
        """See Client.cut."""
        if self.disconnected or self.response_complete:
            return
        if self._head:
            self.transport.write(self._head)
        if self._lasts:
            await self._taken()
            self.transport.abort()
        self._complete(keep_alive=False)

    async def send(self, message: Any) -> None:
        """Take a part of the response. Raises RuntimeError if it comes in the wrong order or is unannounced."""
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        if self.response_complete or (message["type"] == "http.response.start") == self.response_started:
            raise RuntimeError(f"{message['type']} was sent in the wrong order")
        if not self.response_started:
            self._start(message["status"], message.get("headers", ()))
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        if self.chunked_encoding:
            data = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            data += b"" if more else b"0\r\n\r\n"
        elif self.scope["method"] == "HEAD":
            data = b""
        elif self._lasts:
            data = body
        else:
            self.expected_content_length -= len(body)
            if self.expected_content_length < 0 or (self.expected_content_length and not more):
                raise RuntimeError("the body's length differs from its Content-Length")
            data = body if len(body) <= PIECE else await self._write_all_but_the_end(body)
            if self.disconnected:
                return
        self._write(data)
        if not more:
            if self._lasts:
                self._reset_at_close(on=False)
            self._complete(keep_alive=self.keep_alive)

    def _write(self, data: bytes) -> None:
        """Write what comes next, behind the head if that is not written yet."""
        if self._head:
            data, self._head = self._head + data, b""
        self.transport.write(data)

    async def _write_all_but_the_end(self, data: bytes) -> bytes:
        """Write a large body as fast as the client takes it, and return its last piece, which is not written yet. So
        its sender waits, and what it holds for the answer is held until the client has nearly all of it."""
        at = 0
        while len(data) - at > PIECE and not self.disconnected:
            self._write(data[at : at + PIECE])
            at += PIECE
            if self.flow.write_paused:
                await self.flow.drain()
        return data[at:]

    def _complete(self, *, keep_alive: bool) -> None:
        self.response_complete = True
        self.message_event.set()
        if not keep_alive:
            self.transport.close()
        self.on_response()

    def _start(self, status: int, headers: Any) -> None:
        lines = [STATUS_LINE[status][:-2]]
        framed = self.scope["method"] == "HEAD" or status in (204, 304)
        closes = False
        for name, value in (*self.default_headers, *headers):
            lines.append(b"%b: %b" % (name, value))
            if name == b"content-length":
                self.expected_content_length = int(value)
                framed = True
            elif name == b"connection":
                closes = b"close" in value.lower()
        self._lasts = not framed and self.scope["http_version"] == "1.0"
        self.chunked_encoding = not framed and not self._lasts
        if self._lasts:
            self._reset_at_close(on=True)
        if closes:
            self.keep_alive = False
        elif not self.keep_alive:
            lines.append(b"connection: close")
        if self.chunked_encoding:
            lines.append(b"transfer-encoding: chunked")
        head = b"\r\n".join(lines)
        if head.count(b"\n") != len(lines) - 1 or head.count(b"\r") != len(lines) - 1 or b"\0" in head:
            raise RuntimeError("a response header has a line break in it")
        self._head = head + b"\r\n\r\n"
        self.response_started = True
        self.waiting_for_100_continue = False

    # If the end of the connection ends the body, only an orderly close tells a complete body from an incomplete one.
    # The kernel is therefore told at the beginning to reset the connection, even if the worker is killed.

    def _reset_at_close(self, *, on: bool) -> None:
        raw = self.transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", on, 0))

    async def _taken(self) -> None:
        """Return when the client's kernel has acknowledged all bytes, or after FLUSH seconds, because a reset drops the
        rest."""
        end = time.monotonic() + FLUSH
        while time.monotonic() < end and not self.disconnected and self._unsent():  # noqa: ASYNC110
            await asyncio.sleep(LOOK)  # the kernel gives no notice of an acknowledgement

    def _unsent(self) -> int:
        raw = self.transport.get_extra_info("socket")
        (kernel,) = struct.unpack("i", fcntl.ioctl(raw.fileno(), termios.TIOCOUTQ, b"\0" * 4))
        return int(kernel) + self.transport.get_write_buffer_size()
