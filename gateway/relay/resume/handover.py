"""Handover: the request by which an engine continues an answer that broke off, in each of the possible ways.

- `message`: the text so far is a partial assistant message, in the engine's own form (dialects, `continues`).
- `raw`: the text so far stands behind the prompt, as the chat template writes the prompt.
- `rest`: as `message`, and a grammar allows only endings that give the answer its prescribed form.
- `nailed`: the answer is made again, under a schema that allows only the beginning that was sent.
- `thought`: as `message`, with the reasoning so far before the text, between the model's tags.
- `arguments`: only the arguments of the last tool call are made.
- `anew`: the same request is made again. The new answer has to begin with what was sent.

Which ways an engine has is data in its dialect (`resumes`).
"""

from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from gateway.dialects.dialect import Dialect, Made, Way
from gateway.dialects.thoughts import Tags
from gateway.errors import BadRequest, EngineRefused
from gateway.exchange import Exchange
from gateway.forced_tools.plan import call_of
from gateway.grammars.constraint import FIELDS, Constraint, constraint
from gateway.grammars.grammar import UnsupportedError
from gateway.relay.content import Content
from gateway.relay.resume.part import Part, chats_on, continuable, is_constrained, repeatable, stops, thinkable

_LIMITS = ("max_tokens", "max_completion_tokens", "n_predict")


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """The request to an engine that continues an answer, and what to do with its stream."""

    exchange: Exchange
    way: Way = "message"
    tokens: int = 0  # of the answer, that it is given
    again: str = ""  # white space that it isn't, and makes once more
    again_in: str = "content"  # the field in which it comes
    left: bool = True  # whether the caller's limits leave anything to be made
    stops: tuple[str, ...] = ()  # the sequences that end the answer
    keeps_stop: bool = False  # the one that does belongs to it
    raw: str | None = None  # the text, if it is handed over behind the prompt itself
    closes: str = ""  # what ends the reasoning with which the engine goes on there
    skips: dict[str, str] = field(default_factory=dict)  # what an answer made anew has to begin with, by its names
    calls: dict[int, tuple[str, str]] = field(default_factory=dict)  # and its tool calls: names and arguments by index
    call: int | None = None  # the text is the rest of this tool call's arguments
    ends: str | None = None  # its finish_reason, if nothing is left to be made
    checks: Constraint | None = None  # what the whole text has to be


def ways(part: Part, dialect: Dialect) -> list[Way]:
    """Return the ways in which an engine of `dialect`, which began this part, can be asked for the rest of it."""
    kind = _kind(part)
    found = [it for it in dialect.resumes[kind] if _possible(it, part, dialect)]
    if kind == "json" and found[:1] != ["anew"] and "anew" in found and not _exact(part, dialect):
        found.sort(key=lambda it: it != "anew")  # the grammar allows too much
    return found


def hand_over(part: Part, first: Dialect, dialect: Dialect, way: Way = "message", tags: Tags | None = None) -> Handover:
    """Return the request by which an engine of `dialect` continues, in that way, a part that an engine of `first`
    began. `tags` stand around the reasoning of its model, if that is known better than its dialect says. Raises
    EngineRefused if that is not possible."""
    try:
        if way in ("message", "raw"):
            return _continued(part, first, dialect, raw=way == "raw")
        if way == "thought":
            return _thought(part, first, dialect, tags or Tags(*dialect.think_tags))
        if way == "rest":
            return _rest(part, first, dialect)
        if way == "arguments":
            return _arguments(part, dialect)
    except (UnsupportedError, BadRequest) as exc:
        raise EngineRefused(f"An engine cannot continue this answer: {str(exc).rstrip('.')}.", status=400) from exc
    return _anew(part, way)


# -- which ways --------------------------------------------------------------------------------------------------------


def _kind(part: Part) -> Made:
    content = part.content
    if content.made:
        return "calls"
    if content.reasoning and not content.text.tell():
        return "reasoning"  # what the request prescribes is only the form of the text behind it
    if is_constrained(part.exchange):
        return "json"
    return "reasoning" if content.reasoning else "text"


def _possible(way: Way, part: Part, dialect: Dialect) -> bool:
    if way == "anew":
        return repeatable(part.exchange, dialect)
    if not part.content.tokens:
        return True  # nothing has come yet: each way is the same request again
    if way in ("message", "raw"):
        return continuable(part)
    try:
        if way == "thought":
            behind = is_constrained(part.exchange) and part.content.text.tell()
            fields, raw = part.exchange.fields, dialect.raw
            # A raw answer tells the log probabilities of the tags, too, and holds to no form behind the reasoning.
            plain = not fields.get("logprobs") and not is_constrained(part.exchange)
            fits = thinkable(part) and (raw is None or (plain and raw.fits(fields)))
            return fits and (not behind or _is_said(part) or bool(_remainder(part, "", dialect)))
        if way == "rest":
            chats = chats_on(part.exchange) and not part.content.reasoning
            return _is_said(part) or (chats and bool(_remainder(part, "", dialect)))
        return (_is_said(part) or bool(_nailed(part))) if way == "nailed" else _arguments(part, dialect) is not None
    except (UnsupportedError, BadRequest):
        return False


def _exact(part: Part, dialect: Dialect) -> bool:
    try:
        asked = constraint(part.exchange.fields)
        return asked is None or dialect.json_style is None or asked.exact(dialect.json_style)
    except UnsupportedError:
        return False


# -- each way ----------------------------------------------------------------------------------------------------------


def _thought(part: Part, first: Dialect, dialect: Dialect, tags: Tags) -> Handover:
    """The reasoning is handed over between the model's tags, and closed only if text has come behind it."""
    (name, reasoning), text = next(iter(part.content.reasoning.items())), part.content.text.getvalue()
    raw, beside = dialect.raw is not None, {}
    if dialect.thinks_in:
        whole, beside = text, {dialect.thinks_in: reasoning.getvalue()}
    else:
        whole = tags.around(reasoning.getvalue(), text)
    handover = _continued(part, first, dialect, raw=raw, text=whole, beside=beside)
    if text and is_constrained(part.exchange):
        if _is_said(part):
            return Handover(exchange=part.exchange, way="thought", ends="stop")
        handover = _constrained(part, handover, dialect)
    if text:
        return replace(handover, way="thought")
    return replace(handover, way="thought", again_in=name, stops=(), closes=tags.closes.strip() if raw else "")


def _continued(
    part: Part,
    first: Dialect,
    dialect: Dialect,
    *,
    raw: bool,
    text: str | None = None,
    beside: dict[str, str] | None = None,
) -> Handover:
    """The text so far is handed over, or `text` in its place. `beside` are further fields of its message."""
    exchange, text = part.exchange, part.content.text.getvalue() if text is None else text
    fields, tokens, again = dict(exchange.fields), part.tokens if part.content.tokens else 0, ""
    made, behind = tokens, text if raw and text else None
    if dialect.trims and exchange.endpoint.chats and behind is None:
        stripped = text.rstrip()
        text, again = stripped, text[len(stripped) :]
        tokens = max(0, tokens - bool(again)) if text else 0  # white space is one token, as a rule
    fields, left = _within_limits(fields, made, tokens)
    if behind is not None:
        pass  # the text stands behind the prompt, not in it
    elif not exchange.endpoint.chats:
        fields[exchange.endpoint.content] += text
    elif text or beside:
        fields |= {**dialect.continues, "messages": _with_message(exchange, text, first, beside or {})}
    return Handover(
        exchange=exchange.having(fields),
        way="raw" if raw else "message",
        tokens=tokens,
        again=again,
        left=left,
        stops=stops(fields),
        keeps_stop=fields.get("include_stop_str_in_output") is True,
        raw=behind,
    )


def _within_limits(fields: dict[str, Any], made: int, given: int) -> tuple[dict[str, Any], bool]:
    """Return the fields with limits for the rest of an answer, and whether they leave anything to be made. Of the
    tokens that were `made`, the engine is `given` some."""
    fields |= {name: int(fields[name]) for name in _LIMITS if type(fields.get(name)) is float and fields[name] >= 1}
    limits = [name for name in _LIMITS if type(fields.get(name)) is int and fields[name] > 0]
    left = all(fields[name] > made for name in limits)
    fields |= {name: fields[name] - given for name in limits}
    if type(fields.get("min_tokens")) is int:
        fields["min_tokens"] = max(0, fields["min_tokens"] - given)
    return fields, left


def _with_message(exchange: Exchange, text: str, first: Dialect, beside: dict[str, str]) -> list[Any]:
    fields, (*before, last) = exchange.fields, exchange.fields["messages"]
    goes_on = exchange.prefilled or fields.get("continue_final_message") is True or not first.continues
    if last["role"] == "assistant" and goes_on:
        return [*before, last | {"content": last["content"] + text}]  # the answer goes on with the caller's own words
    return [*before, last, {"role": "assistant", "content": text, **beside}]


def _rest(part: Part, first: Dialect, dialect: Dialect) -> Handover:
    handover = _continued(part, first, dialect, raw=False)
    if not part.content.tokens:
        return replace(handover, way="rest")
    if _is_said(part):
        return Handover(exchange=part.exchange, way="rest", ends="stop")
    return replace(_constrained(part, handover, dialect), way="rest")


def _constrained(part: Part, handover: Handover, dialect: Dialect) -> Handover:
    """The same, with a grammar of what may still come."""
    kept = {name: it for name, it in handover.exchange.fields.items() if name not in FIELDS}
    # The white space that is not handed over has to come again, so that what follows still fits.
    fields = kept | _remainder(part, handover.again, dialect)
    return replace(handover, exchange=handover.exchange.having(fields), checks=constraint(part.exchange.fields))


def _is_said(part: Part) -> bool:
    """Whether the text is all that the request prescribes, and nothing but white space may follow."""
    asked = constraint(part.exchange.fields)
    return asked is not None and asked.is_whole(part.content.text.getvalue())


def _remainder(part: Part, before: str, dialect: Dialect) -> dict[str, Any]:
    asked = constraint(part.exchange.fields)
    if asked is None or dialect.json_style is None:
        raise UnsupportedError("the request prescribes no form, or the engine has no grammars")
    return asked.rest(part.content.text.getvalue(), before, dialect.json_style)


def _nailed(part: Part) -> dict[str, Any]:
    asked = constraint(part.exchange.fields)
    if asked is None:
        raise UnsupportedError("the request prescribes no form")
    return asked.nailed(part.content.text.getvalue())


def _anew(part: Part, way: Way) -> Handover:
    name, content = "content" if part.exchange.endpoint.chats else "text", part.content
    kept = {name: content.text, **content.reasoning}
    skips = {key: text for key, it in kept.items() if (text := it.getvalue())}
    calls = {index: (it.name, it.arguments.getvalue()) for index, it in content.made.items()}
    exchange, checks = part.exchange, None
    if way == "nailed" and content.text.tell():
        if _is_said(part):
            return Handover(exchange=exchange, way=way, ends="stop")
        exchange, checks = exchange.having(exchange.fields | _nailed(part)), constraint(exchange.fields)
    return Handover(exchange=exchange, way=way, skips=skips, calls=calls, checks=checks)


def _arguments(part: Part, dialect: Dialect) -> Handover:
    """The last call's arguments are JSON by its function's schema, and are continued as such."""
    made = part.content.made
    index = max(made)
    last, text = made[index], made[index].arguments.getvalue()
    if not last.name or list(made) != sorted(made):
        raise UnsupportedError("a tool call has no name, or the calls are not in order")
    if _is_whole(text):
        return Handover(exchange=part.exchange, way="arguments", call=index, ends="tool_calls")
    exchange = part.exchange.having(call_of(last.name, part.exchange.fields, dialect.most_repeats))
    inner = Part(exchange=exchange, content=_text(text), tokens=part.tokens)
    for way in dialect.resumes["json"]:
        if text and way != "anew" and _possible(way, inner, dialect):
            handover = _rest(inner, dialect, dialect) if way == "rest" else _anew(inner, way)
            return replace(handover, way="arguments", call=index, checks=constraint(exchange.fields), stops=())
    if text.strip():
        raise UnsupportedError("no grammar was made for the arguments of the tool call")
    handover = _anew(inner, "anew")
    return replace(handover, way="arguments", call=index, checks=constraint(exchange.fields))


def _text(text: str) -> Content:
    content = Content()
    if text:
        content.add({"index": 0, "delta": {"content": text}, "finish_reason": None})
    return content


def _is_whole(arguments: str) -> bool:
    try:
        return isinstance(orjson.loads(arguments), dict)
    except orjson.JSONDecodeError:
        return False
