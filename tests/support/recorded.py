"""Recorded: every request of the clients that were run (tests/recordings/clients/requests.json), as they sent it.

The recordings are those of 2026-11-28: long texts are fillers, ids and keys are made up. What repeats is stored once:
`headers` of a request is a number, and its `tools` are names. `host` and `content-length` are left out.
"""

from dataclasses import dataclass
from typing import Any

import orjson

from tests.support.processes import KEY, ROOT

HERE = ROOT / "tests/recordings/clients"
_CREDENTIALS = ("authorization", "x-api-key")


@dataclass(frozen=True)
class Recorded:
    """One request. `client` is a name with a version, `name` a number with some words, `what` a sentence."""

    client: str
    name: str
    what: str
    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: Any

    def __str__(self) -> str:
        return f"{self.client}/{self.name}"

    def copy(self) -> Any:
        """Return a new copy of the body, which a test may change."""
        return orjson.loads(orjson.dumps(self.body))

    def authorized(self) -> dict[str, str]:
        """Return the headers with a key of the gateway in place of the client's first credential. A second one stays
        what it was: a key that the gateway does not know."""
        given = [name for name in self.headers if name.lower() in _CREDENTIALS]
        first = min(given, key=lambda name: _CREDENTIALS.index(name.lower()), default=None)
        if first is None:
            return self.headers
        return self.headers | {first: KEY if first.lower() == "x-api-key" else f"Bearer {KEY}"}


def _read() -> tuple[Recorded, ...]:
    file = orjson.loads((HERE / "requests.json").read_bytes())
    found = []
    for it in file["requests"]:
        body = it["body"]
        if body is not None and "tools" in body:
            body = body | {"tools": [file["tools"][name] for name in body["tools"]]}
        found.append(Recorded(**it | {"headers": file["headers"][it["headers"]], "body": body}))
    return tuple(found)


REQUESTS = _read()
CLIENTS = sorted({it.client for it in REQUESTS})


def posted(path: str) -> list[Recorded]:
    """Return the requests that were posted to a path."""
    return [it for it in REQUESTS if (it.method, it.path) == ("POST", path)]
