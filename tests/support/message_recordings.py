"""What real clients sent to /v1/messages, and streams that all of them accepted (tests/recordings/clients)."""

import json
from typing import Any

from tests.support.recorded import HERE, posted

REQUESTS = [*posted("/v1/messages"), *posted("/v1/messages/count_tokens")]


def body(client: str, what: str) -> dict[str, Any]:
    """Return a new copy of a recorded body, which a test may change."""
    found = next(it for it in REQUESTS if it.client.startswith(client) and it.what == what)
    return dict(found.copy())


def chunks(name: str) -> list[dict[str, Any]]:
    """The chunks of a recorded chat stream, without its errors and its end."""
    found = [json.loads(data) for _, data in _frames(name) if data != "[DONE]"]
    return [it for it in found if "error" not in it]


def events(name: str) -> list[dict[str, Any]]:
    """The events of a recorded Messages stream."""
    return [json.loads(data) for _, data in _frames(name)]


def parsed(stream: bytes) -> list[dict[str, Any]]:
    """Return events as a client reads them. Checks that each has an `event:` line with the type in its data."""
    found = []
    for kind, data in _split(stream.decode()):
        event = json.loads(data)
        assert kind == event["type"]
        found.append(event)
    return found


def _frames(name: str) -> list[tuple[str | None, str]]:
    return _split((HERE / "answers" / f"{name}.sse").read_text())


def _split(text: str) -> list[tuple[str | None, str]]:
    found = []
    assert text.endswith("\n\n")
    for frame in text.removesuffix("\n\n").split("\n\n"):
        *kinds, data = frame.split("\n")
        found.append((kinds[0].removeprefix("event: ") if kinds else None, data.removeprefix("data: ")))
    return found
