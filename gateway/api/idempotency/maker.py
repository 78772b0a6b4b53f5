"""Maker: what makes the answer to a request, and what a maker that died has left of it."""

import asyncio
from http import HTTPStatus
from typing import Any, Protocol

import orjson
from starlette.types import Send

from gateway.api.idempotency.file import CHUNK, HEAD_SIZE, Entry, Kind
from gateway.api.idempotency.form import Form
from gateway.errors import StackError
from gateway.relay.client import Client
from gateway.relay.trail import Past, Trail


class Maker(Protocol):
    """Make the answer to one request."""

    setting: dict[str, Any]  # JSON: what `past` needs to know of the request that an answer was begun for

    def begins(self) -> None:
        """Note that `run` will be called, perhaps when the request's response is over."""

    async def run(self, client: Client, send: Send, trail: Trail) -> bool:
        """Make the answer, or continue the part that `trail.past` holds. Returns whether the answer is complete."""

    def refused(self) -> StackError | None:
        """Return why the request's key or secret is not valid any more; None: it is."""

    async def form(self) -> Form:
        """Return the form of an error, with a writer that no answer uses."""

    async def past(self, setting: dict[str, Any]) -> Past:
        """Return an empty Past, into which the answer's file is read. `setting` is the one of its first maker."""


async def look_back(entry: Entry, maker: Maker) -> tuple[Past, int, bool]:
    """Read what a dead maker has left of an answer. Returns it, how many bytes of the file hold it, and whether it is
    the whole answer."""
    notes = (orjson.loads(frame.data) for frame in entry.frames() if frame.kind == Kind.NOTE)
    first: dict[str, Any] = next(notes, {})
    past = await maker.past(first.get("setting", {}))
    size, read, ended, status, blocking = HEAD_SIZE, 0, False, HTTPStatus.OK, False
    for frame in entry.frames():
        if frame.kind == Kind.START:
            status, headers = orjson.loads(frame.data)
            blocking = any(name == "content-length" for name, _ in headers)
            past.started = not blocking  # a stream, or a sound
        elif frame.kind == Kind.BODY:
            past.body(frame.data)
        elif frame.kind == Kind.NOTE:
            past.take(orjson.loads(frame.data))
        elif frame.kind == Kind.COUNT:
            past.count(orjson.loads(frame.data))
        ended = ended or frame.kind == Kind.END
        if not blocking:  # the one piece of such an answer is there, or none of it is
            size = frame.end
        read += len(frame.data)
        if read > CHUNK:
            read = 0
            await asyncio.sleep(0)  # others get their turn
    return past, size, status == HTTPStatus.OK and (ended or past.whole)
