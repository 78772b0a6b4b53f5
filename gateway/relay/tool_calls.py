"""ToolCalls: give each piece of a tool call its index, if the engine left it out or gave it to another call."""

from typing import Any

import orjson


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
        index = str(choice.get("index"))
        if (calls := self._calls.get(index)) is None:
            calls = self._calls[index] = _Calls()
        changed = False
        for piece in pieces:
            changed = calls.number(piece) or changed
        return changed

    def forget(self, choice: int | None) -> None:
        """Forget the calls of a choice (None: of every choice), because it is made again."""
        for it in list(self._calls) if choice is None else [str(choice)]:
            self._calls.pop(it, None)


class _Calls:
    """The tool calls of one choice, by their indices."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._first: dict[int, str] = {}  # the id of each call
        self._names: dict[int, str] = {}
        self._arguments: dict[int, list[str]] = {}
        self._moved: dict[int, int] = {}  # the newest call of an index that the engine gave to several
        self._last = self._top = -1

    def number(self, piece: dict[str, Any]) -> bool:
        """Give a piece of a call its index. Returns whether it had another one, or none.

        Without an index, a piece with an unknown id begins a call. So does one that has a name and no id, unless the
        last call has no name yet. With the index of a call that is whole, a piece with a name and another id begins a
        call: some engines give every call the index 0, and others give each piece of one call a new id and the name.
        """
        told, identity, function = piece.get("index"), piece.get("id"), piece.get("function")
        function = function if type(function) is dict else {}
        name, identity = str(function.get("name") or ""), str(identity) if identity else ""
        if isinstance(told, int):
            index = self._moved.get(told, told)
            if told in self._moved and identity in self._ids:
                index = self._ids[identity]
            elif name and identity and self._first.get(index, identity) != identity and self._is_whole(index, name):
                index = self._moved[told] = self._top + 1
        else:
            begins = bool(identity) or self._last < 0 or (bool(name) and self._last in self._names)
            index = self._ids.get(identity, self._top + 1 if begins else self._last)
        if identity:
            self._ids.setdefault(identity, index)
            self._first.setdefault(index, identity)
        if name:
            self._names.setdefault(index, name)
        if arguments := function.get("arguments"):
            self._arguments.setdefault(index, []).append(str(arguments))
        self._last, self._top = index, max(self._top, index)
        piece["index"] = index
        return not isinstance(told, int) or index != told

    def _is_whole(self, index: int, name: str) -> bool:
        """Whether the arguments of a call are complete, when a piece with this name follows."""
        arguments = "".join(self._arguments.get(index, ()))
        if not arguments:
            return self._names.get(index, name) != name
        try:
            orjson.loads(arguments)
        except orjson.JSONDecodeError:
            return False
        return True
