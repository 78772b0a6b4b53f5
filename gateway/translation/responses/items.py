"""Items: the output items of an answer that is being made. Each one writes its events, from `output_item.added` to
`output_item.done`, and its form in the response object."""

import base64
from typing import Any, Literal

import orjson

from gateway.translation.responses.events import Events, template
from gateway.translation.responses.history import SEALED
from gateway.translation.responses.tools import INPUT, Origin

Status = Literal["in_progress", "completed", "incomplete"]


class Item:
    """One output item: `begin` it, `add` texts, `close` it. `idle` shows that it is still being made."""

    def __init__(self, events: Events, item_id: str, index: int) -> None:
        self._events = events
        self._place: dict[str, Any] = {"item_id": item_id, "output_index": index}
        self._pieces: list[str] = []
        self._status: Status = "in_progress"
        self._head = self._tail = b""

    def form(self) -> dict[str, Any]:
        """Return the item as it is now."""
        raise NotImplementedError

    def begin(self) -> bytes:
        """Return the item's first event."""
        return self._tell("added")

    def add(self, text: str) -> bytes:
        """Return the event of one more text."""
        self._pieces.append(text)
        return self._events.delta(self._head, text, self._tail)

    def idle(self) -> bytes:
        """Return an event without text. Every client accepts it, and it keeps a client's timer from expiring."""
        return self._events.delta(self._head, "", self._tail)

    def close(self, status: Status) -> bytes:
        """Return the item's last events."""
        raise NotImplementedError

    def cut(self) -> None:
        """End the item without its last events, because Codex runs a call at its `output_item.done`, whatever its
        status."""
        self._status = "incomplete"

    def _tell(self, what: Literal["added", "done"]) -> bytes:
        fields = {"output_index": self._place["output_index"], "item": self.form()}
        return self._events.event(f"response.output_item.{what}", fields)

    @property
    def _id(self) -> str:
        item_id: str = self._place["item_id"]
        return item_id

    @property
    def _text(self) -> str:
        return "".join(self._pieces)


class Reasoning(Item):
    """The model's reasoning: as a summary if the client asked for summaries, otherwise as it is. `sealed`: the client
    wants it in `encrypted_content` too, so that it comes back even if the client drops the rest."""

    def __init__(self, events: Events, item_id: str, index: int, *, summary: bool, sealed: bool) -> None:
        super().__init__(events, item_id, index)
        self._summary, self._sealed = summary, sealed
        self._at = self._place | {"summary_index" if summary else "content_index": 0}
        self._name = "response.reasoning_summary" if summary else "response.reasoning"
        self._part_name = "response.reasoning_summary_part" if summary else "response.content_part"
        self._head, self._tail = template(f"{self._name}_text.delta", self._at)

    def begin(self) -> bytes:
        return super().begin() + self._events.event(f"{self._part_name}.added", {**self._at, "part": self._part("")})

    def close(self, status: Status) -> bytes:
        self._status, text = status, self._text
        return (
            self._events.event(f"{self._name}_text.done", {**self._at, "text": text})
            + self._events.event(f"{self._part_name}.done", {**self._at, "part": self._part(text)})
            + self._tell("done")
        )

    def form(self) -> dict[str, Any]:
        text = self._text
        parts = [self._part(text)] if text else []
        made: dict[str, Any] = {"type": "reasoning", "id": self._id, "summary": parts if self._summary else []}
        if not self._summary and parts:
            made["content"] = parts
        if self._sealed:
            made["encrypted_content"] = SEALED + base64.b64encode(text.encode()).decode()
        return made | {"status": self._status}

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "summary_text" if self._summary else "reasoning_text", "text": text}


class Message(Item):
    """Text for the reader, and refusals, each as a separate part."""

    def __init__(self, events: Events, item_id: str, index: int) -> None:
        super().__init__(events, item_id, index)
        self._parts: list[dict[str, Any]] = []  # the closed parts
        self._logprobs: list[dict[str, Any]] = []
        self._kind: str | None = None  # the kind of the open part
        self._at = self._place

    def write(self, kind: Literal["output_text", "refusal"], text: str) -> bytes:
        """Return the events of one more text, which may begin a part."""
        if kind == self._kind:
            return self.add(text)
        return self._close_part() + self._open_part(kind) + self.add(text)

    def write_judged(self, text: str, logprobs: list[dict[str, Any]]) -> bytes:
        """Return the events of one more text with its log probabilities."""
        events = b"" if self._kind == "output_text" else self._close_part() + self._open_part("output_text")
        self._pieces.append(text)
        self._logprobs += logprobs
        fields = {**self._at, "delta": text, "logprobs": logprobs}
        return events + self._events.event("response.output_text.delta", fields)

    def empty(self) -> bytes:
        """Return the event of a part without text, for an answer that has none."""
        return self._open_part("output_text")

    def close(self, status: Status) -> bytes:
        events = self._close_part()
        self._status = status
        return events + self._tell("done")

    def form(self) -> dict[str, Any]:
        parts = [*self._parts, self._part()] if self._kind else self._parts
        return {"type": "message", "id": self._id, "status": self._status, "role": "assistant", "content": parts}

    def _open_part(self, kind: Literal["output_text", "refusal"]) -> bytes:
        self._kind = kind
        self._at = self._place | {"content_index": len(self._parts)}
        after: dict[str, Any] | None = {"logprobs": []} if kind == "output_text" else None
        self._head, self._tail = template(f"response.{kind}.delta", self._at, after)
        return self._events.event("response.content_part.added", {**self._at, "part": self._part()})

    def _close_part(self) -> bytes:
        if self._kind is None:
            return b""
        part = self._part()
        said = {"text": part["text"], "logprobs": part["logprobs"]} if self._kind == "output_text" else part
        done = {**self._at, **{name: value for name, value in said.items() if name != "type"}}
        events = self._events.event(f"response.{self._kind}.done", done)
        events += self._events.event("response.content_part.done", {**self._at, "part": part})
        self._parts.append(part)
        self._pieces, self._logprobs, self._kind = [], [], None
        return events

    def _part(self) -> dict[str, Any]:
        if self._kind == "refusal":
            return {"type": "refusal", "refusal": self._text}
        return {"type": "output_text", "text": self._text, "annotations": [], "logprobs": self._logprobs}


class Call(Item):
    """A call of one of the client's functions."""

    _name = "response.function_call_arguments"

    def __init__(self, events: Events, item_id: str, index: int, *, call_id: str, origin: Origin) -> None:
        super().__init__(events, item_id, index)
        self.call_id = call_id
        self._origin = origin
        self._head, self._tail = template(f"{self._name}.delta", self._place)

    def whole(self) -> bool:
        """Return whether its arguments are a JSON object."""
        try:
            return type(orjson.loads(self._text)) is dict
        except orjson.JSONDecodeError:
            return False

    def close(self, status: Status) -> bytes:
        events = b"" if self._text.strip() else self.add("{}")  # clients parse the arguments even if there are none
        self._status = status
        done = {**self._place, "name": self._origin.name, "arguments": self._text}
        return events + self._events.event(f"{self._name}.done", done) + self._tell("done")

    def form(self) -> dict[str, Any]:
        return self._called("function_call") | {"arguments": self._text, "status": self._status}

    def _called(self, kind: str) -> dict[str, Any]:
        made = {"type": kind, "id": self._id, "call_id": self.call_id, "name": self._origin.name}
        return made if self._origin.namespace is None else made | {"namespace": self._origin.namespace}


class CustomCall(Call):
    """A call of a custom tool. An engine writes its text inside JSON, so the text is sent when the call is complete."""

    _name = "response.custom_tool_call_input"

    def add(self, text: str) -> bytes:
        self._pieces.append(text)
        return b""

    def close(self, status: Status) -> bytes:
        self._status, text = status, self._input()
        delta = self._events.delta(self._head, text, self._tail)
        return delta + self._events.event(f"{self._name}.done", {**self._place, "input": text}) + self._tell("done")

    def form(self) -> dict[str, Any]:
        return self._called("custom_tool_call") | {"input": self._input(), "status": self._status}

    def _input(self) -> str:
        """Return the text in the arguments, or the arguments as they are if the model did not follow the form."""
        if self._status == "in_progress":
            return ""
        try:
            arguments = orjson.loads(self._text)
        except orjson.JSONDecodeError:
            return self._text
        text = arguments.get(INPUT) if isinstance(arguments, dict) else None
        return text if isinstance(text, str) else self._text
