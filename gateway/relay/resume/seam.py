"""Seam: where an answer passes from one engine to another. The second stream becomes the rest of the first."""

from collections.abc import Callable
from typing import Any

from gateway.errors import EngineError
from gateway.exchange import Usage
from gateway.relay.content import Content
from gateway.relay.reader import Reader
from gateway.relay.resume.handover import Handover
from gateway.relay.resume.part import Part
from gateway.relay.resume.splice import Splice
from gateway.relay.rounds import Rounds
from gateway.relay.tap import Tap
from gateway.relay.writer import OPENAI
from gateway.translation.face import Writer


class Seam:
    """The Reader of an engine that goes on with an answer, or with one choice of it. What it returns has the id, time
    and model of the first stream, no second role, nothing twice, and usage of the whole. Comments of the engine's are
    left out, and its timings, which are of the rest alone.

    A Tap reads the stream, has each chunk sewn on, and learns from it whether the choice is whole. What the Tap would
    forward is not used.
    """

    def __init__(
        self,
        answer: Reader,
        part: Part,
        handover: Handover,
        number: int,
        *,
        add: Callable[[dict[str, Any]], None] | None = None,
        writer: Writer | None = None,
        rounds: Rounds | None = None,
        reads: Callable[[bytes], bytes] | None = None,
    ) -> None:
        """`answer` is what the client has; this is resume `number` of it, 0 if the client does not need to know. With
        `add`, its chunks go there instead. `rounds` see each chunk first. `reads` makes events of the engine's bytes,
        if they are something else."""
        self._part = part
        self._rounds = rounds
        self._told = answer.usage if rounds is None else None  # as far as it was told before the answer broke off
        self.content = answer.content
        self.content.tokens = max(self.content.tokens, self._told.tokens_out if self._told else 0)
        self._tap = Tap(hide_usage=False, content=Content(), edit=self._sew)
        self._tap.head = (rounds.head if rounds is not None else {}) or answer.head
        self.held = b""
        self._whole: Usage | None = None
        self.handover = handover
        self._splice = Splice(part, handover)
        self._reads = reads
        self._wants_usage = part.exchange.wants_usage or add is not None or writer is not None
        self._every_usage = part.exchange.wants_every_usage
        self._writer = rounds.writer(writer or OPENAI) if rounds is not None else writer or OPENAI
        self._put = add or self._send
        self._out = [b": resumed %d\n" % number] if number else []  # a line alone, as sse.PING is

    @property
    def head(self) -> dict[str, Any]:
        """See Reader.head."""
        return self._tap.head

    @property
    def started(self) -> bool:
        """See Reader.started."""
        return self._tap.started and not self._splice.skips

    @property
    def skipping(self) -> bool:
        """See Reader.skipping."""
        return self._tap.started and self._splice.skips

    @property
    def done(self) -> bool:
        """See Reader.done."""
        return self._tap.done

    @property
    def usage(self) -> Usage | None:
        """See Reader.usage."""
        if self._whole is None and self._told is not None:
            return Usage(self._told.tokens_in, self.content.tokens, self._told.cached)
        return self._whole

    @property
    def made(self) -> int:
        """See Reader.made."""
        return self.content.tokens

    def end(self) -> bytes:
        """See Reader.end."""
        self._tap.end()
        return self._take()

    def feed(self, data: bytes) -> bytes:
        """See Reader.feed."""
        self.held = b""
        if self._reads is not None:
            data = self._reads(data)
        try:
            if data:
                self._tap.feed(data)
        except EngineError:
            self.held = self._take()
            raise
        return self._take()

    def close(self, reason: str) -> bytes:
        """Return the answer's end, where nothing is left to be made."""
        self._splice.ending = reason
        said = b'"delta":{}' if self.handover.exchange.endpoint.chats else b'"text":""'
        return self.feed(b'data: {"choices":[{"index":0,%s}]}\n\n' % said)

    def _sew(self, chunk: dict[str, Any]) -> None:
        """Make a chunk one of the first stream's, and put it out if it says anything new. It is changed in place."""
        for name in ("system_fingerprint", "timings"):
            chunk.pop(name, None)
        chunk |= self.head
        usage = Usage.of(chunk.pop("usage", None))
        if usage is not None and (usage.tokens_in or usage.tokens_out):
            self._whole = self._together(usage)
            if self._every_usage:
                chunk["usage"] = self._whole.as_object()
        choices = [it for it in chunk["choices"] if type(it) is dict]
        before = self._splice.extra
        said = [self._splice.sew(it) for it in choices]  # each of them, whatever the first
        if self._rounds is not None:
            self._rounds.edit(chunk)
        if any(said):
            for it in choices:
                self.content.add(it)
            self.content.tokens += self._splice.extra - before
            self._put(chunk)
        if self._splice.ending is not None:
            self._tap.stop()

    def _together(self, rest: Usage) -> Usage:
        """The usage of the whole answer, where this is that of its rest."""
        begun, given = self._told, self.handover.tokens
        if begun is None:
            return self._with_rounds(Usage(max(0, rest.tokens_in - given), given + rest.tokens_out))
        # How many tokens the text makes that was handed over, the two prompts tell.
        if 0 <= rest.tokens_in - begun.tokens_in <= begun.tokens_out:
            given = rest.tokens_in - begun.tokens_in
        return self._with_rounds(Usage(begun.tokens_in, given + rest.tokens_out, begun.cached))

    def _with_rounds(self, usage: Usage) -> Usage:
        return usage if self._rounds is None else self._rounds.together(usage)

    def _take(self) -> bytes:
        if not self.started:
            return b""
        if self.done:
            if self._splice.ending is not None and (known := self.usage):
                self._whole = Usage(known.tokens_in, max(self.content.tokens, known.tokens_out), known.cached)
            if self._whole is not None and self._wants_usage and (self._rounds is None or self._rounds.last):
                self._put(self.head | {"choices": [], "usage": self._whole.as_object()})
            self._out.append(self._writer.end())
        data = b"".join(self._out)
        self._out.clear()
        return data

    def _send(self, chunk: dict[str, Any]) -> None:
        try:
            self._out.append(self._writer.chunk(chunk))
        except EngineError:
            self.content.kept = False  # the client lacks a part, so that no other engine can go on behind it
            raise
