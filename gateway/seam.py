"""Seam: where an answer passes from one engine to another. The second stream becomes the rest of the first."""

from collections.abc import Callable
from typing import Any

import orjson

from gateway.errors import EngineError
from gateway.exchange import Usage
from gateway.resume import Handover
from gateway.sse import DONE, Tap


class Seam(Tap):
    """Reads the stream of an engine that goes on with an answer. What it returns has the id, time and model of the
    first stream, no second role, nothing twice, and usage of the whole; comments of the engine's are left out."""

    def __init__(
        self, answer: Tap, handover: Handover, number: int, add: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        """`answer` is what the client has; this is resume `number` of it. With `add`, its chunks go there instead."""
        super().__init__(hide_usage=False, learn=self._sew)
        self.head, self.text, self.tokens, self.has_content = answer.head, answer.text, answer.tokens, True
        self._prompt = answer.usage.tokens_in if answer.usage else None
        self.handover = handover
        self._again = handover.again
        # What would complete a stop sequence that has begun: the engine, which made the rest alone, can't know.
        sent = answer.text.getvalue()
        self._rests = [stop[n:] for stop in handover.stops for n in range(1, len(stop)) if sent.endswith(stop[:n])]
        self._held_back: list[str] = []
        self._ending: str | None = None  # the finish_reason, where the engine has not come to one
        self._wants_usage = handover.exchange.wants_usage or add is not None
        self._put = add or self._send
        self._out = [b": resumed %d\n\n" % number]

    def feed(self, data: bytes) -> bytes:
        """As Tap's."""
        try:
            super().feed(data)
        except EngineError:
            self.held = self._take()
            raise
        return self._take()

    def close(self, reason: str) -> bytes:
        """The answer's end, where nothing is left to be made."""
        self._ending = reason
        said = b'"delta":{}' if self.handover.exchange.kind == "chat" else b'"text":""'
        return self.feed(b'data: {"choices":[{"index":0,%s}]}\n\n' % said)

    def _sew(self, chunk: dict[str, Any]) -> None:
        """Make a chunk one of the first stream's, and put it out if it says anything new. It is changed in place: what
        Tap learns from it after this is what the client gets."""
        chunk.pop("system_fingerprint", None)
        chunk |= self.head
        if usage := Usage.of(chunk.get("usage")):
            if self._prompt is None:
                self._prompt = max(0, usage.tokens_in - self.handover.tokens)
            chunk["usage"] = _object(Usage(self._prompt, self.handover.tokens + usage.tokens_out))
        choices = chunk.get("choices")
        choices = [self._sew_choice(it) for it in choices if type(it) is dict] if type(choices) is list else []
        if any(choices) or (not choices and usage and self._wants_usage):
            self._put(chunk)
        self.done = self._ending is not None

    def _sew_choice(self, choice: dict[str, Any]) -> bool:
        """The same for a choice; whether it says anything new."""
        delta = choice.get("delta")
        said, name = (delta, "content") if type(delta) is dict else (choice, "text")
        said.pop("role", None)
        text = said.pop(name, None)
        if new := self._new(text if type(text) is str else "", last=bool(choice.get("finish_reason"))):
            said[name] = new
        elif said is choice:
            said[name] = ""
        if self._ending is not None:
            choice["finish_reason"] = self._ending
        return bool(choice.get("finish_reason") or new or (said is delta and any(said.values())))

    def _new(self, text: str, *, last: bool) -> str:
        """What of a piece of text the client has not got, and may get now."""
        if self._again:
            while self._again and text and self._again[0] == text[0]:
                self._again, text = self._again[1:], text[1:]
            if text:
                self._again = ""
        if not self._rests:
            return text
        pieces = [*self._held_back, text] if text else self._held_back
        new = "".join(pieces)
        whole = [rest for rest in self._rests if new.startswith(rest)]
        if whole:
            self._ending = "stop"
            new = min(whole, key=len) if self.handover.keeps_stop else ""
        elif not last and any(rest.startswith(new) for rest in self._rests):
            self._held_back = pieces
            return ""
        self._rests, self._held_back = [], []
        self.tokens += len(pieces) - 1 if new else 0  # what goes out is counted as one piece
        return new

    def _take(self) -> bytes:
        if not self.started:
            return b""
        if self.done:
            if self._ending is not None and self._prompt is not None:
                self.usage = Usage(self._prompt, self.tokens)
                if self._wants_usage:
                    self._put(self.head | {"choices": [], "usage": _object(self.usage)})
            self._out.append(DONE)
        data = b"".join(self._out)
        self._out.clear()
        return data

    def _send(self, chunk: dict[str, Any]) -> None:
        self._out.append(b"data: " + orjson.dumps(chunk) + b"\n\n")


def _object(usage: Usage) -> dict[str, int]:
    made, given = usage.tokens_out, usage.tokens_in
    return {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}
