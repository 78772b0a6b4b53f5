"""Resume: an answer outlives its engine. Whether one that broke off can be continued, what is asked for its rest, and
where.

The text so far is handed over as a partial assistant message, in each engine's own way (dialects, `continues`). Where
no text had come yet, the request is made again as it was. `seam` makes one stream of the two.
"""

import asyncio
import time
from dataclasses import dataclass, replace
from typing import Any

from gateway.dialects import Dialect
from gateway.errors import EngineTimeout, EngineUnreachable, StackError
from gateway.exchange import Exchange
from gateway.retry import worthwhile
from gateway.routing import Route, Target, least_busy
from gateway.sse import Tap
from gateway.upstream import Upstream

ATTEMPTS = 3  # requests for a continuation, connections that were refused aside
MAX_STOPS = 4096  # characters of stop sequences, which are looked for at the seam
_LIMITS = ("max_tokens", "max_completion_tokens", "n_predict")
# Of whichever engine: constraints, which would begin anew, and what is told about single tokens or about the prompt.
_NEVER = frozenset(
    {
        "audio",
        "best_of",
        "echo",
        "grammar",
        "guided_choice",
        "guided_grammar",
        "guided_json",
        "guided_regex",
        "json_schema",
        "logprobs",
        "n_probs",
        "prompt_logprobs",
        "return_token_ids",
        "return_tokens",
        "structural_tag",
        "structured_outputs",
        "suffix",
        "use_beam_search",
    }
)


def possible(exchange: Exchange, answer: Tap, error: StackError) -> bool:
    """Whether an answer that this error broke off can be continued rightly. `answer` is what has come of it."""
    if not exchange.resume or exchange.choices != 1 or not answer.plain or answer.finish_reason is not None:
        return False
    if not worthwhile(error, same_engine=False):
        return False
    return not answer.tokens or (_chat if exchange.kind == "chat" else _completion)(exchange.fields)


def _chat(fields: dict[str, Any]) -> bool:
    form, last = fields.get("response_format"), fields["messages"][-1]
    return (
        _plain(fields)
        and (form is None or (isinstance(form, dict) and form.get("type") == "text"))
        and all(fields.get(name) in (None, "auto", "none") for name in ("tool_choice", "function_call"))
        and fields.get("modalities") in (None, ["text"])
        # Without a turn of the assistant's there is none to go on with.
        and (fields.get("add_generation_prompt") is not False or fields.get("continue_final_message") is True)
        and (last["role"] != "assistant" or (isinstance(last.get("content"), str) and not last.get("tool_calls")))
    )


def _completion(fields: dict[str, Any]) -> bool:
    return isinstance(fields["prompt"], str) and _plain(fields)


def _plain(fields: dict[str, Any]) -> bool:
    # By `is`: a completion's `logprobs: 0` asks for some.
    asked = [name for name in _NEVER & fields.keys() if fields[name] is not None and fields[name] is not False]
    return not asked and sum(map(len, _stops(fields))) <= MAX_STOPS


def _stops(fields: dict[str, Any]) -> list[str]:
    stop = fields.get("stop")
    return [it for it in (stop if isinstance(stop, list) else [stop]) if isinstance(it, str)]


@dataclass(frozen=True, slots=True)
class Handover:
    """What an engine that goes on with an answer is given, and asked for."""

    exchange: Exchange
    tokens: int  # of the answer, that it is given
    again: str  # white space that it isn't, and makes once more
    left: bool  # whether the caller's limits leave anything to be made
    stops: list[str]  # the sequences that end the answer
    keeps_stop: bool  # the one that does belongs to it


def hand_over(exchange: Exchange, answer: Tap, first: Dialect, dialect: Dialect) -> Handover:
    """Have an engine of `dialect` go on with an answer that one of `first` began."""
    fields, text = dict(exchange.fields), answer.text.getvalue()
    tokens, again = answer.usage.tokens_out if answer.usage else answer.tokens, ""
    if dialect.trims and exchange.kind == "chat":
        stripped = text.rstrip()
        text, again = stripped, text[len(stripped) :]
        tokens = max(0, tokens - bool(again)) if text else 0  # white space is one token, as a rule
    limits = [name for name in _LIMITS if type(fields.get(name)) is int and fields[name] > 0]
    left = all(fields[name] > tokens for name in limits)
    fields |= {name: fields[name] - tokens for name in limits}
    if type(fields.get("min_tokens")) is int:
        fields["min_tokens"] = max(0, fields["min_tokens"] - tokens)
    if exchange.kind == "completion":
        fields["prompt"] += text
    elif text:
        fields |= {**dialect.continues, "messages": _continued(fields, text, first)}
    keeps_stop = fields.get("include_stop_str_in_output") is True
    return Handover(replace(exchange, fields=fields), tokens, again, left, _stops(fields), keeps_stop)


def _continued(fields: dict[str, Any], text: str, first: Dialect) -> list[Any]:
    *before, last = fields["messages"]
    if last["role"] == "assistant" and (not first.continues or fields.get("continue_final_message") is True):
        return [*before, last | {"content": last["content"] + text}]  # the answer goes on with the caller's own words
    return [*before, last, {"role": "assistant", "content": text}]


class Search:
    """For an engine that goes on with an answer: from the moment it broke off until one does."""

    def __init__(self, error: StackError, route: Route, first: Target, answer: Tap) -> None:
        """`error` broke the answer that `first` began. `answer` is what has come of it."""
        self.error = error
        self.first = first
        self.answer = answer
        across = route.resume.across_models
        self._tiers = [[it for it in tier if across or it.model == first.model] for tier in route.tiers]
        self._until = time.monotonic() + route.resume.wait
        self._attempts = ATTEMPTS
        self._away: set[Upstream] = set()
        self._unfit: set[Upstream] = set()

    def failed(self, upstream: Upstream, error: StackError) -> None:
        """This engine broke the answer off, or did not go on with it."""
        self._away.add(upstream)
        if error is self.error:
            return
        self._attempts -= not isinstance(error, EngineUnreachable)
        if isinstance(error, EngineTimeout) or not worthwhile(error, same_engine=False):
            self._unfit.add(upstream)

    async def target(self) -> Target | None:
        """Who is asked next: another engine at once, else the first that is found well in time. None: nobody."""
        while self._attempts > 0:
            for tier in self._tiers:
                ready = [it for it in tier if it.upstream not in self._away and it.upstream.breaker.allows()]
                if ready:
                    return least_busy(ready)
            back = await self._first_back()
            if back is None:
                break
            self._away.discard(back)
        return None

    async def _first_back(self) -> Upstream | None:
        upstreams = {it.upstream for tier in self._tiers for it in tier} - self._unfit
        if not upstreams:
            return None
        waits = {asyncio.create_task(it.back()): it for it in upstreams}
        try:
            left = max(0.0, self._until - time.monotonic())
            done, _ = await asyncio.wait(waits, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
        return waits[done.pop()] if done else None
