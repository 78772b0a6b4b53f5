"""Guard: pass on only those tool calls of an answer that meet the demand.

The guard sees each chunk before its client does. It turns JSON into calls if the engine was told to write JSON, drops
calls that were not wanted, and checks names and arguments. No part of a call passes that is known to be wrong.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from gateway import caller_schemas
from gateway.errors import EngineDisobeyed
from gateway.forced_tools.demand import Tool
from gateway.forced_tools.reading import SPACE, CallReader, Extent, MalformedError

_MISSING = "The model did not make the tool call that the request demands: {} Try again, or use a larger model."
_WRONG = "The model's tool calls do not obey the request: {} Try again, or use a larger model."
_NOT_JSON = "The arguments of the call are not valid JSON."
_CUT = ("length", "content_filter")  # the caller's limit or the engine's filter has cut the answer


@dataclass(frozen=True, slots=True)
class Terms:
    """The terms of one answer. `reads`: its text is JSON that stands for calls; with `only`, it is the arguments of the
    function of that name. `names`: the functions that may be called, None for any. `most`: the number of calls that
    pass, None for any. `must`: an answer without a call is wrong. `checked`: the functions whose arguments are checked,
    by their names."""

    reads: bool
    only: str | None
    names: frozenset[str] | None
    most: int | None
    must: bool
    checked: Mapping[str, Tool]


class Guard:
    """Guard one answer. Call `edit` with each chunk; then `failure` says what is wrong, if anything. `sent`: the client
    of a stream has a part of a call, so another call cannot replace it."""

    def __init__(self, terms: Terms) -> None:
        self.failure = ""
        self.wrong: str | None = None  # the name of the function that was called with wrong arguments
        self.sent = False
        self._terms = terms
        self._choices: dict[Any, _Choice] = {}
        self._budget = caller_schemas.Budget()  # one for all calls, because a blocking answer has them all at once

    def edit(self, chunk: dict[str, Any]) -> None:
        """Replace a chunk's choices by the parts of them that pass."""
        for choice in chunk.get("choices") or ():
            if isinstance(choice, dict) and isinstance(choice.get("delta"), dict):
                index = choice.get("index")
                state = self._choices.setdefault(
                    index if isinstance(index, int) else 0, _Choice(self._terms, self._budget)
                )
                try:
                    state.edit(choice)
                except _WrongError as exc:
                    choice["delta"] = {}
                    self.failure, self.wrong = self.failure or str(exc), exc.name
                self.sent = self.sent or bool(choice["delta"].get("tool_calls"))

    def error(self) -> EngineDisobeyed:
        """Return the error for the failure."""
        return EngineDisobeyed((_MISSING if self._terms.must else _WRONG).format(self.failure))


class _WrongError(Exception):
    """Say that the answer does not meet the demand. The message is a sentence."""

    def __init__(self, message: str, name: str | None = None) -> None:
        super().__init__(message)
        self.name = name


class _Call:
    """One call that may pass."""

    def __init__(self, index: int, name: str) -> None:
        self.index = index
        self.name = name
        self.parts: list[str] = []
        self.closed = False
        self.extent = Extent()


class _Choice:
    """The calls of one choice."""

    def __init__(self, terms: Terms, budget: caller_schemas.Budget) -> None:
        self._terms = terms
        self._budget = budget
        self._reader = CallReader(terms.only) if terms.reads else None
        self._calls: dict[int, _Call] = {}  # by the engine's own indices
        self._role: str | None = None  # sent with the first part that passes
        self._out: dict[int, dict[str, Any]] = {}  # pieces of the current chunk
        # The index of the call that is read from JSON; negative, so that it is none of the engine's own
        self._read = -1
        self._said = self._dropped = False

    def edit(self, choice: dict[str, Any]) -> None:
        delta, self._out = choice["delta"], {}
        pieces, text = delta.pop("tool_calls", None), delta.get("content")
        self._said = self._said or bool(text)
        if self._terms.must or self._reader is not None:
            # A client that has received nothing yet can get another engine's answer.
            self._role = delta.pop("role", None) or self._role
        if self._reader is not None:
            delta.pop("content", None)
            if "logprobs" in choice:
                choice["logprobs"] = None  # they describe the JSON
            if isinstance(text, str) and text:
                self._from_json(self._reader, text)
        for piece in pieces if isinstance(pieces, list) else ():
            if isinstance(piece, dict):
                self._native(piece)
        if reason := choice.get("finish_reason"):
            choice["finish_reason"] = self._ends(reason)
        if self._out:
            delta["tool_calls"] = list(self._out.values())
        if self._role and (choice.get("finish_reason") or any(delta.values())):
            choice["delta"], self._role = {"role": self._role, **delta}, None

    # -- calls in JSON -------------------------------------------------------------------------------------------------

    def _from_json(self, reader: CallReader, text: str) -> None:
        try:
            for what, told in reader.feed(text):
                if what == "begin":
                    self._read -= 1
                    self._begin(self._read, told, None)
                elif what == "more":
                    self._more(self._read, told)
                else:
                    self._close(self._read)
        except MalformedError as exc:
            raise _WrongError(str(exc)) from None

    # -- the engine's own calls ----------------------------------------------------------------------------------------

    def _native(self, piece: dict[str, Any]) -> None:
        key, function = piece.get("index"), piece.get("function")
        if not isinstance(key, int) or not isinstance(function, dict):
            return
        name, text = function.get("name"), function.get("arguments")
        if isinstance(name, str) and name and key not in self._calls:
            self._begin(key, name, piece.get("id"))
        call = self._calls.get(key)
        if call is None or not isinstance(text, str) or not text:
            return
        if call.closed and call.name in self._terms.checked and text.strip(SPACE):
            raise _WrongError(_NOT_JSON, call.name)  # more than one value
        ends = not call.closed and any(call.extent.take(char) == "last" for char in text)
        self._more(key, text)
        if ends:
            self._close(key)

    # -- what passes ---------------------------------------------------------------------------------------------------

    def _begin(self, key: int, name: str, identity: Any) -> None:
        terms = self._terms
        if terms.most is not None and len(self._calls) >= terms.most:
            self._dropped = True
            return
        if terms.names is not None and name not in terms.names:
            raise _WrongError(f"The answer calls a function that may not be called: {name[:64]!r}.")
        call = self._calls[key] = _Call(len(self._calls), name)
        identity = identity if isinstance(identity, str) and identity else f"call_{secrets.token_hex(12)}"
        function = {"name": name, "arguments": ""}
        self._out[call.index] = {"index": call.index, "id": identity, "type": "function", "function": function}

    def _more(self, key: int, text: str) -> None:
        if (call := self._calls.get(key)) is None:
            return
        call.parts.append(text)
        piece = self._out.setdefault(call.index, {"index": call.index, "function": {"arguments": ""}})
        piece["function"]["arguments"] += text

    def _close(self, key: int) -> None:
        """Check the arguments of a complete call. Raises _WrongError."""
        if (call := self._calls.get(key)) is None or call.closed:
            return
        call.closed = True
        if (tool := self._terms.checked.get(call.name)) is None:
            return
        try:
            arguments = orjson.loads("".join(call.parts))
        except orjson.JSONDecodeError:
            raise _WrongError(_NOT_JSON, call.name) from None
        if not self._budget.allows(tool.parameters, arguments):
            raise _WrongError(
                "The arguments of the calls need too many steps to be checked against the schema.", call.name
            )
        for error in tool.validator.iter_errors(arguments):
            where = "".join(f"[{it!r}]" for it in error.instance_path)
            raise _WrongError(
                f"The arguments{where} of the call do not fit the schema: {error.message[:160]}.", call.name
            )

    # -- the end -------------------------------------------------------------------------------------------------------

    def _ends(self, reason: Any) -> Any:
        """Check that the demand is met. Returns the finish_reason of what passed. Raises _WrongError."""
        reader, cut = self._reader, reason in _CUT
        for key, call in self._calls.items():
            if not call.closed and not "".join(call.parts).strip() and not cut:
                self._more(key, "{}")  # some engines write an empty text if there are no arguments
            if not call.closed and not cut:
                self._close(key)
        if reader is not None and not self._calls and reader.wrote and not (cut and reader.begun):
            raise _WrongError("The answer is text, and not the JSON of a tool call.")
        if reader is not None and reader.begun and not reader.whole and not cut:
            raise _WrongError("The JSON of the answer is not complete.")
        if self._terms.must and not self._calls and (not cut or (reader is None and self._said)):
            raise _WrongError("The answer has no call.")
        if self._calls:
            whole = reader is None or reader.whole or not reader.wrote
            return ("tool_calls" if whole or not cut else reason) if self._terms.reads else reason
        if self._dropped and not self._said:
            raise _WrongError("The answer has only tool calls, but 'tool_choice' is none.")
        return "stop" if reason == "tool_calls" else reason
