"""Relay routes: serve the relayed paths as plain ASGI, from a request's head to the end of its answer."""

import logging
from functools import partial
from typing import Any

import orjson
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway import endpoints
from gateway import headers as names
from gateway.api.faces import Face, refusal
from gateway.api.idempotency.answers import Answers
from gateway.api.idempotency.form import Form
from gateway.api.middleware import respond
from gateway.api.pipeline import Pipeline
from gateway.api.request import Request
from gateway.errors import BUG, ClientLeft, InternalError, StackError, forget
from gateway.metrics import Metrics
from gateway.relay.client import Client
from gateway.relay.relay import Relay
from gateway.relay.trail import Past, Trail
from gateway.upstream.progress import Progress

Relays = set[Relay]  # the running relays
log = logging.getLogger("stack")


class Maker:
    """Make the answer to one request. See idempotency.maker.Maker."""

    def __init__(self, routes: "Dispatch", request: Request, scope: Scope) -> None:
        self._routes = routes
        self._request = self._begun = request
        self._scope = scope
        self._trace = scope.get("stack.trace")
        self.setting = request.setting

    def refused(self) -> StackError | None:
        """See idempotency.maker.Maker.refused."""
        return self._routes.pipeline.refused(self._request.key)

    async def form(self) -> Form:
        """See idempotency.maker.Maker.form."""
        request = await self._routes.pipeline.as_begun(self._request, self._request.setting)
        return Form(partial(refusal, scope=self._scope), request.writer)

    async def past(self, setting: dict[str, Any]) -> Past:
        """See idempotency.maker.Maker.past."""
        self._begun = await self._routes.pipeline.as_begun(self._request, setting)
        return Past(self._begun.exchange, self._begun.route, self._begun.writer)

    def begins(self) -> None:
        """See idempotency.maker.Maker.begins."""
        if self._trace is not None:
            self._trace.held = True

    async def run(self, client: Client, send: Send, trail: Trail) -> bool:
        """See idempotency.maker.Maker.run. If the answer is continued, its writer has already written the
        beginning."""
        request = self._begun if trail.past is not None and trail.past.started else self._request
        try:
            return await self._routes.relay(request, self._scope, client, send, trail)
        finally:
            if self._trace is not None:
                self._trace.release()


class Dispatch:
    """Serve POST to the relayed paths as plain ASGI, and everything else by FastAPI.

    FastAPI's handling of a request would cost a quarter of the whole relay (this package's README.md). The routes are
    registered with FastAPI as well, for the schema and the 405 answers.
    """

    def __init__(
        self,
        app: ASGIApp,
        pipeline: Pipeline,
        answers: Answers,
        progress: Progress,
        relays: Relays,
        metrics: Metrics,
    ) -> None:
        self._app = app
        self.pipeline = pipeline
        self._answers = answers
        self._progress = progress
        self._metrics = metrics
        self._relays = relays

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        relayed = scope["type"] == "http" and scope["method"] == "POST"
        endpoint = endpoints.BY_PATH.get(scope["path"]) if relayed else None
        if endpoint is None:
            await self._app(scope, receive, send)
            return
        try:
            try:
                request = await self.pipeline.understand(endpoint, scope, receive)
            except StackError as exc:
                self._metrics.refused(endpoint, exc)
                raise
            try:
                if request.face is not None and endpoint.counting:
                    await self._count(request, request.face, send)
                else:
                    await self._answer(request, scope, receive, send)
            finally:
                if not request.lease.taken:
                    request.lease.settle(0)
        except ClientLeft as exc:
            forget(exc)  # the client has disconnected
        except StackError as exc:
            forget(exc)
            await respond(scope, send, exc)
        except Exception:
            log.exception("a bug in the gateway")
            await respond(scope, send, InternalError(BUG))

    async def _count(self, request: Request, face: Face, send: Send) -> None:
        """Answer with the number of tokens of the prompt, and say who counted them."""
        counted = await self.pipeline.count(request)
        body = orjson.dumps(face.counted(counted.tokens))
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (names.COUNTED_BY, b"engine" if counted.exact else b"estimate"),
            *request.lease.headers(),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, request: Request, scope: Scope, receive: Receive, send: Send) -> None:
        name, client = request.headers.get(names.IDEMPOTENCY_KEY), scope["stack.client"]
        if name is None:
            await self.relay(request, scope, client, send)
            return
        maker = Maker(self, request, scope)
        request_id = request.exchange.request_id
        form = Form(partial(refusal, scope=scope), request.writer)
        await self._answers.answer(
            name, request.key.account, request.digest, request_id, maker, client, receive, send, form
        )

    async def relay(
        self, request: Request, scope: Scope, client: Client, send: Send, trail: Trail | None = None
    ) -> bool:
        """Have an engine answer the request. Returns whether the answer is complete. Every error except a bug is sent
        to the client here."""
        relay: Relay | None = None
        try:
            try:
                relay = await self.pipeline.admit(request, trail, scope.get("stack.trace"))
            except StackError as exc:
                self._metrics.refused(request.endpoint, exc)
                raise
            self._relays.add(relay)
            try:
                return await relay.run(client, send)
            finally:
                self._relays.discard(relay)
        except ClientLeft as exc:
            forget(exc)
            return False
        except StackError as exc:
            forget(exc)
            await self._refuse(request, scope, relay, exc, client, send)
            return False
        finally:
            if relay is not None:
                relay.sent()

    async def _refuse(
        self, request: Request, scope: Scope, relay: Relay | None, error: StackError, client: Client, send: Send
    ) -> None:
        """Tell the client of an error before anything of its answer was sent."""
        error = self._progress.explain(error, *(relay.models if relay else ()))
        face = request.face
        if face is not None:
            face.retell(error)
            told = refusal(error, scope)
            if relay is not None and face.fails_in_stream and request.exchange.stream and told.status >= 500:
                await relay.fail(error)
                return
        if relay is None:
            await respond(scope, send, error, client=client)
        else:
            await respond(scope, relay.copied(send), error, relay.standing, client=client)
