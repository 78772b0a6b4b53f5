"""Middleware: pure ASGI, for what needs no knowledge of who asks for what: request ids, the request log, the Host."""

import itertools
import logging
import re
import secrets
import socket
import time
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway import logs
from gateway.errors import BadRequest, StackError
from gateway.metrics import Metrics
from gateway.settings import Settings

_REQUEST_ID = re.compile(rb"[A-Za-z0-9_-]{1,64}")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")
_PROBES = ("/livez", "/readyz")


async def respond(send: Send, error: StackError, more: Iterable[tuple[bytes, bytes]] = ()) -> None:
    """Send an error as a whole response, with `more` headers."""
    body = error.envelope()
    headers = [(name.encode(), value.encode()) for name, value in error.headers.items()]
    headers += more
    headers += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class RequestLog:
    """Gives every request an id, puts it on every response, and writes one line and counts when it is over."""

    def __init__(self, app: ASGIApp, *, log_level: str, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics
        self._ids = f"req_{secrets.token_hex(8)}", itertools.count(1)  # of this process, and in it
        self._log_probes = logging.getLevelNamesMapping()[log_level] <= logging.DEBUG

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = self._request_id(scope)
        scope["request_id"] = request_id
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            if "refusal" in scope:  # the protocol's own (ingress.py)
                await respond(send_with_id, scope["refusal"])
            else:
                await self._app(scope, receive, send_with_id)
        finally:
            client = scope.pop("stack.client")
            if client.disconnected and not client.response_complete:
                status = 499  # it left; nginx's status for that
            path = scope["path"]
            if self._log_probes or status != 200 or path not in _PROBES:
                self._metrics.responded(status or 500)
                elapsed = round((time.perf_counter() - started) * 1000, 1)
                logs.event(
                    "request",
                    {
                        "request_id": request_id,
                        "method": scope["method"],
                        "path": path[:256],
                        "status": status or 500,
                        "elapsed_ms": elapsed,
                    },
                )

    def _request_id(self, scope: Scope) -> str:
        """The caller's own id where it is harmless, else a new one."""
        for name, value in scope["headers"]:
            if name == b"x-request-id":
                if _REQUEST_ID.fullmatch(value):
                    return str(value, "ascii")
                break
        process, numbers = self._ids
        return f"{process}{next(numbers):08x}"


class Host:
    """Requires exactly one well-formed Host header, and on a loopback binding one that names this machine.

    A web page can point a name of its own at 127.0.0.1 (DNS rebinding) and so reach what listens there; the
    name it used is in the Host header.
    """

    def __init__(self, app: ASGIApp, *, settings: Settings) -> None:
        self._app = app
        local = {"localhost", "127.0.0.1", "[::1]", "gateway", socket.gethostname().lower(), settings.reachable_from}
        listed = {name.lower() for name in settings.stack_allowed_hosts}
        self._allowed = local | listed if settings.on_loopback or listed else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self._check(scope)):
            await respond(send, error)
        else:
            await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> StackError | None:
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        match = _HOST.fullmatch(hosts[0].decode("latin-1")) if len(hosts) == 1 else None
        if match is None:
            return BadRequest("The request must have exactly one valid Host header.", code="invalid_host")
        if self._allowed is not None and match[1].lower() not in self._allowed:
            return BadRequest(
                "This gateway does not answer to that Host. If it should, add the name to STACK_ALLOWED_HOSTS.",
                code="invalid_host",
            )
        return None
