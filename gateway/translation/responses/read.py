"""Read: translate a request of the Responses API into a chat completion request and the writer of its answer."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from gateway.errors import BadRequest
from gateway.translation.responses.fields import (
    BOOKKEEPING,
    HARMLESS,
    IGNORED,
    KNOWN,
    READ,
    REFUSED,
    Ignored,
    boolean,
    mapping,
    name,
    number,
    one_of,
    sequence,
    string,
    whole,
)
from gateway.translation.responses.history import History, kind_of
from gateway.translation.responses.resource import settings
from gateway.translation.responses.tools import Toolbox, read_choice, read_tools
from gateway.translation.responses.write import ResponseWriter

_LOGPROBS = "message.output_text.logprobs"
_SEALED = "reasoning.encrypted_content"
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]")
_FORMATS = ("text", "json_object", "json_schema")


@dataclass(frozen=True, slots=True)
class Asked:
    """One translated request. `chat` is the body of a chat completion request, which is the same for equal requests."""

    chat: dict[str, Any]
    stream: bool
    writer: ResponseWriter
    store: bool  # the response is to be kept
    previous_response_id: str | None
    ignored: tuple[str, ...]  # names of what the request asks for and does not get, for the answer's header


def previous(body: dict[str, Any]) -> str | None:
    """Return the id of the response whose conversation the request continues. Raises BadRequest if it is malformed."""
    value = body.get("previous_response_id")
    return None if value is None else name(value, "previous_response_id")


def unknown_previous(response_id: str) -> BadRequest:
    """Return the error for a `previous_response_id` that is not stored, with OpenAI's words and code."""
    return BadRequest(
        f"Previous response with id '{response_id[:80]}' not found.",
        param="previous_response_id",
        code="previous_response_not_found",
    )


def referred(body: dict[str, Any]) -> tuple[str, ...]:
    """Return the ids of items to which `input` refers without holding them. A malformed `input` has none.

    Raises BadRequest with OpenAI's words for an id that appears twice, because the item would be sent twice.
    """
    items = body.get("input")
    found = [it.get("id") for it in items if _is_reference(it)] if type(items) is list else []
    ids: dict[str, None] = {}
    for item_id in found:
        if type(item_id) is str:
            if item_id in ids:
                raise BadRequest(
                    f"Duplicate item found with id '{item_id[:80]}'. Remove duplicate items from your input.",
                    param="input",
                )
            ids[item_id] = None
    return tuple(ids)


def read(
    body: dict[str, Any],
    *,
    request_id: str,
    now: int,
    stores: bool = False,
    history: Sequence[dict[str, Any]] = (),
    kept: Mapping[str, dict[str, Any]] | None = None,
    clock: Callable[[], float] = time.time,
) -> Asked:
    """Read the body of POST /v1/responses.

    `request_id` must be unique, because the ids of the answer are made from it. `now` is in seconds since 1970, and
    `clock` returns the same for the answer's end. `stores`: responses can be stored. `history` holds the items of the
    earlier responses, inputs and outputs in their order (`previous`). `kept` holds the items to which `input` refers,
    by id (`referred`).

    Raises BadRequest that names a field by the caller's own path.
    """
    _refuse(body, stores=stores)
    ignored = Ignored()
    tools, offered, choice = _tools(body, ignored)
    items = _items(body.get("input"), kept or {})
    summary, effort = _reasoning(body, ignored)
    include = _include(body)
    stream = body.get("stream") is not None and boolean(body["stream"], "stream")
    chat: dict[str, Any] = {
        "model": name(body.get("model"), "model"),
        "messages": _messages(body, history, items, tools, ignored),
        **choice,
        **_sampling(body, include),
        **_text(body, ignored),
        **effort,
        **{field: value for field, value in body.items() if field not in KNOWN},  # an engine's own parameters
    }
    if stream:
        chat |= {"stream": True, "stream_options": {"include_usage": True}}
    _note(body, ignored)
    store = stores and body.get("store") is not False
    unique = _UNSAFE.sub("_", request_id)[:128]
    told = settings(body, f"resp_{unique}", now, store=store, summary=summary, sealed=_SEALED in include)
    writer = ResponseWriter(told, offered, unique, _stored(items, unique) if store else [], clock)
    return Asked(chat, stream, writer, store, previous(body), ignored.names())


def _tools(body: dict[str, Any], ignored: Ignored) -> tuple[Toolbox, Toolbox, dict[str, Any]]:
    """Return the request's tools, those that are offered to the model, and chat's fields for them."""
    tools = read_tools(body["tools"], ignored) if body.get("tools") is not None else Toolbox()
    choice, offered = read_choice(body["tool_choice"], tools) if body.get("tool_choice") is not None else (None, tools)
    parallel = body.get("parallel_tool_calls")
    if parallel is not None:
        boolean(parallel, "parallel_tool_calls")
    if not offered.offered:
        return tools, offered, {}
    made = {"tools": list(offered.offered), "tool_choice": choice, "parallel_tool_calls": parallel}
    return tools, offered, {field: value for field, value in made.items() if value is not None}


def _note(body: dict[str, Any], ignored: Ignored) -> None:
    for field in IGNORED:
        if body.get(field) is not None:
            ignored.add(field)
    if body.get("truncation") is not None and one_of(body["truncation"], "truncation", ("auto", "disabled")) == "auto":
        ignored.add("truncation")  # a prompt that is too long is refused, and never truncated


def _refuse(body: dict[str, Any], *, stores: bool) -> None:
    for field, advice in REFUSED.items():
        if (value := body.get(field)) is not None:
            harmless = HARMLESS.get(field)
            if harmless is None or type(value) is not type(harmless) or value != harmless:
                raise BadRequest(f"'{field}' cannot be used at /v1/responses. {advice}", param=field)
    for field in body.keys() - KNOWN:
        if field.lower() in READ or field.lower() in BOOKKEEPING:
            raise BadRequest(f"'{field[:64]}' must be written '{field.lower()}'.", param=field[:64])
    options = body.get("prompt_cache_options")
    if type(options) is dict and options.get("prewarm"):
        raise BadRequest(
            "'prompt_cache_options.prewarm' cannot be used at /v1/responses. Every request here makes an answer. Leave"
            " it out.",
            param="prompt_cache_options.prewarm",
        )
    if body.get("metadata") is not None:
        for key, value in mapping(body["metadata"], "metadata").items():
            string(value, f"metadata.{key[:64]}")
    for field in ("prompt_cache_key", "safety_identifier", "user"):
        if body.get(field) is not None:
            string(body[field], field)
    if body.get("max_tool_calls") is not None:
        whole(body["max_tool_calls"], "max_tool_calls", 1)
    store = body.get("store") is not None and boolean(body["store"], "store")
    if not stores and (store or previous(body)):
        field = "store" if store else "previous_response_id"
        raise BadRequest(
            f"'{field}' cannot be used: this gateway stores no responses (STACK_RESPONSES_DAYS is 0). "
            "Send the whole conversation in 'input'.",
            param=field,
        )


def _items(value: Any, kept: Mapping[str, dict[str, Any]]) -> list[Any]:
    """Return the input items, with the stored items in place of references."""
    if value is None:
        return []
    if type(value) is str:
        return [{"type": "message", "role": "user", "content": value}]
    if type(value) is not list:
        raise BadRequest("'input' must be a string or a list of items.", param="input")
    if not kept:
        return value
    return [kept.get(str(it.get("id")), it) if _is_reference(it) else it for it in value]


def _is_reference(item: Any) -> bool:
    return type(item) is dict and kind_of(item) == "item_reference"


def _messages(
    body: dict[str, Any], history: Sequence[dict[str, Any]], items: list[Any], tools: Toolbox, ignored: Ignored
) -> list[dict[str, Any]]:
    made = History(tools, ignored)
    for index, item in enumerate(history):
        made.add(item, f"previous_response_id.items[{index}]")
    for index, item in enumerate(items):
        made.add(item, f"input[{index}]")
    messages = made.messages()
    if not messages:
        raise BadRequest("'input' must hold at least one item.", param="input")
    if (instructions := body.get("instructions")) is not None and string(instructions, "instructions"):
        messages.insert(0, {"role": "system", "content": instructions})
    return messages


def _sampling(body: dict[str, Any], include: frozenset[str]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    if body.get("max_output_tokens") is not None:
        made["max_completion_tokens"] = whole(body["max_output_tokens"], "max_output_tokens", 1)
    for field in ("temperature", "top_p"):
        if body.get(field) is not None:
            made[field] = number(body[field], field)
    if _LOGPROBS in include or body.get("top_logprobs"):
        made |= {"logprobs": True, "top_logprobs": whole(body.get("top_logprobs") or 0, "top_logprobs", 0, 20)}
    return made


def _text(body: dict[str, Any], ignored: Ignored) -> dict[str, Any]:
    if body.get("text") is None:
        return {}
    text = mapping(body["text"], "text")
    ignored.unknown(text, frozenset({"format", "verbosity"}), "text")
    made: dict[str, Any] = {}
    if (verbosity := text.get("verbosity")) is not None:
        made["verbosity"] = string(verbosity, "text.verbosity")
    if text.get("format") is None:
        return made
    form = mapping(text["format"], "text.format")
    kind = one_of(form.get("type"), "text.format.type", _FORMATS)
    if kind == "json_object":
        made["response_format"] = {"type": kind}
    elif kind == "json_schema":
        schema: dict[str, Any] = {"name": name(form.get("name"), "text.format.name")}
        if form.get("description") is not None:
            schema["description"] = string(form["description"], "text.format.description")
        schema["schema"] = mapping(form.get("schema"), "text.format.schema")
        if form.get("strict") is not None:
            schema["strict"] = boolean(form["strict"], "text.format.strict")
        made["response_format"] = {"type": kind, "json_schema": schema}
    return made


def _reasoning(body: dict[str, Any], ignored: Ignored) -> tuple[bool, dict[str, Any]]:
    """Return whether reasoning goes out as a summary, and chat's field for the effort."""
    if body.get("reasoning") is None:
        return False, {}
    reasoning = mapping(body["reasoning"], "reasoning")
    ignored.unknown(reasoning, frozenset({"effort", "summary", "generate_summary"}), "reasoning")
    summary = False
    for field in ("summary", "generate_summary"):
        if (value := reasoning.get(field)) is not None:
            summary = one_of(value, f"reasoning.{field}", ("auto", "concise", "detailed", "none")) != "none"
    effort = reasoning.get("effort")
    return summary, {} if effort is None else {"reasoning_effort": name(effort, "reasoning.effort")}


def _include(body: dict[str, Any]) -> frozenset[str]:
    """Return what is to be included. OpenAI's other words are about hosted tools, and have no effect."""
    if body.get("include") is None:
        return frozenset()
    return frozenset(string(it, f"include[{at}]") for at, it in enumerate(sequence(body["include"], "include")))


def _stored(items: list[Any], unique: str) -> list[dict[str, Any]]:
    """Return the input items as they are stored and listed: each with a type and an id, and text as a list of parts.
    Raises BadRequest if they are nested too deeply to be written."""
    made = []
    for index, item in enumerate(items):
        kept = {"type": kind_of(item), "id": f"in_{unique}_{index}"} | {
            key: it for key, it in item.items() if it is not None
        }
        if kept["type"] == "message" and type(text := kept.get("content")) is str:
            kind = "output_text" if kept["role"] == "assistant" else "input_text"
            kept["content"] = [{"type": kind, "text": text}]
        made.append(kept)
    try:
        orjson.dumps(made)
    except TypeError:
        raise BadRequest("'input' is nested too deeply.", param="input") from None
    return made
