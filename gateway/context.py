"""Context: a prompt that its engine would cut in silence is refused instead, with both numbers: its tokens, its limit.

vLLM and llama.cpp refuse by themselves; a number that their words lack is asked for. Ollama drops the oldest messages,
or the middle of the last one, and answers 200. It counts tokens for nobody, but it can be forbidden to cut, in its own
API (`truncate: false`; its OpenAI endpoints don't know that). So a prompt that may not fit is first shown to it there,
with one token to be made; what it reads for that stays in its cache for the real request. A token is a byte at least:
a request of fewer bytes than the context has tokens fits, whatever the tokenizer, and costs nothing.
"""

import asyncio
import time
from collections import defaultdict
from dataclasses import replace

from gateway.errors import ContextExceeded, EngineError, StackError
from gateway.exchange import CONTENT, Kind
from gateway.introspection import ASK, Prompt, Window
from gateway.upstream import Upstream

FRESH = 5.0  # seconds for which an engine's word on a context's size is believed
MARGIN = 512  # tokens that a chat template may add beyond the JSON around texts, which is in a request's size
SPECIAL = 2  # tokens: an embedding model's marks at beginning and end
COUNTED = 16  # a longer request, in bytes for each token of the context, isn't counted just for the number's sake


class Contexts:
    """The windows of all models on all engines, as the engines tell them. One per worker."""

    def __init__(self) -> None:
        self._windows: dict[tuple[str, str], Window] = {}
        self._locks: defaultdict[tuple[str, str], asyncio.Lock] = defaultdict(asyncio.Lock)

    async def check(self, upstream: Upstream, prompt: Prompt) -> None:
        """Make sure that an engine that `cuts` won't cut this prompt. Raises ContextExceeded; and EngineError, when the
        engine can't be asked."""
        window = await self._window(upstream, prompt)
        if window.limit is None or (doubtful := _doubtful(prompt, window)) is None:
            return
        try:
            await ASK[upstream.dialect.name].count(upstream, doubtful)
        except ContextExceeded as exc:
            raise _told(exc, prompt.kind, exc.tokens, exc.limit or window.limit) from None

    async def explained(self, error: StackError, upstream: Upstream, prompt: Prompt) -> StackError:
        """An engine's refusal; if it is for the prompt's length, with both numbers where they can be had."""
        if not isinstance(error, ContextExceeded):
            return error
        tokens, limit = error.tokens, error.limit
        try:
            if limit is None:
                limit = (await self._window(upstream, prompt)).limit
            if tokens is None and limit is not None and prompt.size <= COUNTED * limit:
                tokens = await ASK[upstream.dialect.name].count(upstream, prompt)
        except ContextExceeded as exc:
            tokens = exc.tokens
        except EngineError:
            pass  # then it is told in the engine's own words
        return _told(error, prompt.kind, tokens, limit)

    async def _window(self, upstream: Upstream, prompt: Prompt) -> Window:
        """Asked anew every FRESH seconds; the last word stands while the engine is away. Raises EngineError."""
        key = upstream.name, prompt.model
        async with self._locks[key]:
            known = self._windows.get(key)
            if known is None or time.monotonic() - known.asked_at > FRESH:
                try:
                    known = await ASK[upstream.dialect.name].window(upstream, prompt)
                except EngineError:
                    if known is None:
                        raise
                self._windows[key] = known = replace(known, asked_at=time.monotonic())
        return known


def _doubtful(prompt: Prompt, window: Window) -> Prompt | None:
    """What of a prompt might be longer than the window; None if all of it fits for certain."""
    limit = window.limit or 0
    if prompt.kind != "embedding":
        return prompt if prompt.size + window.own + MARGIN > limit else None
    inputs = prompt.fields["input"]  # each is read by itself, without a template
    texts = [it for it in (inputs if isinstance(inputs, list) else [inputs]) if isinstance(it, str)]
    long = [it for it in texts if len(it.encode()) + SPECIAL > limit]
    return replace(prompt, fields={"input": long}) if long else None


def _told(error: ContextExceeded, kind: Kind, tokens: int | None, limit: int | None) -> ContextExceeded:
    """In OpenAI's words, where it is the prompt that doesn't fit and both numbers are known; else in the engine's."""
    field, message = CONTENT[kind], error.message
    numberless = not any(map(str.isdigit, message))
    if limit is not None and (numberless if tokens is None else tokens > limit):
        amount = f"more than {limit}" if tokens is None else f"{tokens}"
        message = (
            f"This model's maximum context length is {limit} tokens. However, your {field} resulted in {amount} tokens."
            f" Please reduce the length of the {field}."
        )
    return ContextExceeded(message, param=field, tokens=tokens, limit=limit)
