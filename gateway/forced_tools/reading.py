"""Reading: read a model's JSON piece by piece as the tool calls that it stands for."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import orjson

SPACE = " \t\r\n"  # what JSON has between values


class Piece(NamedTuple):
    """A part of a call: its beginning with its name, some of the text of its arguments, or its end."""

    what: Literal["begin", "more", "end"]
    text: str = ""


class MalformedError(ValueError):
    """Say that the text is not a call. The message is a sentence for the model."""


class Extent:
    """Find the end of a JSON value, character by character. The value itself is not checked."""

    def __init__(self) -> None:
        self._depth = 0
        self._string = self._escaped = self._begun = False

    def take(self, char: str) -> Literal["inside", "last", "behind"]:
        """Say whether this character belongs to the value, ends it, or stands behind it."""
        if self._string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._string = False
                return "inside" if self._depth else "last"
            return "inside"
        if char == '"':
            self._string = self._begun = True
        elif char in "{[":
            self._depth += 1
            self._begun = True
        elif char in "}]":
            if not self._depth:
                return "behind"
            self._depth -= 1
            return "inside" if self._depth else "last"
        elif not self._depth and self._begun and (char == "," or char in SPACE):
            return "behind"
        elif char not in SPACE:
            self._begun = True
        return "inside"


class CallReader:
    """Read one answer. With `only`, the JSON is the arguments of the function of that name; otherwise it is a call, or
    a list of calls. Text before the first bracket and after the last one is skipped."""

    def __init__(self, only: str | None = None) -> None:
        self.calls = 0  # calls that have ended
        self.wrote = False  # the model wrote something other than white space
        self._only = only
        self._state: Literal["before", "named", "list", "open", "key", "colon", "value", "done"] = "before"
        self._listed = False
        self._extent = Extent()
        self._text: list[str] = []  # the text of the key or value that is being read
        self._key = ""
        self._name: str | None = None
        self._arguments = False  # the call has arguments
        self._early = ""  # arguments that came before the name

    @property
    def begun(self) -> bool:
        """Whether the JSON has begun."""
        return self._state != "before"

    @property
    def whole(self) -> bool:
        """Whether the text may end here."""
        return self._state == "done" or (self._state == "list" and self.calls > 0)

    def feed(self, text: str) -> Iterator[Piece]:
        """Yield the pieces of calls in this text. Raises MalformedError if it is not a call."""
        self.wrote = self.wrote or not text.isspace()
        for char in text:
            if self._state == "done":
                return
            yield from self._step(char)
        if self._passing():
            yield from self._flush()

    def _step(self, char: str) -> Iterator[Piece]:
        match self._state:
            case "value":
                yield from self._in_value(char)
            case "key":
                self._text.append(char)
                if self._extent.take(char) == "last":
                    self._key, self._state = str(_json(self._text)), "colon"
            case "before":
                self._seek(char)
            case _ if char in SPACE:
                pass
            case "named":
                yield from self._in_named(char)
            case "colon":
                self._expect(char, ":")
                self._state, self._extent, self._text = "value", Extent(), []
            case "list":
                self._in_list(char)
            case "open":
                yield from self._in_call(char)

    def _seek(self, char: str) -> None:
        if char == "[" and self._only is None:
            self._state, self._listed = "list", True
        elif char == "{":
            if self._only is None:
                self._state = "open"
                return
            self._extent, self._text, self._state = Extent(), ["{"], "named"
            self._extent.take("{")

    def _in_named(self, char: str) -> Iterator[Piece]:
        """Read the arguments of a named function. The first character shows whether they are JSON, before any piece is
        sent."""
        self._expect(char, '"}')
        self._name, self._key, self._arguments, self._state = self._only, "arguments", True, "value"
        yield Piece("begin", self._only or "")
        yield from self._in_value(char)

    def _in_list(self, char: str) -> None:
        self._expect(char, "{],")
        if char == "{":
            self._state = "open"
        elif char == "]":
            self._state = "done"

    def _in_call(self, char: str) -> Iterator[Piece]:
        self._expect(char, '"},')
        if char == '"':
            self._state, self._extent, self._text = "key", Extent(), ['"']
            self._extent.take(char)
        elif char == "}":
            if self._name is None:
                raise MalformedError("The answer calls a function without a name.")
            if not self._arguments:
                yield Piece("more", "{}")
            yield from self._ended()

    def _in_value(self, char: str) -> Iterator[Piece]:
        where = self._extent.take(char)
        if where != "behind":
            if self._key == "arguments" and not self._text and char not in SPACE:
                self._expect(char, "{")
            if self._text or char not in SPACE:
                self._text.append(char)
        if where == "inside":
            return
        yield from self._value_ended()
        if where == "behind" and self._state == "open":
            yield from self._in_call(char) if char not in SPACE else ()

    def _value_ended(self) -> Iterator[Piece]:
        self._state = "open"
        if self._key == "name":
            name = _json(self._text)
            if not isinstance(name, str) or self._name is not None:
                raise MalformedError("The answer has a call with several names, or with a name that is not a string.")
            self._name, self._text = name, []
            yield Piece("begin", name)
            if self._early:
                yield Piece("more", self._early)
        elif self._key == "arguments":
            self._arguments = True
            if self._name is None:
                self._early = "".join(self._text)
            else:
                yield from self._flush()
            if self._only is not None:
                yield from self._ended()
        self._text = []

    def _ended(self) -> Iterator[Piece]:
        self.calls += 1
        self._name, self._arguments, self._early = None, False, ""
        self._state = "list" if self._listed else "done"
        yield Piece("end")

    def _passing(self) -> bool:
        """Whether the value that is being read is passed on piece by piece."""
        return self._state == "value" and self._key == "arguments" and self._name is not None

    def _flush(self) -> Iterator[Piece]:
        if self._text:
            text = "".join(self._text)
            # Text that was passed on is not kept. One entry says that the value has begun.
            self._text = [""]
            if text:
                yield Piece("more", text)

    @staticmethod
    def _expect(char: str, expected: str) -> None:
        if char not in expected:
            raise MalformedError("The answer is not the JSON of a tool call.")


def _json(parts: list[str]) -> object:
    try:
        return orjson.loads("".join(parts))
    except orjson.JSONDecodeError:
        raise MalformedError("The answer is not valid JSON.") from None
