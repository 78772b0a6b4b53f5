"""Server-sent events: the bytes that a chat stream of OpenAI's API is made of, and its error frame.

The error frames of the two translated APIs are `failed` in translation/messages/writer.py and in
translation/responses/write.py.
"""

from gateway.errors import StackError

# The header of a response that is a stream. There is no charset, because some clients compare the whole value, and the
# standard allows only UTF-8.
HEADER = (b"content-type", b"text/event-stream")
HEADERS = [
    HEADER,
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx: pass every event on at once
]
DONE = b"data: [DONE]\n\n"
PING = b": ping\n"  # a comment without a blank line: some decoders dispatch an empty event at each blank line


def event(data: bytes) -> bytes:
    """Frame one line of JSON as an event."""
    return b"data: %b\n\n" % data


def failure(error: StackError) -> bytes:
    """Write an error as the last event of a stream."""
    return event(error.envelope(error.stream_message))
