"""Ingress: uvicorn's HTTP/1.1 protocol with what it leaves open closed: sizes, times, framing, targets.

A request that is refused here still goes to the app, as a scope with the error under "refusal": so it gets an id, a
log line and the one envelope like any other (request_log.RequestLog), and no route ever sees it.

No timer is set per request. `sweep` looks at every connection once a second, and all a request pays for is to note
what it is at. A bound in seconds is therefore kept to within a second or two.

The file is long because Protocol is one state machine on top of uvicorn's: every method changes the connection's phase,
or depends on it. What does not is in `refusals`.
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

from gateway.errors import RequestTimeout, StackError
from gateway.server.cycle import Cycle
from gateway.server.refusals import MAX_HEAD, MAX_HEADERS, invalid, no_proxy, other_protocol, too_large

log = logging.getLogger("stack")

MAX_AHEAD = 8  # requests that may wait behind the running one on a connection; no known client sends any
AHEAD = 16 * 1024  # bytes that are read before the application asks for them: of a body, and of all waiting requests
UNSENT = 64 * 1024  # bytes that the kernel may hold for a client that does not read
MIN_RATE = 4096  # bytes per second that a body must bring, on average over `Limits.read`
LINGER = 5.0  # seconds for which a client may continue to send after its connection's last answer
PARTING = 1.0  # seconds for which an idle connection may still bring a request after its worker was told to stop
SWEEP = 1.0  # seconds between two looks at every connection

# The phase of a connection's reading side.
HEAD = 0  # a request's headers are expected
BODY = 1  # its body is expected
REST = 2  # its body is expected, although it was answered already
BUSY = 3  # the request is complete and running
IDLE = 4  # between two requests
LAST = 5  # its last answer is written and the gateway's side is shut; further bytes are dropped


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of connections. `read`: seconds for a head to arrive, and for a body to make progress. `write`: seconds
    for a client to take anything of what is written. `strangers`: how many connections may serve no request of a known
    key."""

    read: float
    write: float
    strangers: int


def bound(listener: socket.socket) -> None:
    """Make the kernel hold at most UNSENT unsent bytes for each connection that is accepted here. Otherwise a client
    that does not read a large answer would make the kernel hold megabytes, which count as the gateway's memory."""
    if listener.family != socket.AF_UNIX and hasattr(socket, "TCP_NOTSENT_LOWAT"):  # macOS, with `make dev`
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT)


async def sweep(connections: set[Any]) -> None:
    """Close connections that have waited too long, once a second, for ever. One task per worker."""
    while True:
        await asyncio.sleep(SWEEP)
        now = time.monotonic()
        for connection in list(connections):
            try:
                connection.sweep(now)
            except Exception:
                log.exception("a connection could not be checked")


class _Outlet:
    """The transport as a cycle sees it. Only `close` is the protocol's own."""

    __slots__ = ("abort", "close", "get_extra_info", "get_write_buffer_size", "is_closing", "write")

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self.write = transport.write
        self.is_closing = transport.is_closing
        self.abort = transport.abort
        self.get_extra_info = transport.get_extra_info
        self.get_write_buffer_size = transport.get_write_buffer_size
        self.close = close


Strangers = dict["Protocol", None]  # connections that serve no request of a known key, the oldest first


class Protocol(HttpToolsProtocol):
    """One client's connection."""

    def __init__(self, *args: Any, limits: Limits, strangers: "Strangers", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._strangers = strangers
        self._ahead = 0  # bytes of requests that wait behind the running one
        self._phase = HEAD
        self._due: float | None = None  # when this phase times out; None until the next sweep
        self._chunk = 0  # bytes in the piece being parsed
        self._fed = 0  # bytes parsed in this phase, without the piece it began in
        self._body = 0  # bytes of the body so far
        self._body_seen = 0  # bytes of the body at the last sweep
        self._current: Cycle | None = None  # the running request; self.cycle is the one that was read last
        self._deaf = False  # further bytes are not parsed
        self._upgrading = False
        self._parting = False
        self._backlog = 0  # bytes not yet taken by the client, at the last sweep
        self._stuck_since: float | None = None

    # -- connections ---------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._outlet = _Outlet(transport, self._close)
        self._wait_for_key()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._strangers.pop(self, None)
        if self._current is not None:
            if self._current is not self.cycle:
                self._current.disconnected = True
                self._current.message_event.set()
            self._current.hang_up()
        self._deaf = True
        self._outlet.close = self.transport.close  # breaks the reference cycle

    def shutdown(self) -> None:
        """Stop the connection when the worker stops. uvicorn drops a connection without a running request at once, but
        its request may be on the way (10 SIGHUPs under load lost 44 of 56,500 requests). It gets a moment, and its
        answer turns keep-alive off."""
        if self.cycle is None or self.cycle.response_complete:
            self._parting = True
            self.loop.call_later(PARTING, self._part)
        else:
            self.cycle.keep_alive = False

    def _wait_for_key(self) -> None:
        """Count this connection as one without a known key. If there are too many, close the one that has been without
        for longest, because a new one is more likely to belong to a caller."""
        strangers = self._strangers
        strangers.pop(self, None)
        strangers[self] = None
        while len(strangers) > self._limits.strangers:
            oldest = next(iter(strangers))
            del strangers[oldest]
            oldest.evict()

    def evict(self) -> None:
        """Close the connection in favour of another one, unless it serves a known key."""
        if self._current is not None and self._current.known and not self._current.response_complete:
            return
        if self.transport.get_write_buffer_size():
            self._reset()
        else:
            self.transport.close()

    def _reset(self) -> None:
        """Reset the connection. After an orderly close, the kernel would keep the unsent bytes for a client that reads
        on."""
        raw = self.transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def _part(self) -> None:
        if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
            self.transport.close()

    def _close(self) -> None:
        """Close after an answer. If the client still sends, an immediate close would reset the connection and lose the
        answer. The gateway's side is therefore shut first, and what still comes is dropped for a moment."""
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
            error = cause if isinstance(cause, StackError) else invalid(other_protocol(data) or str(exc))
            # The error lives as long as its answer, and its traceback would keep all that was read here.
            self._refuse(error.with_traceback(None))
            return
        if self._phase <= REST:  # rare, because most requests come in one piece
            self._fed += self._chunk
            # The bytes in a body that are not body are framing and trailers: a few bytes per chunk.
            spent = self._fed if self._phase == HEAD else self._fed - 9 * self._body
            if spent > MAX_HEAD:
                self._refuse(too_large())

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
            (self._fed >= 0 or self._chunk > MAX_HEAD)  # the head came in several pieces, or in one that is too large
            and sum(len(name) + len(value) + 4 for name, value in headers) > MAX_HEAD
        ):
            raise too_large()
        keep_alive = not self._parting and parser.should_keep_alive()
        if (version := parser.get_http_version()) != "1.1":
            if version != "1.0":
                raise invalid(f"HTTP/{version} is not supported")
            scope["http_version"] = version
            keep_alive = False
        before = self.cycle
        waiting = before is not None and not before.response_complete
        if waiting:
            self._read_ahead(sum(len(name) + len(value) for name, value in headers) + len(self.url))
            if len(self.pipeline) >= MAX_AHEAD:
                raise invalid(f"more than {MAX_AHEAD} requests were sent before the first one was answered")
        self._enter(BODY)
        self._body = 0
        self.headers = []  # trailers go here and are never read, because they could replace checked headers
        self._begin(keep_alive=keep_alive)

    def _set_path(self, scope: Any) -> None:
        """Set the path. The target must be a path. Only the name of a model is decoded. Every other route matches the
        path as written, so %2f or %2e cannot be another spelling of it."""
        target = self.url
        if target[:7].lower() == b"http://":
            target = self._own_path(target)
        if not target.startswith(b"/") or b"#" in target or len(target) > MAX_HEAD:
            scope["path"] = target.partition(b"?")[0].decode("latin-1")
            if len(target) > MAX_HEAD:
                raise too_large()
            raise no_proxy() if b"#" not in target else invalid("the target must not have a fragment")
        raw, _, scope["query_string"] = target.partition(b"?")
        path = raw.decode("latin-1")
        scope["raw_path"] = raw
        scope["path"] = unquote(path) if "%" in path and path.startswith("/v1/models/") else path

    def _own_path(self, target: bytes) -> bytes:
        """Return the path of an absolute-form target that names this server, as its Host header does: RFC 9112 (3.2.2)
        demands that of every server. Capitals and the default port make no difference. Any other target stays as it is:
        on a connection without TLS, `https://` must be refused (RFC 9110, 7.4)."""
        authority, slash, path = target[7:].partition(b"/")
        if not slash:
            authority, mark, query = authority.partition(b"?")
            path = mark + query
        hosts = [value.lower().removesuffix(b":80") for name, value in self.headers if name == b"host"]
        return b"/" + path if hosts == [authority.lower().removesuffix(b":80")] else target

    def on_body(self, body: bytes) -> None:
        self._body += len(body)
        cycle: Any = self.cycle
        if not cycle.response_complete:
            if cycle is not self._current:
                self._read_ahead(len(body))
            cycle.body += body
            # The application resumes reading when it wants more
            if len(cycle.body) > (HIGH_WATER_LIMIT if cycle.known else AHEAD):
                self.flow.pause_reading()
            cycle.message_event.set()

    def _read_ahead(self, size: int) -> None:
        """Count the bytes that came behind the running request. Raises BadRequest if they are too many. Reading
        continues during a request, because only reading notices a disconnect, so it needs a limit."""
        self._ahead += size
        if self._ahead > AHEAD:
            raise invalid(f"more than {AHEAD} bytes of further requests were sent before the first one was answered")

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
        self._wait_for_key()
        if self._current is not None and self._current.body:
            self._current.body.clear()  # the application will not read the rest
        if self.pipeline:
            self._start(*self.pipeline.pop())
            if not self.pipeline:
                self._ahead = 0
        elif self._phase == BUSY:
            self._enter(IDLE)
        elif self._phase == BODY:
            self._enter(REST)

    def _enter(self, phase: int) -> None:
        self._phase = phase
        self._due = None
        self._fed = -self._chunk

    def _begin(self, *, keep_alive: bool) -> None:
        """Start the request in self.scope, or put it in line behind the running one."""
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
            expect_100_continue=self.expect_100_continue and self.scope["http_version"] == "1.1",
            keep_alive=keep_alive,
            on_response=self.on_response_complete,
        )
        self.scope["stack.client"] = self.cycle  # type: ignore[typeddict-unknown-key]
        if before is None or before.response_complete:
            self._start(self.cycle, self.app)
        else:  # reading continues, because only reading notices a disconnect
            self.pipeline.appendleft((self.cycle, self.app))

    def _start(self, cycle: Any, app: Any) -> None:
        self._current = cycle
        self._start_asgi_task(cycle, app)

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Answer a request that offers another protocol as if it had no offer, as RFC 9110 (7.8) allows. The parser
        would take its body for that protocol, so it gets the request again without the offer. Java's own client offers
        h2c with every first request."""
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._refuse(no_proxy())
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
        """Answer with `error` and close. Nothing more is parsed."""
        self._deaf = True
        cycle = self.cycle
        if self._phase == BODY and not cycle.response_complete:
            cycle.keep_alive = False
            cycle.more_body = False  # the reader of the body finds the refusal (Pipeline.understand)
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
        """Check this connection's timeouts."""
        if self._is_stuck(now):
            self._reset()
        elif self.transport.is_closing() or self._phase == BUSY or self.flow.read_paused:
            self._due = None  # the gateway does not wait for the client
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
            self.transport.close()  # there is no request to answer
        elif self._phase == BODY and self._body - self._body_seen >= MIN_RATE * self._limits.read:
            self._due = now + self._limits.read
            self._body_seen = self._body
        else:
            self._refuse(RequestTimeout("The request did not arrive in time."))

    def _is_stuck(self, now: float) -> bool:
        """Return whether the client has taken nothing of what is written to it for too long. While more is being
        written, the backlog does not show that; it is below the high-water mark then."""
        size = self.transport.get_write_buffer_size()
        settled = self.flow.write_paused or self.cycle is None or self.cycle.response_complete
        if size == 0 or size < self._backlog or not settled:
            self._stuck_since = None
        elif self._stuck_since is None:
            self._stuck_since = now
        self._backlog = size
        return self._stuck_since is not None and now - self._stuck_since >= self._limits.write
