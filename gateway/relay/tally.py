"""Tally: what an engine tells of an answer's tokens, added up over all of its choices.

Engines differ in where they tell it. vLLM tells each choice's tokens in each chunk, and all together at the end.
llama.cpp tells each choice's at that choice's end, and in a blocking answer the first one's only. Ollama puts zeros
into each chunk of a completion.
"""

from typing import Any

import orjson

from gateway.exchange import Exchange, Usage


class Tally:
    """The tokens of an answer with so many `choices`, to so many `prompts`. `each`: the engine has a last word on every
    choice, and none on all."""

    def __init__(self, choices: int, prompts: int, *, each: bool) -> None:
        self._choices = choices
        self._prompts = prompts
        self.each = each and choices > 1
        self._last: Any = None  # told of all choices
        self._parts: dict[int, Usage] = {}  # told of one choice, by its index

    def tell(self, choices: list[Any], usage: Any) -> None:
        """Take what a chunk with these choices says of usage, or its JSON. It is read only when somebody asks."""
        if self._choices == 1 or not (choices or self.each):
            self._last = usage
        elif told := _read(usage):
            index = choices[0].get("index") if choices and isinstance(choices[0], dict) else None
            # A chunk without choices doesn't say whose tokens it tells.
            self._parts[index if isinstance(index, int) else -1 - len(self._parts)] = told

    @property
    def usage(self) -> Usage | None:
        """Of all choices; None while an engine has not told every one's. A prompt is counted once, however many choices
        it has."""
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
        """The tokens of those choices that were told so far."""
        return sum(part.tokens_out for part in self._parts.values())


def counting(exchange: Exchange) -> Exchange:
    """A blocking request whose answer lets `count` see each choice's tokens: the engine tells the first one's only."""
    if any(exchange.fields.get(name) not in (None, False) for name in ("logprobs", "n_probs")):
        return exchange
    return exchange.having(exchange.fields | {"n_probs": 1})


def count(answer: dict[str, Any], exchange: Exchange, prompts: int) -> None:
    """Put the usage of all choices into the answer to what `counting` made of this request, in place of the first
    one's, and take out what was asked for only to count. A stop sequence's tokens are told of the first choice alone.
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
