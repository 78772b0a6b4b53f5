"""History: translate the items of a conversation into chat messages.

Consecutive items of the assistant (reasoning, text, calls) become one message. The translation of an item depends only
on what stands before it, so a growing conversation keeps its prefix, on which an engine's cache depends.
"""

import base64
import binascii
from typing import Any

import orjson

from gateway.errors import BadRequest
from gateway.translation.responses.fields import Ignored, mapping, name, one_of, sequence, string
from gateway.translation.responses.parts import content, result
from gateway.translation.responses.tools import INPUT, Toolbox

SEALED = "stack.v1."  # the prefix of the gateway's `encrypted_content`, which holds the reasoning in base64
ROLES = ("user", "assistant", "system", "developer")
# Records of tools that ran on another provider's servers. Their results are in that provider's text.
_HOSTED = frozenset(
    {"web_search_call", "file_search_call", "code_interpreter_call", "image_generation_call"}
    | {"mcp_list_tools", "mcp_call", "mcp_approval_request", "mcp_approval_response"}
)
_KEYS = {
    "message": frozenset({"type", "role", "content", "id", "status", "phase"}),
    "reasoning": frozenset({"type", "id", "summary", "content", "encrypted_content", "status"}),
    "function_call": frozenset(
        {"type", "id", "call_id", "name", "namespace", "arguments", "status", "caller", "async"}
    ),
    "custom_tool_call": frozenset({"type", "id", "call_id", "name", "namespace", "input", "status", "caller", "async"}),
    "function_call_output": frozenset({"type", "id", "call_id", "name", "namespace", "output", "status", "caller"}),
    "custom_tool_call_output": frozenset({"type", "id", "call_id", "output", "status", "caller"}),
}


def kind_of(item: dict[str, Any]) -> Any:
    """Return an item's type. A message may leave it out, and so may a reference, which is an id alone."""
    if item.get("type") is not None:
        return item["type"]
    if "role" in item:
        return "message"
    return "item_reference" if item.keys() - {"type"} == {"id"} else None


class History:
    """Translate a conversation: `add` each item in order, then take the `messages`. Each method raises BadRequest that
    names the item's field by its path."""

    def __init__(self, tools: Toolbox, ignored: Ignored) -> None:
        self._tools = tools
        self._ignored = ignored
        self._messages: list[dict[str, Any]] = []
        self._answer: dict[str, Any] | None = None  # the last message if it is the assistant's and may be added to
        self._thoughts: list[str] = []  # reasoning that waits for the text or the call that follows it
        self._images: list[dict[str, Any]] = []  # images of tool outputs, which follow the last of these outputs

    def add(self, item: Any, where: str) -> None:
        """Add one item, whose path is `where`."""
        kind = name(kind_of(mapping(item, where)), f"{where}.type")
        if (known := _KEYS.get(kind)) is None:
            self._other(kind, item, where)
            return
        self._ignored.unknown(item, known, "input[]")
        if not kind.endswith("_output"):
            self._show_images()
        if kind == "message":
            self._message(item, where)
        elif kind == "reasoning":
            self._thoughts.append(_reasoning(item, where))
        elif kind == "function_call":
            self._call(item, where, _arguments(item.get("arguments"), f"{where}.arguments"))
        elif kind == "custom_tool_call":
            text = string(item.get("input"), f"{where}.input")
            self._call(item, where, orjson.dumps({INPUT: text}).decode())
        else:
            self._output(item, where)

    def messages(self) -> list[dict[str, Any]]:
        """Return all messages. Reasoning at the very end is left out, because an engine would take a last assistant
        message for the beginning of its answer."""
        self._show_images()
        if any(self._thoughts):
            self._ignored.add("input[].reasoning")
        return self._messages

    def _message(self, item: dict[str, Any], where: str) -> None:
        role = one_of(item.get("role"), f"{where}.role", ROLES)
        value = item.get("content")
        if role != "assistant":
            self._end_answer()
            self._messages.append({"role": role, "content": content(value, f"{where}.content", self._ignored)})
            return
        text = "" if value is None else content(value, f"{where}.content", self._ignored, joint="")
        answer = self._answer
        if answer is None or (answer["content"] is not None and "tool_calls" not in answer):
            self._begin_answer()["content"] = text
            return
        # Text after a call: templates expect the call's output right after the message with the call
        self._think(answer)
        answer["content"] = _joined(answer["content"], text)

    def _call(self, item: dict[str, Any], where: str, arguments: str) -> None:
        call_id = name(item.get("call_id"), f"{where}.call_id")
        own = name(item.get("name"), f"{where}.name")
        space = item.get("namespace")
        if space is not None:
            string(space, f"{where}.namespace")
        answer = self._answer
        if answer is None:
            answer = self._begin_answer()
        else:
            self._think(answer)
        function = {"name": self._tools.engine_name(own, space or None), "arguments": arguments}
        answer.setdefault("tool_calls", []).append({"id": call_id, "type": "function", "function": function})

    def _output(self, item: dict[str, Any], where: str) -> None:
        self._end_answer()
        call_id = name(item.get("call_id"), f"{where}.call_id")
        text, images = result(item.get("output"), f"{where}.output", self._ignored)
        self._messages.append({"role": "tool", "tool_call_id": call_id, "content": text})
        self._images += images

    def _other(self, kind: str, item: dict[str, Any], where: str) -> None:
        lost = kind == "item_reference"
        if kind in _HOSTED or (lost and str(item.get("id")).startswith("rs_")):  # reasoning, without which it goes on
            self._ignored.add(f"input.{kind}")
            return
        if lost:
            raise BadRequest(
                f"'{where}.id' refers to an item that this gateway has not stored. Send the item itself. Vercel's AI"
                " SDK does that with `providerOptions: { openai: { store: false } }`. Or ask the operator to set"
                " STACK_RESPONSES_DAYS, with which the gateway stores items.",
                param=f"{where}.id",
            )
        raise BadRequest(
            f"'{where}.type' is {kind[:64]!r}, which no engine takes. Possible types: {', '.join(_KEYS)}.",
            param=f"{where}.type",
        )

    def _begin_answer(self) -> dict[str, Any]:
        self._answer = {"role": "assistant", "content": None}
        self._messages.append(self._answer)
        self._think(self._answer)
        return self._answer

    def _think(self, answer: dict[str, Any]) -> None:
        thoughts = [it for it in (answer.get("reasoning_content"), *self._thoughts) if it]
        self._thoughts = []
        if thoughts:
            answer["reasoning_content"] = "\n\n".join(thoughts)

    def _end_answer(self) -> None:
        """End the assistant's last message, so that nothing more is added. Reasoning that nothing follows becomes a
        message of its own, because it may have used up the answer's whole budget."""
        if any(self._thoughts):
            self._begin_answer()["content"] = ""
        self._thoughts = []
        self._answer = None

    def _show_images(self) -> None:
        """Add the images of tool outputs. Tool messages may hold only text and must be contiguous, so images come after
        them."""
        if self._images:
            told = {"type": "text", "text": "The images that the tools returned:"}
            self._messages.append({"role": "user", "content": [told, *self._images]})
            self._images = []


def _joined(before: str | list[dict[str, Any]] | None, more: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Return two contents of one message as one: a text, or a list of parts if one of them has parts."""
    if not before or not more:
        return before or more
    if isinstance(before, str) and isinstance(more, str):
        return f"{before}\n\n{more}"
    both = ([{"type": "text", "text": it}] if isinstance(it, str) else it for it in (before, more))
    return [part for parts in both for part in parts]


def _reasoning(item: dict[str, Any], where: str) -> str:
    """Return the text of a reasoning item. The gateway writes the same text into three places. Another provider's
    encrypted text is skipped, because it cannot be read here."""
    if text := _texts(item.get("content"), f"{where}.content"):
        return text
    sealed = item.get("encrypted_content")
    if sealed is not None and string(sealed, f"{where}.encrypted_content").startswith(SEALED):
        try:
            return base64.b64decode(sealed.removeprefix(SEALED), validate=True).decode()
        except (binascii.Error, ValueError):
            param = f"{where}.encrypted_content"
            raise BadRequest(
                f"'{param}' differs from what the gateway sent. Send it back unchanged.", param=param
            ) from None
    return _texts(item.get("summary"), f"{where}.summary")


def _texts(value: Any, where: str) -> str:
    if value is None:
        return ""
    texts = []
    for index, part in enumerate(sequence(value, where)):
        path = f"{where}[{index}]"
        texts.append(string(mapping(part, path).get("text"), f"{path}.text"))
    return "\n\n".join(it for it in texts if it)


def _arguments(value: Any, where: str) -> str:
    """Return arguments that every engine takes. Engines parse those of earlier calls, and fail with a 400 or 500 if
    they are not an object. Such text becomes the only member of an object."""
    if type(value) is dict:
        try:
            return orjson.dumps(value).decode()
        except TypeError:
            raise BadRequest(f"'{where}' is nested too deeply.", param=where) from None
    if value is None or not string(value, where).strip():
        return "{}"
    text: str = value
    try:
        if type(orjson.loads(text)) is dict:
            return text
    except orjson.JSONDecodeError:
        pass
    return orjson.dumps({"raw": text}).decode()
