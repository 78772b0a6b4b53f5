"""HTTP/1.1 to the engine: a pool of kept-alive connections, parsed by httptools.

The relay is what this project exists for, and its client is most of the relay's cost (ARCHITECTURE.md has the
figures). Only what the relay needs is here: a whole request out; an answer back that has a length, is chunked, or
ends with its connection.
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

MAX_HEADER = 64 * 1024  # bytes of an answer's header block
HIGH_WATER = 256 * 1024  # bytes of body that may wait for the client before the engine is no longer read
MAX_IDLE = 4.0  # seconds; below the 5 s after which vLLM's server closes idle connections


class BrokenError(Exception):
    """The connection ended or its bytes made no sense. `answered` says whether any of an answer had come."""

    def __init__(self, message: str, *, answered: bool) -> None:
        super().__init__(message)
        self.answered = answered


class Connection(asyncio.Protocol):
    """One connection, one exchange at a time. Whoever acquired it gives it back with `Pool.release`."""

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
        self._waiting = 0  # bytes in _parts
        self._header_size = 0
        self._paused = False
        self._delimited = False  # the head told where the body ends
        self._trouble: str | None = None
        self.status = 0  # once the head is here
        self.complete = False  # once the body's end is here
        self.keep_alive = False
        self._begun = False  # a byte of the answer is here
        self._sink: Callable[[bytes], bool] | None = None

    @property
    def reusable(self) -> bool:
        """Whether the exchange came to a clean end, with nothing of its request still waiting to be sent."""
        return self.complete and self.keep_alive and not self.closed and not self._transport.get_write_buffer_size()

    # -- what the relay calls -----------------------------------------------------------------------------------------

    def send(self, request: bytes) -> None:
        """Begin an exchange: write a whole request."""
        self._reset()
        self._transport.write(request)

    async def head(self) -> int:
        """The answer's status, once its head is here. Raises BrokenError."""
        while not self.status:
            await self._wait()
        return self.status

    async def read(self) -> bytes:
        """What has come of the body (up to some 500 kB); empty at its end. Raises BrokenError when it breaks off."""
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
        """Have what comes of this exchange's body from now on, while somebody waits in `read`, handed to `sink`. Where
        that returns False, `read` returns it all the same, with what may have come after it. None: no longer."""
        self._sink = sink

    def abort(self) -> None:
        """Drop the connection now; the engine sees its client hang up."""
        self.closed = True
        self._transport.abort()

    async def _wait(self) -> None:
        if self._trouble is not None:
            raise BrokenError(self._trouble, answered=True)
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
        if self.complete or self.idle_since:  # bytes nobody asked for: not a connection to use again
            self.abort()
            return
        self._begun = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            if not self.complete:
                self._trouble = self._trouble or f"The engine's answer is not valid HTTP ({type(exc).__name__})."
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
            raise ValueError("bytes after the answer")  # httptools makes a parser error of it

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_size += len(name) + len(value)
        if self._header_size > MAX_HEADER:
            raise ValueError("header block too large")
        lower = name.lower()
        if lower in (b"content-length", b"transfer-encoding"):
            self._delimited = True
        elif lower == b"content-encoding" and value.lower() != b"identity":
            self._trouble = "The engine compressed its answer, which it was not asked to."
            raise ValueError("compressed")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status >= 200:  # 1xx is not the answer yet
            self.status = status
            self._delimited = self._delimited or status in (204, 304)

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)
        self._waiting += len(body)

    def on_message_complete(self) -> None:
        if self.status:
            self.complete = True
            self.keep_alive = self._parser.should_keep_alive()


@dataclass(frozen=True, slots=True)
class Target:
    """Where a server is: what to connect to, and what to write into requests."""

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
    """Connections to one server, the most recently used first. No limit: who gets through is decided earlier."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._idle: deque[Connection] = deque()
        self._tls = ssl.create_default_context() if target.tls else None
        self._lookup: asyncio.Task[list[str]] | None = None

    async def acquire(self, connect_timeout: float, *, fresh: bool) -> Connection:
        """An idle connection, or a new one (`fresh`: always), for which the name is looked up afresh.

        Raises OSError when it can't be made, TimeoutError when that takes longer than `connect_timeout` seconds.
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
        """What the server's name stands for now. Raises OSError, UnicodeError.

        Those who ask meanwhile share a lookup: each holds one of few threads until the resolver gives up, long after
        the request was, and two such lookups of one engine's name once held up every other engine.
        """
        if self._lookup is None or self._lookup.done():
            self._lookup = asyncio.create_task(_look_up(self._target))
            self._lookup.add_done_callback(_retrieve)  # maybe nobody waits any more
        return await asyncio.shield(self._lookup)

    async def _connect(self) -> Connection:
        """A connection to the first of the addresses that takes one."""
        target = self._target
        trouble: OSError | None = None
        for address in await self.addresses():
            try:
                _, connection = await asyncio.get_running_loop().create_connection(
                    Connection, address, target.port, ssl=self._tls, server_hostname=target.host if self._tls else None
                )
            except OSError as exc:
                trouble = trouble or exc
            else:
                return connection
        raise trouble or OSError("The name stands for no address.")

    def release(self, connection: Connection) -> None:
        """Take a connection back: kept if its exchange came to a clean end, dropped otherwise."""
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
