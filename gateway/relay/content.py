"""Content: what has come of an answer, learned from its chunks."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

from gateway.relay.shape import settle
from gateway.relay.tool_calls import ToolCalls

_NOT_MADE = ("id", "type")  # fields of a tool call that no model makes
_REASONING = ("reasoning", "reasoning_content")
MAX_REASON = 64  # characters of the finish_reasons that are recorded; the engine chooses them
MAX_TEXT = 1024 * 1024  # characters of an answer that are kept, so that another engine can continue it


@dataclass(slots=True)
class Call:
    """A tool call, as far as it has come."""

    name: str = ""
    arguments: StringIO = field(default_factory=StringIO)


class Content:
    """The content of an answer of one choice, or of several whose texts nobody needs apart; `add` takes each choice of
    each chunk.

    `tokens` counts events with content, which is an estimate of tokens. `text` is all of the answer as long as it is
    `plain`: text and nothing else, and not too long. `text`, `reasoning` and `made` are, as long as it is `kept`;
    `reasoning` by the names that the engine has for it, and `made` the tool calls by their indices.
    """

    def __init__(self, choices: int = 1) -> None:
        self.any = False  # a token of any kind has come
        self.tokens = 0
        self.plain = True
        self.kept = True
        self.reasoning: dict[str, StringIO] = {}
        self.made: dict[int, Call] = {}
        self.text = StringIO()  # much smaller than a list of its pieces
        self.calls = ToolCalls()
        self._room = MAX_TEXT
        self._beside = 0  # characters that are not text
        self._choices = choices
        self._open: set[int] = set()  # choices that have begun and not ended
        self._ended: dict[int, str] = {}  # their finish_reasons
        self._roles: set[int] = set()  # choices whose role has come

    def part(self, index: int) -> "Content":  # noqa: ARG002  there is one
        """Return what has come of the choice with this index."""
        return self

    def expect(self, choices: int) -> None:
        """Expect this number of choices from now on."""
        self._choices = choices

    @property
    def finished(self) -> frozenset[int]:
        """The choices that have their finish_reason."""
        return frozenset(self._ended)

    @property
    def indices(self) -> frozenset[int]:
        """The choices that have begun."""
        return frozenset(self._open | self._ended.keys())

    def reopen(self, index: int | None) -> None:
        """Forget that this choice has ended (None: every choice), because it is made again."""
        for it in list(self._ended) if index is None else [index]:
            self._ended.pop(it, None)
            self._open.discard(it)
        self.calls.forget(index)

    @property
    def finish_reason(self) -> str | None:
        """The finish_reasons of the choices, each once, as they are recorded: see `reasons`."""
        return reasons(self._ended[index] for index in sorted(self._ended))

    @property
    def complete(self) -> bool:
        """Whether every expected choice has begun and has its finish_reason, with or without the stream's
        last event."""
        return len(self._ended) >= self._choices and not self._open

    @property
    def ended(self) -> bool:
        """Whether every choice that has begun has its finish_reason, and one has."""
        return bool(self._ended) and not self._open

    @property
    def characters(self) -> int:
        """The number of characters of all texts, including tool calls and reasoning."""
        return self.text.tell() + self._beside

    def message(self) -> dict[str, Any]:
        """Return the text and the tool calls as a message, as far as they are kept."""
        calls = [{"name": it.name, "arguments": it.arguments.getvalue()} for it in self.made.values()]
        return {"content": self.text.getvalue(), "tool_calls": [{"function": it} for it in calls]}

    def add(self, choice: dict[str, Any]) -> bool:
        """Learn from a chunk's choice. Returns whether the choice was changed, because it was settled or lacked an
        index, or because its role or its finish_reason was repeated or empty. Raises EngineError for a malformed choice
        that was not settled before."""
        mended, other = False, False
        index, delta = choice.get("index"), choice.get("delta")
        made = delta.get("content") if type(delta) is dict else choice.get("text")
        # A usual choice is not settled here, because that takes half as long as all the rest
        if type(index) is not int or (type(made) is not str and (made is not None or type(delta) is not dict)):
            mended = settle(choice)
            index = choice["index"]
        if type(delta) is dict:
            if "role" in delta:
                if index in self._roles or not delta["role"]:
                    del delta["role"]
                    mended = True
                else:
                    self._roles.add(index)
            # Anything other than the role: a tool call, reasoning, a refusal.
            if len(delta) > 1 or not made:
                if delta.get("tool_calls"):
                    settled = settle(choice)
                    mended = self.calls.number(choice) or settled or mended
                for name, value in delta.items():
                    if value and name != "role" and name != "content":  # noqa: PLR1714  twice as fast
                        self.plain = False
                        other = True
                        self._keep(name, value)
        if made:
            self.any = True
            self.tokens += 1
            if self._room > 0:
                self._room -= self.text.write(made)
            else:
                self.plain = self.kept = False
        elif other:
            self.any = True
            self.tokens += 1
        if choice.get("finish_reason") is not None and self._ends(choice, index):
            mended = True
        if index not in self._open and index not in self._ended:
            self._open.add(index)
        return mended

    def _ends(self, choice: dict[str, Any], index: int) -> bool:
        """Note that a choice ends. Returns whether its finish_reason was removed: a choice has one, and an empty one is
        none."""
        reason = choice["finish_reason"]
        if not reason or index in self._ended:
            choice["finish_reason"] = None
            return True
        if type(reason) is str:
            self._open.discard(index)
            self._ended[index] = reason[:MAX_REASON]
        return False

    def _keep(self, name: str, value: object) -> None:
        """Keep what came beside text, if it is reasoning or a tool call."""
        if type(value) is not str:
            self._beside += _characters(value)
            self.kept = self.kept and name == "tool_calls" and type(value) is list and all(map(self._keep_call, value))
            return
        self._beside += len(value)
        if name not in _REASONING or self._room <= 0:
            self.kept = False
            return
        if name not in self.reasoning:
            self.reasoning[name] = StringIO()
        self._room -= self.reasoning[name].write(value)

    def _keep_call(self, piece: object) -> bool:
        """Keep a piece of a tool call. Returns whether that is possible. A null or an empty field is as good as a
        missing one."""
        function = (piece.get("function") or {}) if type(piece) is dict else None
        if type(piece) is not dict or type(function) is not dict or self._room <= 0:
            return False
        call = self.made.setdefault(piece["index"], Call())
        name, arguments = function.get("name"), function.get("arguments")
        call.name = call.name or (name if type(name) is str else "")
        if type(arguments) is str:
            self._room -= call.arguments.write(arguments)
        return piece.get("type") in (None, "", "function")


class Contents(Content):
    """The content of an answer of several choices, each kept for itself."""

    def __init__(self, choices: int) -> None:
        super().__init__(choices)
        self._parts: dict[int, Content] = {}

    def add(self, choice: dict[str, Any]) -> bool:
        """See Content.add."""
        mended = super().add(choice)
        self.part(choice["index"]).add(choice)
        return mended

    def part(self, index: int) -> Content:
        """See Content.part."""
        if index not in self._parts:
            self._parts[index] = Content()
        return self._parts[index]

    def reopen(self, index: int | None) -> None:
        """See Content.reopen."""
        super().reopen(index)
        for it in list(self._parts) if index is None else [index]:
            self._parts.pop(it, None)


def content_of(choices: int) -> Content:
    """Return the content of an answer of so many choices, of which nothing has come yet."""
    return Content() if choices == 1 else Contents(choices)


def reasons(told: Iterable[Any]) -> str | None:
    """Return the finish_reasons of an answer's choices as one text of at most MAX_REASON characters, each once."""
    return ",".join(dict.fromkeys(it[:MAX_REASON] for it in told if isinstance(it, str)))[:MAX_REASON] or None


def _characters(value: object) -> int:
    """Return the number of characters in the strings of a part of a delta."""
    if type(value) is str:
        return len(value)
    if type(value) is dict:
        return sum(_characters(it) for name, it in value.items() if name not in _NOT_MADE)
    return sum(map(_characters, value)) if type(value) is list else 0
