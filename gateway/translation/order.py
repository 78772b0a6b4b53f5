"""Order: keep the pieces of each tool call together, for APIs whose items come one after the other.

In a chat stream the pieces of several calls may alternate. A client of another API runs a call when it is told to be
done, so nothing else begins while the arguments of a call are no whole JSON object. What comes meanwhile waits for the
end of the stream, because a call that seems to lack a part may just be wrong.
"""

from collections.abc import Iterator
from typing import Any

import orjson

from gateway.errors import EngineError

MOST_HELD = 4 * 1024 * 1024  # bytes of JSON, some 60,000 pieces of one token each
_TEXTS = ("content", "reasoning_content", "reasoning", "refusal")


class Order:
    """The order of one answer. Pieces of a wrong type are let through, and are left to the writer.

    `open` is the index of the call that may lack a part of its arguments, or None.
    """

    def __init__(self) -> None:
        self.open: int | None = None
        self._arguments: list[str] = []  # of the open call
        self._held: dict[int | None, list[bytes]] = {}  # deltas by call, None for text, with their log probabilities
        self._size = 0

    def take(self, delta: dict[str, Any], logprobs: Any = None) -> dict[str, Any]:
        """Return what can be written now of a delta. Raises EngineError if too much would have to wait."""
        texts = {name: value for name, value in delta.items() if name != "tool_calls"}
        # White space begins no item
        if any(str(texts.get(it) or "").strip() for it in _TEXTS) and self._lacks():
            self._hold(None, texts, logprobs)
            texts = {}
        calls = delta.get("tool_calls")
        if not calls or type(calls) is not list:
            return texts if calls is None else texts | {"tool_calls": calls}
        return texts | {"tool_calls": [it for it in calls if self._goes_on(it)]}

    def rest(self) -> Iterator[tuple[dict[str, Any], Any]]:
        """Yield the deltas that waited, one item after the other, each with its log probabilities."""
        held, self._held, self.open = self._held, {}, None
        for deltas in held.values():
            for it in deltas:
                delta, logprobs = orjson.loads(it)
                yield delta, logprobs

    def _goes_on(self, piece: Any) -> bool:
        """Return whether a piece of a call can be written now. Otherwise it is held."""
        index = piece.get("index") if type(piece) is dict else None
        if type(index) is not int:
            return True
        if index != self.open:
            if self._lacks():
                self._hold(index, {"tool_calls": [piece]})
                return False
            self.open, self._arguments = index, []
        function = piece.get("function")
        self._arguments.append(str(function.get("arguments") or "") if type(function) is dict else "")
        return True

    def _lacks(self) -> bool:
        """Return whether a call is open whose arguments are no whole JSON object."""
        if self.open is None or self._held:
            return self.open is not None
        try:
            whole = type(orjson.loads("".join(self._arguments))) is dict
        except orjson.JSONDecodeError:
            return True
        if whole:
            self.open = None
        return not whole

    def _hold(self, call: int | None, delta: dict[str, Any], logprobs: Any = None) -> None:
        try:
            held = orjson.dumps((delta, logprobs))
        except TypeError:  # it is nested too deeply
            raise EngineError("The engine's answer cannot be read.") from None
        self._size += len(held)
        if self._size > MOST_HELD:
            raise EngineError("The engine began too much before it had ended a tool call.")
        self._held.setdefault(call, []).append(held)
