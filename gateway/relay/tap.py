"""Tap: read an engine's server-sent events as they pass, and return the bytes that may be forwarded.

Nothing is forwarded before its event is complete and valid. A client therefore never sees half a frame, broken JSON or
invalid UTF-8: official clients crash on those, and lose a last event without its blank line.

The syntax of events is WHATWG HTML's, section 9.2.6. An event of the usual form, one line `data: {...}`, is forwarded
as the engine's own bytes. Any other form is rewritten into that one. An event without data is not forwarded, because
official clients take a blank line after `id:` or `retry:` for an empty event, and crash. For the same reason a comment
is one line.

This file is long because the path of a token is in one place.
"""

from collections.abc import Callable
from typing import Any

import orjson

from gateway import sse
from gateway.errors import EngineEnded, EngineError
from gateway.exchange import Usage
from gateway.relay.content import Content, content_of
from gateway.relay.event_syntax import BOM, end_of_comments, end_of_event, fields, is_usual
from gateway.relay.shape import settle
from gateway.relay.tally import Tally
from gateway.relay.tool_calls import ToolCalls
from gateway.relay.writer import OPENAI
from gateway.translation.face import Writer

MAX_EVENT = 8 * 1024 * 1024  # bytes; a larger event is an error of the engine

# Fields that are the same in every chunk of a stream
_HEAD = ("id", "object", "created", "model", "system_fingerprint")
_USAGE = b',"usage":{'
_USAGE_ROOM = 200  # bytes at the end of a chunk in which its usage is searched


class EngineFault(EngineError):
    """The engine reported an error inside its stream. `error` is its `error` member as it came."""

    def __init__(self, error: Any) -> None:
        super().__init__("The engine reported an error in its stream.")
        self.error = error


class Tap:
    """The Reader of one stream.

    `edit` is called with every chunk before the tap reads it, and may change it. With a `writer`, chunks and the
    stream's end are forwarded in the writer's form, and not as the engine's own bytes.

    Usage is forwarded in one chunk without choices, unless `hide_usage`. With `every_usage` the caller also wants it in
    each of the engine's chunks. `cuts_usage`: it stands at the end of each chunk, as in vLLM's.
    """

    def __init__(
        self,
        *,
        hide_usage: bool,
        every_usage: bool = False,
        cuts_usage: bool = False,
        tally: Tally | None = None,
        choices: int = 1,
        content: Content | None = None,
        edit: Callable[[dict[str, Any]], None] | None = None,
        writer: Writer | None = None,
    ) -> None:
        self.started = False
        self.skipping = self.done = False
        self.head: dict[str, Any] = {}
        self.held = b""
        self.content = content or content_of(choices)
        self._hide_usage = hide_usage
        self._every_usage = every_usage
        self._cuts_usage = cuts_usage and not every_usage
        self._tally = tally or Tally(choices, 1, each=False)
        self._told_usage = False  # the client has received its usage chunk
        self._edit = edit
        self._calls = ToolCalls()  # as the engine has them, before they are edited
        self._writer = writer or OPENAI
        self._rewrites = writer is not None
        self._mended = self._rewrites  # this chunk is not forwarded as the engine sent it
        self._first = True  # the beginning of the stream, which may have a byte order mark, has not come yet
        self._rest: list[bytes] = [b""]  # pieces of an event whose end has not come yet
        self._size = 0  # bytes in _rest
        self._tail = b""  # the last three bytes of _rest

    @property
    def usage(self) -> Usage | None:
        """See Reader.usage."""
        return self._tally.usage

    @property
    def made(self) -> int:
        """See Reader.made: the engine's count so far, or the number of events with content if that is larger."""
        return max(self.content.tokens, self._tally.made)

    @property
    def tokens(self) -> int:
        """The number of events with content so far."""
        return self.content.tokens

    @property
    def finish_reason(self) -> str | None:
        """The finish_reasons of the choices."""
        return self.content.finish_reason

    def feed(self, data: bytes) -> bytes:
        """See Reader.feed."""
        self.held = b""
        if not self._rest and is_usual(data):
            sound = self._chunk(data[6:-2])
            return data if sound is None else sound
        if self._rest:
            # The pieces are joined only when the end of the event has come (it may begin in the last three bytes). To
            # join and search at each piece would take quadratic time for a large event.
            window = self._tail + data
            self._rest.append(data)
            self._tail = window[-3:]
            if not end_of_event(window, 0) and not self._comment_ends(data):
                return self._keep(self._rest, self._size + len(data))
            data = b"".join(self._rest)
            if self._first:
                data = data.removeprefix(BOM)
                self._first = False
        return self._pass(data)

    def _pass(self, buffer: bytes) -> bytes:
        """Return what is forwarded of the events that begin in `buffer`. An incomplete last event is kept."""
        plain = b"\r" not in buffer  # true for every known engine
        out: list[bytes] = []
        keep = start = 0  # buffer[keep:start] is valid as it came, and not yet forwarded
        try:
            while not self.done:
                end = buffer.find(b"\n\n", start) + 2 if plain else end_of_event(buffer, start)
                if end < 2:
                    break
                if plain and buffer.startswith(b"data: {", start) and buffer.find(b"\n", start, end - 2) < 0:
                    sound = self._chunk(buffer[start + 6 : end - 2])
                else:
                    sound = self._event(buffer[start:end])
                if sound is not None:
                    out += (buffer[keep:start], sound)
                    keep = end
                start = end
        except EngineError:
            self.held = b"".join([*out, buffer[keep:start]])
            raise
        rest = end_of_comments(buffer, start)
        if rest > start:
            # Comments are forwarded at once, because they keep the connection alive while an engine sends nothing else.
            out += (buffer[keep:start], self._comment())
            keep = start
        self._keep([buffer[rest:]] if rest < len(buffer) else [], len(buffer) - rest)
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

    def _comment_ends(self, data: bytes) -> bool:
        """Return whether the kept bytes are a comment line that ends in `data`."""
        return self._rest[0][:1] == b":" and (b"\n" in data or b"\r" in data)

    def _comment(self) -> bytes:
        """Return what is forwarded for comments: nothing before the first event, because the head is not sent yet."""
        return sse.PING if self.started and not self.done else b""

    def stop(self) -> None:
        """Read no further."""
        self.done = True

    def end(self) -> bytes:
        """See Reader.end."""
        if not self.started:
            if error := _only_error(b"".join(self._rest)):
                raise EngineFault(error)
            raise EngineError("The engine's answer has no data.", code="engine_broken_stream")
        if not self.content.complete:
            raise EngineEnded("The engine ended its stream before the answer was complete.")
        self.done = True
        return self._goodbye()

    def _goodbye(self) -> bytes:
        """Return the end of the stream, preceded by the usage chunk if the engine reported its usage in another way."""
        usage = None if self._hide_usage or self._told_usage else self.usage
        if usage is None:
            return self._writer.end()
        return self._writer.chunk(self.head | {"choices": [], "usage": usage.as_object()}) + self._writer.end()

    def _event(self, event: bytes) -> bytes:
        """Learn from one complete event of any form, and return it in the usual form; b"" if it is not forwarded."""
        lines = fields(event)
        # A line break in JSON is white space
        data = b" ".join(value for name, value in lines if name == b"data").strip()
        if not data or data == b"null":  # llama.cpp begins with a null if it completes several prompts
            return self._comment() if any(not name for name, _ in lines) else b""
        if data == b"[DONE]":
            if not self.content.ended:
                raise EngineEnded("The engine ended its answer before it was complete.")
            self.done = True
            return self._goodbye()
        if [value for name, value in lines if name == b"event"][-1:] == [b"error"]:
            raise EngineFault(_error(data))
        sound = self._chunk(data)
        return sse.event(data) if sound is None else sound

    def _chunk(self, data: bytes) -> bytes | None:
        """Learn from one event's data. Returns None if it may be forwarded as it is; otherwise the bytes to forward in
        its place, or b"" for nothing."""
        # In each chunk of vLLM the usage is the last member, and is cut off before the chunk is parsed. The name cannot
        # match inside a text, because its quotation marks have backslashes there.
        at = data.rfind(_USAGE, -_USAGE_ROOM) if self._cuts_usage else 0
        if at > 0 and data.find(b"}", at) == len(data) - 2:  # the usage has no inner object, and no member follows it
            told, data = data[at + len(_USAGE) - 1 : -1], data[:at] + b"}"
        else:
            at = 0
        try:
            chunk = orjson.loads(data)
        except orjson.JSONDecodeError:
            raise _unreadable() from None
        if type(chunk) is not dict:
            raise EngineError("The engine sent an event that is not a JSON object.", code="engine_broken_stream")
        if error := chunk.get("error"):
            raise EngineFault(error)
        choices = chunk.get("choices")
        if type(choices) is not list:
            if not chunk.get("usage"):
                return b""  # the chunk is empty, and clients fail at a chunk without choices
            choices = chunk["choices"] = []
            self._mended = True
        if not self.started:
            self._begins(chunk)
        if self._edit is not None or len(choices) > 1:
            self._have_settled(chunk, choices)
        cut = False
        if at and choices:
            self._tally.tell(choices, told)
        elif usage := _object(told) if at else chunk.get("usage"):
            if self._hides_usage(chunk, choices, usage):
                return b""
            cut = bool(choices) and not self._every_usage
        for choice in choices:
            if self.content.add(choice) if type(choice) is dict else settle(choice):
                self._mended = True
        if cut:
            del chunk["usage"]
        if self._mended or cut or (at and not choices):
            self._mended = self._rewrites
            return self._written(chunk)
        return sse.event(data) if at else None

    def _begins(self, chunk: dict[str, Any]) -> None:
        self.started = True
        self.head = self.head or {name: chunk[name] for name in _HEAD if name in chunk}

    def _written(self, chunk: dict[str, Any]) -> bytes:
        try:
            return self._writer.chunk(chunk)
        except EngineError:
            self.content.kept = False  # the client lacks a part, so no other engine can continue the answer
            raise

    def _have_settled(self, chunk: dict[str, Any], choices: list[Any]) -> None:
        """Settle the choices before anything is learned of one: a chunk with a malformed choice is not forwarded. Then
        have the chunk edited."""
        for choice in choices:
            if settle(choice):
                self._mended = True
            if self._edit is not None and "tool_calls" in choice.get("delta", ()) and self._calls.number(choice):
                self._mended = True
        if self._edit is not None:
            self._edit(chunk)

    def _hides_usage(self, chunk: dict[str, Any], choices: list[Any], usage: Any) -> bool:
        """Learn from a chunk's usage. Returns whether the chunk holds nothing else and is not forwarded."""
        chunk["usage"] = usage
        self._tally.tell(choices, usage)
        if choices:
            return False
        hides = self._hide_usage or self._tally.each
        if hides:
            self._mended = self._rewrites
        else:
            self._told_usage = True
        return hides


def _object(data: bytes) -> Any:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        raise _unreadable() from None


def _unreadable() -> EngineError:
    return EngineError("The engine sent an event that is not valid JSON.", code="engine_broken_stream")


def _only_error(data: bytes) -> Any:
    """Return the error of an engine that sent an object with that in place of a stream; otherwise None."""
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    return value.get("error") if isinstance(value, dict) else None


def _error(data: bytes) -> Any:
    """Return the data of an event of the type `error`."""
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    return value.get("error", value) if isinstance(value, dict) else value
