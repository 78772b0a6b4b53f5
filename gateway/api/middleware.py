"""Middleware: handle what is the same for every request, as pure ASGI: CORS, HEAD, Host and X-Forwarded-For. See also
`request_log`.
"""

import contextlib
import ipaddress
import re
import socket
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway import addresses, sse
from gateway import headers as names
from gateway.api import faces
from gateway.errors import BadRequest, StackError
from gateway.keys import neighbours
from gateway.relay.client import Client
from gateway.settings import Settings

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")


async def respond(
    scope: Scope,
    send: Send,
    error: StackError,
    more: Iterable[tuple[bytes, bytes]] = (),
    *,
    client: Client | None = None,
) -> None:
    """Send an error as a whole response in the form of the path's API, with `more` headers. To Codex it is sent as a
    stream (`faces.failing`). `client` receives the response, if it is not the request's own client."""
    if (events := faces.failing(error, scope)) is not None:
        start = {"type": "http.response.start", "status": 200, "headers": [*sse.HEADERS, *more]}
        await send(start | {"error": error.outcome, "failed": error.status})
        await send({"type": "http.response.body", "body": events, "more_body": True})
        await (client or scope["stack.client"]).cut()
        return
    status, headers, body = faces.refusal(error, scope)
    headers = [*headers, *more, (b"content-length", b"%d" % len(body))]
    # "error" is ours: what the log calls it.
    await send({"type": "http.response.start", "status": status, "headers": headers, "error": error.outcome})
    await send({"type": "http.response.body", "body": body})


class Cors(CORSMiddleware):
    """Handle CORS. Rejections have OpenAI's error shape, and a page can read the protocol's own rejections too."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if "refusal" in scope:  # it may be a preflight, which must not be granted then
            await self.simple_response(scope, receive, send, Headers(scope=scope))
        else:
            await super().__call__(scope, receive, send)

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        reason = bytes(response.body).decode()
        advice = "The operator lists the origins of web pages in STACK_CORS_ORIGINS."
        if "origin" not in reason:
            advice = f"A web page may use {', '.join(self.allow_methods)}."
        error = BadRequest(f"{reason}. {advice}", code="cors_refused")
        kept = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
        return Response(error.envelope(), error.status, kept, media_type="application/json")


class Head:
    """Answer HEAD wherever GET is answered, with the same head. The server leaves the body out."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)


class Forwarded:
    """Take the client's address from X-Forwarded-For, if the reverse proxy sent the request.

    The proxy is the only neighbour on the network where the gateway has the address `own`. The last entry is what the
    proxy saw. The entries before it are the client's own words.
    """

    def __init__(self, app: ASGIApp, *, own: str) -> None:
        self._app = app
        self._own = own

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = scope.get("client")
        if scope["type"] == "http" and client and neighbours.is_beside(client[0], self._own):
            values = [value for name, value in scope["headers"] if name == names.FORWARDED_FOR]
            last = values[-1].decode("latin-1").rpartition(",")[2].strip() if values else ""
            with contextlib.suppress(ValueError):
                scope["client"] = (str(ipaddress.ip_address(last)), client[1])
        await self._app(scope, receive, send)


# Names by which containers and virtual machines reach the machine they run on. Nobody can register a name in .internal.
_THIS_MACHINE = frozenset({"localhost", "gateway", "host.docker.internal", "host.containers.internal"})


class Host:
    """Check the Host header, and answer what the protocol (server/protocol.py) rejected with that rejection.

    A request must have exactly one well-formed Host header. On a loopback binding, the header must name this machine. A
    web page can point a name of its own at 127.0.0.1 (DNS rebinding) and so reach a local server, but that name is then
    in the Host header.
    """

    def __init__(self, app: ASGIApp, *, settings: Settings) -> None:
        self._app = app
        local = _THIS_MACHINE | {socket.gethostname().lower(), addresses.host(settings.reachable_from)}
        listed = set(settings.stack_allowed_hosts)
        self._allowed = local | listed if settings.on_loopback or listed else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := scope.get("refusal") or self._check(scope)):
            await respond(scope, send, error)
        else:
            await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> StackError | None:
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        match = _HOST.fullmatch(hosts[0].decode("latin-1")) if len(hosts) == 1 else None
        if match is None:
            return BadRequest("The request must have exactly one valid Host header.", code="invalid_host")
        name = match[1].lower().removesuffix(".")
        if self._allowed is not None and name not in self._allowed and not _is_loopback(name):
            return BadRequest(
                "This gateway does not accept this Host header. To allow the name, add it to STACK_ALLOWED_HOSTS.",
                code="invalid_host",
            )
        return None


def _is_loopback(name: str) -> bool:
    """Return whether a host name can only mean this machine: a loopback address, or a name in .localhost (RFC 6761)."""
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return name.endswith(".localhost")
