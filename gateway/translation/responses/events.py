"""Events: write the server-sent events of one answer, numbered from 0."""

from typing import Any

import orjson


class Events:
    """Write the events of one answer. Each has the next `sequence_number`."""

    def __init__(self) -> None:
        self._number = 0

    def event(self, kind: str, fields: dict[str, Any]) -> bytes:
        """Return one event of any kind."""
        data = orjson.dumps({"type": kind, **fields, "sequence_number": self._number})
        self._number += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), data)

    def delta(self, head: bytes, text: str, tail: bytes) -> bytes:
        """Return one delta event, of which only `text` and the number are new. `head` and `tail` come from
        `template`."""
        number = self._number
        self._number = number + 1
        return b"%b%b%b%d}\n\n" % (head, orjson.dumps(text), tail, number)


def template(kind: str, place: dict[str, Any], after: dict[str, Any] | None = None) -> tuple[bytes, bytes]:
    """Return the bytes before and after the text of a delta event. `place` says which part it belongs to, and `after`
    holds the fields behind the text."""
    head = orjson.dumps({"type": kind, **place})[:-1]
    tail = orjson.dumps(after or {})[1:-1]
    before = b"event: %b\ndata: %b" % (kind.encode(), head)
    return before + b',"delta":', (b"," + tail if tail else b"") + b',"sequence_number":'
