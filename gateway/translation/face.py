"""Face: what all APIs that are translated to chat completions share: a writer, and the names of fields."""

from collections.abc import Mapping
from typing import Any, Protocol

from gateway.errors import StackError


class Writer(Protocol):
    """Write one answer in the form of the API that the request used.

    The reader of a request makes one for it. A streamed answer calls `head` once, then `waiting` and `chunk` as often
    as needed, then either `end` or `failed` once. A blocking answer calls `whole` once. Bytes are whole events.
    """

    def head(self) -> bytes:
        """Return the events that are sent together with the response's head."""

    def waiting(self) -> bytes:
        """Return what the client gets after the head while its request waits."""

    def chunk(self, chunk: dict[str, Any]) -> bytes:
        """Translate one chat chunk. The result may be empty. Raises EngineError if no event can express the chunk."""

    def end(self) -> bytes:
        """Give the last events of a whole answer, after its last chunk (usage may come in one with empty choices).
        Raises EngineError if what came is no whole answer; `failed` ends it then."""

    def failed(self, error: StackError) -> bytes:
        """Return the events that end a broken answer."""

    def whole(self, completion: dict[str, Any]) -> dict[str, Any]:
        """Translate a blocking chat completion. Raises EngineError if the API has no form for it."""


def called(name: str, names: Mapping[str, str]) -> str:
    """Return the caller's name of a chat completion's field; `names` has the names that differ. `name` may be a path.
    The part behind a renamed field is left out, because the translation may have moved it."""
    root = name.partition(".")[0].partition("[")[0]
    return names.get(root, name)


def retell(error: StackError, names: Mapping[str, str]) -> None:
    """Change an error about a chat completion so that it has the caller's own name of the field. A second call changes
    nothing."""
    if error.param is None:
        return
    told = called(error.param, names)
    if told != error.param:
        error.message = error.message.replace(f"'{error.param}'", f"'{told}'")
        error.param = told
