"""What is written by hand is what OpenTelemetry's own classes read."""

import math

from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from gateway.traces import otlp
from tests.support.collector import span, value

TEXT = st.text()
VALUES = st.one_of(
    TEXT, st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.lists(TEXT, min_size=1)
)
TIMES = st.integers(0, 2**64 - 1)


@given(rejected=st.integers(0, 2**63 - 1), message=TEXT)
def test_the_number_of_rejected_spans_is_read(rejected: int, message: str) -> None:
    partial = ExportTracePartialSuccess(rejected_spans=rejected, error_message=message)
    answer = ExportTraceServiceResponse(partial_success=partial).SerializeToString()
    assert otlp.rejected(answer) == rejected


@given(st.binary())
def test_an_answer_that_is_something_else_rejects_nothing_that_fails(answer: bytes) -> None:
    assert otlp.rejected(answer) >= 0


@given(
    attributes=st.dictionaries(TEXT, VALUES, max_size=6),
    times=st.tuples(TIMES, TIMES),
    name=TEXT,
    state=TEXT,
    parent=st.one_of(st.just(b""), st.binary(min_size=8, max_size=8)),
    failed=st.booleans(),
)
def test_any_span_is_read_as_it_was_meant(
    attributes: dict[str, otlp.Value], times: tuple[int, int], name: str, state: str, parent: bytes, failed: bool
) -> None:
    began, ended = times
    written = otlp.span(
        trace=b"t" * 16,
        id=b"s" * 8,
        parent=parent,
        remote=bool(parent),
        state=state,
        name=name,
        kind="client",
        began=began,
        ended=ended,
        attributes=[otlp.attribute(name, it) for name, it in attributes.items()],
        events=otlp.event("happened", began),
        failed=failed,
    )
    body = otlp.request({"service.name": "stack"}, "stack", "1", [written, written])
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    assert [(it.key, value(it.value)) for it in resource.resource.attributes] == [("service.name", "stack")]
    (scope,) = resource.scope_spans
    assert (scope.scope.name, scope.scope.version, len(scope.spans)) == ("stack", "1", 2)
    proto = scope.spans[1]
    assert (proto.start_time_unix_nano, proto.end_time_unix_nano) == times
    read = span(proto)
    assert (read.name, read.kind, read.trace, read.id) == (name, "client", (b"t" * 16).hex(), (b"s" * 8).hex())
    assert (read.parent, read.state, read.failed) == (parent.hex(), state, failed)
    assert read.flags == (0x301 if parent else 0x101)
    assert list(read.events) == ["happened"]
    assert read.attributes == attributes


def test_half_a_character_and_odd_numbers_are_written_all_the_same() -> None:
    pair = ExportTraceServiceRequest.FromString(otlp.request({"x": "a\ud83d"}, "", "", []))
    assert value(pair.resource_spans[0].resource.attributes[0].value) == "a?"
    written = otlp.attribute("x", math.inf)
    assert written == otlp.constant("x", math.inf)  # type: ignore[arg-type]
    assert otlp.constant("x", True) != otlp.constant("x", 1)
