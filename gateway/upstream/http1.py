"""HTTP/1.1: the client of the engines: a pool of kept-alive connections, parsed by httptools.

The client is most of the relay's cost (see this package's README.md), so it has only what the relay needs: it sends a
whole request, and reads an answer that has a length, is chunked, or ends with its connection.

This file is long because it holds a whole protocol: the pool, the connection and the parser share their state.
"""

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import httptools

MAX_HEADER = 64 * 1024  # bytes of an answer's header block, or of what may come between two bytes of its body
LARGE = 64 * 1024  # bytes; a larger body is not copied to be sent together with its head
HIGH_WATER = 256 * 1024  # bytes of body that may wait for the client; beyond that, the engine is not read
MAX_IDLE = 4.0  # seconds that a connection may be idle; vLLM's server closes it after 5 s


class BrokenError(Exception):
    """Say that the connection ended, or that its bytes were `malformed`. `answered`: a part of an answer had come."""

    def __init__(self, message: str, *, answered: bool, malformed: bool = False) -> None:
        super().__init__(message)
        self.answered = answered
        self.malformed = malformed


class Connection(asyncio.Protocol):
    """One connection, with one exchange at a time. Its owner gives it back with `Pool.release`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self.closed = False
        self.idle_since = 0.0
        self.reused = False
        self._reset()

    def _reset(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._parts: list[bytes] = []
        self._waiting = self._header_size = 0  # bytes in _parts, and of header lines
        self.content_type = b""
        self._barren = 0  # bytes since the last byte of the body: heads, extensions of chunks, trailers
        self._paused = False
        self._delimited = False  # the head says where the body ends
        self._trouble: str | None = None
        self.status = 0  # set when the head has arrived
        self.complete = False  # the end of the body has arrived
        self.keep_alive = False
        self._begun = False  # a byte of the answer has arrived
        self._sink: Callable[[bytes], bool] | None = None

    @property
    def reusable(self) -> bool:
        """Whether the exchange ended cleanly, all of its request was sent, and the connection is still being read. It
        is not if a large part of a complete answer was not taken."""
        ended = self.complete and self.keep_alive and not self.closed
        return ended and not self._paused and not self._transport.get_write_buffer_size()

    # -- what the relay calls -----------------------------------------------------------------------------------------

    def send(self, head: bytes, body: bytes) -> None:
        """Begin an exchange: send a whole request."""
        self._reset()
        if len(body) > LARGE:
            self._transport.write(head)
            self._transport.write(body)
        else:
            self._transport.write(head + body)

    async def head(self) -> int:
        """Return the answer's status when its head has arrived. Raises BrokenError."""
        while not self.status:
            await self._wait()
        return self.status

    async def read(self) -> bytes:
        """Return what has come of the body, up to about 500 kB; b"" at its end. Raises BrokenError if it breaks off."""
        while not self._parts:
            if self.complete:
                return b""
            await self._wait()
        data = self._joined()
        self._parts.clear()
        self._waiting = 0
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        return data

    def pump(self, sink: Callable[[bytes], bool] | None) -> None:
        """Pass what comes of this exchange's body to `sink` while a caller waits in `read`. If `sink` returns False,
        `read` returns that piece and what came after it. None ends this."""
        self._sink = sink

    def abort(self) -> None:
        """Drop the connection at once. To the engine this is a disconnect of its client."""
        self.closed = True
        self._transport.abort()

    async def _wait(self) -> None:
        if self._trouble is not None:
            raise BrokenError(self._trouble, answered=True, malformed=True)
        if self.closed:
            raise BrokenError("The connection to the engine ended.", answered=self._begun)
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- what the event loop calls ------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self.complete or self.idle_since:  # bytes without a request: the connection cannot be used again
            self.abort()
            return
        self._begun = True
        self._barren += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            if not self.complete:
                self._trouble = self._trouble or f"The engine's answer is not valid HTTP ({type(exc).__name__})."
            self.abort()
        if self._barren > MAX_HEADER and not self.complete:  # the parser keeps incomplete headers in memory
            self._trouble = self._trouble or "The engine's answer has a head or a chunk header that is too long."
            self.abort()
        if self._pumped():
            return
        if self._waiting > HIGH_WATER and not self._paused:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def _pumped(self) -> bool:
        sink, waiter = self._sink, self._waiter
        if sink is None or not self._parts or self.complete or self.closed or waiter is None or waiter.done():
            return False
        if not sink(self._joined()):
            return False
        self._parts.clear()
        self._waiting = 0
        return True

    def _joined(self) -> bytes:
        return self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if exc is None and self.status and not self._delimited:
            self.complete = True  # a body without a length ends with its connection
        self._wake()

    def eof_received(self) -> None:
        if self.status and not self._delimited:
            self.complete = True  # the engine closed its side
            self._wake()

    # -- what the parser calls ----------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self.complete:
            raise ValueError("bytes after the answer")  # httptools turns this into a parser error

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_size += len(name) + len(value)
        if self._header_size > MAX_HEADER:
            raise ValueError("header block too large")
        lower = name.lower()
        self.content_type = value if lower == b"content-type" else self.content_type
        if lower in (b"content-length", b"transfer-encoding"):
            self._delimited = True
        elif lower == b"content-encoding" and value.lower() != b"identity":
            self._trouble = "The engine compressed its answer, although the gateway did not allow that."
            raise ValueError("compressed")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status >= 200:  # 1xx is not the answer yet
            self.status = status
            self._delimited = self._delimited or status in (204, 304)

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)
        self._waiting += len(body)
        self._barren = 0

    def on_message_complete(self) -> None:
        if self.status:
            self.complete = True
            self.keep_alive = self._parser.should_keep_alive()


@dataclass(frozen=True, slots=True)
class Target:
    """The address of a server, and what goes into the requests to it."""

    host: str
    port: int
    tls: bool
    authority: str
    path: str

    @classmethod
    def of(cls, url: str) -> "Target":
        parts = urlsplit(url)
        tls = parts.scheme == "https"
        return cls(parts.hostname or "", parts.port or (443 if tls else 80), tls, parts.netloc, parts.path)


class Pool:
    """Connections to one server; the most recently used one is taken first. The pool has no limit, because admission
    has one."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._idle: deque[Connection] = deque()
        self.tls = ssl.create_default_context() if target.tls else None  # respects SSL_CERT_FILE and SSL_CERT_DIR
        self._lookup: asyncio.Task[list[str]] | None = None

    async def acquire(self, connect_timeout: float, *, fresh: bool) -> Connection:
        """Return an idle connection, or a new one (`fresh`: always a new one), for which the name is looked up again.

        Raises OSError if no connection can be made, and TimeoutError after `connect_timeout` seconds.
        """
        oldest = asyncio.get_running_loop().time() - MAX_IDLE
        while self._idle and not fresh:
            connection = self._idle.pop()
            if not connection.closed and connection.idle_since > oldest:
                connection.idle_since = 0.0
                connection.reused = True
                return connection
            connection.abort()
        async with asyncio.timeout(connect_timeout):
            return await self._connect()

    async def addresses(self) -> list[str]:
        """Return the addresses of the server's name. Raises OSError, UnicodeError.

        Calls during a lookup share its result. A lookup holds one of few threads until the resolver gives up, often
        long after its request has ended, and two lookups of one engine's name once blocked requests to every other
        engine.
        """
        if self._lookup is None or self._lookup.done():
            self._lookup = asyncio.create_task(_look_up(self._target))
            self._lookup.add_done_callback(_retrieve)  # takes the result even if no caller waits any more
        return await asyncio.shield(self._lookup)

    async def _connect(self) -> Connection:
        """Connect to the first address that accepts a connection."""
        target = self._target
        trouble: OSError | None = None
        for address in await self.addresses():
            try:
                _, connection = await asyncio.get_running_loop().create_connection(
                    Connection, address, target.port, ssl=self.tls, server_hostname=target.host if self.tls else None
                )
            except OSError as exc:
                trouble = trouble or exc
            else:
                return connection
        raise trouble or OSError("The engine's host name has no address.")

    def release(self, connection: Connection) -> None:
        """Take a connection back. It is kept if its exchange ended cleanly, and dropped otherwise."""
        now = asyncio.get_running_loop().time()
        while self._idle and self._idle[0].idle_since <= now - MAX_IDLE:
            self._idle.popleft().abort()
        if connection.reusable:
            connection.idle_since = now
            self._idle.append(connection)
        else:
            connection.abort()

    def close(self) -> None:
        """Drop the idle connections."""
        while self._idle:
            self._idle.pop().abort()
        if self._lookup is not None:
            self._lookup.cancel()


async def _look_up(target: Target) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


def _retrieve(lookup: asyncio.Task[list[str]]) -> None:
    if not lookup.cancelled():
        lookup.exception()
