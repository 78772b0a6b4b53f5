"""Conversation: translate the system prompt and the messages of a request into chat messages.

The same conversation always gives the same messages, and a longer one gives the same messages and more, because the
engine's prefix cache depends on it. Every text therefore becomes a string, in whichever form the client wrote it. Cache
marks have no effect, and each message is translated by itself, in its place.
"""

from dataclasses import dataclass
from typing import Any

import orjson

from gateway.errors import BadRequest
from gateway.translation.messages import blocks
from gateway.translation.messages.fields import MOST_MESSAGES, Notes, a_flag, a_list, an_object, name, one_of, text

# Claude Code 2.1.332 puts this line first. Its last digits depend on the user's first message, so no two conversations
# would share a prefix.
BILLING = "x-anthropic-billing-header:"
_ROLES = ("user", "assistant", "system")
_IN_MESSAGE = frozenset({"role", "content"})
_IN_THINKING = frozenset({"thinking", "signature"})
# `caller` and `toolset_name` tell how the call came about, and ask for nothing
_IN_CALL = frozenset({"id", "name", "input", "caller", "toolset_name"})
_IN_RESULT = frozenset({"tool_use_id", "content", "is_error", "toolset_name"})
_IN_COMPACTION = frozenset({"content", "encrypted_content", "signature"})
_ENCRYPTED = "redacted_thinking"  # only the service that wrote it can read it


@dataclass(frozen=True, slots=True)
class Conversation:
    """The chat messages, and the names of the tools that were called or loaded by a reference, each once, in order."""

    messages: list[dict[str, Any]]
    used: tuple[str, ...]


def read_conversation(system: Any, messages: Any, notes: Notes) -> Conversation:
    """Translate the system prompt (text, blocks, or null) and the messages. Raises BadRequest by the caller's path."""
    found = _system(system, notes)
    used: dict[str, None] = {}
    listed = a_list(messages, "messages")
    if not listed:
        raise BadRequest("'messages' is empty.", param="messages")
    if len(listed) > MOST_MESSAGES:
        raise BadRequest(f"'messages' has more than {MOST_MESSAGES} entries.", param="messages")
    for index, it in enumerate(listed):
        where = f"messages[{index}]"
        message = an_object(it, where)
        notes.unknown(message, _IN_MESSAGE, "messages", where)
        role = one_of(message.get("role"), _ROLES, f"{where}.role")
        found += _READERS[role](message.get("content"), f"{where}.content", used, notes)
    return Conversation(found, tuple(used))


def _system(value: Any, notes: Notes) -> list[dict[str, Any]]:
    if value is None:
        return []
    if type(value) is list and value and type(value[0]) is dict:
        first = value[0].get("text")
        if type(first) is str and first.startswith(BILLING):
            told = blocks.only_text(value[1:], "system", notes, first=1)
            return [{"role": "system", "content": told}] if told else []
    told = blocks.only_text(value, "system", notes)
    return [{"role": "system", "content": told}] if told else []


def _instruction(content: Any, where: str, used: dict[str, None], notes: Notes) -> list[dict[str, Any]]:
    """Translate a message with the role system in the middle of a conversation. It stays in its place, because at the
    front it would change the prefix."""
    del used
    return [{"role": "system", "content": blocks.only_text(content, where, notes)}]


def _user(content: Any, where: str, used: dict[str, None], notes: Notes) -> list[dict[str, Any]]:
    """Translate a user message. The results of tools come first and contiguous, as separate messages, and the user's
    other content follows."""
    if type(content) is str:
        return [{"role": "user", "content": content}]
    results: list[dict[str, Any]] = []
    images: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    for index, it in enumerate(a_list(content, where)):
        path = f"{where}[{index}]"
        block = an_object(it, path)
        if block.get("type") == "tool_result":
            results.append(_result(block, path, images, used, notes))
        else:
            parts += blocks.parts(block, path, notes)
    if results and not images and not parts:
        return results
    return [*results, {"role": "user", "content": blocks.joined(images + parts)}]


def _result(
    block: dict[str, Any], where: str, images: list[dict[str, Any]], used: dict[str, None], notes: Notes
) -> dict[str, Any]:
    """Return a tool's result as a message with only text, which all engines take. Its images are added to `images`,
    numbered."""
    notes.unknown(block, _IN_RESULT, "messages.content", where)
    told: list[str] = ["Error:"] if a_flag(block.get("is_error"), f"{where}.is_error") else []
    content = block.get("content")
    if type(content) is str:
        told.append(content)
    elif content is not None:
        for index, it in enumerate(a_list(content, f"{where}.content")):
            path = f"{where}.content[{index}]"
            inner = an_object(it, path)
            if inner.get("type") == "tool_reference":
                tool = name(inner.get("tool_name"), f"{path}.tool_name")
                used[tool] = None
                told.append(f"The tool {tool} is available now.")
                continue
            for part in blocks.parts(inner, path, notes):
                if part["type"] == "text":
                    told.append(part["text"])
                    continue
                label = f"[image {len(images) // 2 + 1}]"
                told.append(f"{label} follows in the next message.")
                images += [{"type": "text", "text": label}, part]
    called = name(block.get("tool_use_id"), f"{where}.tool_use_id")
    return {"role": "tool", "tool_call_id": called, "content": blocks.SEPARATOR.join(it for it in told if it)}


def _assistant(content: Any, where: str, used: dict[str, None], notes: Notes) -> list[dict[str, Any]]:
    if type(content) is str:
        return [{"role": "assistant", "content": content}]
    told: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for index, it in enumerate(a_list(content, where)):
        path = f"{where}[{index}]"
        block = an_object(it, path)
        kind = block.get("type")
        if kind == "tool_use":
            calls.append(_call(block, path, notes))
            used[calls[-1]["function"]["name"]] = None
        elif kind == "thinking":
            notes.unknown(block, _IN_THINKING, "messages.content", path)
            thoughts.append(text(block.get("thinking"), f"{path}.thinking"))
        elif kind == "compaction":
            told.append(_summary(block, path, notes))
        elif type(kind) is str and _is_foreign(kind):
            notes.ignore("messages.content", path)
        elif kind != "text":
            raise BadRequest(
                f"'{path}.type' must be one of text, thinking, tool_use, redacted_thinking or compaction in an"
                " assistant's message.",
                param=f"{path}.type",
            )
        else:
            told.append(blocks.only_text([block], where, notes, first=index))
    message: dict[str, Any] = {"role": "assistant", "content": blocks.SEPARATOR.join(it for it in told if it)}
    if thought := blocks.SEPARATOR.join(it for it in thoughts if it):
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = calls
    return [message]


def _summary(block: dict[str, Any], where: str, notes: Notes) -> str:
    """Return the summary that Anthropic's service wrote of the conversation before this block. What it stands for is
    kept, too. It is null if there was none."""
    notes.unknown(block, _IN_COMPACTION, "messages.content", where)
    summary = block.get("content")
    return "" if summary is None else text(summary, f"{where}.content")


def _call(block: dict[str, Any], where: str, notes: Notes) -> dict[str, Any]:
    notes.unknown(block, _IN_CALL, "messages.content", where)
    given = block.get("input")
    try:
        arguments = orjson.dumps({} if given is None else an_object(given, f"{where}.input")).decode()
    except TypeError:  # nested more than 254 levels deep
        raise BadRequest(f"'{where}.input' is nested too deeply.", param=f"{where}.input") from None
    function = {"name": name(block.get("name"), f"{where}.name"), "arguments": arguments}
    return {"id": name(block.get("id"), f"{where}.id"), "type": "function", "function": function}


def _is_foreign(kind: str) -> bool:
    """Return whether a block of an assistant records a tool that ran at Anthropic, in a conversation that
    began there."""
    return kind in (_ENCRYPTED, "server_tool_use", "mcp_tool_use", "fallback") or kind.endswith("_tool_result")


_READERS = {"user": _user, "assistant": _assistant, "system": _instruction}
