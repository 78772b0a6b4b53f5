"""Relay: the response that owns its exchange with the engine, from first byte to last.

The usual shape (await the engine in the endpoint, then return a StreamingResponse) leaves nobody listening
for the client's hang-up until headers arrive: measured, an engine went on generating for 4.0 s after the
client left at 0.3 s. Here one task listens from the start, and whatever ends the exchange early (the client
leaves, a timeout, the gateway stops) cancels it in one way: `_halt`.

Before the first data event an error keeps its status. After it the head is out, and an answer that can't be
finished ends with an error frame and `[DONE]`: clients take a bare end of stream for success.
"""

import asyncio
import time
from dataclasses import dataclass
from typing import Any, cast

import orjson
from starlette.types import Receive, Send

from gateway import dialects, logs
from gateway.errors import Draining, EngineError, EngineTimeout, InternalError, StackError
from gateway.exchange import Exchange, Usage
from gateway.metrics import Metrics
from gateway.settings import Settings
from gateway.sse import DONE, PING, EngineFault, Tap
from gateway.upstream import Reply, Upstream

FAREWELL = 1.0  # seconds an error frame may take to reach a client that reads slowly

_JSON = [(b"content-type", b"application/json")]
_EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx: pass every event on at once
]


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait, in seconds from the request's start; `idle` from the last bytes of the engine."""

    first_token: float
    idle: float
    total: float
    hold: float  # after this a stream's head goes out with comment pings, so that nobody in between gives up

    @property
    def shortest(self) -> float:
        return min(self.first_token, self.idle, self.total, self.hold)

    @classmethod
    def of(cls, settings: Settings) -> "Patience":
        return cls(
            settings.llm_first_token_timeout, settings.llm_idle_timeout, settings.llm_timeout, settings.stack_hold
        )


class ClientLeft(StackError):
    """The caller hung up. 499 is nginx's status for it; nobody ever receives it."""

    status, code = 499, "client_left"


class Relay:
    """One exchange. `run` it once: it answers the client, or raises a StackError if nothing was sent yet."""

    def __init__(
        self, exchange: Exchange, upstream: Upstream, patience: Patience, metrics: Metrics, *, log_content: bool
    ) -> None:
        self._exchange = exchange
        self._upstream = upstream
        self._patience = patience
        self._metrics = metrics
        self._log_content = log_content
        self._loop = asyncio.get_running_loop()
        self._committed = False  # the response's head is out
        self._finished = False  # its last byte is handed over
        self._stop: StackError | None = None
        self._pinging: asyncio.Task[None] | None = None
        self._pinged_at = exchange.started
        self._heard_at: float | None = None  # when the engine was last heard, once it has begun to answer
        self._first_token_at: float | None = None
        self._usage: Usage | None = None
        self._counted = 0  # content events seen: what was made, where the engine didn't get to say
        self._finish_reason: str | None = None
        self._text: list[bytes] = []

    async def run(self, receive: Receive, send: Send) -> None:
        """Answer the client. Raises StackError when that ended before anything was sent."""
        self._send = send
        self._task = cast("asyncio.Task[None]", asyncio.current_task())
        self._started_log()
        self._timer = self._loop.call_later(self._patience.shortest, self._tick)
        listener = self._loop.create_task(self._listen(receive))
        error: StackError | None = None
        try:
            if self._exchange.stream:
                await self._stream()
            else:
                await self._block()
        except asyncio.CancelledError:
            if self._stop is None:
                error = Draining("The server was torn down.")
                raise  # not ours
            self._task.uncancel()
            error = self._stop
        except EngineFault as exc:
            error = dialects.fault(exc.error)
        except StackError as exc:
            error = exc
        except Exception:
            error = InternalError("A bug.")
            raise
        finally:
            self._timer.cancel()
            listener.cancel()
            if self._pinging is not None and not self._pinging.done():
                self._pinging.cancel()
                await asyncio.wait({self._pinging})
            self._finished_log(error)
        if error is None or isinstance(error, ClientLeft):
            return
        if not self._committed:
            raise error
        await self._farewell(error)

    def cut(self) -> None:
        """End the stream now, honestly: the gateway is about to stop."""
        self._halt(Draining("The gateway is stopping; the answer is not complete."))

    # -- the two ways of answering ------------------------------------------------------------------------------------

    async def _stream(self) -> None:
        tap = Tap(hide_usage=not self._exchange.wants_usage)
        with await self._upstream.post(self._exchange) as reply:
            if reply.status != 200:
                raise dialects.refusal(reply.status, await reply.read())
            try:
                while data := await self._next(reply, tap):
                    sound = tap.feed(data)
                    if tap.started:
                        self._heard_at = time.monotonic()
                        if self._first_token_at is None and tap.has_content:
                            self._first_token_at = self._heard_at
                    if sound:
                        await self._forward(sound, last=tap.done)
                    if tap.done:
                        break
                else:
                    tap.end()
                    await self._forward(DONE, last=True)  # it finished, and forgot to say so
            except EngineError:
                if tap.started and tap.held:
                    await self._forward(tap.held, last=False)
                raise
            finally:
                self._usage, self._counted, self._finish_reason = tap.usage, tap.tokens, tap.finish_reason
            await reply.finish()

    @staticmethod
    async def _next(reply: Reply, tap: Tap) -> bytes:
        try:
            return await reply.next()
        except EngineError:
            if tap.complete:  # everything was said; only the goodbye is missing
                return b""
            raise

    async def _block(self) -> None:
        with await self._upstream.post(self._exchange) as reply:
            body = await reply.read()
        if reply.status != 200:
            raise dialects.refusal(reply.status, body)
        try:
            answer = orjson.loads(body)
        except orjson.JSONDecodeError:
            answer = None
        if not isinstance(answer, dict):
            raise EngineError("The engine's answer is not a JSON object.")
        if answer.get("error"):
            raise dialects.fault(answer["error"])
        self._usage = Usage.of(answer.get("usage"))
        choices = answer.get("choices")
        if isinstance(choices, list) and choices and isinstance(choices[0], dict):
            self._finish_reason = choices[0].get("finish_reason")
        if self._log_content:
            self._text.append(body)
        await self._commit([*_JSON, (b"content-length", b"%d" % len(body))])
        await self._send({"type": "http.response.body", "body": body})
        self._finished = True

    async def _forward(self, data: bytes, *, last: bool) -> None:
        if self._pinging is not None:
            await self._pinging
        if not self._committed:
            await self._commit(_EVENT_STREAM)
        if self._log_content:
            self._text.append(data)
        await self._send({"type": "http.response.body", "body": data, "more_body": not last})
        self._finished = last

    async def _commit(self, headers: list[tuple[bytes, bytes]]) -> None:
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        self._committed = True

    async def _ping(self) -> None:
        if not self._committed:
            await self._commit(_EVENT_STREAM)
        await self._send({"type": "http.response.body", "body": PING, "more_body": True})

    async def _farewell(self, error: StackError) -> None:
        """The stream can't be finished: say so in the one way that clients raise an error for."""
        frame = b"data: " + error.envelope() + b"\n\n" + DONE
        try:
            async with asyncio.timeout(FAREWELL):
                await self._send({"type": "http.response.body", "body": frame})
        except TimeoutError:
            pass  # a client that doesn't read; the server closes the connection, which is no clean end either

    # -- what may end it early ----------------------------------------------------------------------------------------

    async def _listen(self, receive: Receive) -> None:
        """Wait for the client to hang up. (uvicorn also says "disconnect" once the answer is complete.)"""
        while (await receive())["type"] != "http.disconnect":
            pass
        if not self._finished:
            self._halt(ClientLeft("The client closed the connection."))

    def _tick(self) -> None:
        """Look at the clock; come back when the next thing is due. One timer per exchange, not one per chunk."""
        now, patience, started = time.monotonic(), self._patience, self._exchange.started
        due = started + patience.total
        if now >= due:
            return self._halt(EngineTimeout(f"The answer took longer than {patience.total:g} seconds."))
        if self._exchange.stream and self._heard_at is None:
            if now >= started + patience.first_token:
                return self._halt(EngineTimeout(f"The engine said nothing for {patience.first_token:g} seconds."))
            if now >= self._pinged_at + patience.hold:
                self._pinged_at = now
                if self._pinging is None or self._pinging.done():
                    self._pinging = self._loop.create_task(self._ping())
            due = min(due, started + patience.first_token, self._pinged_at + patience.hold)
        elif self._heard_at is not None:
            if now >= self._heard_at + patience.idle:
                return self._halt(EngineTimeout(f"The engine fell silent for {patience.idle:g} seconds."))
            due = min(due, self._heard_at + patience.idle)
        self._timer = self._loop.call_later(due - now, self._tick)
        return None

    def _halt(self, reason: StackError) -> None:
        if self._stop is None and not self._finished:
            self._stop = reason
            self._task.cancel()

    # -- what is written down -----------------------------------------------------------------------------------------

    def _started_log(self) -> None:
        it = self._exchange
        self._metrics.started(it)
        logs.event(
            f"{it.kind}_started",
            {
                "request_id": it.request_id,
                "key": it.key_id,
                "model": it.model,
                _SIZE[it.kind]: it.size,
                "stream": it.stream,
            },
        )
        if self._log_content:
            logs.content("prompt", {"request_id": it.request_id, "body": it.body.decode()})

    def _finished_log(self, error: StackError | None) -> None:
        it, usage = self._exchange, self._usage
        tokens_out = usage.tokens_out if usage else self._counted
        self._metrics.finished(
            it,
            error,
            tokens_in=usage.tokens_in if usage else 0,
            tokens_out=tokens_out,
            first_token_at=self._first_token_at,
            broken=self._committed and error is not None and not isinstance(error, ClientLeft),
        )
        fields: dict[str, Any] = {
            "request_id": it.request_id,
            "key": it.key_id,
            "model": it.model,
            "tokens_in": usage.tokens_in if usage else None,
            "tokens_out": tokens_out,
        }
        if it.stream:
            first = self._first_token_at
            fields["ttft_ms"] = round((first - it.started) * 1000, 1) if first is not None else None
        fields["finish_reason"] = self._finish_reason
        fields["outcome"] = "finished" if error is None else error.outcome
        logs.event(f"{it.kind}_finished_stream" if it.stream else f"{it.kind}_finished", fields)
        if self._log_content:
            logs.content("output", {"request_id": it.request_id, "body": b"".join(self._text).decode(errors="replace")})


_SIZE = {"chat": "n_messages", "completion": "n_prompts", "embedding": "n_inputs"}
