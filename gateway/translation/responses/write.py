"""Write: write one answer in the form of the Responses API, as a stream or as one object.

A stream begins with `response.created` and `response.in_progress`. It sends each output item from `output_item.added`
to `output_item.done`. It ends with `response.completed`, `.incomplete` or `.failed`, which holds the whole response.
"""

from collections.abc import Callable
from typing import Any, Literal

from gateway.errors import EngineError, StackError
from gateway.translation.face import retell
from gateway.translation.order import Order
from gateway.translation.responses.errors import failure
from gateway.translation.responses.events import Events
from gateway.translation.responses.fields import NAMES
from gateway.translation.responses.items import Call, CustomCall, Item, Message, Reasoning, Status
from gateway.translation.responses.resource import Settings, usage_of
from gateway.translation.responses.tools import Toolbox

# The reason in `incomplete_details` for the finish_reason of a cut answer. Any other finish_reason means a complete
# answer.
_CUT = {"length": "max_output_tokens", "content_filter": "content_filter"}


class ResponseWriter:
    """Write one answer (gateway.translation.face.Writer). `unique` is a part of its items' ids. `asked` are the input
    items of the request, as they are to be stored. `clock` returns seconds since 1970."""

    def __init__(
        self,
        settings: Settings,
        tools: Toolbox,
        unique: str,
        asked: list[dict[str, Any]],
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._tools = tools
        self._unique = unique
        self._asked = asked
        self._clock = clock
        self._events = Events()
        self._items: list[Item] = []  # the items that have begun, in order
        self._open: Item | None = None
        self._text: Message | None = None  # the open item if text is being added to it
        # White space that may begin an item, if more follows: of a message, with its log probabilities; of reasoning
        self._held: tuple[str, list[dict[str, Any]]] = ("", [])
        self._held_thought = ""
        self._order = Order()
        self._calls: dict[int, Call | None] = {}  # by the index in chat's deltas; None: it has no name yet
        self._early: dict[int, list[tuple[Any, str]]] = {}  # ids and arguments of calls that have no name yet
        self._finish: str | None = None
        self._usage: dict[str, Any] | None = None
        self._begun = False
        self._out: list[
            bytes
        ] = []  # the events of the current chunk; if it has a fault, those before the fault are sent with the failure
        self._final: dict[str, Any] | None = None

    def head(self) -> bytes:
        """Return `response.created` and `response.in_progress`."""
        self._begun = True
        return self._progress("created") + self._progress("in_progress")

    def waiting(self) -> bytes:
        """Return an event for clients whose timer ignores comments: `response.in_progress` once more, or an empty delta
        within an item."""
        return self._progress("in_progress") if self._open is None else self._open.idle()

    def chunk(self, chunk: dict[str, Any]) -> bytes:
        """Return one chat chunk as events. Raises EngineError if it cannot be translated: a text that is not a string,
        or arguments for a call that was complete."""
        usage = chunk.get("usage")
        if usage is not None:
            self._usage = usage_of(usage)
        choices = chunk.get("choices")
        if not choices:
            return b""
        choice = _dict(choices[0] if type(choices) is list else None)
        if (finish := choice.get("finish_reason")) is not None:
            self._finish = str(finish)
        delta = _dict(choice.get("delta") or {})
        logprobs = choice.get("logprobs")
        # Nearly every chunk is one more text for the open message.
        if self._text is not None and len(delta) == 1 and not logprobs:
            content = delta.get("content")
            if content and type(content) is str:
                return self._text.write("output_text", content)
        if self._order.open is not None or delta.get("tool_calls"):
            delta = self._order.take(delta, logprobs)
        self._delta(delta, logprobs)
        events = b"".join(self._out)
        self._out.clear()
        return events

    def end(self) -> bytes:
        """Return the last events: those of the open item, and `response.completed` or `response.incomplete`. Raises
        EngineError for an answer without a finish_reason, whatever it held, and for a call without a name."""
        if self._finish is None:
            raise EngineError("The engine's answer ended too early.")
        reason = _CUT.get(self._finish)
        for delta, logprobs in self._order.rest():
            self._delta(delta, logprobs)
        if self._early:
            raise EngineError("The engine called a tool without naming it.")
        if reason is None and all(isinstance(it, Reasoning) for it in self._items):
            # The model has said nothing. Clients read the last message, and in a stored conversation the next question
            # must follow an answer, because some chat templates refuse two messages of the user in a row.
            self._out.append(self._message().empty())
        events = b"".join(self._out) + self._close("completed" if reason is None else "incomplete")
        self._out.clear()
        state = "completed" if reason is None else "incomplete"
        self._final = {"status": state, "incomplete": reason, "usage": self._usage}
        if reason is None:
            self._final["completed_at"] = int(self._clock())
        return events + self._events.event(f"response.{state}", {"response": self._response(written=True)})

    def failed(self, error: StackError) -> bytes:
        """Return `error` and `response.failed`. Codex reads only the second, and LangChain only the first. Open items
        stay open, because a client runs a call when it is done."""
        events = (b"" if self._begun else self.head()) + b"".join(self._out)
        self._out.clear()
        if isinstance(self._open, Call):
            self._items.pop()
        elif self._open is not None:
            self._open.cut()
        self._open = self._text = None
        retell(error, NAMES)
        told = {"code": error.code, "message": error.stream_message, "param": error.param}
        # The fields are sent twice: the specification has them in the event, and openai's Python client reads only
        # `error`.
        events += self._events.event("error", told | {"error": {"type": error.type, **told}})
        self._final = {"status": "failed", "error": failure(error), "usage": self._usage}
        return events + self._events.event("response.failed", {"response": self._response(written=True)})

    def whole(self, completion: dict[str, Any]) -> dict[str, Any]:
        """Return a blocking chat completion as a response object. Raises EngineError if it holds no answer, or a call
        without a name."""
        choices = completion.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise EngineError("The engine's answer has no usable entry in 'choices'.")
        choice, message = choices[0], choices[0].get("message")
        if not isinstance(message, dict):
            raise EngineError("The engine's answer has no message.")
        calls = message.get("tool_calls")
        if isinstance(calls, list):
            numbered = [it | {"index": index} for index, it in enumerate(calls) if isinstance(it, dict)]
            message = message | {"tool_calls": numbered}
        finish = choice.get("finish_reason") or "stop"
        told = {"delta": message, "logprobs": choice.get("logprobs"), "finish_reason": finish}
        self.chunk({"choices": [told], "usage": completion.get("usage")})
        self.end()
        return self.response()

    def response(self) -> dict[str, Any]:
        """Return the response object as it is to be stored, which is final after `end`, `failed` or `whole`."""
        return self._response(written=False)

    def input_items(self) -> list[dict[str, Any]]:
        """Return the request's own input items as they are to be stored, each with an id."""
        return self._asked

    def _response(self, *, written: bool) -> dict[str, Any]:
        output = [it.form() for it in self._items]
        if self._final is None:
            return self._settings.response("in_progress", output, written=written)
        return self._settings.response(output=output, written=written, **self._final)

    def _progress(self, kind: Literal["created", "in_progress"]) -> bytes:
        return self._events.event(f"response.{kind}", {"response": self._response(written=True)})

    def _delta(self, delta: dict[str, Any], logprobs: Any) -> None:
        if thought := delta.get("reasoning_content") or delta.get("reasoning"):
            self._thought(_string(thought))
        if content := delta.get("content"):
            self._say(_string(content), _judged(logprobs))
        if refusal := delta.get("refusal"):
            text = _string(refusal)
            self._out.append(self._message().write("refusal", text))
        for piece in _list(delta.get("tool_calls") or []):
            self._piece(_dict(piece))

    def _thought(self, text: str) -> None:
        item = self._open
        if not isinstance(item, Reasoning):
            text, self._held_thought = self._held_thought + text, ""
            if text.isspace():
                self._held_thought = text
                return
            its = self._settings
            item = Reasoning(self._events, *self._next("rs"), summary=its.summary, sealed=its.sealed)
            self._begin(item)
        self._out.append(item.add(text))

    def _say(self, text: str, judged: list[dict[str, Any]]) -> None:
        """Write a piece of text. White space begins no message: some models put it between their reasoning and a call,
        or into a call."""
        if self._text is None:
            text, judged, self._held = self._held[0] + text, self._held[1] + judged, ("", [])
            if text.isspace():
                self._held = (text, judged)
                return
        message = self._message()
        self._out.append(message.write_judged(text, judged) if judged else message.write("output_text", text))

    def _message(self) -> Message:
        """Return the open message, or begin one."""
        if self._text is not None:
            return self._text
        item = Message(self._events, *self._next("msg"))
        self._begin(item)
        self._text = item
        return item

    def _piece(self, piece: dict[str, Any]) -> None:
        """Write one piece of a call. The first piece with a name begins the call, and earlier pieces are kept until
        then."""
        index = piece.get("index")
        if type(index) is not int:  # gateway.relay.tool_calls gives every piece one
            raise EngineError("The engine sent a piece of a tool call without its index.")
        function = _dict(piece.get("function") or {})
        arguments = _string(function.get("arguments") or "")
        call = self._calls.get(index)
        if call is None:
            self._calls[index] = None
            early = self._early.setdefault(index, [])
            early.append((piece.get("id"), arguments))
            if not function.get("name"):
                return
            del self._early[index]
            call_id = next((it for it, _ in early if it), f"call_{self._unique}_{index}")
            call = self._calls[index] = self._call(_string(function["name"]), _string(call_id))
            self._begin(call)
            arguments = "".join(it for _, it in early)
        elif call is not self._open and arguments:
            raise EngineError("The engine continued a tool call that it had already ended.")
        if arguments:
            self._out.append(call.add(arguments))

    def _call(self, called: str, call_id: str) -> Call:
        origin = self._tools.origin(called)
        kind, prefix = (CustomCall, "ctc") if origin.custom else (Call, "fc")
        return kind(self._events, *self._next(prefix), call_id=call_id, origin=origin)

    def _next(self, prefix: str) -> tuple[str, int]:
        index = len(self._items)
        return f"{prefix}_{self._unique}_{index}", index

    def _begin(self, item: Item) -> None:
        self._out.append(self._close("completed"))
        self._open = item
        self._items.append(item)
        self._out.append(item.begin())

    def _close(self, status: Status) -> bytes:
        item, self._open, self._text = self._open, None, None
        if item is None:
            return b""
        if self._finish in _CUT and isinstance(item, Call) and not item.whole():
            item.cut()
            return b""
        return item.close(status)


def _string(value: Any) -> str:
    if type(value) is str:
        return value
    raise EngineError("The engine's answer has a value of the wrong type where a text belongs.")


def _dict(value: Any) -> dict[str, Any]:
    if type(value) is dict:
        return value
    raise EngineError("The engine's answer has a value of the wrong type where an object belongs.")


def _list(value: Any) -> list[Any]:
    if type(value) is list:
        return value
    raise EngineError("The engine's answer has a value of the wrong type where a list belongs.")


def _judged(logprobs: Any) -> list[dict[str, Any]]:
    """Return chat's log probabilities in this API's form."""
    tokens = logprobs.get("content") if isinstance(logprobs, dict) else None
    return [_token(it) | {"top_logprobs": [_token(top) for top in _tops(it)]} for it in _list(tokens or [])]


def _tops(token: Any) -> list[Any]:
    return _list(_dict(token).get("top_logprobs") or [])


def _token(token: Any) -> dict[str, Any]:
    told = _dict(token)
    return {"token": told.get("token"), "bytes": told.get("bytes") or [], "logprob": told.get("logprob")}
