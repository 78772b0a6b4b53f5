"""Answers of a Messages writer in both forms: as a stream, and as one message."""

import json
from typing import Any

from gateway.translation.face import Writer
from gateway.translation.messages import Writer as MessageWriter
from tests.support.message_recordings import parsed


def writer(**changes: Any) -> Writer:
    return MessageWriter(**({"request_id": "r1", "model": "m", "max_tokens": 100} | changes))


def streamed(chunks: list[dict[str, Any]], **changes: Any) -> list[dict[str, Any]]:
    it = writer(**changes)
    return parsed(b"".join([it.head(), *map(it.chunk, chunks), it.end()]))


def chunk(finish: str | None = None, usage: dict[str, Any] | None = None, **delta: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "c", "object": "chat.completion.chunk", "choices": [choice]} | ({"usage": usage} if usage else {})


def piece(index: int, arguments: str = "", **more: Any) -> dict[str, Any]:
    """Return a piece of a tool call. Its first piece has `name` and `id`."""
    name = {"name": more["name"]} if "name" in more else {}
    call = {"id": more["id"], "type": "function"} if "id" in more else {}
    return chunk(tool_calls=[{"index": index, "function": {"arguments": arguments} | name} | call])


def summed(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the message that a client makes of events, as Anthropic documents it."""
    message: dict[str, Any] = {}
    arguments: dict[int, str] = {}
    for event in events:
        kind = event["type"]
        if kind == "message_start":
            message = event["message"]
        elif kind == "content_block_start":
            assert event["index"] == len(message["content"])
            message["content"].append(event["content_block"])
        elif kind == "content_block_delta":
            block, delta = message["content"][event["index"]], event["delta"]
            assert event["index"] == len(message["content"]) - 1
            if delta["type"] == "input_json_delta":
                arguments[event["index"]] = arguments.get(event["index"], "") + delta["partial_json"]
            else:
                (field,) = delta.keys() - {"type"}
                block[field] += delta[field]
        elif kind == "message_delta":
            message |= event["delta"]
            message["usage"] |= event["usage"]
    for index, text in arguments.items():
        message["content"][index]["input"] = json.loads(text)
    return message


def completion(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the blocking answer with the content of these chunks."""
    message: dict[str, Any] = {"role": "assistant", "content": None}
    calls: dict[int, dict[str, Any]] = {}
    whole: dict[str, Any] = {"index": 0, "message": message, "finish_reason": None}
    usage = None
    for it in chunks:
        usage = it.get("usage") or usage
        for choice in it["choices"]:
            whole["finish_reason"] = choice["finish_reason"] or whole["finish_reason"]
            for field in ("content", "reasoning_content"):
                if choice["delta"].get(field):
                    message[field] = (message.get(field) or "") + choice["delta"][field]
            for call in choice["delta"].get("tool_calls", ()):
                function = calls.setdefault(call["index"], {"function": {"name": "", "arguments": ""}})["function"]
                calls[call["index"]] |= {key: call[key] for key in ("id", "type") if key in call}
                function["name"] += call["function"].get("name", "")
                function["arguments"] += call["function"]["arguments"]
    if calls:
        message["tool_calls"] = [calls[index] for index in sorted(calls)]
    return {"id": "c", "object": "chat.completion", "choices": [whole], "usage": usage}
