"""Trail: notes about an answer, with which another worker can continue the answer if this worker dies.

The answer's file holds what the client got of a stream. The notes hold the rest: which engine began the answer, its
usage row, what its key was charged, and the chunks of an answer that is sent as a whole or in the form of another API.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import orjson

from gateway import sse
from gateway.errors import EngineError, EngineUnavailable
from gateway.exchange import Exchange, Usage
from gateway.relay.fold import Fold, repeated
from gateway.relay.reader import Reader
from gateway.relay.resume.part import seeded
from gateway.relay.rounds import rounds
from gateway.relay.tap import Tap
from gateway.routing.routes import Route, Target
from gateway.translation.face import Writer

MOST = 16 * 1024 * 1024  # bytes of an answer that is read again, which takes half a second
_COMMENT = re.compile(rb"^:.*\n", re.MULTILINE)
LOST = "The worker that made this answer has stopped. Send the request again."


class Trail:
    """The notes of one answer. `past` is what an earlier maker has left, if there was one. `write` is called with each
    note. `wanted` tells whether a client with a valid secret is reading the answer."""

    reader: Reader | None  # of the stream that comes now

    def __init__(
        self,
        write: Callable[[dict[str, Any]], None],
        past: "Past | None" = None,
        wanted: Callable[[], bool] = lambda: False,
    ) -> None:
        self.note = write
        self.past = past
        self.wanted = wanted
        self.reader = None

    def chunk(self, chunk: dict[str, Any]) -> None:
        """Note a chunk of an answer that is sent as a whole, or in the form of another API."""
        self.note({"chunk": chunk})

    @property
    def begun(self) -> bool:
        """Whether an earlier maker has begun the response."""
        return self.past is not None and self.past.started

    @property
    def usage(self) -> Usage | None:
        """The tokens so far, if the engine reported them."""
        return self.reader.usage if self.reader is not None else None


class Past:
    """What an earlier maker has left of an answer. Call `take` with each note, `body` with each piece of the body, and
    `count` with each count of tokens. Then relay.answer.way says what can be done. `exchange` is the request that the
    client has sent again."""

    def __init__(self, exchange: Exchange, route: Route, writer: Writer | None = None) -> None:
        """`writer` is as the one was at the beginning that wrote the answer in another form."""
        self.row: dict[str, Any] = {}  # in the usage
        self.charged = 0  # tokens that its key was charged, and that stay charged
        self.book = ""  # where
        self.resumes = 0
        self.started = False  # the response's head is there
        self.first: Target | None = None  # who began it
        self.fold: Fold | None = None
        self.asked = exchange
        self.route = route
        self._writer = writer if exchange.stream else None
        self._written = b"" if self._writer is None else self._writer.head()  # what that makes of the chunks
        self._body = b""  # what stands there
        self._request_id = ""
        self._sound = True
        self._size = 0
        self._begin()

    def _begin(self) -> None:
        self.fold = None
        if not self.asked.stream:
            self.fold = Fold(repeated(self.asked))
        self.reader = _Again(self.asked.choices, self.fold, self._writer)

    def take(self, note: dict[str, Any]) -> None:
        """Read a note: see Trail."""
        if "chunk" in note:
            self._feed(sse.event(orjson.dumps(note["chunk"])))
        if "waits" in note and self._writer is not None:
            self._written += self._writer.waiting()
        if note.get("anew"):
            self._begin()
        if "engine" in note:
            asked = note["engine"], note["model"]
            targets = (target for tier in self.route.tiers for target in tier)
            self.first = next((it for it in targets if (it.upstream.name, it.model) == asked), None)
        self.resumes = note.get("resumes", self.resumes)
        self.row = note.get("row", self.row)
        self.charged = note.get("charged", self.charged)
        self.book = note.get("book", self.book)
        self._request_id = note.get("request_id", self._request_id)

    @property
    def inheritance(self) -> dict[str, Any]:
        """Return the notes that stay true for an answer that replaces this one."""
        return {"row": self.row, "charged": self.charged, "book": self.book}

    def body(self, data: bytes) -> None:
        """Read a piece of the body: whole events."""
        self._size += len(data)
        if self._size > MOST:
            self._sound = False
        elif self._writer is not None:
            self._body += _COMMENT.sub(b"", data)
        elif self.asked.stream:
            self._feed(data)

    def count(self, usage: list[int]) -> None:
        """Read how many tokens the engine had reported."""
        self.reader.told = Usage(*usage)

    def _feed(self, data: bytes) -> None:
        if self._sound:
            try:
                self._written += self.reader.feed(data) if self._writer is not None else self.reader.feed(data)[:0]
            except EngineError:
                self._sound = False

    @property
    def whole(self) -> bool:
        """Whether the answer is complete."""
        return self.reader.done and self.asked.stream and self._writer is None

    @property
    def sound(self) -> bool:
        """Whether an engine may continue the answer: everything was read, and belongs to one stream."""
        first = self.first
        return first is not None and self._agrees and rounds(self.asked, first.upstream.dialect) is None

    @property
    def _agrees(self) -> bool:
        return self._sound and self._written.startswith(self._body)

    @property
    def missing(self) -> bytes:
        """The bytes that the noted chunks of an answer in another form make, and that its body does not have yet."""
        return self._written[len(self._body) :] if self.started and self._writer is not None else b""

    @property
    def empty(self) -> bool:
        """Whether no client has anything of the answer."""
        return not self.reader.started and self._agrees if self.asked.stream else not self.started

    def exchange(self) -> Exchange:
        """Return the request as the first maker sent it: with the seed that it had."""
        it, first = self.asked, self.first
        if first is None or not first.upstream.dialect.seeds or not self.route.resume.most or not self._request_id:
            return it
        return it.having(seeded(replace(it, request_id=self._request_id)).fields)


class Noting:
    """A Writer that notes every chunk, so that another worker's Writer can be brought into the same state."""

    def __init__(self, writer: Writer, trail: Trail) -> None:
        self._writer = writer
        self._trail = trail
        self.head = writer.head
        self.end = writer.end
        self.failed = writer.failed
        self.whole = writer.whole

    def waiting(self) -> bytes:
        """See Writer.waiting."""
        self._trail.note({"waits": True})
        return self._writer.waiting()

    def chunk(self, chunk: dict[str, Any]) -> bytes:
        """See Writer.chunk."""
        self._trail.chunk(chunk)
        return self._writer.chunk(chunk)


class _Again(Tap):
    """The Reader of an answer that is read again from its file. `told` is what was noted of its usage."""

    def __init__(self, choices: int, fold: Fold | None, writer: Writer | None) -> None:
        edit = fold.add if fold is not None else None
        super().__init__(hide_usage=False, choices=choices, edit=edit, writer=writer)
        self.told: Usage | None = None

    @property
    def usage(self) -> Usage | None:
        """See Reader.usage."""
        return super().usage or self.told


def lost() -> EngineError:
    """Return the error of an answer whose worker died."""
    return EngineUnavailable(LOST, code="answer_lost")
