"""Tap: reads an engine's server-sent events as they pass and says which bytes may be forwarded.

Nothing is forwarded before its event is whole and found sound, so a client never sees half a frame,
broken JSON or invalid UTF-8: official clients crash on those, and lose a last event without its blank
line. What is forwarded is the engine's own bytes. Event syntax: WHATWG HTML, section 9.2.6.
"""

import re
from collections.abc import Callable
from io import StringIO
from typing import Any

import orjson

from gateway.errors import EngineError
from gateway.exchange import Usage

MAX_EVENT = 8 * 1024 * 1024  # bytes; an event larger than this is an engine gone wrong
MAX_TEXT = 1024 * 1024  # characters of an answer that are kept, for another engine to go on with
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
EVENT_STREAM = (b"content-type", b"text/event-stream; charset=utf-8")  # the header of a stream

_HEAD = ("id", "object", "created", "model", "system_fingerprint")  # the same in every chunk of a stream
_NEWLINE = re.compile(rb"\r\n|\n|\r")
# A blank line ends an event, and any of CRLF, LF and CR ends a line. After CRLF CR the next byte tells: an LF belongs
# to it.
_EVENT_END = re.compile(rb"\r\n\r\n|\r\n\n|\r\n\r(?=[^\n])|\n\n|\n\r\n|\n\r(?=[^\n])|\r\r\n?")


class EngineFault(EngineError):
    """The engine reported an error inside its stream. `error` is its `error` member as it came."""

    def __init__(self, error: Any) -> None:
        super().__init__("The engine reported an error in its stream.")
        self.error = error


class Tap:
    """One stream's reader. Feed it what arrives; it returns what to send on.

    After a feed, `started` says whether a data event has been seen, `done` whether `[DONE]` has, and
    `usage`, `finish_reason`, `tokens` (events with content, an estimate of tokens) what was learned. `text` is all of
    the answer as long as it is `plain`: text and nothing else, and not too long. `learn` is called with every chunk.
    """

    def __init__(
        self, *, hide_usage: bool, choices: int = 1, learn: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        self.started = False
        self.has_content = False
        self.done = False
        self.usage: Usage | None = None
        self.finish_reason: str | None = None
        self.tokens = 0
        self.plain = True
        self.text = StringIO()  # smaller than a list of its pieces by far
        self.head: dict[str, Any] = {}  # what every chunk says, from the first
        self._room = MAX_TEXT
        self._hide_usage = hide_usage
        self._learn = learn
        self._choices = choices
        self._rest: list[bytes] = []  # pieces of an event whose end isn't here yet
        self._size = 0  # bytes in _rest
        self._tail = b""  # its last three
        self.held = b""
        self._open: set[int] = set()  # choices that have begun and not finished
        self._ended: set[int] = set()

    @property
    def complete(self) -> bool:
        """Whether the answer is whole, said or not: every choice asked for, and begun, has its finish_reason."""
        return len(self._ended) >= self._choices and not self._open

    def feed(self, data: bytes) -> bytes:
        """Take bytes as they arrived and return the bytes of whole, sound events to forward (maybe none).

        Raises EngineFault for an error event and EngineError for a broken one; sound events that came before
        it in `data` are then in `self.held`, for the caller to forward first.
        """
        self.held = b""
        if not self._rest and _is_usual(data):
            return data if self._chunk(data[6:-2]) else b""
        buffer = data
        if self._rest:
            # Joined only once the event's end is here (it may have begun in the last three bytes): joining and
            # searching at each piece would cost a large event's square.
            window = self._tail + data
            self._rest.append(data)
            self._tail = window[-3:]
            if not _EVENT_END.search(window):
                return self._keep(self._rest, self._size + len(data))
            buffer = b"".join(self._rest)
        plain = b"\r" not in buffer  # every known engine
        out: list[bytes] = []
        keep = start = 0  # buffer[keep:start] is sound and not yet handed out
        try:
            while not self.done:
                end = buffer.find(b"\n\n", start) + 2 if plain else _end_of_event(buffer, start)
                if end < 2:
                    break
                if plain and buffer.startswith(b"data: {", start) and buffer.find(b"\n", start, end - 2) < 0:
                    forward = self._chunk(buffer[start + 6 : end - 2])
                else:
                    forward = self._event(buffer[start:end])
                if not forward:
                    out.append(buffer[keep:start])
                    keep = end
                start = end
        except EngineError:
            self.held = b"".join([*out, buffer[keep:start]])
            raise
        self._keep([buffer[start:]] if start < len(buffer) else [], len(buffer) - start)
        if not out:
            return buffer[keep:start]
        return b"".join([*out, buffer[keep:start]])

    def _keep(self, rest: list[bytes], size: int) -> bytes:
        self._rest, self._size = rest, size
        if len(rest) == 1:
            self._tail = rest[0][-3:]
        if size > MAX_EVENT:
            raise EngineError(f"The engine sent an event of more than {MAX_EVENT} bytes.", code="engine_broken_stream")
        return b""

    def end(self) -> None:
        """The engine closed its stream. Raises EngineError unless the answer is whole."""
        if not self.started:
            raise EngineError("The engine's answer held no data.", code="engine_broken_stream")
        if not self.complete:
            raise EngineError(
                "The engine ended its stream before the answer was complete.", code="engine_broken_stream"
            )

    def _event(self, event: bytes) -> bool:
        """Learn from one whole event of any form; False means: don't forward it."""
        try:
            event.decode()
        except UnicodeDecodeError:
            raise EngineError("The engine sent invalid UTF-8.", code="engine_broken_stream") from None
        data = _data(event)
        if data is None:  # comments and other fields
            return self.started  # the head isn't out yet: nothing to keep alive
        if data.strip() == b"[DONE]":
            if not self._ended or self._open:
                raise EngineError("The engine ended its answer before it was complete.", code="engine_broken_stream")
            self.done = True
            return True
        return self._chunk(data)

    def _chunk(self, data: bytes) -> bool:
        """Learn from one event's data; False means: don't forward it."""
        try:
            chunk = orjson.loads(data)
        except orjson.JSONDecodeError:
            raise EngineError("The engine sent a frame that is not valid JSON.", code="engine_broken_stream") from None
        if type(chunk) is not dict:
            raise EngineError("The engine sent a frame that is not an object.", code="engine_broken_stream")
        if error := chunk.get("error"):
            raise EngineFault(error)
        if not self.started:
            self.started = True
            self.head = self.head or {name: chunk[name] for name in _HEAD if name in chunk}
        if self._learn is not None:
            self._learn(chunk)
        choices = chunk.get("choices")
        if usage := chunk.get("usage"):
            self.usage = Usage.of(usage) or self.usage
            if not choices and self._hide_usage:
                return False
        if type(choices) is list:
            for choice in choices:
                if type(choice) is dict:
                    self._choice(choice)
        return True

    def _choice(self, choice: dict[str, Any]) -> None:
        index = choice.get("index", 0)
        if type(index) is not int:
            index = 0
        if reason := choice.get("finish_reason"):
            self.finish_reason = reason
            self._open.discard(index)
            self._ended.add(index)
        elif index not in self._ended:
            self._open.add(index)
        delta = choice.get("delta")
        if type(delta) is dict:
            made = delta.get("content")
            # Beside it a tool call, reasoning, a refusal: anything but the role.
            if len(delta) > 1 or not made:
                for name, value in delta.items():
                    if value and name != "role" and name != "content":  # noqa: PLR1714  twice as fast
                        self.plain = False
                        made = made or value
        else:
            made = choice.get("text")
        if made:
            self.has_content = True
            self.tokens += 1
            if self._room > 0 and type(made) is str:
                self._room -= self.text.write(made)
            else:
                self.plain = False


def _is_usual(data: bytes) -> bool:
    """Whether it is one whole event of one line, as engines send them."""
    whole = data.startswith(b"data: {") and data.endswith(b"}\n\n")
    return whole and data.find(b"\n") == len(data) - 2 and b"\r" not in data


def _end_of_event(buffer: bytes, start: int) -> int:
    """Where the event that begins at `start` ends; 0 if its end isn't here yet."""
    match = _EVENT_END.search(buffer, start)
    return match.end() if match else 0


def _data(event: bytes) -> bytes | None:
    """The event's data lines joined by newlines; None when it has none."""
    lines = [line for line in _NEWLINE.split(event) if line.startswith(b"data")]
    values = [line[4:].removeprefix(b":").removeprefix(b" ") for line in lines if line[4:5] in (b":", b"")]
    return b"\n".join(values) if values else None
