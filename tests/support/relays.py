"""A relay without a process or a socket: an engine with scripted replies, and a client that keeps what it gets."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import orjson
from starlette.types import Message

from gateway.config import Retries
from gateway.dialects import DIALECTS
from gateway.errors import StackError
from gateway.exchange import Ending, Exchange
from gateway.limits.estimates import Estimates
from gateway.limits.rules import Lease
from gateway.recent.recent import Memory, Recent
from gateway.relay.services import Services
from gateway.routing.retry import Budget
from gateway.routing.routes import Patience, Resume, Route, Target
from gateway.upstream.breaker import Breaker

PATIENCE = Patience(connect=5.0, first_token=60.0, idle=30.0, total=600.0, hold=15.0)


def exchange(*, stream: bool = True, started: float | None = None, **fields: Any) -> Exchange:
    """Return an exchange for a chat of one message with these further fields."""
    body = {"messages": [{"role": "user", "content": "Hello"}], "stream": stream} | fields
    return Exchange(
        request_id="r-1",
        kind="chat",
        key_id="key",
        stream=stream,
        wants_usage=False,
        size=1,
        choices=1,
        resume=True,
        fields=body,
        started=time.monotonic() if started is None else started,
        queue_timeout=10.0,
    )


def chunk(text: str = "", *, reason: str | None = None, **more: Any) -> bytes:
    """One event of a chat stream."""
    choice = {"index": 0, "delta": {"content": text} if text else {}, "finish_reason": reason}
    told = {"id": "c-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return b"data: %b\n\n" % orjson.dumps(told | more)


USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}\n\n'
DONE = b"data: [DONE]\n\n"
ANSWER = [chunk("Hello"), chunk(" there"), chunk(reason="stop"), USAGE, DONE]


class Reply:
    """An engine's reply that has arrived in these pieces. Then it breaks off with `error`, or ends."""

    def __init__(self, pieces: list[bytes], error: StackError | None = None, status: int = 200) -> None:
        self.status = status
        self.closed = False
        self._pieces = pieces
        self._error = error
        self._sink: Callable[[bytes], bool] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.closed = True

    def pump(self, sink: Callable[[bytes], bool] | None) -> None:
        self._sink = sink

    async def next(self) -> bytes:
        """Return the next piece. As with a connection, what the sink takes never comes here."""
        while self._pieces:
            piece = self._pieces.pop(0)
            if self._sink is None or not self._sink(piece):
                return piece
        if self._error is not None:
            raise self._error
        return b""

    async def read(self, most: int, *, waits: Callable[[], None], holds: Callable[[int], None] | None = None) -> bytes:
        del most, holds
        waits()
        return b"".join(self._pieces)

    async def finish(self) -> None:
        """Do nothing: nothing is left to read."""


@dataclass(eq=False)
class Engine:
    """An Upstream that returns these replies one after the other, or raises them."""

    replies: list[Reply | StackError]
    name: str = "engine"
    dialect: Any = DIALECTS["vllm"]
    outstanding: int = 0
    absence: None = None
    down_since: None = None
    asked: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.breaker = Breaker(3, 1.0, lambda *_: None)

    def wait(self) -> float:
        return 0.0

    async def post(
        self, kind: str, body: bytes, new_id: Callable[[], str], connect_timeout: float, *, lines: str
    ) -> Reply:
        del kind, connect_timeout, lines
        new_id()
        self.asked.append(orjson.loads(body))
        reply = self.replies.pop(0)
        if isinstance(reply, StackError):
            raise reply
        return reply

    async def back(self) -> None:
        await asyncio.get_running_loop().create_future()

    async def died(self, settle: float) -> bool:
        del settle
        return False


class Client:
    """The connection to which an answer goes, and its `send`."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.whole = self.was_cut = self.takes = False
        self.pushed = 0
        self.hung_up: Callable[[], None] | None = None

    def watch(self, hung_up: Callable[[], None] | None) -> None:
        self.hung_up = hung_up

    def push(self, data: bytes) -> None:
        assert self.takes
        self.pushed += 1
        self.body += data

    async def cut(self) -> None:
        self.was_cut = True

    async def send(self, message: Message) -> None:
        assert not self.whole, "the response is over"
        if message["type"] == "http.response.start":
            assert not self.status, "the response has begun"
            self.status, self.headers = message["status"], dict(message["headers"])
            return
        assert self.status, "the head comes first"
        self.body += message["body"]
        self.whole = not message.get("more_body", False)
        self.takes = not self.whole


class Visit:
    """A visit to queues that no other request uses."""

    def __init__(self) -> None:
        self.engine = ""
        self.left, self.others, self.learned, self.position = 10.0, 0, False, None
        self.milliseconds, self.model, self.loading = 0, 0, None
        self.waits: list[Any] = []

    async def enter(self, upstream: Any, model: str, *, resumes: bool) -> None:
        del model, resumes
        self.engine = upstream.name

    async def load(self, upstream: Any, model: str) -> None:
        del upstream, model

    def leave(self) -> None:
        self.engine = ""

    def turned_back(self, *, teaches: bool) -> None:
        del teaches

    async def pause(self, seconds: float) -> None:
        del seconds
        await asyncio.sleep(0)


class Books:
    """Metrics, recorder and suspects in one. A name in `broken` raises instead."""

    def __init__(self, *broken: str) -> None:
        self.told: list[str] = []
        self.endings: list[Ending] = []
        self._broken = broken

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def tell(*args: Any, **_: Any) -> Any:
            self.told.append(name)
            if name in self._broken:
                raise ZeroDivisionError(name)
            self.endings += [it for it in args if isinstance(it, Ending)]
            return {"id": "row"} if name == "started" else None

        return tell

    def barred(self, it: Exchange) -> float:
        del it
        return 0.0

    async def suspect(self, *args: Any, **kwargs: Any) -> bool:
        del args, kwargs
        return False

    def visit(self, it: Exchange) -> Visit:
        del it
        return Visit()

    async def check(self, *args: Any) -> None:
        """Accept every prompt."""

    async def way(self, *args: Any, **kwargs: Any) -> str:
        """Return that every model continues a last assistant message."""
        del args, kwargs
        return "message"

    async def explained(self, error: StackError, *args: Any) -> StackError:
        del args
        return error


class CountedLease(Lease):
    """A lease that keeps the number of tokens it was settled with."""

    __slots__ = ("settled",)

    def __init__(self) -> None:
        super().__init__()
        self.settled: list[int] = []

    def settle(self, tokens: int) -> None:
        if self.open:
            self.settled.append(tokens)
        super().settle(tokens)


def rules(books: Books, **changes: Any) -> Services:
    """Return rules without any wait."""
    told: Any = books
    made = Services(
        retries=Retries(backoff=0.001, backoff_max=0.001),
        budget=Budget(1.0, 1),
        metrics=told,
        recorder=told,
        recent=Recent(Memory(), 0),
        estimates=Estimates(),
        contexts=told,
        continuations=told,
        admission=told,
        suspects=told,
        progress=told,
        traces=None,
        log_content=False,
        max_answer=1 << 20,
    )
    return replace(made, **changes)


def route(*engines: Engine) -> Route:
    """Return the route of a model with these engines, each one the fallback of the one before."""
    targets: Any = [(Target(it, "m"),) for it in engines]  # type: ignore[arg-type]
    return Route("model", tuple(targets), PATIENCE, Resume(most=3, wait=0.0, across_models=False))


class Shout:
    """A Writer that writes one line for each call."""

    def head(self) -> bytes:
        return b"HEAD\n"

    def waiting(self) -> bytes:
        return b"WAIT\n"

    def chunk(self, chunk: dict[str, Any]) -> bytes:
        if usage := chunk.get("usage"):
            return b"USAGE %d\n" % usage["total_tokens"]
        return "".join(it["delta"].get("content", "") for it in chunk["choices"]).upper().encode()

    def end(self) -> bytes:
        return b"\nEND\n"

    def failed(self, error: StackError) -> bytes:
        return f"\nFAILED {error.code}\n".encode()

    def whole(self, completion: dict[str, Any]) -> dict[str, Any]:
        return {"said": completion["choices"][0]["message"]["content"].upper()}
