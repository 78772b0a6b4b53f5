"""Making: an answer that is being made by this worker, on its way from the relay to its file."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import orjson
from starlette.types import Message

from gateway import sse
from gateway.api.idempotency.file import Entry, Kind, framed, whose
from gateway.api.idempotency.form import Form
from gateway.api.idempotency.space import Space
from gateway.errors import EngineUnavailable, StackError
from gateway.relay.trail import Past, Trail

_FULL = EngineUnavailable(
    "This answer is too large to keep for its Idempotency-Key. Send the request without one.", code="idempotency_full"
)
_FULL.headers = MappingProxyType({})  # it would not help to ask again


class Making:
    """An answer that this worker makes: the relay's Client, and the other end of its `send`."""

    takes = True

    def __init__(
        self, entry: Entry, path: Path, most: int, space: Space, form: Form, past: Past | None = None, size: int = 0
    ) -> None:
        """`past` is what an earlier maker has left of it, of `size` bytes, or of the answer whose place it takes."""
        self.entry = entry
        self.path = path
        self.readers = 0
        self.grown = asyncio.Event()  # set, and replaced, whenever there is more
        self.trail = Trail(self.note, past)
        self._most = most - size  # bytes of this one
        self._space = space
        self._form = form
        self._abandoned = False
        self._hung_up: Callable[[], None] | None = None
        self._start = b""  # the response's, as it is kept, until the first of its body is here
        self._begun = size > 0 and past is not None and past.started  # the start, which is a stream's, is kept
        self._stream = self._begun
        self._counted = [0, 0, 0]  # the tokens that were noted last: of the prompt, of the answer, cached
        self.full = False  # there was no room for the rest
        self._notes = True  # all of them are written so far

    def abandon(self) -> None:
        """Tell the relay that the client has left, because no client wants the answer any more."""
        self._abandoned = True
        self.watch(self._hung_up)

    def watch(self, hung_up: Callable[[], None] | None) -> None:
        """See Client.watch."""
        self._hung_up = hung_up
        if self._abandoned and hung_up is not None:
            hung_up()

    async def send(self, message: Message) -> None:
        """Take an ASGI message of the response. If the answer is continued, its start is in the file already."""
        if message["type"] == "http.response.body":
            self._push(message.get("body", b""), last=not message.get("more_body", False))
        elif not self._begun:
            headers = [[name.decode("latin-1"), value.decode("latin-1")] for name, value in message["headers"]]
            self._start = framed(Kind.START, orjson.dumps([message["status"], headers]))
            self._stream = sse.HEADER in message["headers"]
            self.tell()

    async def cut(self) -> None:
        """See Client.cut. The readers of the answer learn of this by its state FAILED."""

    def push(self, data: bytes) -> None:
        """See Client.push."""
        self._push(data, last=False)

    def note(self, note: dict[str, Any]) -> None:
        """Write a note for another maker that may have to continue the answer. See relay.trail.Trail."""
        if not self._notes:
            return
        try:
            self._write(framed(Kind.NOTE, orjson.dumps(note)))
        except OSError:  # another maker goes on from the notes before it, so that none is missing between two others
            self._notes = False

    def _push(self, data: bytes, *, last: bool) -> None:
        try:
            self._write_body(data, last=last)
        except OSError:  # no room
            self._give_up()
        self.tell()

    def _write_body(self, body: bytes, *, last: bool) -> None:
        frames = framed(Kind.BODY, body) if body else b""
        usage = self.trail.usage if self._stream else None
        if usage is not None and (told := [usage.tokens_in, usage.tokens_out, usage.cached]) != self._counted:
            self._counted = told
            frames = framed(Kind.COUNT, orjson.dumps(told)) + frames
        # The start comes only with the body: an answer that doesn't fit at all gets an error of its own.
        if self._write(self._start + frames + (framed(Kind.END) if last else b"")):
            self._start, self._begun = b"", True

    def _write(self, frames: bytes) -> bool:
        """Write them, all or nothing. Returns whether there was room. Raises OSError."""
        self._most -= len(frames)
        if self._most < 0 or not self._space.take(whose(self.path), len(frames)):
            self._give_up()
        elif not self.full:
            self.entry.write(frames)
            return True
        return False

    def _give_up(self) -> None:
        """Say that there is no room for the rest, which does need a little."""
        if self.full:
            return
        self.full = True
        self.abandon()
        with suppress(OSError):
            if self._begun:
                if self._stream:
                    self.entry.write(framed(Kind.BODY, self._form.failure(_FULL)))
                return
            self._refuse(_FULL)

    def fail(self, error: StackError) -> None:
        """Make the error the answer, if nothing else was written."""
        if not (self._begun or self.full):
            with suppress(OSError):
                self._refuse(error)

    def _refuse(self, error: StackError) -> None:
        status, headers, body = self._form.refusal(error)
        told = [[name.decode(), value.decode()] for name, value in headers]
        told.append(["content-length", str(len(body))])
        self.entry.write(framed(Kind.START, orjson.dumps([status, told])) + framed(Kind.BODY, body))

    def tell(self) -> None:
        """Wake the readers of this worker, because the file has grown or has another state."""
        self.grown.set()
        self.grown = asyncio.Event()
