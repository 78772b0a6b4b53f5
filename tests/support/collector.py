"""A collector of OpenTelemetry: a real HTTP server that reads what it gets with OpenTelemetry's own classes."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Proto
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from tests.support.processes import free_port, wait_for


@dataclass
class Span:
    """One span, as far as tests look at it. Times are seconds since 1970."""

    name: str
    kind: str
    trace: str
    id: str
    parent: str
    state: str
    flags: int
    began: float
    ended: float
    failed: bool
    attributes: dict[str, Any]
    events: dict[str, float]


@dataclass
class Collector:
    """What a collector got. It answers with `status` while `open` is set, and keeps nothing if that is an error. Of
    each request it says that it rejects so many spans."""

    url: str
    status: int = 200
    refused: int = 0  # requests
    asked: int = 0  # requests
    rejects: int = 0  # spans
    open: threading.Event = field(default_factory=threading.Event)
    headers: list[dict[str, str]] = field(default_factory=list)
    resources: list[dict[str, Any]] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)

    def of(self, request_id: str) -> list[Span]:
        """The trace of a request, its own span first, then the others in the order in which they began."""

        def find() -> list[Span]:
            own = [it for it in self.spans if it.attributes.get("stack.request.id") == request_id]
            if not own:
                return []
            others = [it for it in self.spans if it.trace == own[0].trace and it is not own[0]]
            return [own[0], *sorted(others, key=lambda it: (it.began, -it.ended))]

        return wait_for(find, message=f"no span of {request_id}")

    def take(self, body: bytes, headers: dict[str, str]) -> int:
        self.asked += 1
        self.open.wait(9)
        if self.status >= 300:
            self.refused += 1
            return self.status
        request = ExportTraceServiceRequest.FromString(body)
        self.bodies.append(body)
        self.headers.append(headers)
        for resource in request.resource_spans:
            self.resources.append({it.key: value(it.value) for it in resource.resource.attributes})
            self.spans += [span(it) for scope in resource.scope_spans for it in scope.spans]
        return self.status

    def said(self) -> bytes:
        partial = ExportTracePartialSuccess(rejected_spans=self.rejects, error_message="no" * 5000)
        return ExportTraceServiceResponse(partial_success=partial if self.rejects else None).SerializeToString()


def span(it: Proto) -> Span:
    return Span(
        name=it.name,
        kind=Proto.SpanKind.Name(it.kind).removeprefix("SPAN_KIND_").lower(),
        trace=it.trace_id.hex(),
        id=it.span_id.hex(),
        parent=it.parent_span_id.hex(),
        state=it.trace_state,
        flags=it.flags,
        began=it.start_time_unix_nano / 1e9,
        ended=it.end_time_unix_nano / 1e9,
        failed=it.status.code == Status.STATUS_CODE_ERROR,
        attributes={pair.key: value(pair.value) for pair in it.attributes},
        events={event.name: event.time_unix_nano / 1e9 for event in it.events},
    )


def value(it: AnyValue) -> Any:
    kind = it.WhichOneof("value")
    return [value(part) for part in it.array_value.values] if kind == "array_value" else getattr(it, kind)


@contextmanager
def collecting(port: int | None = None) -> Iterator[Collector]:
    port = port or free_port()
    collector = Collector(f"http://127.0.0.1:{port}")
    collector.open.set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            body = self.rfile.read(int(self.headers["content-length"]))
            status = collector.take(body, {name.lower(): text for name, text in self.headers.items()})
            self.send_response(status)
            self.end_headers()
            self.wfile.write(collector.said() if status not in (204, 304) else b"")

        def log_message(self, *args: Any) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join()
