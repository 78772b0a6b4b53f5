"""Trail: what the maker of an answer writes down beside it, so that another worker can go on with it if this one dies.

What is there of a stream stands in the answer's file anyway. Beside it are notes: who began the answer, what its usage
row is, what its key was charged, and the chunks of an answer that is passed on as a whole or in another form.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import orjson

from gateway import sse
from gateway.errors import EngineError, EngineUnavailable
from gateway.exchange import Exchange, Usage
from gateway.relay.fold import Fold
from gateway.relay.reader import Reader
from gateway.relay.resume.part import seeded
from gateway.relay.rounds import rounds
from gateway.relay.tap import Tap
from gateway.routing.routes import Route, Target
from gateway.translation.face import Writer

MOST = 16 * 1024 * 1024  # bytes of an answer that is read again, which takes half a second
_COMMENT = re.compile(rb"^:.*\n", re.MULTILINE)
LOST = "The worker that made this answer has stopped. Ask again."


class Trail:
    """One answer's. `past` is what an earlier maker has left of it, if there was one. `write` takes each note."""

    reader: Reader | None  # of the stream that comes now

    def __init__(self, write: Callable[[dict[str, Any]], None], past: "Past | None" = None) -> None:
        self.note = write
        self.past = past
        self.reader = None

    def chunk(self, chunk: dict[str, Any]) -> None:
        """Note a chunk of an answer that is passed on as a whole, or in another form."""
        self.note({"chunk": chunk})

    @property
    def begun(self) -> bool:
        """Whether an earlier maker has begun the response."""
        return self.past is not None and self.past.started

    @property
    def usage(self) -> Usage | None:
        """The tokens so far, if the engine told them."""
        return self.reader.usage if self.reader is not None else None


class Past:
    """What an earlier maker has left of an answer, as it is read: `take` its notes, `body` and `count`. See
    relay.answer.way. `exchange` is the same request, sent again."""

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
            self.fold = Fold(self.asked.fields["messages"] if self.asked.endpoint.chats else [])
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
        """The notes that hold for an answer that takes the place of this one."""
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
        """Read how many tokens there were."""
        self.reader.told = Usage(*usage)

    def _feed(self, data: bytes) -> None:
        if self._sound:
            try:
                self._written += self.reader.feed(data) if self._writer is not None else self.reader.feed(data)[:0]
            except EngineError:
                self._sound = False

    @property
    def whole(self) -> bool:
        """Whether it is all there."""
        return self.reader.done and self.asked.stream and self._writer is None

    @property
    def sound(self) -> bool:
        """Whether an engine may go on with what there is, as far as that was read and belongs to one stream."""
        first = self.first
        return first is not None and self._agrees and rounds(self.asked, first.upstream.dialect) is None

    @property
    def _agrees(self) -> bool:
        return self._sound and self._written.startswith(self._body)

    @property
    def missing(self) -> bytes:
        """What was noted of an answer in another form, and is not in its body yet."""
        return self._written[len(self._body) :] if self.started and self._writer is not None else b""

    @property
    def empty(self) -> bool:
        """Whether no client has anything of the answer."""
        return not self.reader.started and self._agrees if self.asked.stream else not self.started

    def exchange(self) -> Exchange:
        """The request as it was made at first: with the seed that it got then."""
        it, first = self.asked, self.first
        if first is None or not first.upstream.dialect.seeds or not self.route.resume.most or not self._request_id:
            return it
        return it.having(seeded(replace(it, request_id=self._request_id)).fields)


class Noting:
    """A Writer that notes what it is given, so that another one can be brought to where this one is."""

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
    """What ended an answer whose worker died."""
    return EngineUnavailable(LOST, code="answer_lost")
