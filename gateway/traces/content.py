"""Content: prompts and answers in the form of the GenAI conventions, for traces that may have them."""

from collections.abc import Sequence
from typing import Any

import orjson

MAX_TEXT = 16_384  # characters of one text
MAX_ALL = 131_072  # characters of all that a request says, and of all of its answer
MAX_MESSAGES = 64  # of a conversation, its last ones
_NAME = 64  # characters of a name, a role or an id
_PART = 64  # characters that each part takes of MAX_ALL besides its text


class _Room:
    """What is left of MAX_ALL."""

    def __init__(self) -> None:
        self.left = MAX_ALL

    def take(self, text: object, most: int = MAX_TEXT) -> str:
        """Return the beginning of a text, as long as fits."""
        cut = str(text)[: max(0, min(most, self.left))]
        self.left -= len(cut)
        return cut


def said(fields: dict[str, Any]) -> str:
    """Return what a request says, as JSON: roles and parts. Pictures and the like are named and not copied. Of what is
    too long, the last messages are told."""
    room, messages = _Room(), fields.get("messages")
    if isinstance(messages, list):
        last = reversed(messages[-MAX_MESSAGES:])
        return _json([_message(it, room) for it in last if isinstance(it, dict) and room.left > 0][::-1])
    texts = fields.get("prompt", fields.get("input", fields.get("documents")))
    texts = texts if isinstance(texts, list) else [texts]
    return _json([{"role": "user", "parts": _parts([it], room)} for it in texts[:MAX_MESSAGES] if isinstance(it, str)])


def written(answer: Sequence[dict[str, Any]], finish_reason: str | None) -> str:
    """Return what the choices of an answer say, as JSON. `answer` has a message of each."""
    room, end = _Room(), {} if finish_reason is None else {"finish_reason": finish_reason}
    return _json([_message({**it, "role": "assistant"}, room) | end for it in answer if room.left > 0])


def _message(message: dict[str, Any], room: _Room) -> dict[str, Any]:
    role, content, calls = room.take(message.get("role"), _NAME), message.get("content"), message.get("tool_calls")
    parts = _parts(content if isinstance(content, list) else [content], room)
    if role == "tool":
        response = "\n".join(it["content"] for it in parts if "content" in it)
        return {
            "role": role,
            "parts": [{"type": "tool_call_response", **_id(message, "tool_call_id"), "response": response}],
        }
    for it in calls if isinstance(calls, list) else ():
        if isinstance(it, dict) and room.left > 0:
            parts.append(_call(it, room))
    return {"role": role, "parts": parts}


def _parts(content: list[Any], room: _Room) -> list[dict[str, Any]]:
    """Return the parts of a content. Texts that follow each other are one."""
    parts: list[dict[str, Any]] = []
    for it in content:
        if room.left <= 0:
            break
        text = it.get("text") if isinstance(it, dict) else it
        if isinstance(text, str) and text:
            before = parts.pop()["content"] + "\n" if parts and "content" in parts[-1] else ""
            parts.append({"type": "text", "content": (before + room.take(text, MAX_TEXT - len(before)))[:MAX_TEXT]})
        elif isinstance(it, dict) and not isinstance(text, str):
            parts.append({"type": room.take(it.get("type"), _NAME)})
        room.left -= _PART
    return parts


def _call(call: dict[str, Any], room: _Room) -> dict[str, Any]:
    function = call.get("function")
    function = function if isinstance(function, dict) else {}
    room.left -= _PART
    name, arguments = room.take(function.get("name"), _NAME), room.take(function.get("arguments"))
    return {"type": "tool_call", **_id(call, "id"), "name": name, "arguments": arguments}


def _id(it: dict[str, Any], name: str) -> dict[str, str]:
    value = it.get(name)
    return {"id": value[:_NAME]} if isinstance(value, str) else {}


def _json(value: list[dict[str, Any]]) -> str:
    return orjson.dumps(value).decode()
