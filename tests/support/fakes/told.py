"""Told: what a test tells the fake engine in a user's message, for APIs whose requests have no other place for it."""

import json
from typing import Any

_MARK = "fake:#"  # a raw request to Ollama is known by the "#" as well: tests/support/fakes/model.py


def telling(**fields: Any) -> str:
    """Return a message that gives its request these fields in the eyes of the fake engine."""
    return _MARK + json.dumps(fields)


def messages_of(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the messages of a request. A completion may have a field of that name, with any value."""
    messages = request.get("messages")
    return [it for it in messages if isinstance(it, dict)] if isinstance(messages, list) else []


def with_told(request: dict[str, Any]) -> dict[str, Any]:
    """Return the request with what one of its messages tells."""
    for it in messages_of(request):
        if isinstance(it.get("content"), str) and it["content"].startswith(_MARK):
            return request | json.JSONDecoder().raw_decode(it["content"], len(_MARK))[0]
    return request
