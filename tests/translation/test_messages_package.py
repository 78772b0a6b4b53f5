"""The official package reads what is written: events and messages against its models, whole answers by its client."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import orjson
import pytest

from gateway.errors import (
    ContextExceeded,
    EngineLost,
    InvalidKey,
    ModelNotFound,
    QueueFull,
    RateLimited,
    StackError,
)
from gateway.translation.messages import counted, envelope
from tests.support.message_answers import chunk, completion, piece, streamed, writer
from tests.support.message_recordings import chunks

anthropic = pytest.importorskip("anthropic")
pydantic = pytest.importorskip("pydantic")

USAGE = {
    "prompt_tokens": 11,
    "completion_tokens": 7,
    "prompt_tokens_details": {"cached_tokens": 4},
    "completion_tokens_details": {"reasoning_tokens": 5},
}
ANSWERS: dict[str, list[dict[str, Any]]] = {
    **{name: chunks(f"chat-{name}") for name in ("text", "reason", "reasonboth", "tool", "two")},
    "cut": [chunk(content="a"), chunk("length", USAGE)],
    "refused": [chunk(content="a"), chunk("content_filter", USAGE)],
    "empty": [chunk("stop", USAGE)],
    "no arguments": [piece(0, "", id="c1", name="x"), chunk("tool_calls", USAGE)],
}


@contextmanager
def serving(status: int, kind: str, body: bytes, extra: dict[str, str]) -> Iterator[str]:
    """A server that answers everything with this, and its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status)
            for name, value in {"content-type": kind, "content-length": str(len(body)), **extra}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def ask(address: str) -> tuple[Any, dict[str, Any]]:
    """The package's client for that address, and a request."""
    client = anthropic.Anthropic(base_url=address, api_key="sk-test", max_retries=0)
    return client, {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}


def valid(kind: Any, value: dict[str, Any]) -> None:
    """Strictly: the package itself builds its objects without a check."""
    pydantic.TypeAdapter(kind).validate_json(orjson.dumps(value), strict=True)


@pytest.mark.parametrize("name", ANSWERS)
def test_every_event_and_message_is_valid(name: str) -> None:
    for event in streamed(ANSWERS[name]):
        if event["type"] != "ping":  # the package has no model of it, and skips it
            valid(anthropic.types.RawMessageStreamEvent, event)
    valid(anthropic.types.Message, writer().whole(completion(ANSWERS[name])))


@pytest.mark.parametrize("name", ANSWERS)
def test_the_client_makes_the_blocking_answer_of_the_stream(name: str) -> None:
    it = writer()
    body = b"".join([it.head(), it.waiting(), *map(it.chunk, ANSWERS[name]), it.end()])
    with serving(200, "text/event-stream", body, {}) as address:
        client, request = ask(address)
        with client.messages.stream(**request) as stream:
            made = stream.get_final_message()
    whole = orjson.dumps(writer().whole(completion(ANSWERS[name])))
    with serving(200, "application/json", whole, {}) as address:
        client, request = ask(address)
        blocking = client.messages.create(**request)
    for field in ("id", "role", "model", "stop_reason", "stop_sequence"):
        assert getattr(made, field) == getattr(blocking, field), field
    for block, same in zip(made.content, blocking.content, strict=True):
        told = block.to_dict()  # its text blocks have a field more, for structured output
        assert {name: told[name] for name in same.to_dict()} == same.to_dict()
    assert (made.usage.input_tokens, made.usage.output_tokens) == (
        blocking.usage.input_tokens,
        blocking.usage.output_tokens,
    )


def test_an_error_in_a_stream_is_raised_with_our_words() -> None:
    it = writer()
    body = it.head() + it.chunk(chunk(content="a")) + it.failed(EngineLost("The engine was lost."))
    with serving(200, "text/event-stream", body, {}) as address:
        client, request = ask(address)
        with (
            pytest.raises(anthropic.APIError, match=r"The engine was lost\."),
            client.messages.stream(**request) as got,
        ):
            got.get_final_message()


ERRORS: list[tuple[StackError, str]] = [
    (InvalidKey("Incorrect API key provided."), "AuthenticationError"),
    (ModelNotFound("No such model."), "NotFoundError"),
    (ContextExceeded("Too long.", param="messages", tokens=9, limit=8), "BadRequestError"),
    (RateLimited("Slow down.", 2, {}), "RateLimitError"),
    (QueueFull("Full.", 2), "ServiceUnavailableError"),
    (EngineLost("Lost."), "InternalServerError"),
]


@pytest.mark.parametrize(("error", "name"), ERRORS)
def test_errors_are_the_packages_own_exceptions(error: StackError, name: str) -> None:
    body, extra = envelope(error, request_id="r1")
    valid(anthropic.types.ErrorResponse, orjson.loads(body))
    told = {key.decode(): value.decode() for key, value in extra}
    with serving(error.status, "application/json", body, told) as address:
        client, request = ask(address)
        with pytest.raises(anthropic.APIStatusError) as caught:
            client.messages.create(**request)
    assert type(caught.value).__name__ == name
    assert caught.value.request_id == "r1"


def test_a_count_is_the_packages_own() -> None:
    with serving(200, "application/json", orjson.dumps(counted(14)), {}) as address:
        client, request = ask(address)
        del request["max_tokens"]
        assert client.messages.count_tokens(**request).input_tokens == 14
