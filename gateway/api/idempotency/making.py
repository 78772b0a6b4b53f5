"""Making: an answer that is being made by this worker, on its way from the relay to its file."""

import asyncio
import time
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
from gateway.headers import SHOULD_RETRY
from gateway.relay.trail import Past, Trail

Refused = Callable[[], StackError | None]  # why a client may not have the answer any more; None: it may
ELSEWHERE = 0.3  # seconds after which a client that another worker serves does not read any more


def too_large() -> StackError:
    """Return the error of an answer that cannot be kept, for the clients that did not get it."""
    error = EngineUnavailable(
        "This answer is too large to keep for its Idempotency-Key. Send the request without one.",
        code="idempotency_full",
    )
    error.headers = MappingProxyType({SHOULD_RETRY: "false"})  # each repetition would be made, and billed, in vain
    return error


class Making:
    """An answer that this worker makes: the relay's Client, and the other end of its `send`."""

    takes = True

    def __init__(
        self, entry: Entry, path: Path, most: int, space: Space, form: Form, past: Past | None = None, size: int = 0
    ) -> None:
        """`past` is what an earlier maker has left of it, of `size` bytes, or of the answer whose place it takes."""
        self.entry = entry
        self.path = path
        self.readers: set[Refused] = set()  # of this worker
        self.grown = asyncio.Event()  # set, and replaced, whenever there is more
        self.trail = Trail(self.note, past, self.wanted)
        self._most = most - size  # bytes of this one
        self._space = space
        self._form = form
        self._abandoned = False
        self._hung_up: Callable[[], None] | None = None
        self._start = b""  # the response's, as JSON, until the first of its body is here
        self._begun = size > 0 and past is not None and past.started  # the start, which is a stream's, is kept
        self._stream = self._begun
        self._counted = [0, 0, 0]  # the tokens that were noted last: of the prompt, of the answer, cached
        self.full = False  # there was no room for the rest
        self.unkept: tuple[bytes, bytes] | None = None  # start and body of a blocking answer without room
        self._notes = True  # all of them are written so far

    def wanted(self) -> bool:
        """Return whether a client is reading that may have the answer. The other workers' clients have looked a moment
        ago, and leave by themselves if they may not have it."""
        if any(refused() is None for refused in self.readers):
            return True
        return time.monotonic() - self.entry.last_seen() < ELSEWHERE

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
            self._start = orjson.dumps([message["status"], headers])
            self._stream = sse.HEADER in message["headers"]
            self.tell()

    async def cut(self) -> None:
        """See Client.cut. The readers of the answer learn of this by its state FAILED."""

    def push(self, data: bytes) -> None:
        """See Client.push."""
        self._push(data, last=False)

    def note(self, note: dict[str, Any]) -> None:
        """Write a note for another maker that may have to continue the answer. See relay.trail.Trail."""
        # If one has no room, another maker goes on from the notes before it: none is missing between two others.
        self._notes = self._notes and self._write(framed(Kind.NOTE, orjson.dumps(note)))

    def _push(self, data: bytes, *, last: bool) -> None:
        if not self.full and not self._write_body(data, last=last):
            self._give_up(data, last=last)
        self.tell()

    def _write_body(self, body: bytes, *, last: bool) -> bool:
        """Write a piece of the body. Returns whether there was room."""
        frames = framed(Kind.BODY, body) if body else b""
        usage = self.trail.usage if self._stream else None
        if usage is not None and (told := [usage.tokens_in, usage.tokens_out, usage.cached]) != self._counted:
            self._counted = told
            frames = framed(Kind.COUNT, orjson.dumps(told)) + frames
        # The start comes only with the body: an answer that doesn't fit at all gets an error of its own.
        start = framed(Kind.START, self._start) if self._start else b""
        if not self._write(start + frames + (framed(Kind.END) if last else b"")):
            return False
        self._start, self._begun = b"", True
        return True

    def _write(self, frames: bytes) -> bool:
        """Write them, all or nothing. Returns whether there was room."""
        if len(frames) > self._most or not self._space.take(whose(self.path), len(frames)):
            return False
        try:
            self.entry.write(frames)
        except OSError:
            return False
        self._most -= len(frames)
        return True

    def _give_up(self, body: bytes, *, last: bool) -> None:
        """There is no room for this piece of the body. A blocking answer, which is charged by now, is handed to this
        worker's readers without being kept. The others are told, which does need a little room."""
        self.full = True
        if self._start and last:
            self.unkept = self._start, body
        else:
            self.abandon()
        with suppress(OSError):
            if not self._begun:
                self._refuse(too_large())
            elif self._stream:
                self.entry.write(framed(Kind.BODY, self._form.failure(too_large())))

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
