"""Pipeline: one request from its headers to a Relay, top to bottom. The order is a security property."""

import re
import time
import zlib
from dataclasses import dataclass, replace
from types import NoneType
from typing import Any

import orjson
from starlette.types import Receive, Scope

from gateway import guard, parameters
from gateway.errors import BadRequest, ClientLeft, TooLarge, UnsupportedEncoding
from gateway.exchange import CONTENT, Exchange, Kind
from gateway.keys import Key, Keys
from gateway.limits import Book
from gateway.prompts import Prompts
from gateway.relay import Relay, Rules
from gateway.routing import Route, Routes
from gateway.settings import Settings

_STRICT = b"x-stack-strict"
_QUEUE_TIMEOUT = b"x-stack-queue-timeout"


@dataclass(frozen=True, slots=True)
class Request:
    """A request that is understood: who asks, for what, and where that leads."""

    key: Key
    exchange: Exchange
    route: Route
    headers: dict[bytes, bytes]
    raw: bytes  # the body as it came


class Pipeline:
    """What stands between a request and the engine: authenticate → read → understand → route, then admit → relay."""

    def __init__(
        self, settings: Settings, keys: Keys, routes: Routes, prompts: Prompts, book: Book, rules: Rules
    ) -> None:
        self._keys = keys
        self._routes = routes
        self._prompts = prompts
        self._book = book
        self._rules = rules
        self._max_body = settings.stack_max_body_bytes
        self._strict = settings.stack_strict_params
        self._queue_timeout = settings.stack_queue_timeout

    async def understand(self, kind: Kind, scope: Scope, receive: Receive) -> Request:
        """Who asks for what, checked and whole. Raises StackError. Nothing has been counted or begun yet."""
        headers = dict(scope["headers"])
        key = await self._keys.authenticate(headers.get(b"authorization"))
        raw = await self._read(headers, receive)
        started = time.monotonic()  # how long the client took to send it is not the answer's time
        if "refusal" in scope:  # the rest of the body never came, or came broken (ingress.py)
            raise scope["refusal"]
        body = parse(raw)
        size = check(kind, body)
        route = await self._routes.resolve(body.get("model"), key, headers)
        if _is_strict(headers, unless_said=self._strict):
            route = strictly(route, kind, body)
        body, prompt = self._prompts.apply(key, route.name, kind, body)
        options = body.get("stream_options") or {}
        exchange = Exchange(
            request_id=scope["request_id"],
            kind=kind,
            key_id=key.id,
            stream=bool(body.get("stream")) and kind != "embedding",
            wants_usage=options.get("include_usage") is True,
            size=size,
            choices=_choices(kind, size, body.get("n")),
            resume=_switch(headers, b"x-stack-resume"),
            fields=body,
            prompt=prompt,
            started=started,
            priority=key.priority,
            mark=zlib.crc32(raw),
            queue_timeout=_shortened(headers, self._queue_timeout),
        )
        return Request(key, exchange, route, headers, raw)

    async def admit(self, request: Request) -> Relay:
        """A Relay that is ready to run, and has to: its key is charged. Raises StackError."""
        it = request.exchange
        size = len(request.raw) if it.prompt is None else len(it.encode("", it.fields, stream=False))
        estimate = self._rules.estimates.of(it, request.route.name, size)
        lease = await self._book.admit(request.key, estimate)
        return Relay(it, request.route, lease, self._rules)

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        encoding = headers.get(b"content-encoding", b"identity").strip().lower()
        if encoding not in (b"identity", b""):
            raise UnsupportedEncoding("Send the body without Content-Encoding.")
        if headers.get(b"transfer-encoding", b"chunked").lower() != b"chunked":
            raise UnsupportedEncoding("Send the body with no Transfer-Encoding other than chunked.")
        declared = headers.get(b"content-length", b"")
        if declared.isdigit() and (len(declared) > 18 or int(declared) > self._max_body):
            raise TooLarge(f"The body is larger than {self._max_body} bytes.")
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientLeft("The client closed the connection.")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            more = message.get("more_body", False)
            if size > self._max_body:
                raise TooLarge(f"The body is larger than {self._max_body} bytes.")
        return b"".join(parts)


def parse(raw: bytes) -> dict[str, Any]:
    """A request's body as an object. Raises BadRequest.

    orjson is strict where engines differ: NaN, infinities, lone surrogates, a BOM, UTF-16 and nesting beyond
    1024 are refused. A name that stands twice in one object is refused too.
    """
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as exc:
        raise BadRequest(f"The body is not valid JSON: {exc}.") from None
    if not isinstance(body, dict):
        raise BadRequest("The body must be a JSON object.")
    guard.refuse_repeated_names(raw, body)
    return body


def check(kind: Kind, body: dict[str, Any]) -> int:
    """Check the fields the gateway itself relies on; all others pass untouched. Returns how many messages, prompts or
    inputs there are. Raises BadRequest that names the field."""
    model = body.get("model")
    if model is not None and (not isinstance(model, str) or not model):
        raise BadRequest("'model' must be the name of a model, or be left out.", param="model")
    if type(body.get("stream")) not in (bool, NoneType):
        raise BadRequest("'stream' must be true or false.", param="stream")
    if type(body.get("stream_options")) not in (dict, NoneType):
        raise BadRequest("'stream_options' must be an object.", param="stream_options")
    field = CONTENT[kind]
    content = body.get(field)
    if content is None:
        raise BadRequest(f"'{field}' is missing.", param=field)
    if kind == "chat":
        if not isinstance(content, list) or not content:
            raise BadRequest("'messages' must be a list with at least one message.", param=field)
        for index, message in enumerate(content):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise BadRequest(f"'messages[{index}]' must be an object with a 'role'.", param=f"messages[{index}]")
    elif not isinstance(content, str | list):
        raise BadRequest(f"'{field}' must be a string or a list.", param=field)
    guard.refuse_control(body)
    # A list of numbers is one prompt in tokens, anything else in a list is one prompt each.
    return len(content) if isinstance(content, list) and not (content and isinstance(content[0], int)) else 1


def strictly(route: Route, kind: Kind, body: dict[str, Any]) -> Route:
    """The route without the engines that would ignore one of the request's parameters. Raises BadRequest that names the
    parameter when none is left."""
    dialects = [target.upstream.dialect.name for tier in route.tiers for target in tier]
    ignored = {name: parameters.read(name, kind, body).ignored for name in dialects}
    if not any(ignored.values()):
        return route
    tiers = tuple(tuple(it for it in tier if not ignored[it.upstream.dialect.name]) for tier in route.tiers)
    if not any(tiers):
        name = ignored[dialects[0]][0]
        raise BadRequest(
            f"The engine behind this model would ignore '{name}', and strict mode is on.",
            param=name,
            code="unsupported_parameter",
        )
    return replace(route, tiers=tuple(filter(None, tiers)))


def _is_strict(headers: dict[bytes, bytes], *, unless_said: bool) -> bool:
    value = headers.get(_STRICT)
    if value is None:
        return unless_said
    if value.lower() not in (b"true", b"false"):
        raise BadRequest("'x-stack-strict' must be true or false.", param="x-stack-strict")
    return value.lower() == b"true"


def _shortened(headers: dict[bytes, bytes], longest: float) -> float:
    """For how many seconds the request may wait in queues. Raises BadRequest."""
    value = headers.get(_QUEUE_TIMEOUT)
    if value is None:
        return longest
    if not re.fullmatch(rb"[0-9]{1,9}(\.[0-9]{0,9})?", value):
        raise BadRequest("'x-stack-queue-timeout' must be a number of seconds.", param="x-stack-queue-timeout")
    return min(longest, float(value))


def _choices(kind: Kind, size: int, n: object) -> int:
    """How many answers are asked for: `n`, of each prompt."""
    each = n if isinstance(n, int) and n > 0 else 1
    return each * size if kind == "completion" else each


def _switch(headers: dict[bytes, bytes], name: bytes) -> bool:
    """What a header says that is `on`, as without it, or `off`. Raises BadRequest."""
    value = headers.get(name, b"on").lower()
    if value not in (b"on", b"off"):
        raise BadRequest(f"'{name.decode()}' must be on or off.", param=name.decode())
    return value == b"on"
