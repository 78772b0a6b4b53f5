"""Pipeline: take one request from its headers to a Relay, from top to bottom. The order is a security property.

This file is long because the order of the steps is read from top to bottom.
"""

import functools
import hashlib
import re
import secrets
import time
import zlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from starlette.types import Receive, Scope

from gateway import headers as names
from gateway import multipart
from gateway.api import bounds
from gateway.api.body import Bench, Workshop
from gateway.api.checks import check, suited
from gateway.api.faces import FACES, Asked, Face, Setting
from gateway.api.idempotency.answers import Answers
from gateway.api.reading import read
from gateway.api.request import Count, Reading, Request
from gateway.api.switches import is_strict, shortened, switch
from gateway.byte_budget import Budget, Charge
from gateway.endpoints import Endpoint
from gateway.errors import BadRequest, InvalidKey, ModelNotFound, StackError, UnsupportedMediaType
from gateway.exchange import Exchange
from gateway.forced_tools import demand
from gateway.keys import users
from gateway.keys.authenticate import Keys
from gateway.keys.known import Key
from gateway.limits import lengths
from gateway.limits.rules import Book, Inherited, Lease
from gateway.limits.users import enter
from gateway.prompts.render import Prompts
from gateway.relay.relay import Relay
from gateway.relay.services import Services
from gateway.relay.trail import Trail
from gateway.responses.responses import Responses
from gateway.routing.routes import Route, Routes
from gateway.settings import Settings
from gateway.traces.trace import Trace

# Bytes of memory for each byte of a stored conversation while it is read: as it is stored, and four for a character of
# text. Only one conversation is unpacked at a time, so its values are charged when they are known.
_COPIES = 5
Said = tuple[bytes | memoryview, ...]  # a body, in pieces
_JSON = re.compile(rb"application/([\w.-]+\+)?json[ \t]*(;.*)?", re.IGNORECASE)


class Pipeline:
    """Prepare a request for the engine: authenticate, charge a request, read, check, route, charge the tokens, make
    the relay.
    """

    def __init__(
        self,
        settings: Settings,
        keys: Keys,
        routes: Routes,
        prompts: Prompts,
        book: Book,
        answers: Answers,
        services: Services,
        memory: Budget,
        bodies: Workshop,
        responses: Responses,
    ) -> None:
        self._keys = keys
        self._routes = routes
        self._prompts = prompts
        self._book = book
        self._answers = answers
        self._services = services
        self._memory = memory
        self._bodies = bodies
        self._responses = responses
        self._max_body = settings.stack_max_body_bytes
        self._strict = settings.stack_strict_params
        self._queue_timeout = settings.stack_queue_timeout

    async def understand(self, endpoint: Endpoint, scope: Scope, receive: Receive) -> Request:
        """Read a request: who asks for what, completely and checked. Its key is charged one request before the body is
        read.

        Raises StackError; the request then no longer counts as concurrent.
        """
        headers = dict(scope["headers"])
        key = users.identified(await self._keys.authenticate(headers, scope["client"]), headers)
        scope["stack.client"].known = True
        _check_type(endpoint, headers.get(b"content-type", b""))
        replay = self._answers.has(headers.get(names.IDEMPOTENCY_KEY), key.account)
        lease = await enter(self._book, key, self._services.estimates.seconds(key.id), replay=replay)
        try:
            return await self._understand(endpoint, scope, receive, headers, key, lease, replay=replay)
        except BaseException:
            lease.settle(0)
            raise

    async def _understand(
        self,
        endpoint: Endpoint,
        scope: Scope,
        receive: Receive,
        headers: dict[bytes, bytes],
        key: Key,
        lease: Lease,
        *,
        replay: bool,
    ) -> Request:
        charge = self._memory.charge(key.id, 0)
        raw = await read(scope, receive, charge, self._max_body)
        started = time.monotonic()  # the time that the client took to send it does not count as the answer's
        bench = self._bodies.bench(key.account, scope["stack.client"])
        if endpoint.form:
            body, weight = multipart.parse(raw, headers[b"content-type"]), len(raw)
            said = tuple(multipart.says(body))  # a client that repeats its request chooses another boundary
        else:
            body, weight = await bench.parse(raw)
            said = (raw,)
        charge.resize(len(raw) + weight)  # the body is kept as values, and written again for the engine
        strict = is_strict(headers, unless_said=self._strict)
        asked: Asked | None = None
        its, reading, face = None, None, FACES[endpoint.api] if endpoint.translated else None
        if face is not None:
            its, reading = await self._translating(endpoint, scope, key, face, body, charge, len(raw), weight)
            told: Asked = await bench.work(*reading, its)
            weight = reading[0]
            asked, body = _strictly(told) if strict else told, told.chat
        try:
            exchange, route = await self._prepare(
                endpoint, scope, headers, key, said, body, weight, asked, started, charge, bench, strict=strict
            )
        except StackError as exc:
            if face is not None:
                face.retell(exc)
            raise
        digest = _digest(endpoint, said) if names.IDEMPOTENCY_KEY in headers else b""
        request = Request(endpoint, key, exchange, route, headers, digest, lease, replay, face, its, reading)
        return request if asked is None else self._written_by(request, asked)

    async def _translating(
        self,
        endpoint: Endpoint,
        scope: Scope,
        key: Key,
        face: Face,
        body: dict[str, Any],
        charge: Charge,
        size: int,
        weight: int,
    ) -> tuple[Setting, Reading]:
        """With what the face reads a request, and how. `size` and `weight` are the body's, in bytes, as it came and as
        values. Raises StackError."""
        own = size + 2 * weight
        past = await self._responses.history(
            key.account, *face.refers(body), hold=lambda stored: charge.resize(own + _COPIES * stored)
        )
        charge.resize(own + past.size + 2 * past.weight)
        unique, now = secrets.token_hex(16), int(time.time())
        its = Setting(scope["request_id"], now, unique, endpoint.counting, past, self._responses.on)
        return its, (weight + past.weight, functools.partial(face.read, body))

    async def as_begun(self, request: Request, setting: dict[str, Any]) -> Request:
        """Return the request with a new writer, which is in the state in which an earlier request's writer began.
        `setting` is the `Request.setting` of that earlier request."""
        if request.reading is None or request.its is None or not setting:
            return request
        bench = self._bodies.bench(request.key.account, None)  # the answer may have several clients
        return self._written_by(request, await bench.work(*request.reading, replace(request.its, **setting)))

    def _written_by(self, request: Request, asked: Asked) -> Request:
        keep = None
        if (stored := asked.stored) is not None:
            keep = functools.partial(self._responses.keep, request.key.account, stored.writer, stored)
        return replace(request, writer=asked.writer, keep=keep)

    async def _prepare(
        self,
        endpoint: Endpoint,
        scope: Scope,
        headers: dict[bytes, bytes],
        key: Key,
        said: Said,
        body: dict[str, Any],
        weight: int,
        asked: Asked | None,
        started: float,
        charge: Charge,
        bench: Bench,
        *,
        strict: bool,
    ) -> tuple[Exchange, Route]:
        """Check a request's fields and find its route. `body` is as engines have it, `weight` the bytes of its values,
        `said` as the caller sent it, and `asked` what a face made of that."""
        kind = endpoint.kind
        size, body, route, prompt = await self._checked(endpoint, headers, key, body, weight, bench, strict=strict)
        options = body.get("stream_options") or {}
        return Exchange(
            request_id=scope["request_id"],
            kind=kind,
            key_id=key.id,
            owner=key.owner,
            user=key.user,
            stream=bool(body.get("stream")) and endpoint.streams,
            wants_usage=options.get("include_usage") is True,
            size=size,
            choices=_choices(endpoint, size, body.get("n")),
            resume=switch(headers, names.RESUME),
            fields=body,
            prompt=prompt,
            started=started,
            priority=key.priority,
            mark=functools.reduce(lambda crc, it: zlib.crc32(it, crc), said, 0),
            queue_timeout=shortened(headers, self._queue_timeout),
            charge=charge,
            origin=asked.origin if asked else None,
        ), route

    async def _checked(
        self,
        endpoint: Endpoint,
        headers: dict[bytes, bytes],
        key: Key,
        body: dict[str, Any],
        weight: int,
        bench: Bench,
        *,
        strict: bool,
    ) -> tuple[int, dict[str, Any], Route, str | None]:
        """Return a body's size, its fields for the engine, its route, and the names of its prompts."""
        kind, work = endpoint.kind, bench.work
        size = await work(weight, check, kind, body)
        body = lengths.unify(kind, body)
        route = await self._routes.resolve(body.get("model"), key, headers)
        engines = {target.upstream.dialect.name for tier in route.tiers for target in tier}
        texts, searches = await work(weight, bounds.check, body, engines)
        await work(weight + texts.weight if texts.weight else 0, texts.check)
        for it in searches:
            await bench.search(it.check) if it.takes_long else it.check()
        if endpoint.chats:
            await work(weight, demand.check, body)
        # Before a prompt, control tokens are searched for, which takes up to 0.2 µs for each character.
        search = 4 * weight if self._prompts.of(key, route.called or (route.name,)) else 0
        body, prompt = await work(search, self._prompts.apply, key, route.name, kind, body, route.called)
        return size, body, await work(weight, suited, route, kind, body, strict=strict), prompt

    async def count(self, request: Request) -> Count:
        """Count the tokens of a request's prompt. This takes no slot of an engine, and its key is charged no tokens.
        Raises StackError."""
        it, route = request.exchange, request.route
        estimate = self._services.estimates.of(it, route.name).prompt
        target = route.pick(())
        tokens = await self._services.contexts.counted(target.upstream, it, target.model)
        return Count(estimate if tokens is None else tokens, exact=tokens is not None)

    async def admit(self, request: Request, trail: Trail | None = None, trace: Trace | None = None) -> Relay:
        """Charge the key the request's tokens, and return the Relay. The caller must run it, because it holds the
        charge.

        With a `trail`, the charge is noted there. A part of the answer that was charged before is not charged again.
        Raises StackError."""
        it, lease = request.exchange, request.lease
        key = self._allowed(request.key, it)
        estimate = self._services.estimates.of(it, request.route.name)
        past = trail.past if trail is not None else None
        goes_on = past is not None and past.book == self._book.memory  # what the dead had set aside stays charged there
        if lease.taken or not lease.open or request.replay:  # the answer that existed is gone
            lease = await enter(self._book, key, self._services.estimates.seconds(key.id), goes_on=goes_on)
        lease.taken = True
        try:
            if past is not None and past.book and not goes_on:  # the accounts began anew, by what the records say
                past.charged = await self._services.recorder.charged(past.row.get("id", ""))
            if goes_on:  # also if it entered as any other: it came while the dead worker was still alive
                lease.go_on()
            else:
                await lease.set_aside(estimate)
            if past is not None and past.book:
                lease = Inherited(lease, past.charged, estimate)
            if trail is not None:
                trail.note({"book": self._book.memory, "charged": lease.charged})
            return Relay(it, request.route, key, lease, self._services, request.writer, request.keep, trail, trace)
        except BaseException:
            lease.settle(0)
            raise

    def look_after(self, relays: Iterable[Relay]) -> None:
        """End the running requests of keys that were revoked or have expired, and the waiting requests of keys that may
        not use their model any more."""
        for relay in relays:
            try:
                self._allowed(relay.key, relay.exchange)
            except InvalidKey as exc:
                if not relay.wanted:
                    relay.halt(exc)
            except ModelNotFound as exc:
                if not relay.at_work:
                    relay.halt(exc)

    def refused(self, key: Key) -> InvalidKey | None:
        """Return why a request's key or secret is not valid any more; None: it is."""
        try:
            self._keys.still(key)
        except InvalidKey as exc:
            return exc
        return None

    def _allowed(self, key: Key, it: Exchange) -> Key:
        """Return the current state of the key. Raises InvalidKey, or ModelNotFound if the key may not use that model
        any more."""
        key = self._keys.still(key)
        self._routes.check(it.fields.get("model"), key)
        return key


def _digest(endpoint: Endpoint, said: Said) -> bytes:
    """Of what a request says: it is the same again if the request is sent again."""
    digest = hashlib.sha256(endpoint.path.encode() + b"\n")
    for it in said:
        digest.update(it)
    return digest.digest()


def _check_type(endpoint: Endpoint, content_type: bytes) -> None:
    """Check that a request's body is what its endpoint reads. Raises UnsupportedMediaType."""
    if endpoint.form and not multipart.is_form(content_type):
        raise UnsupportedMediaType(
            "Send the body as a form, with Content-Type: multipart/form-data and its boundary.", param="content-type"
        )
    if not endpoint.form and not _JSON.fullmatch(content_type):
        raise UnsupportedMediaType("Send the body as JSON, with Content-Type: application/json.", param="content-type")


def _strictly(asked: Asked) -> Asked:
    """Return the request for strict mode, in which no field may be left out or changed. Raises BadRequest that names
    the first field that would be left out."""
    for field in asked.origin.ignored:
        raise BadRequest(
            f"'{field}' has no effect here, and strict mode is on. Leave it out.",
            param=field,
            code="unsupported_parameter",
        )
    return replace(asked, origin=replace(asked.origin, advice=(), yields=False))


def _choices(endpoint: Endpoint, size: int, n: object) -> int:
    """Return how many answers are asked for: `n` for each prompt."""
    each = n if isinstance(n, int) and n > 0 else 1
    return each * size if endpoint.counted == "prompts" else each
