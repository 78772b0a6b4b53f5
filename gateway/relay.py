"""Relay: the response that owns its exchange with the engine, from first byte to last.

The usual shape (await the engine in the endpoint, then return a StreamingResponse) leaves nobody listening
for the client's hang-up until headers arrive: measured, an engine went on generating for 4.0 s after the
client left at 0.3 s. Here the client is watched from the start, and whatever ends the exchange early (the client
leaves, a timeout, the gateway stops) cancels it in one way: `_halt`.

In the midst of a stream what comes is passed on as it comes, without waking the exchange's task: `_pump`.

Before the first data event an error keeps its status. After it the head is out, and an answer whose engine fails is
continued by another (gateway.resume). One that can't be finished ends with an error frame and `[DONE]`: clients take a
bare end of stream for success.
"""

import asyncio
import functools
import time
from dataclasses import dataclass
from typing import Any, cast

import orjson
from starlette.types import Send

from gateway import dialects, logs, parameters
from gateway.admission import Admission
from gateway.answer import Answer
from gateway.config import Retries
from gateway.context import Contexts
from gateway.errors import (
    ClientLeft,
    Draining,
    EngineError,
    EngineSilent,
    EngineTimeout,
    EngineUnavailable,
    InternalError,
    StackError,
)
from gateway.estimates import Estimates
from gateway.exchange import Ending, Exchange, Running, Usage
from gateway.introspection import Prompt
from gateway.limits import Headers, Lease
from gateway.metrics import Metrics
from gateway.recorder import Recorder
from gateway.response import Client
from gateway.resume import Search
from gateway.retry import Budget, backoff, blames_the_engine, worthwhile
from gateway.routing import Route, Target
from gateway.sse import DONE, EVENT_STREAM, PING, EngineFault, Tap
from gateway.upstream import Reply

FAREWELL = 1.0  # seconds an error frame may take to reach a client that reads slowly

_JSON = (b"content-type", b"application/json")
_STREAM_HEADERS = [
    EVENT_STREAM,
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx: pass every event on at once
]


@dataclass(frozen=True, slots=True)
class Rules:
    """What holds for every relay of a worker."""

    retries: Retries
    budget: Budget
    metrics: Metrics
    recorder: Recorder
    estimates: Estimates
    contexts: Contexts
    admission: Admission
    log_content: bool


class Relay:
    """One exchange, and its lease's end. `run` it once: it answers the client, or raises a StackError if nothing was
    sent yet."""

    def __init__(self, exchange: Exchange, route: Route, lease: Lease, rules: Rules) -> None:
        self._exchange = exchange
        self._lease = lease
        self._route = route
        self._patience = route.patience
        self._rules = rules
        self._loop = asyncio.get_running_loop()
        self._headers = [(b"x-stack-arm", route.arm.encode())] if route.arm else []
        self._ignored: list[tuple[bytes, bytes]] = []  # the header about parameters, for the engine asked last
        self._committed = False  # the response's head is out
        self._forwarded = False  # an event of the engine's is out: from here on another can only continue
        self._finished = False  # the last byte is handed over
        self._told: Ending | None = None  # what was written down of it when it was whole
        self._stop: StackError | None = None
        self._pinging: asyncio.Task[None] | None = None
        self._pinged_at = exchange.started
        self._first_token_at: float | None = None
        self._text: list[bytes] = []
        self._tried: list[Target] = []
        self._quiet_since: float | None = None  # since when the engine is waited for, if it is, and owes a stream
        self._asked = False  # an engine got the request
        self._begun = False  # it has begun to answer
        self._answer = Answer(exchange, route)
        self._fed: bytes | EngineError | None = None  # what the tap made of data that is the task's to deal with
        self._visit = rules.admission.visit(exchange)

    @property
    def standing(self) -> Headers:
        """The headers that say how its key stands now."""
        return self._lease.headers()

    @property
    def models(self) -> set[str]:
        """The models it may ask, by their engines' own names."""
        return {target.model for tier in self._route.tiers for target in tier}

    async def run(self, client: Client, send: Send) -> bool:
        """Answer the client; whether with a whole answer. Raises StackError when it ended before anything was sent."""
        self._client, self._send = client, send
        self._task = cast("asyncio.Task[None]", asyncio.current_task())
        self._started_log()
        self._timer = self._loop.call_later(self._patience.shortest, self._tick)
        client.watch(self._hung_up)
        error: StackError | None = InternalError("A bug, or the server was torn down.")
        try:
            await self._ask()
            error = None
        except asyncio.CancelledError:
            if self._stop is None:
                raise  # not ours
            self._task.uncancel()
            error = self._stop
        except StackError as exc:
            error = exc
        finally:
            self._finished = True  # from here on nothing may cancel
            self._timer.cancel()
            client.watch(None)
            if self._pinging is not None and not self._pinging.done():
                self._pinging.cancel()
                await asyncio.wait({self._pinging})
            self._ended(error)
        if error is not None and not isinstance(error, ClientLeft):
            if not self._committed:
                raise error
            await self._farewell(error)
        return error is None

    def running(self) -> Running:
        """How it stands."""
        it, now, first = self._exchange, time.monotonic(), self._first_token_at
        return Running(
            row=self._record.get("id"),
            request_id=it.request_id,
            key_id=it.key_id,
            model=self._route.name,
            engine=self._tried[-1].upstream.name if self._tried else None,
            kind=it.kind,
            stream=it.stream,
            seconds=now - it.started,
            generating=now - first if first is not None else None,
            tokens=self._answer.tap.tokens if self._answer.tap else 0,
            position=self._visit.position,
        )

    def cut(self) -> None:
        """End the stream now, honestly: the gateway is about to stop."""
        self._halt(Draining("The gateway is stopping; the answer is not complete."))

    # -- which engine answers -----------------------------------------------------------------------------------------

    async def _ask(self) -> None:
        """Ask one engine after another until one answers. Raises the last one's StackError."""
        self._rules.budget.request()
        target: Target | None = self._route.pick(self._tried)
        while target is not None:
            self._tried.append(target)
            try:
                await self._attempt(target)
            except StackError as exc:
                search = self._answer.breaks(exc, sent=self._forwarded)
                target = await (self._resume(search, exc) if search else self._retry(exc))
            else:
                return

    async def _attempt(self, target: Target) -> None:
        """One try at one engine, once it has a slot, and what it says about that engine's health."""
        upstream = target.upstream
        self._begun = False
        await self._visit.enter(upstream, ahead=self._answer.search is not None)
        upstream.outstanding += 1
        upstream.breaker.began()
        try:
            if self._exchange.stream or (upstream.dialect.deaf and self._exchange.kind != "embedding"):
                await self._stream(target)
            else:
                await self._block(target)
        except asyncio.CancelledError:
            if not isinstance(self._stop, EngineSilent):
                upstream.breaker.gave_up()
                raise
            error, self._stop = self._stop, None
            self._task.uncancel()
            upstream.breaker.failed(error.message, silent=True)
            raise error from None
        except StackError as exc:
            if blames_the_engine(exc):
                upstream.breaker.failed(exc.message, silent=isinstance(exc, EngineSilent))
            else:
                upstream.breaker.gave_up()  # if it answered at all, `_post` has said so
            raise
        except BaseException:
            upstream.breaker.gave_up()
            raise
        finally:
            upstream.outstanding -= 1
            self._visit.leave()
            self._quiet_since = None

    async def _retry(self, error: StackError) -> Target:
        """Whom to ask after this failure, when it is time to. Raises it again if nobody."""
        rules = self._rules
        if self._forwarded or len(self._tried) >= rules.retries.attempts:
            raise error
        try:
            target = self._route.pick(self._tried)
        except EngineUnavailable:
            raise error from error.__cause__
        same = any(target.upstream is it.upstream for it in self._tried)
        if not worthwhile(error, same_engine=same) or not rules.budget.take():
            raise error
        self._answer = Answer(self._exchange, self._route)
        self._log_handing_on("retry" if same else "fallback", error, target)
        if same:
            rules.metrics.retried(target.upstream.name)
            await asyncio.sleep(backoff(len(self._tried) + 1, rules.retries))
            if not target.upstream.breaker.allows():  # by now; half-open it may be at another's trial
                raise error
        else:
            rules.metrics.fell_back(self._route.name)
        return target

    async def _resume(self, search: Search, error: StackError) -> Target | None:
        """Who goes on with the answer, once somebody can; None: it is finished. Raises what broke it off if nobody."""
        self._begun = False  # the client gets pings again
        search.failed(self._tried[-1].upstream, error)
        end = self._answer.complete(search)
        target = None if end else await search.target()
        if target is None and not end:
            self._rules.metrics.resumed(self._route.name, "failed")
            return await self._retry(search.error)  # which is possible where the client has nothing of it
        self._log_handing_on("resume", search.error, target)
        if end:
            self._rules.metrics.resumed(self._route.name, "resumed")
            await self._forward(end, last=True)
        return target

    # -- the ways of answering ----------------------------------------------------------------------------------------

    async def _stream(self, target: Target) -> None:
        """Pass the engine's events on as they come; or their sum, where the client waits for the whole (gateway.fold).
        Where the answer broke off, those of an engine that goes on with it."""
        exchange, tap = self._answer.ask(target)
        with await self._post(exchange, target, stream=True) as reply:
            self._fed = None
            if self._answer.fold is None and not self._rules.log_content:
                reply.pump(functools.partial(self._pump, tap))
            try:
                while data := await self._read(reply, tap):
                    sound = self._feed(tap, data)
                    self._heard(tap)
                    if sound:
                        await self._forward(sound, last=tap.done)
                    if tap.done:
                        break
                else:
                    tap.end()
                    await self._forward(DONE, last=True)  # it finished, and forgot to say so
            except EngineError as exc:
                self._heard(tap)
                if tap.held:
                    await self._forward(tap.held, last=False)
                raise dialects.fault(exc.error) if isinstance(exc, EngineFault) else exc from exc
            await reply.finish()

    def _pump(self, tap: Tap, data: bytes) -> bool:
        """What has come of a stream, while the task waits for it. In its midst it is passed on here; whether that was
        possible. Its beginning, its end and what goes wrong are the task's."""
        if self._first_token_at is None or not self._begun or not self._client.takes:
            return False
        self._wait()  # here is something, whatever it is: until the task has seen to it the clock has no say
        try:
            sound = tap.feed(data)
        except EngineError as exc:
            self._fed = exc
            return False
        if tap.done:
            self._fed = sound
            return False
        if sound:
            self._client.push(sound)
        return True

    def _feed(self, tap: Tap, data: bytes) -> bytes:
        """What the tap makes of the data, or made of it already. (There is nothing behind that which it would take.)"""
        fed, self._fed = self._fed, None
        if isinstance(fed, EngineError):
            raise fed
        return tap.feed(data) if fed is None else fed

    async def _block(self, target: Target) -> None:
        """Wait for the whole answer and pass it on."""
        with await self._post(self._exchange, target, stream=False) as reply:
            body = await self._rest(reply)
        try:
            answer = orjson.loads(body)
        except orjson.JSONDecodeError:
            answer = None
        if not isinstance(answer, dict):
            raise EngineError("The engine's answer is not a JSON object.")
        if answer.get("error"):
            raise dialects.fault(answer["error"])
        self._answer.usage = Usage.of(answer.get("usage"))
        choices = answer.get("choices")
        if isinstance(choices, list) and choices and isinstance(choices[0], dict):
            self._answer.finish_reason = choices[0].get("finish_reason")
        await self._reply(body)

    async def _post(self, exchange: Exchange, target: Target, *, stream: bool) -> Reply:
        """Ask the engine; returns its reply if that is a 200, else raises what the refusal means."""
        upstream = target.upstream
        reading = parameters.read(upstream.dialect.name, exchange.kind, exchange.fields)
        self._ignored = reading.headers
        body = exchange.encode(target.model, reading.fields, stream=stream)
        if stream:
            self._wait()
        prompt = Prompt(exchange.kind, target.model, reading.fields, len(body))
        if upstream.dialect.cuts:
            await self._rules.contexts.check(upstream, prompt)
        self._asked = True
        reply = await upstream.post(exchange.kind, body, exchange.request_id, self._patience.connect)
        upstream.breaker.succeeded()  # a stream's end may be long in coming
        if reply.status == 200:
            return reply
        with reply:
            error = dialects.refusal(reply.status, await self._rest(reply))
        raise await self._rules.contexts.explained(error, upstream, prompt)

    async def _rest(self, reply: Reply) -> bytes:
        """The whole body of an answer that has begun: however long that took, the idle timeout watches the rest."""
        self._begun = True
        body = await reply.read(self._wait)
        self._quiet_since = None
        return body

    def _wait(self) -> None:
        """From here on the engine is waited for."""
        self._quiet_since = time.monotonic()

    async def _read(self, reply: Reply, tap: Tap) -> bytes:
        if self._begun:
            self._wait()
        try:
            return await reply.next()
        except EngineError:
            if tap.complete:  # everything was said; only the goodbye is missing
                return b""
            raise

    def _heard(self, tap: Tap) -> None:
        if tap.started:
            if not self._begun:
                self._begun = True
                if self._answer.takes(self._tried[-1], tap):
                    self._rules.metrics.resumed(self._route.name, "resumed")
            self._quiet_since = None  # what takes long now is the client's matter
            if self._first_token_at is None and tap.has_content:
                self._first_token_at = time.monotonic()

    # -- what the client gets -----------------------------------------------------------------------------------------

    async def _reply(self, body: bytes) -> None:
        """A whole blocking answer."""
        if self._rules.log_content:
            self._text.append(body)
        await self._answered()
        resumes = [(b"x-stack-resumes", b"%d" % self._answer.resumes)] if self._answer.resumes else []
        await self._commit([_JSON, (b"content-length", b"%d" % len(body)), *resumes])
        await self._send({"type": "http.response.body", "body": body})
        self._finished = True

    async def _forward(self, data: bytes, *, last: bool) -> None:
        """A part of a stream; of one that is folded, only the sum at its end."""
        if self._answer.fold is not None:
            if last:
                await self._reply(orjson.dumps(self._answer.fold.answer()))
            return
        if self._pinging is not None:
            await self._pinging
        if not self._committed:
            await self._commit(_STREAM_HEADERS)
        if self._rules.log_content:
            self._text.append(data)
        self._forwarded = True
        if last:
            await self._answered()
        await self._send({"type": "http.response.body", "body": data, "more_body": not last})
        self._finished = last

    async def _commit(self, headers: list[tuple[bytes, bytes]]) -> None:
        queued = (b"x-stack-queue-ms", b"%d" % self._visit.milliseconds)
        headers = [*headers, queued, *self._lease.headers(), *self._headers, *self._ignored]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        self._committed = True

    async def _ping(self) -> None:
        if not self._committed:
            await self._commit(_STREAM_HEADERS)
        await self._send({"type": "http.response.body", "body": PING, "more_body": True})

    async def _farewell(self, error: StackError) -> None:
        """The stream can't be finished: say so in the one way that clients raise an error for."""
        if not self._exchange.stream:
            return  # a blocking answer cut in its middle: the connection is closed, short of the length it announced
        frame = b"data: " + error.envelope() + b"\n\n" + DONE
        try:
            async with asyncio.timeout(FAREWELL):
                await self._send({"type": "http.response.body", "body": frame})
        except TimeoutError:
            pass  # a client that doesn't read; the server closes the connection, which is no clean end either

    # -- what may end it early ----------------------------------------------------------------------------------------

    def _hung_up(self) -> None:
        self._halt(ClientLeft("The client closed the connection."))

    def _tick(self) -> None:
        """Look at the clock; come back when the next thing is due. One timer per exchange, not one per chunk."""
        now, patience, started = time.monotonic(), self._patience, self._exchange.started
        due = started + patience.total
        if now >= due:
            return self._halt(EngineTimeout(f"The answer took longer than {patience.total:g} seconds."))
        if self._quiet_since is not None:
            limit = patience.idle if self._begun else patience.first_token
            if now >= self._quiet_since + limit:
                self._quiet_since = None
                self._halt(EngineSilent(f"The engine said nothing for {limit:g} seconds."))
            else:
                due = min(due, self._quiet_since + limit)
        if self._exchange.stream and not self._begun:
            if now >= self._pinged_at + patience.hold:
                self._pinged_at = now
                if self._pinging is None or self._pinging.done():
                    self._pinging = self._loop.create_task(self._ping())
            due = min(due, self._pinged_at + patience.hold)
        self._timer = self._loop.call_later(min(due - now, patience.shortest), self._tick)
        return None

    def _halt(self, reason: StackError) -> None:
        if self._stop is None and not self._finished:
            self._stop = reason
            self._task.cancel()

    # -- what is written down -----------------------------------------------------------------------------------------

    def _started_log(self) -> None:
        it = self._exchange
        self._rules.metrics.started(it.kind, self._route.name, self._route.arm)
        estimated = self._lease.estimate.prompt
        self._record = self._rules.recorder.started(it, self._route.name, self._route.arm, estimated)
        fields: dict[str, Any] = {
            "request_id": it.request_id,
            "key": it.key_id,
            "model": self._route.name,
            _SIZE[it.kind]: it.size,
        }
        if it.prompt is not None:
            fields["prompt"] = it.prompt
        logs.event(f"{it.kind}_started", fields | {"stream": it.stream})
        if self._rules.log_content:
            body = orjson.dumps(it.fields, default=str).decode()
            logs.content("prompt", {"request_id": it.request_id, "body": body})

    def _log_handing_on(self, event: str, error: StackError, target: Target | None) -> None:
        names = {"from": self._tried[-1].upstream.name, "to": target.upstream.name if target else None}
        logs.event(event, {"request_id": self._exchange.request_id, "after": error.code, **names})

    async def _answered(self) -> None:
        """The answer is whole, and its last bytes go out next. What a client has is written down before, even if this
        process is killed now."""
        ending = self._told = self._ending(None)
        self._lease.settle(ending.tokens_in + ending.tokens_out)
        self._rules.recorder.finished(self._record, ending)
        await self._lease.known()

    def _ended(self, error: StackError | None) -> None:
        it, answer = self._exchange, self._answer
        if answer.search is not None and error is not answer.search.error:
            self._rules.metrics.resumed(self._route.name, "abandoned")
        ending = self._told if self._told and error is None else self._ending(error)
        self._lease.settle(ending.tokens_in + ending.tokens_out)
        self._rules.estimates.learn(ending, self._lease.estimate)
        self._rules.metrics.finished(ending)
        if ending is not self._told:
            self._rules.recorder.finished(self._record, ending)
        logs.event(f"{it.kind}_finished_stream" if it.stream else f"{it.kind}_finished", ending.fields())
        if self._rules.log_content:
            logs.content("output", {"request_id": it.request_id, "body": b"".join(self._text).decode(errors="replace")})

    def _ending(self, error: StackError | None) -> Ending:
        it, answer = self._exchange, self._answer
        answer.learn()
        # A whole answer whose tokens nobody counted has as many as were expected.
        guessed = self._lease.estimate.answer if error is None and not it.stream and answer.usage is None else 0
        return Ending(
            exchange=it,
            route=self._route.name,
            arm=self._route.arm,
            engine=self._tried[-1].upstream.name if self._tried else None,
            attempts=len(self._tried),
            resumes=answer.resumes,
            error=error,
            begun=self._committed,
            usage=answer.usage,
            estimated=self._lease.estimate.prompt,
            counted=answer.tokens or guessed,
            first_token_at=self._first_token_at if it.stream else None,
            finish_reason=answer.finish_reason,
            ended=time.monotonic(),
            queued_ms=self._visit.milliseconds,
            asked=self._asked,
        )


_SIZE = {"chat": "n_messages", "completion": "n_prompts", "embedding": "n_inputs"}
