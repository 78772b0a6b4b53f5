"""Thoughts: tell a model's reasoning from the text behind it, in an answer that an engine sends as the model writes
it."""

from typing import NamedTuple


class Tags(NamedTuple):
    """What a model writes before and behind its reasoning, with the white space there. `opens` is empty if the chat
    template has written it."""

    opens: str
    closes: str

    def around(self, reasoning: str, text: str) -> str:
        """Return the answer as the model has written it: this reasoning, and the text behind it if that has begun."""
        if not text:
            return self.opens + reasoning
        closes = self.closes.lstrip() if reasoning[-1:].isspace() else self.closes
        return self.opens + reasoning + closes + text


class Thoughts:
    """What of an answer that begins within the reasoning is reasoning, and what is text. `tag` ends the reasoning, and
    the white space behind it is dropped, as Ollama does."""

    def __init__(self, tag: str) -> None:
        self._tag = tag
        self._thinks = bool(tag)
        self._begun = not tag  # the text has
        self._held = ""  # what may be the beginning of the tag

    def take(self, piece: str, *, last: bool) -> tuple[str, str]:
        """Return the reasoning and the text in the next piece of the answer. At the `last` one nothing is held back."""
        if self._begun:
            return "", piece
        thought, text = "", self._held + piece
        self._held = ""
        if self._thinks:
            thought, tag, text = text.partition(self._tag)
            if not tag:
                kept = 0 if last else _overlap(thought, self._tag)
                self._held = thought[len(thought) - kept :]
                return thought[: len(thought) - kept], ""
            self._thinks = False
        text = text.lstrip()
        self._begun = bool(text)
        return thought, text


def _overlap(text: str, tag: str) -> int:
    """Return how many characters at the text's end are the beginning of the tag."""
    return next(size for size in range(min(len(text), len(tag) - 1), -1, -1) if text.endswith(tag[:size]))
