"""Ingress: uvicorn's HTTP/1.1 protocol with what it leaves open closed: sizes, times, framing, targets.

A request that is refused here still goes to the app, as a scope with the error under "refusal": so it gets an id, a
log line and the one envelope like any other (middleware.RequestLog), and no route ever sees it.

No timer is set per request. `sweep` looks at every connection once a second, and all a request pays for is to note
what it is at. A bound in seconds is therefore kept to within a second or two.
"""

import asyncio
import logging
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.errors import BadRequest, HeadersTooLarge, NotFound, RequestTimeout, StackError
from gateway.response import Cycle

log = logging.getLogger("stack")

MAX_HEADERS = 100  # Apache's default; real clients send 10 to 25
MAX_HEAD = 32 * 1024  # bytes of target and headers together: what nginx takes by default
MAX_AHEAD = 8  # requests waiting behind one under way on the same connection; no client of ours sends any
MIN_RATE = 4096  # bytes a second a body must bring, on average over `Limits.read`
LINGER = 5.0  # seconds a client may go on sending to a connection that has been given its last answer
PARTING = 1.0  # seconds an idle connection may still bring a request after its worker was told to stop
SWEEP = 1.0  # seconds

# What a connection's reading side is at.
HEAD = 0  # waiting for the end of a request's headers
BODY = 1  # … of its body
REST = 2  # … of its body, though it is answered already
BUSY = 3  # the request is whole and under way
IDLE = 4  # between two requests
LAST = 5  # its last answer is written and our side shut; what still comes is thrown away


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds: for a head to arrive and a body to make progress; for a client to take anything of what is written."""

    read: float
    write: float


async def sweep(connections: set[Any]) -> None:
    """Run for ever, one per worker: close those Protocols in `connections` that have been waiting too long."""
    while True:
        await asyncio.sleep(SWEEP)
        now = time.monotonic()
        for connection in list(connections):
            try:
                connection.sweep(now)
            except Exception:
                log.exception("a connection could not be looked after")


class _Outlet:
    """The transport as a cycle sees it: `close` is ours, `write` the transport's own, at no cost."""

    __slots__ = ("close", "is_closing", "write")

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self.write = transport.write
        self.is_closing = transport.is_closing
        self.close = close


class Protocol(HttpToolsProtocol):
    """One client's connection."""

    def __init__(self, *args: Any, limits: Limits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._phase = HEAD
        self._due: float | None = None  # when this phase has lasted too long; None until the next sweep
        self._chunk = 0  # bytes in the piece being parsed
        self._fed = 0  # bytes parsed in this phase, without the piece it began in
        self._body = 0  # bytes of the body so far
        self._body_seen = 0  # … when the sweep last looked
        self._current: Cycle | None = None  # the request under way; self.cycle is the one read last
        self._deaf = False  # nothing that comes is parsed any more
        self._upgrading = False
        self._parting = False
        self._backlog = 0  # bytes not yet taken by the client, at the last sweep
        self._stuck_since: float | None = None

    # -- connections ---------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._outlet = _Outlet(transport, self._close)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._current is not None:
            if self._current is not self.cycle:
                self._current.disconnected = True
                self._current.message_event.set()
            self._current.hang_up()
        self._deaf = True
        self._outlet.close = self.transport.close  # nothing refers to itself any more

    def shutdown(self) -> None:
        """Called when the worker stops. A connection without a request under way is not dropped at once, as uvicorn
        does: its request may be on the way (10 SIGHUPs under load lost 44 of 56,500 requests). It gets a moment, and
        answers with keep-alive off.
        """
        if self.cycle is None or self.cycle.response_complete:
            self._parting = True
            self.loop.call_later(PARTING, self._part)
        else:
            self.cycle.keep_alive = False

    def _part(self) -> None:
        if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
            self.transport.close()

    def _close(self) -> None:
        """Close after an answer. A client that is still sending would have the answer reset away under its hands:
        our side is shut and what still comes is read and dropped for a moment."""
        if self.transport.is_closing() or self._phase == LAST:
            return
        if self._phase in (BUSY, IDLE) and not self._deaf:
            self.transport.close()
            return
        self._deaf = True
        self._enter(LAST)
        self.transport.write_eof()
        self.flow.resume_reading()

    # -- reading -------------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        self._chunk = len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as exc:
            self._ignore_upgrade(data[exc.args[0] :])
            return
        except httptools.HttpParserError as exc:
            cause = exc.__context__
            self._refuse(cause if isinstance(cause, StackError) else _invalid(str(exc)))
            return
        if self._phase <= REST:  # rare: most requests come in one piece
            self._fed += self._chunk
            # In a body, what is not body is framing and trailers: a few bytes per chunk.
            spent = self._fed if self._phase == HEAD else self._fed - 9 * self._body
            if spent > MAX_HEAD:
                self._refuse(_too_large())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._enter(HEAD)

    def on_headers_complete(self) -> None:
        parser, headers, scope = self.parser, self.headers, self.scope
        if parser.should_upgrade():
            self._upgrading = True
            return
        scope["method"] = parser.get_method().decode("ascii")
        scope["query_string"] = b""
        self._set_path(scope)
        if len(headers) > MAX_HEADERS or (
            (self._fed >= 0 or self._chunk > MAX_HEAD)  # in several pieces, or one too large
            and sum(len(name) + len(value) + 4 for name, value in headers) > MAX_HEAD
        ):
            raise _too_large()
        keep_alive = not self._parting and parser.should_keep_alive()
        if (version := parser.get_http_version()) != "1.1":
            if version != "1.0":
                raise _invalid(f"HTTP/{version} is not spoken here")
            scope["http_version"] = version
            keep_alive = False
        before = self.cycle
        waiting = before is not None and not before.response_complete
        if waiting and len(self.pipeline) >= MAX_AHEAD:
            raise _invalid(f"more than {MAX_AHEAD} requests are sent ahead")
        self._enter(BODY)
        self._body = 0
        self.headers = []  # trailers go here, and nobody reads them: they could add what has been checked already
        self._begin(keep_alive=keep_alive)

    def _set_path(self, scope: Any) -> None:
        """The target must be a path. Only a model's name is decoded: every other route is matched as it is written,
        so that %2f or %2e can't be another spelling of one."""
        target = self.url
        if not target.startswith(b"/") or b"#" in target or len(target) > MAX_HEAD:
            scope["path"] = target.partition(b"?")[0].decode("latin-1")
            if len(target) > MAX_HEAD:
                raise _too_large()
            raise _no_proxy() if b"#" not in target else _invalid("a target has no fragment")
        raw, _, scope["query_string"] = target.partition(b"?")
        path = raw.decode("latin-1")
        scope["raw_path"] = raw
        scope["path"] = unquote(path) if "%" in path and path.startswith("/v1/models/") else path

    def on_body(self, body: bytes) -> None:
        self._body += len(body)
        cycle = self.cycle
        if not cycle.response_complete:
            cycle.body += body
            if len(cycle.body) > HIGH_WATER_LIMIT:
                if cycle is not self._current:
                    raise _invalid("a request that is sent ahead is too large")
                self.flow.pause_reading()
            cycle.message_event.set()

    def on_message_complete(self) -> None:
        if self._upgrading:
            return
        cycle = self.cycle
        if cycle.response_complete:
            self._enter(IDLE)
        else:
            self._enter(BUSY)
            cycle.more_body = False
            cycle.message_event.set()

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self.transport.is_closing() or self._phase == LAST:
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start(*self.pipeline.pop())
        elif self._phase == BUSY:
            self._enter(IDLE)
        elif self._phase == BODY:
            self._enter(REST)

    def _enter(self, phase: int) -> None:
        self._phase = phase
        self._due = None
        self._fed = -self._chunk

    def _begin(self, *, keep_alive: bool) -> None:
        """Start the request in self.scope, or put it in line behind the one under way."""
        before = self.cycle
        self.cycle = Cycle(
            scope=self.scope,
            transport=self._outlet,  # type: ignore[arg-type]
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue,
            keep_alive=keep_alive,
            on_response=self.on_response_complete,
        )
        self.scope["stack.client"] = self.cycle  # type: ignore[typeddict-unknown-key]
        if before is None or before.response_complete:
            self._start(self.cycle, self.app)
        else:  # reading goes on: it is how the hang-up of the one under way is noticed
            self.pipeline.appendleft((self.cycle, self.app))

    def _start(self, cycle: Any, app: Any) -> None:
        self._current = cycle
        self._start_asgi_task(cycle, app)

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Answer a request that offers another protocol as if it hadn't, as RFC 9110 (7.8) allows. The parser would
        take its body for that protocol, so it is told anew, without the offer. Java's own client offers h2c with
        every first request."""
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._refuse(_no_proxy())
            return
        self._upgrading = False
        kept = [(name, value) for name, value in self.headers if name not in (b"connection", b"upgrade")]
        if any(name == b"connection" and b"close" in value.lower() for name, value in self.headers):
            kept.append((b"connection", b"close"))
        lines = b"".join(b"%s: %s\r\n" % header for header in kept)
        head = b"%s %s HTTP/%s\r\n%s\r\n" % (method, self.url, self.parser.get_http_version().encode(), lines)
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(head + rest)

    # -- refusing ------------------------------------------------------------------------------------------------------

    def _refuse(self, error: StackError) -> None:
        """Answer with `error` and close; nothing more is parsed."""
        self._deaf = True
        cycle = self.cycle
        if self._phase == BODY and not cycle.response_complete:
            cycle.keep_alive = False
            cycle.more_body = False  # whoever waits for the body finds the refusal (Pipeline.understand)
            self.scope["refusal"] = error  # type: ignore[typeddict-unknown-key]
            cycle.message_event.set()
        elif self._phase in (BODY, REST):
            self._close()
        else:
            if self._phase != HEAD or self.scope is None:
                self.on_message_begin()
            scope: Any = self.scope
            scope["refusal"] = error
            known = bool(self.url)
            scope.setdefault("method", self.parser.get_method().decode("ascii") if known else "-")
            scope.setdefault("path", self.url.partition(b"?")[0].decode("latin-1") or "-")
            self._begin(keep_alive=False)
            self.cycle.more_body = False
            self.cycle.message_event.set()
            self.flow.resume_reading()

    # -- once a second -------------------------------------------------------------------------------------------------

    def sweep(self, now: float) -> None:
        """Look at the clock for this connection."""
        if self._is_stuck(now):
            # By a reset: an orderly close would keep what is left to write in the kernel, for a client that reads on.
            raw = self.transport.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()
        elif self.transport.is_closing() or self._phase == BUSY or self.flow.read_paused:
            self._due = None  # it isn't the client who is waited for
        elif self._due is None:
            self._due = now + self._patience()
            self._body_seen = self._body
        elif now >= self._due:
            self._expire(now)

    def _patience(self) -> float:
        if self._phase == IDLE:
            return float(self.timeout_keep_alive)
        return LINGER if self._phase in (REST, LAST) else self._limits.read

    def _expire(self, now: float) -> None:
        if self._phase == LAST:
            self.transport.abort()
        elif self._phase in (REST, IDLE) or (self._phase == HEAD and self.scope is None):
            self.transport.close()  # there is nothing to say, and to a silent one nothing to answer
        elif self._phase == BODY and self._body - self._body_seen >= MIN_RATE * self._limits.read:
            self._due = now + self._limits.read
            self._body_seen = self._body
        else:
            self._refuse(RequestTimeout("The request did not arrive in time."))

    def _is_stuck(self, now: float) -> bool:
        """Whether the client has taken nothing for too long of what is written to it. While more is being added the
        backlog says nothing about that; it is below the high-water mark then."""
        size = self.transport.get_write_buffer_size()
        settled = self.flow.write_paused or self.cycle is None or self.cycle.response_complete
        if size == 0 or size < self._backlog or not settled:
            self._stuck_since = None
        elif self._stuck_since is None:
            self._stuck_since = now
        self._backlog = size
        return self._stuck_since is not None and now - self._stuck_since >= self._limits.write


def _invalid(reason: str) -> BadRequest:
    return BadRequest(f"The request is not valid HTTP/1.1: {reason}.", code="invalid_http")


def _no_proxy() -> NotFound:
    return NotFound("The request's target must be a path: this is no proxy.")


def _too_large() -> HeadersTooLarge:
    return HeadersTooLarge(f"The request has more than {MAX_HEADERS} headers, or more than {MAX_HEAD} bytes of them.")
