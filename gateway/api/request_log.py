"""Request log: give each request its id, and write its one `request` line, as pure ASGI."""

import asyncio
import logging
import re
import secrets
import time
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway import headers as names
from gateway import logs
from gateway.api import faces
from gateway.endpoints import BY_PATH
from gateway.errors import level_of
from gateway.metrics import Metrics

if TYPE_CHECKING:
    from gateway.traces.spans import Traces

MAX_LINES = 100  # of the log, for requests with one status of an error, in a second
_REQUEST_ID = re.compile(rb"[A-Za-z0-9_-]{1,64}")
_PROBES = ("/livez", "/readyz")


class Sample:
    """Decide which refused requests get a log line: so many per second and status. Count the others."""

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}  # in this second

    def takes(self, status: int) -> bool:
        """Return whether to write one more line for a request with that status."""
        if status < 400:
            return True
        if not self._seen:
            asyncio.get_running_loop().call_later(1.0, self._tell)
        self._seen[status] = seen = self._seen.get(status, 0) + 1
        return seen <= MAX_LINES

    def _tell(self) -> None:
        for status, seen in self._seen.items():
            if seen > MAX_LINES:
                logs.event("requests_not_logged", {"status": status, "count": seen - MAX_LINES})
        self._seen = {}


class RequestLog:
    """Give every request an id, put the id on the response, and write one log line when the response is over."""

    def __init__(self, app: ASGIApp, *, log_level: str, metrics: Metrics, traces: "Traces | None") -> None:
        self._app = app
        self._metrics = metrics
        self._traces = traces
        self._sample = Sample()
        self._log_probes = logging.getLevelNamesMapping()[log_level] <= logging.DEBUG

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = self._request_id(scope)
        scope["request_id"] = request_id
        if self._traces is not None:
            scope["stack.trace"] = self._traces.begin(scope["headers"], time.monotonic())
        status = 0
        code: dict[str, str] = {}
        failed: int | None = None  # the status of the error that a stream tells

        async def send_with_id(message: Message) -> None:
            nonlocal status, failed
            if message["type"] == "http.response.start":
                status, failed = message["status"], message.get("failed")
                if "error" in message:
                    code["code"] = message["error"]
                headers = faces.dressed(scope, list(message.get("headers", ())), request_id)
                message["headers"] = [*headers, (names.REQUEST_ID, request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            client = scope.pop("stack.client")
            if client.disconnected and not client.response_complete:
                status = 499  # it left; nginx's status for that
            self._ended(scope, request_id, status or 500, failed, code, time.perf_counter() - started)

    def _ended(
        self, scope: Scope, request_id: str, status: int, failed: int | None, code: dict[str, str], seconds: float
    ) -> None:
        """Count, log and trace a response that is over. `failed` is the status of the error that a stream told, and
        `code` says why a request was refused."""
        path = scope["path"]
        if not self._log_probes and status == 200 and path in _PROBES:
            return
        self._metrics.responded(status)
        told = failed or status
        taken = self._sample.takes(told)
        if taken and (told >= 400 or logs.sampled(request_id)):
            fields = {
                "request_id": request_id,
                "method": scope["method"],
                "path": path[:256],
                "status": status,
                "elapsed_ms": round(seconds * 1000, 1),
            }
            logs.event("request", fields | code, level_of(told))
        if self._traces is not None and (taken or scope["stack.trace"].about or scope["stack.trace"].held):
            route = path if path in BY_PATH else getattr(scope.get("route"), "path", None)
            why, trace = code.get("code", ""), scope["stack.trace"]
            self._traces.responded(trace, scope["method"], path, route, request_id, status, why)

    def _request_id(self, scope: Scope) -> str:
        """Return the caller's own id if it is harmless, otherwise a new random one. The id must not be guessable,
        because people give it to support staff, and it identifies a caller's request."""
        for name, value in scope["headers"]:
            if name == names.REQUEST_ID:
                if _REQUEST_ID.fullmatch(value):
                    return str(value, "ascii")
                break
        return f"req_{secrets.token_hex(16)}"
