"""Faces: the translated APIs as the routes use them: how a request is read, and the form in which errors are sent.

Every error is sent in the form of the API to which the path belongs, wherever it arises. A path of no translated API
has OpenAI's form.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from gateway import headers as names
from gateway.endpoints import Api
from gateway.errors import StackError
from gateway.exchange import Origin
from gateway.responses.responses import Past
from gateway.translation import messages, responses
from gateway.translation.face import Writer, retell

Headers = list[tuple[bytes, bytes]]

_JSON = (b"content-type", b"application/json")
_MODELS = "/v1/models"
_ENDS = ("/messages", "/messages/count_tokens")
# Statuses below 500 after which Codex repeats a request in vain. A 401 stays what it is: a client may have another key.
_REPEATED = frozenset({409, 413, 415, 422, 431})


@dataclass(frozen=True, slots=True)
class Asked:
    """A translated request: the body of a chat completion, the writer of its answer, and its origin. `stored` is set if
    its response is to be stored."""

    chat: dict[str, Any]
    writer: Writer
    origin: Origin
    stored: responses.Asked | None = None


@dataclass(frozen=True, slots=True)
class Setting:
    """What a request is read with, beside its body. `now`: seconds since 1970. `unique`: what the ids of its answer are
    made of, if responses can be stored. `counting`: only its tokens are to be counted. `past`: the stored conversation
    that it continues. `stores`: responses can be stored."""

    request_id: str
    now: int
    unique: str
    counting: bool = False
    past: Past = field(default_factory=Past)
    stores: bool = False


class Refusal(NamedTuple):
    """An error as a whole response."""

    status: int
    headers: Headers
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Face:
    """One translated API.

    `path` is its only path, or the beginning of all. `refers` gives the id of the response that a body continues, and
    the ids of the stored items that it refers to. Both it and `read` raise BadRequest that names the field by the
    caller's own path. `counted` makes the answer to a request that only counts. `fails_in_stream`: a streamed request
    that no engine answers gets a stream that says so.
    """

    path: str
    refers: Callable[[dict[str, Any]], tuple[str | None, Sequence[str]]]
    read: Callable[[dict[str, Any], Setting], Asked]
    counted: Callable[[int], dict[str, Any]]
    names: Mapping[str, str]
    fails_in_stream: bool

    def retell(self, error: StackError) -> None:
        """Change an error about the chat completion so that it has the caller's own name of the field."""
        retell(error, self.names)


def of_path(path: str) -> Face | None:
    """Return the face that a path belongs to. None: the path is not one of a translated API."""
    return next((it for it in FACES.values() if path == it.path or path.startswith(f"{it.path}/")), None)


def _is_messages(path: str) -> bool:
    """Return whether a path is Anthropic's, or was meant to be: a slip in a client's base URL leaves its end as it is.
    OpenAI's Assistants have messages too, in threads."""
    if "/messages" not in path:  # nearly all paths
        return False
    face = of_path(path)
    if face is not None:
        return face is FACES["messages"]
    return path.rstrip("/").endswith(_ENDS) and "/threads/" not in path


def _of_anthropic(scope: Mapping[str, Any]) -> bool:
    """Return whether a request is one of Anthropic's API. Its path of the models is OpenAI's as well."""
    path: str = scope["path"]
    if path == _MODELS or path.startswith(f"{_MODELS}/"):
        return any(name == b"anthropic-version" for name, _ in scope["headers"])
    return _is_messages(path)


def refusal(error: StackError, scope: Mapping[str, Any]) -> Refusal:
    """Write an error as a response to this request."""
    path, status, extra = scope["path"], error.status, []
    if _of_anthropic(scope):
        # `dressed` adds the headers about the request and its key, to whole answers as well.
        body, found = messages.envelope(error, request_id=scope["request_id"])
        extra = [it for it in found if it[0] == names.SHOULD_RETRY.encode() and names.SHOULD_RETRY not in error.headers]
    elif of_path(path) is FACES["responses"]:
        body, extra = responses.envelope(error)
        status = responses.status_of(error)
    else:
        body = error.envelope()
    own = [(name.encode(), value.encode()) for name, value in error.headers.items()]
    return Refusal(status, [*own, *extra, _JSON], body)


def failing(error: StackError, scope: Mapping[str, Any]) -> bytes | None:
    """Return an error as a whole stream for Codex; None if the client gets the error as a response.

    Codex repeats a request 30 times after a 5xx and six times after most other errors, but not after an error in a
    stream. It is recognised because no other client accepts nothing but events."""
    face = of_path(scope["path"])
    if face is None or not face.fails_in_stream or scope["path"] != face.path or scope["method"] != "POST":
        return None
    accepts = dict(scope["headers"]).get(b"accept", b"").strip().lower()
    status = refusal(error, scope).status
    if accepts != b"text/event-stream" or (status < 500 and status not in _REPEATED):
        return None
    body = {"model": "unknown", "input": "", "stream": True}  # the request's own was not read
    return face.read(body, Setting(scope["request_id"], int(time.time()), "")).writer.failed(error)


def dressed(scope: Mapping[str, Any], headers: Headers, request_id: str) -> Headers:
    """Return a response's headers together with those that clients of the request's API read in their place."""
    if not _of_anthropic(scope):
        return headers
    return [*headers, *messages.headers(headers, request_id, time.time())]


def _read_response(body: dict[str, Any], its: Setting) -> Asked:
    """Read a request of the Responses API."""
    if its.counting:
        body = body | {"stream": False}
    # A caller may choose a request's id and use it again, but every stored response needs a different id.
    asked = responses.read(
        body,
        request_id=its.unique if its.stores else its.request_id,
        now=its.now,
        stores=its.stores,
        history=its.past.items,
        kept=its.past.kept,
    )
    advice = ("reasoning_effort",) if "reasoning_effort" in asked.chat else ()
    origin = Origin("responses", asked.ignored, advice, _RESPONSE_NAMES)
    return Asked(asked.chat, asked.writer, origin, asked if asked.store else None)


def _read_message(body: dict[str, Any], its: Setting) -> Asked:
    asked = messages.read(body, request_id=its.request_id, now=its.now, counting=its.counting)
    return Asked(asked.chat, asked.writer, Origin("messages", asked.ignored, asked.advice, _MESSAGE_NAMES))


_RESPONSE_NAMES = MappingProxyType(responses.NAMES)
_MESSAGE_NAMES = MappingProxyType(messages.NAMES)
FACES: Mapping[Api, Face] = MappingProxyType(
    {
        "responses": Face(
            path="/v1/responses",
            refers=lambda body: (responses.previous(body), responses.referred(body)),
            read=_read_response,
            counted=responses.input_tokens,
            names=_RESPONSE_NAMES,
            fails_in_stream=True,
        ),
        "messages": Face(
            path="/v1/messages",
            refers=lambda _: (None, ()),
            read=_read_message,
            counted=messages.counted,
            names=_MESSAGE_NAMES,
            fails_in_stream=False,
        ),
    }
)
