"""Reader: translate a Messages request into a chat request and the writer of its answer. All functions are pure."""

from dataclasses import dataclass
from typing import Any

from gateway.errors import BadRequest
from gateway.translation.messages.conversation import read_conversation
from gateway.translation.messages.fields import (
    BOOKKEEPING,
    KEPT,
    OF_CHAT,
    REFUSED,
    TRANSLATED,
    Notes,
    a_flag,
    a_list,
    an_object,
    name,
    one_of,
    text,
)
from gateway.translation.messages.tools import read_tools
from gateway.translation.messages.writer import Writer

_KNOWN = TRANSLATED | KEPT | BOOKKEEPING.keys() | REFUSED.keys() | OF_CHAT.keys()
_EFFORTS = ("low", "medium", "high", "xhigh", "max")
_THINKING = ("adaptive", "enabled", "disabled", "between_tools")
# Thinking is always shown, because otherwise clients could not send it back
_IN_THINKING = frozenset({"budget_tokens", "display"})
_IN_OUTPUT = frozenset({"effort", "format"})
_IN_FORMAT = frozenset({"schema"})
# The effort for a budget of thinking tokens up to this number, if the request names no effort.
_BUDGETS = ((4096, "low"), (16_384, "medium"))


@dataclass(frozen=True, slots=True)
class Asked:
    """One translated request. `ignored` names the fields without effect, for x-stack-ignored-params or strict mode, as
    paths without indexes, such as `tools` or `messages.content.citations`. `advice` names the fields of `chat` that are
    only a wish in this API: an engine that refuses one of them is asked without it."""

    chat: dict[str, Any]
    stream: bool
    writer: Writer
    ignored: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()


def read(body: dict[str, Any], *, request_id: str, now: int, counting: bool = False) -> Asked:
    """Translate a request's body. `counting`: for count_tokens, which asks for no answer, so nothing streams and
    `max_tokens` may be missing. `now` is not used, because no time goes into a chat body or a message.

    Raises only BadRequest, which names the field by the caller's own path.
    """
    del now
    notes = Notes()
    _refuse(body, notes)
    model = name(body.get("model"), "model")
    conversation = read_conversation(body.get("system"), body.get("messages"), notes)
    chat: dict[str, Any] = {"model": model, "messages": conversation.messages}
    chat |= read_tools(body.get("tools"), body.get("tool_choice"), conversation.used, notes)
    limit = None if counting and body.get("max_tokens") is None else _whole(body.get("max_tokens"), "max_tokens", 1)
    if limit is not None:
        chat["max_tokens"] = limit
    stops = _stops(body.get("stop_sequences"))
    if stops:
        chat["stop"] = stops
    chat |= _sampling(body) | _output(body, notes)
    effort = _effort(body, notes)
    if effort is not None:
        chat["reasoning_effort"] = effort
    _note_edits(body, notes)
    chat |= {field: body[field] for field in sorted(KEPT & body.keys()) if body[field] is not None}
    stream = a_flag(body.get("stream"), "stream") and not counting
    if stream:
        chat |= {"stream": True, "stream_options": {"include_usage": True}}
    writer = Writer(request_id=request_id, model=model, max_tokens=limit, stops=tuple(stops))
    return Asked(chat, stream, writer, notes.ignored, ("reasoning_effort",) if effort is not None else ())


def _refuse(body: dict[str, Any], notes: Notes) -> None:
    """Refuse fields that would change the answer and cannot, and note unknown ones."""
    for table in (REFUSED, OF_CHAT):
        for field, advice in table.items():
            value = body.get(field)
            if value and not (value == 1 and field in ("n", "best_of")):
                raise BadRequest(f"'{field}' is not supported here. {advice}", param=field)
    notes.unknown(body, _KNOWN, "", "")


def _whole(value: Any, where: str, least: int) -> int:
    if type(value) is float and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    if type(value) is not int:
        raise BadRequest(f"'{where}' must be a whole number.", param=where)
    if not least <= value < 2**63:
        raise BadRequest(f"'{where}' must be at least {least} and fit into 64 bits.", param=where)
    return value


def _stops(value: Any) -> list[str]:
    if value is None:
        return []
    return [text(it, f"stop_sequences[{index}]") for index, it in enumerate(a_list(value, "stop_sequences"))]


def _sampling(body: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field, most in (("temperature", 2), ("top_p", 1)):
        if (value := body.get(field)) is not None:
            if type(value) not in (int, float) or not 0 <= value <= most:
                raise BadRequest(f"'{field}' must be a number from 0 to {most}.", param=field)
            found[field] = value
    if body.get("top_k") is not None:
        found["top_k"] = _whole(body["top_k"], "top_k", 0)
    return found


def _output(body: dict[str, Any], notes: Notes) -> dict[str, Any]:
    """Return `output_config.format` as `response_format`. In the beta its name was `output_format`."""
    config = body.get("output_config")
    where, given = "output_format", body.get("output_format")
    if config is not None:
        notes.unknown(an_object(config, "output_config"), _IN_OUTPUT, "output_config", "output_config")
        if config.get("format") is not None:
            if given is not None:
                raise BadRequest(
                    "'output_format' and 'output_config.format' cannot be combined. Use 'output_config.format'.",
                    param=where,
                )
            where, given = "output_config.format", config["format"]
    if given is None:
        return {}
    form = an_object(given, where)
    notes.unknown(form, _IN_FORMAT, where, where)
    one_of(form.get("type"), ("json_schema",), f"{where}.type")
    schema = an_object(form.get("schema"), f"{where}.schema")
    return {
        "response_format": {"type": "json_schema", "json_schema": {"name": "output", "strict": True, "schema": schema}}
    }


def _effort(body: dict[str, Any], notes: Notes) -> str | None:
    """Return `output_config.effort` and `thinking` as `reasoning_effort`. None leaves it to the model: there is no word
    for "as little as by default" if `thinking` is missing, and some templates refuse "none"."""
    config = body.get("output_config") or {}
    effort = config.get("effort")
    if effort is not None:
        effort = one_of(effort, _EFFORTS, "output_config.effort")
    if body.get("thinking") is None:
        return effort
    thinking = an_object(body["thinking"], "thinking")
    notes.unknown(thinking, _IN_THINKING, "thinking", "thinking")
    kind = one_of(thinking.get("type"), _THINKING, "thinking.type")
    if kind == "disabled":
        return "none"
    if kind != "enabled":
        return effort
    budget = _whole(thinking.get("budget_tokens"), "thinking.budget_tokens", 1)
    notes.ignore("thinking.budget_tokens", "thinking.budget_tokens")
    return effort or next((it for most, it in _BUDGETS if budget <= most), "high")


def _note_edits(body: dict[str, Any], notes: Notes) -> None:
    """Note fields that would change the conversation or the speed at Anthropic, unless they ask for nothing."""
    if body.get("speed") not in (None, "standard"):
        notes.ignore("speed", "speed")
    if body.get("context_management") is None:
        return
    edits = an_object(body["context_management"], "context_management").get("edits")
    for index, it in enumerate(a_list(edits, "context_management.edits") if edits is not None else ()):
        kind = an_object(it, f"context_management.edits[{index}]").get("type")
        if type(kind) is not str or not kind.startswith("clear_thinking") or it.get("keep") != "all":
            notes.ignore("context_management.edits", "context_management.edits")
