"""Judges: whether an answer is valid by its API's own types and whole by the rules of its stream, and what it says.

The types are those of the packages `openai` and `anthropic`, applied strictly: no value is converted, and in the APIs
that the gateway writes itself no field is unknown. An engine's own fields of a chat completion pass through the
gateway, so they may be there.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin

import anthropic.types as theirs
import orjson
from openai.types import Completion, Model, responses
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from tests.support.message_answers import summed

Json = dict[str, Any]


@dataclass(frozen=True)
class Said:
    """What a client has in the end. A call is its tool's name, with the namespace before it, and its arguments."""

    text: str
    thoughts: str
    calls: tuple[tuple[str, Any], ...]
    finish: str


def strictly(kind: type[BaseModel], value: Any, *, more: bool = False) -> None:
    """Check that a value is of the type. `more`: fields that the type does not know may be there."""
    made = kind.model_validate_json(orjson.dumps(value), strict=True)
    assert more or not _unknown(made), (kind.__name__, _unknown(made))


# Fields that these types of the package lack: the first three are Open Responses' (2026-04-24), and older versions of
# the package demand the last.
_BEYOND: dict[type[BaseModel], set[str]] = {
    responses.Response: {"presence_penalty", "frequency_penalty", "store"},
    responses.ResponseFunctionCallArgumentsDoneEvent: {"name"},
}


def _unknown(value: Any, where: str = "") -> list[str]:
    """Return the paths of the fields that no type knows."""
    if isinstance(value, BaseModel):
        inside = value.__dict__.items()
        known = _BEYOND.get(type(value), set())
        found = [f"{where}.{name}" for name in (value.model_extra or {}).keys() - known]
        return found + [it for name, item in inside for it in _unknown(item, f"{where}.{name}")]
    return [it for item in value for it in _unknown(item, f"{where}[]")] if isinstance(value, list) else []


def _by_type(union: Any) -> dict[str, type[BaseModel]]:
    """Return the members of a union of events by their types."""
    members = get_args(get_args(union)[0] if get_origin(union) is Annotated else union)
    return {get_args(it.model_fields["type"].annotation)[0]: it for it in members}


# -- chat completions -------------------------------------------------------------------------------------------------


def chat(answer: Json) -> list[Said]:
    """Judge a blocking chat completion. Returns what each choice says."""
    strictly(ChatCompletion, answer, more=True)
    _counted(answer["usage"])
    assert [it["index"] for it in answer["choices"]] == list(range(len(answer["choices"])))
    return [_said(it["message"], it["finish_reason"]) for it in answer["choices"]]


def chat_stream(events: Sequence[Any], *, usage: bool) -> list[Said]:
    """Judge the events of a streamed chat completion. `usage`: the request asked for it."""
    chunks = _chunks(events, ChatCompletionChunk, usage=usage)
    messages: dict[int, Json] = {}
    finished: dict[int, str] = {}
    for choice in (it for chunk in chunks for it in chunk["choices"]):
        index, delta = choice["index"], choice["delta"]
        assert index not in finished, "a piece after its choice's end"
        assert ("role" in delta) == (index not in messages), "the role comes once, with the first piece"
        message = messages.setdefault(index, {"content": "", "reasoning": "", "tool_calls": []})
        message["content"] += delta.get("content") or ""
        message["reasoning"] += delta.get("reasoning_content") or delta.get("reasoning") or ""
        for piece in delta.get("tool_calls") or ():
            _join(message["tool_calls"], piece)
        if choice["finish_reason"]:
            finished[index] = choice["finish_reason"]
    assert sorted(finished) == sorted(messages) == list(range(len(messages)))
    return [_said(messages[index], finished[index]) for index in sorted(messages)]


def completion(answer: Json) -> list[Said]:
    """Judge a blocking completion."""
    strictly(Completion, answer, more=True)
    _counted(answer["usage"])
    return [Said(it["text"], "", (), it["finish_reason"]) for it in answer["choices"]]


def completion_stream(events: Sequence[Any], *, usage: bool) -> list[Said]:
    """Judge the events of a streamed completion."""
    texts: dict[int, str] = {}
    finished: dict[int, str] = {}
    for choice in (it for chunk in _chunks(events, Completion, usage=usage) for it in chunk["choices"]):
        assert choice["index"] not in finished
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        if choice["finish_reason"]:
            finished[choice["index"]] = choice["finish_reason"]
    assert sorted(finished) == list(range(len(texts)))
    return [Said(texts[index], "", (), finished[index]) for index in sorted(texts)]


def _chunks(events: Sequence[Any], kind: type[BaseModel], *, usage: bool) -> list[Json]:
    """Check what holds for every stream of OpenAI's older APIs, and return the chunks with choices."""
    *chunks, done = events
    assert done == "[DONE]"
    for it in chunks:
        # A chunk of a completion has null for a reason that the package's type leaves no room for
        told = it | {"choices": [choice for choice in it["choices"] if choice.get("finish_reason")]}
        strictly(kind, told if kind is Completion else it, more=True)
    assert len({(it["id"], it["created"]) for it in chunks}) == 1
    counted = [it for it in chunks if it.get("usage")]
    assert len(counted) == usage
    if usage:
        assert chunks[-1]["choices"] == []
        _counted(chunks[-1]["usage"])
        chunks = chunks[:-1]
    assert all(it["choices"] for it in chunks)
    return chunks


def _counted(usage: Json) -> None:
    assert usage["prompt_tokens"] > 0
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def _join(calls: list[Json], piece: Json) -> None:
    """Add a piece of a tool call to the calls so far."""
    if piece["index"] == len(calls):
        assert piece["id"], "a call begins with its id"
        assert piece["function"]["name"], "a call begins with its name"
        calls.append({"id": piece["id"], "function": dict(piece["function"])})
        return
    assert piece["index"] == len(calls) - 1, "the pieces of two calls are mixed"
    assert not piece.get("id") or piece["id"] == calls[-1]["id"]
    calls[-1]["function"]["arguments"] += piece["function"]["arguments"]


def _said(message: Json, finish: str) -> Said:
    calls = message.get("tool_calls") or []
    assert len({it["id"] for it in calls}) == len(calls)
    told = tuple((it["function"]["name"], json.loads(it["function"]["arguments"])) for it in calls)
    thoughts = message.get("reasoning_content") or message.get("reasoning") or ""
    return Said(message.get("content") or "", thoughts, told, finish)


# -- models -----------------------------------------------------------------------------------------------------------


def model(entry: Json) -> None:
    """Judge a model of the list, which serves the clients of both packages."""
    strictly(Model, entry, more=True)
    strictly(theirs.ModelInfo, {name: it for name, it in entry.items() if name != "capabilities"}, more=True)


# -- Responses --------------------------------------------------------------------------------------------------------

_RESPONSE_EVENTS = _by_type(responses.ResponseStreamEvent)
_ITEMS: dict[str, type[BaseModel]] = {  # a type for all that an item may be takes seconds to be built
    "message": responses.ResponseOutputMessage,
    "reasoning": responses.ResponseReasoningItem,
    "function_call": responses.ResponseFunctionToolCall,
    "custom_tool_call": responses.ResponseCustomToolCall,
}
_PART = r"content_part.added ({0}.delta )*{0}.done content_part.done "
_SUMMARY = "{0}_part.added ({0}_text.delta )*{0}_text.done {0}_part.done ".format("reasoning_summary")
# The events of each kind of item, between those that add it and end it.
_FORMS = {
    "message": f"({_PART.format('output_text')}|{_PART.format('refusal')})+",
    "reasoning": f"({_PART.format('reasoning_text')}|{_SUMMARY})",
    "function_call": "(function_call_arguments.delta )+function_call_arguments.done ",
    "custom_tool_call": "(custom_tool_call_input.delta )+custom_tool_call_input.done ",
}
_TEXTS = ("text", "refusal", "arguments", "input")  # where a `done` event has what its deltas had


def response(answer: Json) -> Said:
    """Judge a whole response object that must be complete."""
    strictly(responses.Response, answer)
    assert answer["status"] == "completed"
    assert answer["output"]
    usage = answer["usage"]
    assert usage["input_tokens"] > 0
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    ids = [it["id"] for it in answer["output"]]
    assert len(set(ids)) == len(ids)
    assert all(it["status"] == "completed" for it in answer["output"])
    text, thoughts, calls = "", "", []
    for item in answer["output"]:
        if item["type"] == "message":
            text += "".join(it["text"] for it in item["content"])
            assert all(it["annotations"] == [] for it in item["content"])  # LangChain falls without them
        elif item["type"] == "reasoning":
            thoughts += "".join(it["text"] for it in (*item["summary"], *item.get("content", ())))
        else:
            assert item["call_id"]
            calls.append((".".join(filter(None, [item.get("namespace"), item["name"]])), json.loads(item["arguments"])))
    return Said(text, thoughts, tuple(calls), answer["status"])


def response_stream(events: Sequence[Json]) -> Said:
    """Judge the events of a streamed response that must be complete. All but the last have a part of its response."""
    assert [it["sequence_number"] for it in events] == list(range(len(events)))
    created, *middle, last = events
    assert created["type"] == "response.created"
    assert middle[0]["type"] == "response.in_progress"
    while middle[0]["type"] == "response.in_progress":  # again and again while the request waits
        middle = middle[1:]
    assert last["type"] == "response.completed"
    begun = last["response"] | {"status": "in_progress", "output": [], "usage": None, "completed_at": None}
    for it in (created, events[1], last):
        assert it.keys() == _RESPONSE_EVENTS[it["type"]].model_fields.keys()
        assert it is last or it["response"] == begun
    indexes = [it["output_index"] for it in middle]
    assert indexes == sorted(indexes), "items come one after the other"
    assert sorted(set(indexes)) == list(range(len(last["response"]["output"])))
    items = [_item([it for it in middle if it["output_index"] == index]) for index in sorted(set(indexes))]
    assert items == last["response"]["output"]
    return response(last["response"])


def _item(events: list[Json]) -> Json:
    """Judge the events of one output item. Returns the item."""
    begun, *inside, done = events
    item: Json = done["item"]
    for it in inside:
        strictly(_RESPONSE_EVENTS[it["type"]], it)
    for it in (begun, done):
        assert it.keys() == _RESPONSE_EVENTS[it["type"]].model_fields.keys()
        strictly(_ITEMS[it["item"]["type"]], it["item"])
    assert begun["item"]["status"] == "in_progress"
    for name in ("id", "type", "call_id", "name", "namespace"):
        assert begun["item"].get(name) == item.get(name)
    kinds = "".join(f"{it['type'].removeprefix('response.')} " for it in inside)
    assert re.fullmatch(_FORMS[item["type"]], kinds), kinds
    assert (begun["type"], done["type"]) == ("response.output_item.added", "response.output_item.done")
    assert {it["item_id"] for it in inside} == {item["id"]}
    pieces, texts, parts = "", [], []
    for it in inside:
        if it["type"].endswith(".delta"):
            pieces += it["delta"]
        elif it["type"].endswith("_part.added"):
            assert it.get("content_index", it.get("summary_index")) == len(parts)
            parts.append(None)
        elif it["type"].endswith("_part.done"):
            parts[-1] = it["part"]
        else:
            (text,) = (it[name] for name in _TEXTS if name in it)
            assert text == pieces
            texts, pieces = [*texts, text], ""
    own = item.get("summary") or item.get("content") or []
    assert parts == own
    assert texts == ([it.get("text", it.get("refusal")) for it in own] or [item.get("arguments", item.get("input"))])
    return item


# -- Messages ---------------------------------------------------------------------------------------------------------

_MESSAGE_EVENTS = _by_type(theirs.RawMessageStreamEvent)
_BLOCK = "(content_block_start (content_block_delta )*content_block_stop )"
_DELTAS = {"text": ["text_delta"], "thinking": ["thinking_delta", "signature_delta"], "tool_use": ["input_json_delta"]}


def message(answer: Json) -> Said:
    """Judge a whole message."""
    strictly(theirs.Message, answer)
    assert answer["content"]
    assert answer["usage"]["input_tokens"] > 0
    found: dict[str, list[Json]] = {"text": [], "thinking": [], "tool_use": []}
    for block in answer["content"]:
        found[block["type"]].append(block)
    assert all(it["text"] for it in found["text"])
    assert all(it["thinking"] for it in found["thinking"])
    assert all(it["signature"] for it in found["thinking"])  # without one, pi and Vercel's SDK drop the block
    assert len({it["id"] for it in found["tool_use"]}) == len(found["tool_use"])
    text = "".join(it["text"] for it in found["text"])
    thoughts = "".join(it["thinking"] for it in found["thinking"])
    return Said(text, thoughts, tuple((it["name"], it["input"]) for it in found["tool_use"]), answer["stop_reason"])


def message_stream(events: Sequence[Json]) -> Said:
    """Judge the events of a streamed message."""
    assert events[0]["type"] == "message_start"
    assert events[0]["message"]["content"] == []
    told = [it for it in events if it != {"type": "ping"}]
    for it in told:
        strictly(_MESSAGE_EVENTS[it["type"]], it)
    kinds = "".join(f"{it['type']} " for it in told)
    assert re.fullmatch(f"message_start {_BLOCK}+message_delta message_stop ", kinds), kinds
    index, block = -1, {}
    for it in told:
        if it["type"] == "content_block_start":
            index, block = index + 1, it["content_block"]
        elif it["type"] == "content_block_delta":
            assert it["delta"]["type"] in _DELTAS[block["type"]]
        if it["type"].startswith("content_block"):
            assert it["index"] == index
    return message(summed(told))
