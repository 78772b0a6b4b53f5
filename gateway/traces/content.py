"""Content: prompts and answers in the form of the GenAI conventions, for traces that may have them."""

from collections.abc import Sequence
from typing import Any

import orjson

MAX_TEXT = 16_384  # characters of one text
MAX_MESSAGES = 64  # of a conversation, its last ones


def said(fields: dict[str, Any]) -> str:
    """Return what a request says, as JSON: roles and parts. Pictures and the like are named and not copied."""
    messages = fields.get("messages")
    if isinstance(messages, list):
        return _json([_message(it) for it in messages[-MAX_MESSAGES:] if isinstance(it, dict)])
    texts = fields.get("prompt", fields.get("input", fields.get("documents")))
    texts = texts if isinstance(texts, list) else [texts]
    return _json([{"role": "user", "parts": [_text(it)]} for it in texts[:MAX_MESSAGES] if isinstance(it, str)])


def written(answer: Sequence[str], finish_reason: str | None) -> str:
    """Return what the choices of an answer say, as JSON."""
    end = {} if finish_reason is None else {"finish_reason": finish_reason}
    return _json([{"role": "assistant", "parts": [_text(it)]} | end for it in answer])


def _message(message: dict[str, Any]) -> dict[str, Any]:
    role, content = str(message.get("role")), message.get("content")
    if role == "tool":
        whole = content if isinstance(content, str) else ""
        answer = {"type": "tool_call_response", "id": message.get("tool_call_id"), "response": whole[:MAX_TEXT]}
        return {"role": role, "parts": [answer]}
    parts = content if isinstance(content, list) else [content]
    told = [_text(it) if isinstance(it, str) else _part(it) for it in parts if isinstance(it, str | dict)]
    calls = message.get("tool_calls")
    told += [_call(it) for it in (calls if isinstance(calls, list) else ()) if isinstance(it, dict)]
    return {"role": role, "parts": told}


def _part(part: dict[str, Any]) -> dict[str, Any]:
    text = part.get("text")
    return _text(text) if isinstance(text, str) else {"type": str(part.get("type"))}


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    function = function if isinstance(function, dict) else {}
    arguments = str(function.get("arguments"))[:MAX_TEXT]
    return {"type": "tool_call", "id": call.get("id"), "name": function.get("name"), "arguments": arguments}


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "content": text[:MAX_TEXT]}


def _json(value: list[dict[str, Any]]) -> str:
    return orjson.dumps(value, default=str).decode()
