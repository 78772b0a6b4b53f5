"""The two translated APIs for tests: how each is asked, and how its answers are added up."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.support.processes import FakeEngine


def script(*steps: list[Any]) -> str:
    """Return a user's message that makes the fake engine run these steps."""
    return "script:" + json.dumps(list(steps))


def whole_script(*steps: list[Any]) -> str:
    """Return such a message for a stream of three tokens, with these steps before the last token."""
    return script(["role"], ["token", "one"], ["token", " two"], *steps, ["token", " three"], *END)


END = [["finish", "stop"], ["usage"], ["done"], ["end"]]


@dataclass(frozen=True)
class Api:
    """One API. `body` makes a request with a user's message, and `error` reads an error's (type, message)."""

    name: str
    path: str
    counts: str
    body: Callable[..., dict[str, Any]]
    error: Callable[[dict[str, Any]], tuple[str, str]]
    last: str  # the type of the last event of a complete answer
    failed: str  # the type of the last event of a broken answer
    limit: str  # the field for the longest answer


def _response(text: str = "Hello", /, model: str = "fake-model", **more: Any) -> dict[str, Any]:
    return {"model": model, "input": text, **more}


def _message(text: str = "Hello", /, model: str = "fake-model", **more: Any) -> dict[str, Any]:
    return {"model": model, "max_tokens": 100, "messages": [{"role": "user", "content": text}], **more}


def _openai(body: dict[str, Any]) -> tuple[str, str]:
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    return body["error"]["type"], body["error"]["message"]


def _anthropic(body: dict[str, Any]) -> tuple[str, str]:
    assert body.keys() == {"type", "error", "request_id"}
    assert body["type"] == "error"
    assert body["error"].keys() == {"type", "message"}
    return body["error"]["type"], body["error"]["message"]


RESPONSES = Api(
    "responses",
    "/v1/responses",
    "/v1/responses/input_tokens",
    _response,
    _openai,
    "response.completed",
    "response.failed",
    "max_output_tokens",
)
MESSAGES_API = Api(
    "messages",
    "/v1/messages",
    "/v1/messages/count_tokens",
    _message,
    _anthropic,
    "message_stop",
    "error",
    "max_tokens",
)
APIS = {it.name: it for it in (RESPONSES, MESSAGES_API)}


def events(text: str) -> list[dict[str, Any]]:
    """Return the events of a stream. Checks that the name of each is the type in its data."""
    found = []
    for block in text.split("\n\n")[:-1]:
        lines = [line for line in block.split("\n") if not line.startswith(":")]
        if lines:
            name, data = lines
            found.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {found[-1]['type']}"
    return found


def text_of(told: list[dict[str, Any]]) -> str:
    """Return the text of a stream's events."""
    deltas = (it["delta"] for it in told if it["type"] in ("response.output_text.delta", "content_block_delta"))
    return "".join(it if isinstance(it, str) else it.get("text", "") for it in deltas)


def seen(engine: FakeEngine, mark: str) -> list[dict[str, Any]]:
    """Return the engine's requests that have this mark in their messages."""
    return [it for it in engine.seen() if mark in json.dumps(it["body"].get("messages"))]
