"""Context window: refuse a prompt that its engine would silently cut, and name both numbers: its tokens and the limit.

vLLM and llama.cpp refuse such prompts by themselves. If their refusal lacks a number, the engine is asked for it.
Ollama drops the oldest messages, or the middle of the last one, and answers 200. It does not count tokens, but its own
API can forbid cutting (`truncate: false`, which its OpenAI endpoints do not have). A prompt that might not fit is
therefore first sent there for an answer of one token. What Ollama reads for that stays in its cache for the real
request. A token has at least one byte. A request with fewer bytes than the context has tokens therefore fits with any
tokenizer, and is not checked.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

from gateway.dialects.asking import Prompt, Window, uncounted
from gateway.endpoints import ENDPOINTS, Kind
from gateway.errors import ContextExceeded, EngineError, StackError
from gateway.exchange import Exchange
from gateway.upstream import parameters
from gateway.upstream.client import Upstream

FRESH = 5.0  # seconds for which an engine's report of a context window is used
MARGIN = 512  # tokens that a chat template may add; the size of a request covers only its JSON
SPECIAL = 2  # tokens that an embedding model adds at the beginning and the end
COUNT_TIMEOUT = 5.0  # seconds for a count of tokens that a client asked for
# Bytes of a request for each token of the context; a longer request is not counted only to report the number
COUNTED = 16

_NO_ANSWER = "max_tokens must be at least 1, got 0"  # vLLM's message for a prompt that is as long as the context


class Contexts:
    """Remember the context windows that the engines report. One per worker."""

    def __init__(self) -> None:
        self._windows: dict[tuple[str, str], Window] = {}
        self._locks: defaultdict[tuple[str, str], asyncio.Lock] = defaultdict(asyncio.Lock)

    async def check(self, upstream: Upstream, prompt: Prompt, reads: Callable[[], None]) -> None:
        """Check that an engine that `cuts` will not cut this prompt. `reads` is called before the engine reads it.
        Raises ContextExceeded if it would be cut, and EngineError if the engine cannot be asked."""
        window = await self._window(upstream, prompt)
        if window.limit is None and not window.unloaded:
            return
        if (doubtful := _doubtful(prompt, window)) is None:
            return
        reads()
        try:
            await _count(upstream, doubtful)
        except ContextExceeded as exc:
            raise _told(exc, prompt.kind, exc.tokens, exc.limit or window.limit) from None

    async def counted(self, upstream: Upstream, exchange: Exchange, model: str) -> int | None:
        """Count the tokens of a prompt that is not to be answered. None if the engine cannot count it within
        COUNT_TIMEOUT seconds, would have to work through it, or would count far more than its model can read."""
        dialect = upstream.dialect
        if dialect.counts_by_reading:
            return None
        fields = parameters.read(dialect.name, exchange.kind, exchange.fields).fields
        fields = {**fields, **(dialect.continues if exchange.prefilled else {})}
        prompt = Prompt(exchange.kind, model, fields, len(exchange.encode(model, fields)))
        try:
            async with asyncio.timeout(COUNT_TIMEOUT):
                limit = (await self._window(upstream, prompt)).limit
                if limit is None or prompt.size > COUNTED * limit:
                    return None
                return await _count(upstream, prompt)
        except ContextExceeded as exc:
            return exc.tokens
        except (EngineError, TimeoutError):
            return None

    async def limit(self, upstream: Upstream, prompt: Prompt) -> int | None:
        """Return how many tokens a model can read; None if it is not known."""
        try:
            return (await self._window(upstream, prompt)).limit
        except EngineError:
            return None

    async def explained(self, error: StackError, upstream: Upstream, prompt: Prompt) -> StackError:
        """Return an engine's refusal. If it is about the length of the prompt, add both numbers as far as they can be
        had."""
        if not isinstance(error, ContextExceeded):
            return error
        tokens, limit = error.tokens, error.limit
        try:
            if limit is None:
                limit = (await self._window(upstream, prompt)).limit
            if tokens is None and limit is not None and prompt.size <= COUNTED * limit:
                tokens = await _count(upstream, prompt)
        except ContextExceeded as exc:
            tokens = exc.tokens
        except EngineError:
            pass  # the refusal then keeps the engine's own words
        return _told(error, prompt.kind, tokens, limit)

    async def _window(self, upstream: Upstream, prompt: Prompt) -> Window:
        """Return the window, which is asked for again after FRESH seconds. The last known one is used while the engine
        is unreachable. Raises EngineError."""
        key = upstream.name, prompt.model
        async with self._locks[key]:
            known = self._windows.get(key)
            if known is None or time.monotonic() - known.asked_at > FRESH:
                try:
                    known = await upstream.dialect.window(upstream, prompt)
                except EngineError:
                    if known is None:
                        raise
                self._windows[key] = known = replace(known, asked_at=time.monotonic())
        return known


async def _count(upstream: Upstream, prompt: Prompt) -> int | None:
    ways = upstream.dialect.endpoints.get(prompt.kind)
    return await (ways.count if ways else uncounted)(upstream, prompt)


def _doubtful(prompt: Prompt, window: Window) -> Prompt | None:
    """Return the part of a prompt that might be longer than the window; None if all of it fits for certain."""
    limit = window.limit or 0
    if prompt.endpoint.counted != "inputs":
        return prompt if prompt.size + window.own + MARGIN > limit else None
    inputs = prompt.content  # each input is read by itself, without a template
    texts = [it for it in (inputs if isinstance(inputs, list) else [inputs]) if isinstance(it, str)]
    long = [it for it in texts if len(it.encode()) + SPECIAL > limit]
    return replace(prompt, fields={prompt.endpoint.content: long}) if long else None


def _told(error: ContextExceeded, kind: Kind, tokens: int | None, limit: int | None) -> ContextExceeded:
    """Return the error in OpenAI's words if the prompt does not fit and both numbers are known, otherwise in the
    engine's."""
    field, message = ENDPOINTS[kind].content, error.message
    # vLLM reports characters and not tokens if a prompt is many times too long. A prompt of exactly the window's length
    # leaves no token for an answer.
    useless = not any(map(str.isdigit, message)) or " characters " in message or message.startswith(_NO_ANSWER)
    if limit is not None and (useless if tokens is None else tokens >= limit):
        least = "at least" if message.startswith(_NO_ANSWER) else "more than"
        amount = f"{least} {limit}" if tokens is None else f"{tokens}"
        message = (
            f"This model's maximum context length is {limit} tokens. However, your {field} resulted in {amount} tokens."
            f" Please reduce the length of the {field}."
        )
    return ContextExceeded(message, param=field, tokens=tokens, limit=limit)
