"""Event syntax: find the ends of lines and events in a stream, and read their fields (WHATWG HTML, section 9.2.6)."""

import re

BOM = b"\xef\xbb\xbf"  # a byte order mark, which a stream may begin with
_NEWLINE = re.compile(rb"\r\n|\n|\r")
# A blank line ends an event, and any of CRLF, LF and CR ends a line. An LF that follows a CR in the next piece counts
# as another blank line, which changes nothing.
_EVENT_END = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r)")
_COMMENTS = re.compile(rb"(?::[^\r\n]*(?:\r\n|\n|\r(?=[^\n])))+")  # whole lines; a CR at the very end may become CRLF


def is_usual(data: bytes) -> bool:
    """Return whether this is exactly one event with one line that holds an object, as engines send them."""
    whole = data.startswith(b"data: {") and data.endswith(b"}\n\n")
    return whole and data.find(b"\n") == len(data) - 2 and b"\r" not in data


def end_of_event(buffer: bytes, start: int) -> int:
    """Return where the event ends that begins at `start`; 0 if its end has not come yet."""
    match = _EVENT_END.search(buffer, start)
    return match.end() if match else 0


def end_of_comments(buffer: bytes, start: int) -> int:
    """Return where the comment lines end that begin at `start`; `start` if there are none."""
    match = _COMMENTS.match(buffer, start)
    return match.end() if match else start


def fields(event: bytes) -> list[tuple[bytes, bytes]]:
    """Return an event's lines as names and values. A comment has an empty name."""
    lines = [line.partition(b":") for line in _NEWLINE.split(event) if line]
    return [(name, value.removeprefix(b" ")) for name, _, value in lines]
