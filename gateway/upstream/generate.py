"""Generate: ask one engine for an answer, with the parameters, context window and refusals of that engine."""

from typing import Any, NamedTuple, Protocol

import orjson

from gateway import headers
from gateway.dialects.asking import Prompt
from gateway.errors import ContextExceeded, EngineRefused, StackError
from gateway.exchange import Exchange, Origin
from gateway.translation.face import called
from gateway.upstream import concessions, parameters, wishes
from gateway.upstream.client import MAX_REFUSAL, Reply, Upstream
from gateway.upstream.concessions import Concession
from gateway.upstream.context_window import Contexts
from gateway.upstream.engine_errors import refusal

Headers = list[tuple[bytes, bytes]]


class Asker(Protocol):
    """The caller of `generate`, which is told how far the request has come."""

    def ignored(self, headers: Headers) -> None:
        """Take the headers that name the parameters which this engine ignores, and the roles that it gets under another
        name. Called before the engine is asked."""

    def checks(self) -> None:
        """Note that the engine reads the prompt now, for a check. It gets the request afterwards, if at all."""

    def asked(self) -> None:
        """Note that the engine gets the request now."""

    def new_id(self) -> str:
        """Return an id for the request. Called each time that the request is sent."""

    def lines(self) -> str:
        """Return further header lines of the request, each with its end; empty if there are none."""

    async def rest(self, reply: Reply, most: int) -> bytes:
        """Read the rest of a reply, of `most` bytes."""


async def generate(
    upstream: Upstream,
    exchange: Exchange,
    model: str,
    *,
    stream: bool,
    contexts: Contexts,
    connect_timeout: float,
    asker: Asker,
) -> Reply:
    """Ask the engine for an answer by `model`. Returns its reply, a 200 whose head has arrived; the caller closes it.

    If the engine refuses a translated request for a field that is only a wish, the request is sent again without the
    field. If it refuses the roles of the messages, their order, or a tool's pattern, the request is sent in another
    form.

    Raises the meaning of the engine's refusal; ContextExceeded for a prompt that the engine would cut; BadRequest for a
    request that has no form for this engine; and what Upstream.post raises.
    """
    reading = parameters.read(upstream.dialect.name, exchange.kind, exchange.fields)
    question = _Question(upstream, exchange, model, stream, contexts, connect_timeout, asker)
    if exchange.origin is None:
        asker.ignored(reading.headers)
        return await question.ask(reading.fields)
    return await question.ask_translated(reading, exchange.origin)


async def continue_raw(
    upstream: Upstream, exchange: Exchange, model: str, text: str, connect_timeout: float, asker: Asker
) -> Reply:
    """Ask the engine to continue a text behind the prompt of a request, by its dialect's `raw`.

    Raises EngineRefused if the engine does not show the prompt, and otherwise what `generate` raises.
    """
    raw = upstream.dialect.raw
    reading = parameters.read(upstream.dialect.name, exchange.kind, exchange.fields)
    asker.ignored(reading.headers)
    prompt = Prompt(exchange.kind, model, reading.fields, 0)
    rendered = await raw.render(upstream, prompt) if raw is not None else None
    if raw is None or rendered is None:
        raise EngineRefused("This engine does not return the prompt that it builds from a request.", status=400)
    body = orjson.dumps(raw.body(prompt, rendered + text) | {"stream": True})
    asker.asked()
    reply = await upstream.post(exchange.kind, body, asker.new_id, connect_timeout, path=raw.path, lines=asker.lines())
    upstream.breaker.succeeded()
    if reply.status == 200:
        return reply
    with reply:
        raise refusal(upstream.dialect, reply.status, await asker.rest(reply, MAX_REFUSAL))


class _Question(NamedTuple):
    """The arguments of `generate`."""

    upstream: Upstream
    exchange: Exchange
    model: str
    stream: bool
    contexts: Contexts
    connect_timeout: float
    asker: Asker

    async def ask(self, fields: dict[str, Any]) -> Reply:
        upstream, kind, asker = self.upstream, self.exchange.kind, self.asker
        body = self.exchange.encode(self.model, fields, upstream.dialect.counts if self.stream else None)
        prompt = Prompt(kind, self.model, fields, len(body))
        if upstream.dialect.cuts:
            await self.contexts.check(upstream, prompt, asker.checks)
        asker.asked()
        reply = await upstream.post(kind, body, asker.new_id, self.connect_timeout, lines=asker.lines())
        upstream.breaker.succeeded()  # the engine works: a stream may end much later
        if reply.status == 200:
            return reply
        with reply:
            error = refusal(upstream.dialect, reply.status, await asker.rest(reply, MAX_REFUSAL))
        raise await self.contexts.explained(error, upstream, prompt)

    async def ask_translated(self, reading: parameters.Reading, origin: Origin) -> Reply:
        """Ask in the form that the engine is known to need, and in another form after a refusal, if there is one."""
        upstream, model = self.upstream, self.model
        fields = {**reading.fields, **(upstream.dialect.continues if self.exchange.prefilled else {})}
        known = tuple(it for it in origin.advice if it in fields and upstream.unwelcome.has(model, it, fields[it]))
        ignored = [*origin.ignored, *(called(it, origin.names) for it in (*reading.ignored, *known))]
        roles = list(reading.roles)
        fields = await self._fitted(wishes.without(fields, known))
        tried: list[Concession] = []
        first: StackError | None = None
        for it in concessions.beforehand(model, fields, upstream.unwelcome) if origin.yields else ():
            fields = _conceded(it, ignored, roles, origin)
        while True:
            self.asker.ignored([*_named(ignored), *parameters.told_roles(roles)])
            try:
                reply = await self.ask(fields)
            except (EngineRefused, ContextExceeded) as exc:
                names = wishes.refused(exc, fields, origin.advice, upstream.dialect.long_limits)
                other = None
                if not names and origin.yields:
                    other = concessions.after(exc, fields, upstream.dialect.most_repeats)
                    first = first or exc
                if not names and other is None:
                    raise first or exc from None  # the reason of the first refusal is the caller's own form
            else:
                for it in tried:
                    it.learn(model, upstream.unwelcome)
                return reply
            if other is not None:
                tried.append(other)
                fields = _conceded(other, ignored, roles, origin)
                continue
            for name in set(names) & set(origin.advice):
                upstream.unwelcome.learn(model, name, fields[name])
                ignored.append(called(name, origin.names))
            fields = wishes.without(fields, names)

    async def _fitted(self, fields: dict[str, Any]) -> dict[str, Any]:
        way = self.upstream.dialect.long_limits
        if way == "taken" or not any(it in fields for it in wishes.LIMITS):
            return fields
        limit = await self.contexts.limit(self.upstream, Prompt(self.exchange.kind, self.model, fields, 0))
        return fields if limit is None else wishes.fitted(fields, limit, way)


def _conceded(it: Concession, ignored: list[str], roles: list[str], origin: Origin) -> dict[str, Any]:
    """Note what a concession changed, by the caller's names. Returns its fields."""
    ignored += [origin.names.get(name, name) for name in it.ignored]
    roles += it.roles
    return it.fields


def _named(ignored: list[str]) -> Headers:
    names = ",".join(dict.fromkeys(ignored))
    return [(headers.IGNORED_PARAMS, names.encode())] if names else []
