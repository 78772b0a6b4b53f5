"""Fold: a stream's chunks, added up to the answer that a blocking request would have got.

For engines that go on with a blocking request whose client has left (dialects, `deaf`): they are asked for a stream,
which they do abort, and the caller gets one answer all the same, the engine's own but for id, times and timings. What
a stream doesn't tell is missing: the log probability of the token that ends an answer. Requests whose stream lacks text
of the answer are not folded. (All of llama.cpp's, tried.)

And for engines whose streams hold all that their blocking answers do (`whole_streams`): an answer of which a part is
known can be continued if the engine dies.
"""

from collections.abc import Callable
from typing import Any

from gateway.exchange import Exchange, Usage

_OBJECTS = {"chat.completion.chunk": "chat.completion"}
_ONCE = ("role", "id", "type", "name")  # strings of a delta that are complete, and never continued


class Fold:
    """One answer in the making: `add` each chunk, then take the `answer`. `messages` are as `repeated` says. `note`
    is told each chunk. `exact`: the engine's blocking answers say what its streams do (dialects, `whole_streams`)."""

    exact = False

    def __init__(self, messages: list[dict[str, Any]], note: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.note = note
        self._beginning = _beginning(messages)
        self._answer: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}

    def add(self, chunk: dict[str, Any]) -> None:
        """Add one chunk. Its fields beside the choices hold for the whole answer, and a later value replaces an earlier
        one, but null and an empty string replace nothing."""
        if self.note is not None:
            self.note(chunk)
        for name, value in chunk.items():
            if name == "choices":
                for choice in value:
                    self._add_choice(choice)
            elif value is not None and (value != "" or name not in self._answer):
                self._answer[name] = value

    def answer(self, usage: Usage | None) -> dict[str, Any]:
        """Return the whole answer, with the choices in order. If there are several, `usage` is the usage of all,
        because a chunk's usage and timings are those of one choice."""
        kind = self._answer.get("object")
        choices = [self._choices[index] for index in sorted(self._choices)]
        for message in (choice["message"] for choice in choices if "message" in choice):
            if (calls := message.get("tool_calls")) is not None:
                calls = message["tool_calls"] = list(calls.values())
            if self.exact:
                message["content"] = message["content"] or ""
                if calls:
                    message["tool_calls"] = [it | {"index": number} for number, it in enumerate(calls)]
                continue
            content = self._beginning + (message["content"] or "")
            message["content"] = content or (None if calls else "")
        if usage is not None and len(choices) > 1:
            self._answer["usage"] = usage.as_object()
            self._answer.pop("timings", None)
        return {"choices": choices} | self._answer | {"object": _OBJECTS.get(str(kind), kind)}

    def _add_choice(self, choice: dict[str, Any]) -> None:
        index = choice.get("index", 0)
        whole = self._choices.setdefault(index, {"finish_reason": None, "index": index})
        for name, value in choice.items():
            if name == "delta" and isinstance(value, dict):
                _add_delta(whole.setdefault("message", {"role": "assistant", "content": None}), value)
            elif name == "text":
                whole["text"] = whole.get("text", "") + (value or "")
            elif name == "logprobs" and isinstance(value, dict):
                whole["logprobs"] = whole.get("logprobs") or {}
                _continue(whole["logprobs"], value)
            elif name == "finish_reason":  # the first one holds, as in a stream
                whole[name] = whole[name] or value
            elif (value is not None and value != "") or name not in whole:
                whole[name] = value


def foldable(fields: dict[str, Any]) -> bool:
    """Return whether the stream for this request holds all of the answer. If an answer ends by its limit, a stream
    lacks the text that might have become a stop sequence, and the JSON before its first valid piece."""
    form = fields.get("response_format")
    plain = form is None or (isinstance(form, dict) and form.get("type") == "text")
    stops = any(fields.get("stop") or ())  # empty stop sequences are not sent (gateway.upstream.parameters)
    return plain and not stops and fields.get("json_schema") is None


def streamable(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a request's fields as a stream takes them: together with `tools`, `logprobs` needs the engine's
    own name."""
    if not fields.get("tools") or not fields.get("logprobs"):
        return fields
    kept = {name: value for name, value in fields.items() if name not in ("logprobs", "top_logprobs")}
    top = fields.get("top_logprobs")
    return kept | {"n_probs": 20 if top is None else top}


def repeated(exchange: Exchange) -> list[dict[str, Any]]:
    """Return the messages of a chat completion, whose blocking answer repeats a last assistant message if the engine
    `repeats` it (dialects). The answers of the translated APIs hold only what is new."""
    return exchange.fields["messages"] if exchange.endpoint.chats and exchange.origin is None else []


def remove_beginning(answer: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    """Take a last assistant message off the beginning of a blocking answer that repeats it."""
    choices = answer.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        message = choice.get("message") if isinstance(choice, dict) else None
        if isinstance(message, dict) and isinstance(content := message.get("content"), str):
            message["content"] = content.removeprefix(_beginning(messages))


def _beginning(messages: list[dict[str, Any]]) -> str:
    """Return the text of a last assistant message, which the answer continues."""
    if not messages or messages[-1]["role"] != "assistant":
        return ""
    content = messages[-1].get("content")
    if isinstance(content, list):
        content = "\n\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _add_delta(message: dict[str, Any], delta: dict[str, Any]) -> None:
    """Add a delta. Tool calls come in pieces that carry their call's index, and are kept by it until the end."""
    pieces = delta.get("tool_calls")
    if isinstance(pieces, list):
        calls = message["tool_calls"] = message.get("tool_calls") or {}
        for piece in pieces:
            rest = {name: value for name, value in piece.items() if name != "index"}
            _continue(calls.setdefault(piece["index"], {}), rest)
        delta = {name: value for name, value in delta.items() if name != "tool_calls"}
    _continue(message, delta)


def _continue(whole: dict[str, Any], more: dict[str, Any]) -> None:
    """Add to an object: its texts are continued, its lists extended, and so are its objects. Null and an empty string
    replace nothing."""
    for name, value in more.items():
        there = whole.get(name)
        if value is None or (value == "" and there is not None):
            whole.setdefault(name, None)
        elif isinstance(value, str) and isinstance(there, str) and name not in _ONCE:
            whole[name] = there + value
        elif isinstance(value, dict) and isinstance(there, dict):
            _continue(there, value)
        elif isinstance(value, list):
            whole[name] = there if isinstance(there, list) else []
            whole[name] += value
        else:
            whole[name] = value
