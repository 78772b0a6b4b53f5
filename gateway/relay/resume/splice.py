"""Splice: what of an engine's choice the client has not got yet, when the engine goes on with an answer or makes it
once more."""

from typing import Any

from gateway.errors import EngineError, EngineRefused
from gateway.relay.resume.handover import Handover
from gateway.relay.resume.part import Part

_SPACE = " \t\r\n"


class Splice:
    """One choice's. `sew` each piece of it; then `skips` says whether the engine still makes what the client has."""

    def __init__(self, part: Part, handover: Handover) -> None:
        self.ending: str | None = handover.ends  # the finish_reason, where the engine has not come to one
        self.extra = 0  # pieces that went out together with another one
        self._part = part
        self._handover = handover
        self._again = handover.again
        self._skips = dict(handover.skips)
        self._calls = dict(handover.calls)  # what the engine has not made yet of each, by the engine's index
        self._begun: set[int] = set()  # the calls that the engine has come to
        self._string = False  # the text that is skipped is within one of JSON's strings
        self._escaped = False
        # What would complete a stop sequence that has begun: the engine, which made the rest alone, can't know.
        sent = part.content.text.getvalue() if handover.call is None else ""
        self._rests = [stop[n:] for stop in handover.stops for n in range(1, len(stop)) if sent.endswith(stop[:n])]
        self._held: list[str] = []
        self._held_logprobs: dict[str, list[Any]] = {}
        # The characters before the engine's first one, which does not count those that it was given.
        self._before = 0 if handover.skips else len(sent)
        self._texts = [self._begin_of_checked()]

    @property
    def skips(self) -> bool:
        """Whether something is missing of what the client has."""
        begun = len(self._begun) == len(self._calls)
        return bool(self._skips) or not begun or any(arguments for _, arguments in self._calls.values())

    def sew(self, choice: dict[str, Any]) -> bool:
        """Change a choice of a chunk into what the client lacks of it. Returns whether that is anything.

        Raises EngineRefused if the answer, made anew, is another one, and EngineError if it is not what it has to be.
        """
        choice["index"] = self._part.index
        delta = choice.get("delta")
        said, name = (delta, "content") if type(delta) is dict else (choice, "text")
        said.pop("role", None)
        ends = bool(choice.get("finish_reason"))
        before = len(said.get(name) or "")
        if self.skips:
            self._skip(choice, said)
        text = said.pop(name, None)
        self._dropped = 0
        if self._again and self._handover.again_in in said:
            said[self._handover.again_in] = self._without_again(said[self._handover.again_in] or "")
        elif self._again and text and self._handover.again_in != "content":
            self._again = ""
        new = self._new(text if type(text) is str else "", last=ends)
        self._tell_logprobs(choice, before - len(text or "") + self._dropped)
        if self._handover.checks is not None:
            self._texts.append(new)
        if self._handover.call is not None:
            self._as_arguments(choice, said, new)
        elif new:
            said[name] = new
        elif said is choice:
            said[name] = ""
        if self.ending is not None:
            choice["finish_reason"] = self.ending
        if choice.get("finish_reason") in ("stop", "tool_calls"):
            self._check()
        return bool(choice.get("finish_reason") or new or (said is delta and any(said.values())))

    # -- what comes once more ------------------------------------------------------------------------------------------

    def _skip(self, choice: dict[str, Any], said: dict[str, Any]) -> None:
        """Take off what the client has of an answer made anew."""
        beyond = bool(choice.get("finish_reason"))
        for name in list(said) if said is not choice else ["text"]:
            value = said.get(name)
            if not value:
                continue
            if name == "tool_calls" and type(value) is list:
                said[name] = [it for it in value if type(it) is dict and self._skip_call(it)]
                beyond = beyond or any(it.get("index", 0) not in self._calls for it in said[name])
                continue
            rest = self._behind(name, value)
            beyond = beyond or bool(rest)
            said[name] = rest
        if beyond and self.skips:
            raise _another()

    def _behind(self, name: str, value: Any) -> Any:
        """What of a field's value stands behind what the client has of it."""
        skips = self._skips.get(name, "")
        if not skips:
            # What the client has never seen may come now, if it has all that is behind.
            return value
        if type(value) is not str:
            raise _another()
        if self._handover.way == "nailed" or (self._handover.way == "arguments" and name == "content"):
            left, rest = self._skip_json(skips, value)
        else:
            size = min(len(value), len(skips))
            if value[:size] != skips[:size]:
                raise _another()
            left, rest = skips[size:], value[size:]
        if left:
            self._skips[name] = left
        else:
            del self._skips[name]
        return rest

    def _skip_json(self, skips: str, value: str) -> tuple[str, str]:
        """Compare JSON texts, whatever the white space between their tokens is."""
        at = here = 0
        while at < len(skips):
            char = skips[at]
            if here < len(value) and char == value[here]:
                here += 1
            elif not self._string and char in _SPACE:
                at += 1
                continue
            elif here == len(value):
                break
            elif not self._string and value[here] in _SPACE:
                here += 1
                continue
            else:
                raise _another()
            at += 1
            if self._string and self._escaped:
                self._escaped = False
            elif self._string and char == "\\":
                self._escaped = True
            elif char == '"':
                self._string = not self._string
        return skips[at:], value[here:]

    def _skip_call(self, piece: dict[str, Any]) -> bool:
        """Take off what the client has of a tool call. Returns whether anything is left of the piece."""
        index, function = piece.get("index", 0), piece.get("function")
        if index not in self._calls:
            return True
        name, left = self._calls[index]
        said = function if type(function) is dict else {}
        self._begun.add(index)
        told, arguments = said.pop("name", None), said.get("arguments") or ""
        size = min(len(left), len(arguments)) if type(arguments) is str else 0
        if (told and told != name) or type(arguments) is not str or arguments[:size] != left[:size]:
            raise _another()
        self._calls[index] = name, left[size:]
        piece.clear()  # its id and its type are the first part's
        piece |= {"index": index, "function": {"arguments": arguments[size:]}}
        return size < len(arguments)

    # -- what is new ---------------------------------------------------------------------------------------------------

    def _new(self, text: str, *, last: bool) -> str:
        """What of a piece of text the client has not got, and may get now."""
        if self._again and self._handover.again_in == "content":
            size = len(text)
            text = self._without_again(text)
            self._dropped = size - len(text)
        if not self._rests:
            return text
        pieces = [*self._held, text] if text else self._held
        new = "".join(pieces)
        whole = [rest for rest in self._rests if new.startswith(rest)]
        if whole:
            self.ending = "stop"
            new = min(whole, key=len) if self._handover.keeps_stop else ""
        elif not last and any(rest.startswith(new) for rest in self._rests):
            self._held = pieces
            return ""
        self._rests, self._held = [], []
        self.extra += len(pieces) - 1 if new else 0  # what goes out is counted as one piece
        return new

    def _without_again(self, text: str) -> str:
        """Take off the white space that was not handed over, and has come once more."""
        while self._again and text and self._again[0] == text[0]:
            self._again, text = self._again[1:], text[1:]
        if text:
            self._again = ""
        return text

    def _tell_logprobs(self, choice: dict[str, Any], dropped: int) -> None:
        """Take off the log probabilities of the characters that were dropped, and keep those of a text that waits."""
        told = choice.get("logprobs")
        told = told if type(told) is dict else {}
        if not told and (self._held or not self._held_logprobs):
            return
        lists = {name: it for name, it in told.items() if type(it) is list}
        if "tokens" in lists:  # a completion's lists run side by side
            size = _tokens([{"token": it} for it in lists["tokens"]], dropped)
            lists = {name: it[size:] for name, it in lists.items()}
            if "text_offset" in lists:
                lists["text_offset"] = [it + self._before if type(it) is int else it for it in lists["text_offset"]]
        else:
            lists = {name: it[_tokens(it, dropped) :] for name, it in lists.items()}
        for name, it in self._held_logprobs.items():
            lists[name] = [*it, *lists.get(name, ())]
        self._held_logprobs = lists if self._held else {}
        choice["logprobs"] = told | lists

    def _as_arguments(self, choice: dict[str, Any], said: dict[str, Any], new: str) -> None:
        """Make the text that is a call's arguments the rest of them."""
        said.clear()
        choice.pop("logprobs", None)
        if new:
            said["tool_calls"] = [{"index": self._handover.call, "function": {"arguments": new}}]
        if choice.get("finish_reason") == "stop":
            choice["finish_reason"] = "tool_calls"

    # -- the end -------------------------------------------------------------------------------------------------------

    def _begin_of_checked(self) -> str:
        """What the client has of the text that is checked in the end."""
        if self._handover.checks is None:
            return ""
        if self._handover.call is None:
            return self._part.content.text.getvalue()
        return self._part.content.made[self._handover.call].arguments.getvalue()

    def _check(self) -> None:
        """See that the whole text is what the request prescribes."""
        checks = self._handover.checks
        if checks is not None and (fault := checks.fault("".join(self._texts))):
            raise EngineError(
                f"The continued answer does not have the form that the request demands: {fault}",
                code="engine_broken_stream",
            )


def _tokens(entries: list[Any], characters: int) -> int:
    """How many of these tokens make so many characters."""
    for number, it in enumerate(entries):
        if characters <= 0:
            return number
        characters -= len(it["token"]) if type(it) is dict and type(it.get("token")) is str else 0
    return len(entries)


def _another() -> EngineRefused:
    return EngineRefused("The answer that the engine made anew is another one.", status=400)
