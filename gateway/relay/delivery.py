"""Delivery: send an answer to its client, and know how much of it the client has received."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from contextlib import suppress
from enum import IntEnum
from typing import Any

import orjson
from starlette.types import Message, Send

from gateway import headers as names
from gateway import sse
from gateway.admission.visit import Visit
from gateway.errors import StackError
from gateway.limits.rules import Headers
from gateway.relay.answer import Answer
from gateway.relay.client import Client
from gateway.relay.writer import OPENAI

LARGE = 64 * 1024  # bytes of an answer that a client may not take at once
FAREWELL = 1.0  # seconds for an error event to reach a client that reads slowly

JSON = (b"content-type", b"application/json")


class Phase(IntEnum):
    """How much the client has received. It only grows."""

    NOTHING = 0  # an error still gets its own status
    HEAD = 1  # the response's head, and comments: another engine can still begin the answer again
    EVENTS = 2  # a part of the answer: another engine can only continue it
    WHOLE = 3  # all that is left is to send the last bytes: nothing may end the answer early any more


class Delivery:
    """One answer's way to its client. `open` it before anything is sent, and `close` it at the end.

    `answered` is awaited before the last bytes of a whole answer go out. With `copy`, what is sent of the answer is
    kept there. `begun`: the client has a part of it, from a worker that died.
    """

    def __init__(
        self,
        answer: Answer,
        visit: Visit,
        standing: Callable[[], Headers],
        answered: Callable[[], Awaitable[None]],
        copy: list[bytes] | None = None,
        *,
        begun: bool = False,
    ) -> None:
        goes_on = Phase.HEAD if answer.search is None else Phase.EVENTS
        self.phase = goes_on if begun else Phase.NOTHING
        self.handed: Callable[[], None] | None = None  # to call when all that is left is to send a blocking answer
        self.ignored: Headers = []  # the header about ignored parameters, for the last engine asked
        self._answer = answer
        self._visit = visit
        self._standing = standing
        self._answered = answered
        self._copy = copy
        self._played = 0  # bytes of a sound, which is not copied
        self._sound = b""  # its media type
        self._writer = answer.writer or OPENAI
        self._begins_with = b""  # what the writer sends before everything else in a stream
        self._pinging: asyncio.Task[None] | None = None
        self._told_wait = 0  # milliseconds in queues that the client was told

    @property
    def copies(self) -> bool:
        """Whether a copy of the whole answer is kept, for a log or a capture."""
        return self._copy is not None

    def open(self, client: Client, send: Send) -> None:
        """Set the client to which the answer goes."""
        self.client, self._send = client, send
        if self._answer.exchange.stream and self.phase == Phase.NOTHING:
            self._begins_with = self._writer.head()

    async def close(self) -> None:
        """Send no more pings."""
        if self._pinging is not None and not self._pinging.done():
            self._pinging.cancel()
            await asyncio.wait({self._pinging})
        if self._copy is not None and self._played:
            self._copy.append(b"(%d bytes of %s)" % (self._played, self._sound))

    async def forward(self, data: bytes, *, last: bool) -> None:
        """Send a part of a stream. A folded stream is sent as one answer at its end."""
        if self._answer.fold is not None:
            if last:
                await self.reply(self._whole(self._answer.folded(self._answer.fold)))
            return
        if self._pinging is not None:
            await self._pinging
        if self.phase == Phase.NOTHING:
            await self._commit(sse.HEADERS)
            data = self._begins_with + data
        elif self.phase == Phase.HEAD:
            data = self._waited() + data
        if self._copy is not None:
            self._copy.append(data)
        self.phase = Phase.EVENTS
        if last:
            await self._answered()
        await self._send({"type": "http.response.body", "body": data, "more_body": not last})
        if last:
            self.phase = Phase.WHOLE

    def written(self, body: bytes, answer: dict[str, Any], *, changed: bool) -> bytes:
        """Return an engine's blocking answer as the client gets it: the engine's own bytes, unless it was `changed` or
        has another form."""
        whole = self._writer.whole(answer)
        return body if whole is answer and not changed else orjson.dumps(whole)

    async def play(self, data: bytes, kind: bytes, *, last: bool = False) -> None:
        """Send a piece of a sound of that media type."""
        if self.phase == Phase.NOTHING:
            await self._commit([(b"content-type", kind)])
        self.phase = Phase.EVENTS
        self._played, self._sound = self._played + len(data), kind
        if last:
            await self._answered()
        await self._send({"type": "http.response.body", "body": data, "more_body": not last})
        if last:
            self.phase = Phase.WHOLE

    async def reply(self, body: bytes, kind: tuple[bytes, bytes] = JSON) -> None:
        """Send a whole blocking answer, whose header of its media type is `kind`."""
        if self._copy is not None:
            self._copy.append(body)
        await self._answered()
        count = self._answer.resumes
        resumes = [(names.RESUMES, b"%d" % count)] if count else []
        await self._commit([kind, (b"content-length", b"%d" % len(body)), *resumes])
        self.phase = Phase.WHOLE
        if self.handed is not None:
            self.handed()
        whole = {"type": "http.response.body", "body": body}
        if len(body) <= LARGE:
            await self._send(whole)
            return
        try:
            async with asyncio.timeout(self._answer.route.patience.total):  # as long as the answer itself may take
                await self._send(whole)
        except TimeoutError:
            await self.client.cut()

    def ping(self) -> None:
        """Send a ping to a client whose stream has not begun. It does not wait for a slow client."""
        if self._pinging is None or self._pinging.done():
            self._pinging = asyncio.get_running_loop().create_task(self._ping())

    async def fail(self, error: StackError) -> None:
        """Send a stream with only the error that explains why there is no answer, and cut it."""
        await self._commit(sse.HEADERS)
        body = self._begins_with + self._writer.failed(error)
        await self.copied(self._send)({"type": "http.response.body", "body": body, "more_body": True})
        await self.client.cut()

    async def farewell(self, error: StackError) -> None:
        """Send the error that ends an answer which has begun, and cut it."""
        if self._answer.exchange.stream:
            waited = b"" if self.phase >= Phase.EVENTS else self._waited()
            with suppress(TimeoutError):  # the client does not read, and the cut shows the failure
                async with asyncio.timeout(FAREWELL):
                    body = waited + self._writer.failed(error)
                    await self.copied(self._send)({"type": "http.response.body", "body": body, "more_body": True})
        await self.client.cut()

    def copied(self, send: Send) -> Send:
        """Return a `send` that also copies the bodies, if they are copied at all."""
        copy = self._copy
        if copy is None:
            return send

        async def both(message: Message) -> None:
            copy.append(message.get("body", b""))
            await send(message)

        return both

    def _whole(self, completion: dict[str, Any]) -> bytes:
        return orjson.dumps(self._writer.whole(completion))

    async def _commit(self, headers: Headers) -> None:
        self._told_wait = self._visit.milliseconds
        queued = (names.QUEUE_MS, b"%d" % self._told_wait)
        arm = self._answer.route.arm
        arms = [(names.ARM, arm.encode())] if arm else []
        loading = self._visit.loading  # in the head of a stream that goes out before the model is loaded
        loads = [] if loading is None else [(names.LOADING, b"%d" % math.ceil(loading))]
        headers = [*headers, queued, *loads, *self._standing(), *arms, *self.ignored]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        self.phase = Phase.HEAD

    async def _ping(self) -> None:
        loading = self._visit.loading
        comment = b"" if loading is None else b": loading the model, about %d s\n" % math.ceil(loading)
        body = comment + self._writer.waiting()
        if self.phase == Phase.NOTHING:
            await self._commit(sse.HEADERS)
            body = self._begins_with + body
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    def _waited(self) -> bytes:
        """Return a comment with the whole wait in queues, if the head was sent during the wait; otherwise b""."""
        waited = self._visit.milliseconds
        return b": queued %d ms\n" % waited if waited > self._told_wait else b""
