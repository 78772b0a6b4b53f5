"""Writer: write a chat answer to a Messages request as Anthropic's events or as one message.

A message is a list of blocks, one after the other: thinking, text, tool_use. A stream opens a block when its first
piece comes and closes it before the next one. Blocks that are empty, or have only white space, are not sent, because a
client would send them back in its next request, and many chat templates fail on them.
"""

import re
from typing import Any, Literal

import orjson

from gateway.errors import EngineError, StackError
from gateway.exchange import Usage
from gateway.translation.face import retell
from gateway.translation.messages.chat import (
    UNREADABLE,
    arguments_of,
    calls_of,
    choice_of,
    function_of,
    reason_of,
    text_of,
    usage_of,
)
from gateway.translation.messages.envelope import envelope
from gateway.translation.messages.fields import NAMES
from gateway.translation.order import Order

# Clients (pi, Vercel's SDK) send a thinking block back only if it has a signature. The gateway does not verify it.
SIGNATURE = "c3RhY2s="

_Kind = Literal["text", "thinking", "tool_use"]
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)  # Anthropic's own pattern for the id of a call
_PING = b'event: ping\ndata: {"type":"ping"}\n\n'
_STOP = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
_DELTA = b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":{"type":"%b","%b":'
_SIGNED = _DELTA + b'"' + SIGNATURE.encode() + b'"}}\n\n'
_DELTAS: dict[_Kind, tuple[bytes, bytes]] = {
    "text": (b"text_delta", b"text"),
    "thinking": (b"thinking_delta", b"thinking"),
    "tool_use": (b"input_json_delta", b"partial_json"),
}
_EMPTY: dict[_Kind, dict[str, Any]] = {
    "text": {"type": "text", "text": ""},
    "thinking": {"type": "thinking", "thinking": "", "signature": ""},
}


class Writer:
    """Write one answer. `max_tokens` and `stops` are the request's. One request uses it once."""

    def __init__(self, *, request_id: str, model: str, max_tokens: int | None, stops: tuple[str, ...] = ()) -> None:
        self._request_id = request_id
        self._model = model
        self._max_tokens = max_tokens
        self._stops = stops
        self._index = -1  # the index of the last block that was opened
        self._open: _Kind | None = None
        self._delta = b""  # the start of the open block's events
        self._held: dict[_Kind, str] = {}  # white space that may begin a block, if more follows
        self._order = Order()
        self._calls: list[int] = []  # the engine's numbers of the calls so far; the last one may be open
        self._pending: str | None = None  # the arguments of a call whose name has not come yet
        self._given: Any = None  # the engine's id of the last call
        self._ids: set[str] = set()
        self._finish: dict[str, Any] = {}  # the choice with the finish_reason
        self._usage: Any = None
        self._refused = False

    def head(self) -> bytes:
        """Return the start of the message. The engine has counted no token yet, so message_delta reports the usage."""
        message = self._message([], usage_of(None, None))
        return _event("message_start", {"message": message}) + _PING

    def waiting(self) -> bytes:
        """Return a ping, which every client knows. (@ai-sdk/anthropic fails at types that it does not know.)"""
        return _PING

    def chunk(self, chunk: dict[str, Any]) -> bytes:
        """Translate one chunk. Raises EngineError if it is malformed, or if a call goes on that was whole and closed:
        the client may have begun to run it."""
        if usage := chunk.get("usage"):
            self._usage = usage
        choices = chunk.get("choices")
        if not choices:
            return b""
        choice = choice_of(choices)
        if choice.get("finish_reason"):
            self._finish = choice
        delta = choice.get("delta")
        if not delta:
            return b""
        if type(delta) is not dict:
            raise EngineError(UNREADABLE)
        if self._order.open is not None or delta.get("tool_calls"):
            delta = self._order.take(delta)
        return self._pieces(delta)

    def _pieces(self, delta: dict[str, Any]) -> bytes:
        events = b""
        if thought := delta.get("reasoning_content") or delta.get("reasoning"):
            events = self._piece("thinking", thought)
        if said := delta.get("content"):
            events += self._piece("text", said)
        if said := delta.get("refusal"):
            self._refused = True
            events += self._piece("text", said)
        if calls := delta.get("tool_calls"):
            for call in calls_of(calls):
                events += self._call(call)
        return events

    def end(self) -> bytes:
        """Close the message, with its reason and its usage. Raises EngineError if a call has no name."""
        events = b"".join([self._pieces(delta) for delta, _ in self._order.rest()])
        if self._pending is not None:
            raise EngineError("The engine called a tool without naming it.")
        usage = Usage.of(self._usage)
        reason, sequence = self._reason(self._finish, usage)
        told = {"delta": {"stop_reason": reason, "stop_sequence": sequence}, "usage": usage_of(usage, self._usage)}
        return events + self._close() + _event("message_delta", told) + _STOP

    def failed(self, error: StackError) -> bytes:
        """End a broken answer. The open block stays open, so that no client takes it for complete."""
        retell(error, NAMES)
        body, _ = envelope(error, request_id=self._request_id, message=error.stream_message)
        return b"event: error\ndata: %b\n\n" % body

    def whole(self, completion: dict[str, Any]) -> dict[str, Any]:
        """Translate a blocking completion into the blocks of the stream. Raises EngineError if it has no answer, or a
        call without a name."""
        choice = choice_of(completion.get("choices"))
        answer = choice.get("message")
        if type(answer) is not dict:
            raise EngineError(UNREADABLE)
        thought = text_of(answer.get("reasoning_content") or answer.get("reasoning"))
        refusal = text_of(answer.get("refusal"))
        self._refused = refusal != ""
        said = text_of(answer.get("content")) + refusal
        blocks: list[dict[str, Any]] = []
        if thought.strip():
            blocks.append({"type": "thinking", "thinking": thought, "signature": SIGNATURE})
        if said.strip():
            blocks.append({"type": "text", "text": said})
        calls = calls_of(answer.get("tool_calls"))
        blocks += [self._tool_use(call.get("id"), function_of(call), parsed=True) for call in calls]
        usage = Usage.of(completion.get("usage"))
        message = self._message(blocks, usage_of(usage, completion.get("usage")))
        message["stop_reason"], message["stop_sequence"] = self._reason(choice, usage)
        return message

    def _message(self, blocks: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": f"msg_{self._request_id}",
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": blocks,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }

    def _piece(self, kind: _Kind, piece: str) -> bytes:
        """Write a piece of text or thinking, into the open block if that is of its kind."""
        if type(piece) is not str:
            raise EngineError(UNREADABLE)
        if self._open == kind:
            return self._delta + orjson.dumps(piece) + b"}}\n\n"
        piece = self._held.pop(kind, "") + piece
        if piece.isspace():
            self._held[kind] = piece
            return b""
        return self._start(kind, _EMPTY[kind]) + self._delta + orjson.dumps(piece) + b"}}\n\n"

    def _call(self, call: dict[str, Any]) -> bytes:
        """Write a piece of a call: its beginning, or more of its arguments."""
        function = function_of(call)
        named, given, number = function.get("name"), call.get("id"), call.get("index")
        arguments = text_of(function.get("arguments"))
        if type(number) is not int:  # gateway.relay.tool_calls gives every piece one
            raise EngineError(UNREADABLE)
        if number not in self._calls:
            if self._pending is not None:
                raise EngineError("The engine called a tool without naming it.")
            self._calls.append(number)
            self._given, self._pending = given, ""
            return self._begin(named, arguments)
        if self._pending is not None and number == self._calls[-1]:
            self._given = self._given or given
            return self._begin(named, arguments)
        if not arguments:
            return b""
        if number == self._calls[-1] and self._open == "tool_use":
            return self._delta + orjson.dumps(arguments) + b"}}\n\n"
        raise EngineError("The engine mixed the pieces of several tool calls.")

    def _begin(self, named: Any, arguments: str) -> bytes:
        """Open the block of a call as soon as its name is known, with the arguments so far."""
        arguments = (self._pending or "") + arguments
        if not named:
            self._pending = arguments
            return b""
        self._pending = None
        events = self._start("tool_use", self._tool_use(self._given, {"name": named}, parsed=False))
        return events + self._delta + orjson.dumps(arguments) + b"}}\n\n" if arguments else events

    def _tool_use(self, given: Any, function: dict[str, Any], *, parsed: bool) -> dict[str, Any]:
        """Return the block of a call. The engine's id stays if clients accept its form, because some templates depend
        on it."""
        called = function.get("name")
        if type(called) is not str or not called:
            raise EngineError("The engine called a tool without naming it.")
        if type(given) is not str or given in self._ids or not _ID.fullmatch(given):
            given = f"toolu_{self._request_id}_{len(self._ids)}"
        self._ids.add(given)
        arguments = arguments_of(text_of(function.get("arguments"))) if parsed else {}
        return {"type": "tool_use", "id": given, "name": called, "input": arguments}

    def _start(self, kind: _Kind, block: dict[str, Any]) -> bytes:
        events = self._close()
        self._index += 1
        self._open = kind
        self._delta = _DELTA % (self._index, *_DELTAS[kind])
        return events + _event("content_block_start", {"index": self._index, "content_block": block})

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        signed = _SIGNED % (self._index, b"signature_delta", b"signature") if self._open == "thinking" else b""
        self._open = None
        return signed + _event("content_block_stop", {"index": self._index})

    def _reason(self, choice: dict[str, Any], usage: Usage | None) -> tuple[str, str | None]:
        return reason_of(
            choice,
            usage,
            called=bool(self._ids),
            refused=self._refused,
            max_tokens=self._max_tokens,
            stops=self._stops,
        )


def _event(kind: str, fields: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps({"type": kind} | fields))
