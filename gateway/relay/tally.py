"""Tally: add up the tokens that an engine reports for the choices of an answer.

Engines report tokens at different places. vLLM reports each choice's tokens in each chunk, and the sum at the end.
llama.cpp reports each choice's tokens at the end of that choice, and in a blocking answer only those of the first
choice. Ollama puts zeros into each chunk of a completion.
"""

from typing import Any

import orjson

from gateway.exchange import Exchange, Usage


class Tally:
    """The tokens of an answer with this number of `choices`, to this number of `prompts`. `each`: the engine reports
    the tokens of every choice at that choice's end, and no sum."""

    def __init__(self, choices: int, prompts: int, *, each: bool) -> None:
        self._choices = choices
        self._prompts = prompts
        self.each = each and choices > 1
        self._last: Any = None  # told of all choices
        self._parts: dict[int, Usage] = {}  # told of one choice, by its index

    def tell(self, choices: list[Any], usage: Any) -> None:
        """Take the `usage` of a chunk with these choices, as an object or as JSON. It is parsed only when it is
        needed."""
        if self._choices == 1 or not (choices or self.each):
            self._last = usage
        elif told := _read(usage):
            index = choices[0].get("index") if choices and isinstance(choices[0], dict) else None
            # A chunk without choices doesn't say whose tokens it tells.
            self._parts[index if isinstance(index, int) else -1 - len(self._parts)] = told

    @property
    def usage(self) -> Usage | None:
        """The usage of all choices; None until the engine has reported every choice. A prompt counts once, however many
        choices it has."""
        if told := _read(self._last):
            return told
        if not self._parts or len(self._parts) < self._choices:
            return None
        parts = self._parts.values()
        read, cached = (
            sum(it) * self._prompts // self._choices
            for it in ([part.tokens_in for part in parts], [part.cached for part in parts])
        )
        return Usage(read, self.made, cached)

    @property
    def made(self) -> int:
        """The tokens of the choices that the engine has reported so far."""
        return sum(part.tokens_out for part in self._parts.values())


def counting(exchange: Exchange) -> Exchange:
    """Return the blocking request, changed so that `count` can count each choice's tokens in the answer.

    The engine itself reports only the first choice's tokens, so the request asks for log probabilities."""
    if any(exchange.fields.get(name) not in (None, False) for name in ("logprobs", "n_probs")):
        return exchange
    return exchange.having(exchange.fields | {"n_probs": 1})


def count(answer: dict[str, Any], exchange: Exchange, prompts: int) -> None:
    """Replace the first choice's usage in a blocking answer by that of all choices.

    `exchange` is the request before `counting`. Log probabilities that only `counting` asked for are removed. Of the
    choices after the first, the tokens of a stop sequence are not counted.
    """
    told, choices = _read(answer.get("usage")), answer.get("choices")
    if told is None or not isinstance(choices, list) or not all(isinstance(it, dict) for it in choices):
        return
    made = [told.tokens_out] + [_tokens(it) for it in choices[1:]]
    each = max(1, len(choices) // max(1, prompts))
    # Other prompts may be longer or shorter; only the first one's tokens are told.
    answer["usage"] = Usage(told.tokens_in * max(1, len(choices) // each), sum(made), told.cached).as_object()
    answer.pop("timings", None)  # of the first
    if counting(exchange) is not exchange:
        for choice in choices:
            if "message" in choice:
                choice.pop("logprobs", None)
            else:
                choice["logprobs"] = None


def _tokens(choice: dict[str, Any]) -> int:
    logprobs = choice.get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    return max(1, len(content)) if isinstance(content, list) else 1


def _read(usage: Any) -> Usage | None:
    """What a usage object says; None where it says nothing, as Ollama's of zeros."""
    if isinstance(usage, bytes):
        try:
            usage = orjson.loads(usage)
        except orjson.JSONDecodeError:
            return None
    told = Usage.of(usage)
    return told if told and (told.tokens_in or told.tokens_out) else None
