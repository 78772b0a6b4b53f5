"""Reader: one client that reads an answer from its file, while that is made or afterwards."""

import asyncio

import orjson
from starlette.types import Receive, Send

from gateway import headers as names
from gateway import sse
from gateway.api.idempotency.file import CHUNK, RUNNING, WHOLE, Entry, Kind
from gateway.api.idempotency.form import Form
from gateway.api.idempotency.making import Making, Refused
from gateway.errors import ClientLeft, StackError
from gateway.relay.client import Client

CHECK = 0.4  # seconds between two looks whether the client may still have the answer
POLL = 0.02  # seconds between two looks at an answer that another worker makes


class Reader:
    """One client reading one answer. `making` is set if this worker makes it. `started`: the client has something."""

    def __init__(
        self, entry: Entry, making: Making | None, client: Client, form: Form, refused: Refused, *, again: bool
    ) -> None:
        self._entry = entry
        self.making = making
        self._client = client
        self._form = form
        self._refused = refused
        self._again = again
        self.started = False
        self._offset = 0
        self._until = 0  # the end of the large frame in whose body the offset is
        self._ended = False  # the end was read
        self._left: int | None = None  # bytes of a body with a length that are not sent yet

    async def run(self, receive: Receive, send: Send) -> bool:
        """Send the answer. Returns False if its maker died before the answer was complete, or if the file lacks a part
        of it. Call `run` again when the file has more. Raises ClientLeft, or why the client may not have the answer any
        more."""
        listener, making = asyncio.create_task(_hang_up(receive)), self.making
        if making is not None:
            making.readers.add(self._refused)
        try:
            while True:
                if (reason := self._refused()) is not None:
                    raise reason
                if making is not None and making.unkept is not None and not self.started:
                    await self._hand_on(send, *making.unkept)
                    return True
                grown = making.grown if making is not None else None
                state = self._entry.state()
                # Looked at before the rest is read: after it nothing more can come.
                deserted = state == RUNNING and making is None and self._entry.deserted()
                if await self._send_rest(send):
                    continue
                if deserted or (state != RUNNING and not self.started) or (state == WHOLE and not self._ended):
                    return False
                if state != RUNNING:
                    await self._end(send, state)
                    return True
                if listener.done():
                    raise ClientLeft("The client disconnected.")
                await self._wait(grown, listener)
        finally:
            listener.cancel()
            self._entry.seen()
            if making is not None:
                making.readers.discard(self._refused)

    @property
    def position(self) -> int:
        """The offset of the first frame that was not read, in bytes; 0: all."""
        return max(self._offset, self._until)

    async def lose(self, send: Send, error: StackError, form: Form) -> None:
        """End an answer of which the client has a part with that error, in that form."""
        if self._stream:
            await send({"type": "http.response.body", "body": form.lost(error), "more_body": True})
        await self._client.cut()

    async def _hand_on(self, send: Send, start: bytes, body: bytes) -> None:
        """Send an answer that has no room in its file."""
        await self._start(send, start)
        await send({"type": "http.response.body", "body": body})

    async def _send_rest(self, send: Send) -> bool:
        """Send a chunk of what is there and was not sent yet; whether there was any. No more than that is in memory for
        a client that does not read."""
        before = self._offset
        if before < self._until:
            body = self._entry.read(before, min(CHUNK, self._until - before))
            self._offset += len(body)
        else:
            body = await self._next(send)
        if body:
            if self._left is not None:
                self._left -= len(body)
            await send({"type": "http.response.body", "body": body, "more_body": True})
        return self._offset > before

    async def _next(self, send: Send) -> bytes:
        """Go on to a chunk of the next frames, or to the body of a large one. Returns what there is of the body."""
        bodies, size = [], 0
        for frame in self._entry.frames(self._offset, bodies=False):
            if frame.kind == Kind.BODY and not frame.data:
                self._offset, self._until = frame.begin, frame.end
                break
            self._offset = frame.end
            self._ended = self._ended or frame.kind == Kind.END
            if frame.kind == Kind.START:
                await self._start(send, frame.data)
            elif frame.kind == Kind.BODY:
                bodies.append(frame.data)
                size += len(frame.data)
            if size >= CHUNK:
                break
        return b"".join(bodies)

    async def _start(self, send: Send, start: bytes) -> None:
        status, pairs = orjson.loads(start)
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in pairs]
        self._stream = sse.HEADER in headers
        self._left = next((int(value) for name, value in headers if name == b"content-length"), None)
        if self._again:  # the key stands otherwise by now
            headers = [it for it in headers if not it[0].startswith(names.RATE_LIMIT_PREFIX)]
            headers.append((names.REPLAYED, b"true"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        self.started = True

    async def _end(self, send: Send, state: int) -> None:
        """The last byte there will be is sent. An answer that its maker could not finish must not look like a whole
        one."""
        # An error has a length, and its answer is FAILED. A stream or a sound has none.
        if state == WHOLE if self._left is None else self._left == 0:
            await send({"type": "http.response.body", "body": b""})
        else:
            await self._client.cut()

    async def _wait(self, grown: asyncio.Event | None, listener: "asyncio.Task[None]") -> None:
        self._entry.seen()
        if grown is None:
            await asyncio.wait({listener}, timeout=POLL)
            return
        waiter = asyncio.create_task(grown.wait())
        try:
            await asyncio.wait({waiter, listener}, timeout=CHECK, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiter.cancel()


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
