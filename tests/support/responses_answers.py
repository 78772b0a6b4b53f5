"""Answers for tests of the Responses API: recorded and made-up streams, and what a writer makes of them."""

from pathlib import Path
from typing import Any

import orjson

from gateway.translation.responses import Asked, read

RECORDED = Path(__file__).parent.parent / "recordings" / "clients"


def asked(request_id: str = "mock", **fields: Any) -> Asked:
    """A streamed request with these fields, read."""
    body = {"model": "mock-model", "input": "Hello", "stream": True, **fields}
    return read(body, request_id=request_id, now=1700000000, stores=True, clock=lambda: 1700000002.5)


def chunk(finish: str | None = None, usage: dict[str, Any] | None = None, **delta: Any) -> dict[str, Any]:
    """One chat chunk."""
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]} | ({"usage": usage} if usage else {})


def call(index: int, name: str | None = None, arguments: str = "", call_id: str | None = None) -> dict[str, Any]:
    """One chunk with a piece of a tool call."""
    function = {"arguments": arguments} | ({"name": name} if name else {})
    piece = {"index": index, "function": function} | ({"id": call_id, "type": "function"} if call_id else {})
    return chunk(tool_calls=[piece])


def events_of(stream: bytes) -> list[dict[str, Any]]:
    """Return the events of a stream. Checks that each has an `event:` line that agrees with its data."""
    made = []
    assert stream.endswith(b"\n\n")
    for block in stream.replace(b"\r\n", b"\n").split(b"\n\n")[:-1]:
        kind, _, data = block.partition(b"\n")
        event = orjson.loads(data.removeprefix(b"data: "))
        assert kind == b"event: " + event["type"].encode()
        made.append(event)
    return made


def streamed(request: Asked, chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the events of a complete answer."""
    writer = request.writer
    return events_of(writer.head() + b"".join(writer.chunk(it) for it in chunks) + writer.end())


def types(events: list[dict[str, Any]]) -> list[str]:
    return [it["type"] for it in events]


def recorded_chunks(name: str) -> list[dict[str, Any]]:
    """Return the chunks of a recorded chat stream, without `[DONE]` and errors."""
    frames = (RECORDED / "answers" / name).read_bytes().split(b"\n\n")
    data = [it.removeprefix(b"data: ") for it in frames if it.startswith(b"data: {")]
    return [it for it in map(orjson.loads, data) if "choices" in it]
