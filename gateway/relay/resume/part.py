"""Part: one choice of an answer that broke off, and what its request allows to be done about it."""

import zlib
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any

from gateway.dialects.dialect import Dialect
from gateway.exchange import Exchange
from gateway.grammars.constraint import FIELDS
from gateway.relay.content import Content

MAX_STOPS = 4096  # characters of stop sequences, which are looked for at the seam
# What is told about the prompt, or cannot be had of a part of an answer.
_NEVER = frozenset(
    ["audio", "best_of", "echo", "prompt_logprobs", "return_token_ids", "return_tokens", "suffix", "use_beam_search"]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What has come of one choice of an answer. `exchange` asks for this choice alone. `content` is what its engine
    made, and `told` the tokens that the engine had counted, if it had."""

    exchange: Exchange
    content: Content
    tokens: int
    index: int = 0
    resumed: bool = True  # False: it comes after another one, of the same engine


def seeded(exchange: Exchange) -> Exchange:
    """Return a request that gives the same answer each time, as far as its engine keeps to a seed: with a seed of ours
    if it samples and names none."""
    fields = exchange.fields
    if not exchange.resume or fields.get("temperature") == 0 or fields.get("seed") is not None:
        return exchange
    return exchange.having(fields | {"seed": zlib.crc32(exchange.request_id.encode()) >> 1})


def alone(exchange: Exchange, index: int) -> Exchange:
    """Return a request for the choice with this index alone, of several choices or prompts."""
    if exchange.choices == 1:
        return exchange
    kind, fields = exchange.endpoint, {name: it for name, it in exchange.fields.items() if name != "n"}
    each = exchange.choices // max(1, exchange.prompts)
    if exchange.prompts > 1:
        fields[kind.content] = fields[kind.content][index // each]
    if index % each and type(seed := fields.get("seed")) is int:
        fields["seed"] = seed + index % each  # the same seed would make the same choice
    return replace(exchange, fields=fields, choices=1, size=1 if exchange.prompts > 1 else exchange.size)


def continuable(part: Part) -> bool:
    """Whether an engine can go on with the text so far."""
    exchange = part.exchange
    if not part.content.plain or is_constrained(exchange):
        return False
    fields = exchange.fields
    return _chat(fields) if exchange.endpoint.chats else _completion(fields, exchange.endpoint.content)


def thinkable(part: Part) -> bool:
    """Whether an engine can go on with the reasoning so far, and the text behind it."""
    content, fields = part.content, part.exchange.fields
    if len(content.reasoning) != 1 or content.made or not content.kept or not part.exchange.endpoint.chats:
        return False
    return _chat(fields) and fields["messages"][-1]["role"] != "assistant"


def repeatable(exchange: Exchange, dialect: Dialect) -> bool:
    """Whether an engine of this dialect, asked once more, may give the same answer."""
    fields = exchange.fields
    told = fields.get("modalities") not in (None, ["text"]) or _asked(fields, _NEVER)
    return not told and (dialect.seeds or fields.get("temperature") == 0 or fields.get("seed") is not None)


def is_constrained(exchange: Exchange) -> bool:
    """Whether the form of the answer's text is prescribed."""
    return _asked(exchange.fields, FIELDS) and not _is_text(exchange.fields)


def _is_text(fields: dict[str, Any]) -> bool:
    form = fields.get("response_format")
    return isinstance(form, dict) and form.get("type") == "text" and not _asked(fields, FIELDS - {"response_format"})


def _chat(fields: dict[str, Any]) -> bool:
    last = fields["messages"][-1]
    return (
        _plain(fields)
        and all(fields.get(name) in (None, "auto", "none") for name in ("tool_choice", "function_call"))
        and fields.get("modalities") in (None, ["text"])
        # Without a turn of the assistant's there is none to go on with.
        and (fields.get("add_generation_prompt") is not False or fields.get("continue_final_message") is True)
        and (last["role"] != "assistant" or (isinstance(last.get("content"), str) and not last.get("tool_calls")))
    )


def chats_on(exchange: Exchange) -> bool:
    """Whether an engine can go on with a text that is the beginning of the whole answer."""
    fields = exchange.fields
    if not exchange.endpoint.chats:
        return _completion(fields, exchange.endpoint.content)
    return _chat(fields) and fields["messages"][-1]["role"] != "assistant" and not fields.get("tools")


def _completion(fields: dict[str, Any], prompt: str) -> bool:
    return isinstance(fields[prompt], str) and _plain(fields)


def _plain(fields: dict[str, Any]) -> bool:
    return not _asked(fields, _NEVER) and sum(map(len, stops(fields))) <= MAX_STOPS


def _asked(fields: dict[str, Any], names: AbstractSet[str]) -> bool:
    # By `is`: vLLM's `prompt_logprobs: 0` asks for some.
    return any(fields[name] is not None and fields[name] is not False for name in names & fields.keys())


def stops(fields: dict[str, Any]) -> tuple[str, ...]:
    """Return the sequences that end the answer."""
    stop = fields.get("stop")
    return tuple(it for it in (stop if isinstance(stop, list) else [stop]) if isinstance(it, str))
