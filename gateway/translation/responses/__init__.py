"""The Responses API as a face of chat completions: it reads requests and writes answers. It stores nothing."""

from gateway.translation.responses.errors import envelope, status_of
from gateway.translation.responses.fields import NAMES
from gateway.translation.responses.read import Asked, previous, read, referred, unknown_previous
from gateway.translation.responses.resource import input_tokens
from gateway.translation.responses.write import ResponseWriter

__all__ = [
    "NAMES",
    "Asked",
    "ResponseWriter",
    "envelope",
    "input_tokens",
    "previous",
    "read",
    "referred",
    "status_of",
    "unknown_previous",
]
