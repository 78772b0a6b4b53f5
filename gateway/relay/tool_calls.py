"""ToolCalls: add the index to each piece of a tool call, if the engine left it out."""

from typing import Any


class ToolCalls:
    """The tool calls of an answer. Clients assemble the pieces of a call by its index."""

    def __init__(self) -> None:
        self._calls: dict[str, _Calls] = {}  # by choice

    def number(self, choice: dict[str, Any]) -> bool:
        """Give each piece of a call in a chunk's choice its call's index. Returns whether a piece lacked it."""
        delta = choice.get("delta")
        pieces = delta.get("tool_calls") if type(delta) is dict else None
        if type(pieces) is not list:
            return False
        calls = self._calls.setdefault(str(choice.get("index")), _Calls())
        return sum(calls.number(piece) for piece in pieces if type(piece) is dict) > 0


class _Calls:
    """The tool calls of one choice, by their indices."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._named: set[int] = set()
        self._last = -1

    def number(self, piece: dict[str, Any]) -> bool:
        """Give a piece of a call its index. Returns whether it had none. A piece with an unknown id begins a call. A
        piece without an id but with a name begins a call, unless the last call has no name yet."""
        index, identity, function = piece.get("index"), piece.get("id"), piece.get("function")
        named = bool(type(function) is dict and function.get("name"))
        missing = not isinstance(index, int)
        if not isinstance(index, int):
            begins = bool(identity) or self._last < 0 or (named and self._last in self._named)
            index = piece["index"] = self._ids.get(str(identity), self._last + 1 if begins else self._last)
        if identity:
            self._ids.setdefault(str(identity), index)
        if named:
            self._named.add(index)
        self._last = index
        return missing
