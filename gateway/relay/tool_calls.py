"""ToolCalls: give each piece of a tool call its index, if the engine left it out or gave it to another call."""

from typing import Any


class ToolCalls:
    """The tool calls of an answer. Clients assemble the pieces of a call by its index. Pieces that are numbered already
    keep their indices."""

    def __init__(self) -> None:
        self._calls: dict[str, _Calls] = {}  # by choice

    def number(self, choice: dict[str, Any]) -> bool:
        """Give each piece of a call in a chunk's choice its call's index. Returns whether that changed a piece."""
        delta = choice.get("delta")
        pieces = delta.get("tool_calls") if type(delta) is dict else None
        if type(pieces) is not list:
            return False
        calls = self._calls.setdefault(str(choice.get("index")), _Calls())
        return sum(calls.number(piece) for piece in pieces if type(piece) is dict) > 0

    def forget(self, choice: int | None) -> None:
        """Forget the calls of a choice (None: of every choice), because it is made again."""
        for it in list(self._calls) if choice is None else [str(choice)]:
            self._calls.pop(it, None)


class _Calls:
    """The tool calls of one choice, by their indices."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._first: dict[int, str] = {}  # the id of each call
        self._named: set[int] = set()
        self._moved: dict[int, int] = {}  # the newest call of an index that the engine gave to several
        self._last = self._top = -1

    def number(self, piece: dict[str, Any]) -> bool:
        """Give a piece of a call its index. Returns whether it had another one, or none.

        Without an index, a piece with an unknown id begins a call. So does one that has a name and no id, unless the
        last call has no name yet. With the index of a call, a piece with a name and another id begins a call, because
        some engines give every call the index 0.
        """
        told, identity, function = piece.get("index"), piece.get("id"), piece.get("function")
        named = bool(type(function) is dict and function.get("name"))
        identity = str(identity) if identity else ""
        if isinstance(told, int):
            index = self._moved.get(told, told)
            if named and identity and self._first.get(index, identity) != identity:
                index = self._moved[told] = self._ids.get(identity, self._top + 1)
        else:
            begins = bool(identity) or self._last < 0 or (named and self._last in self._named)
            index = self._ids.get(identity, self._top + 1 if begins else self._last)
        if identity:
            self._ids.setdefault(identity, index)
            self._first.setdefault(index, identity)
        if named:
            self._named.add(index)
        self._last, self._top = index, max(self._top, index)
        piece["index"] = index
        return not isinstance(told, int) or index != told
