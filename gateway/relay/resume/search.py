"""Search: decide whether an answer that broke off is continued, and find the engine that continues it.

If no token had come yet, the request is made again as it was.
"""

import time
from itertools import chain

from gateway.dialects.dialect import Way
from gateway.errors import EngineRefused, EngineTimeout, EngineUnreachable, StackError
from gateway.exchange import Exchange
from gateway.relay.content import Content
from gateway.relay.outage import first_back
from gateway.relay.reader import Reader
from gateway.relay.resume.handover import ways
from gateway.relay.resume.part import Part
from gateway.relay.rounds import Rounds
from gateway.routing.retry import worthwhile
from gateway.routing.routes import Route, Target, least_busy
from gateway.upstream.client import Upstream

ATTEMPTS = 3  # requests for a continuation, connections that were refused aside
_TEXT: frozenset[Way] = frozenset({"message", "raw"})  # ways in which an engine goes on with a text that it is given
# Ways in which an engine goes on with what another kind of engine or another model began. None of them depends on what
# this engine would have said.
_ELSEWHERE: frozenset[Way] = _TEXT | {"rest", "nailed", "arguments"}


def possible(exchange: Exchange, content: Content, error: StackError) -> bool:
    """Return whether an answer that this error broke off can be continued, or made again. `content` is what has come
    of it."""
    if not exchange.resume or not exchange.endpoint.resumes or content.complete:
        return False
    return content.kept and worthwhile(error, same_engine=False)


def part_of(exchange: Exchange, reader: Reader, rounds: Rounds | None, *, resumed: bool) -> Part:
    """Return what has come of the choice that the engine was making. `resumed`: the client is told of a resume."""
    if rounds is not None:
        content = rounds.made.part(rounds.index)
        return Part(
            exchange=rounds.exchange, content=content, tokens=content.tokens, index=rounds.index, resumed=resumed
        )
    tokens = reader.usage.tokens_out if reader.usage is not None else reader.content.tokens
    return Part(exchange=exchange, content=reader.content, tokens=tokens, resumed=resumed)


class Search:
    """Search for an engine that continues an answer, from the moment of the break until an engine has begun."""

    def __init__(self, error: StackError, route: Route, first: Target, part: Part) -> None:
        """`error` broke off the answer that the target `first` began. `part` is the choice that is made next."""
        self.error = error
        self.first = first
        self.part = part
        self._route = route
        self._left: dict[tuple[str, bool], list[Way]] = {}  # the ways that were not refused yet, by kinds of targets
        others = (it for tier in route.tiers for it in tier if self._can(it))
        self._at = next((it for it in chain([first], others) if self._ways(it)), first)  # with whom it is tried now
        self._until = time.monotonic() + route.resume.wait
        self._attempts = ATTEMPTS
        self._away: set[Upstream] = set()
        self._unfit: set[Upstream] = set()

    @property
    def hopeless(self) -> bool:
        """Whether no way is left to continue the answer."""
        return not self._ways(self._at)

    @property
    def way(self) -> Way:
        """The way that is tried now."""
        return self._ways(self._at)[0]

    @property
    def said(self) -> str:
        """The way, as the log names it: `again` if no token had come. `text` stands for `message` and for `raw`,
        because an Ollama is asked later which of the two it can do."""
        if not self.part.content.tokens:
            return "again"
        return "text" if self.way in _TEXT else self.way

    @property
    def continues(self) -> bool:
        """Whether the engine gets the text so far, and continues it."""
        return self.way in _TEXT and self.part.content.tokens > 0

    def failed(self, upstream: Upstream, error: StackError) -> None:
        """Note that this engine broke the answer off, or did not continue it."""
        ways_left = self._ways(self._at)
        if error is not self.error and isinstance(error, EngineRefused) and len(ways_left) > 1:
            ways_left.pop(0)  # it is well, but does not do it in this way
            self._away.discard(upstream)
            return
        self._away.add(upstream)
        if error is self.error:
            return
        self._attempts -= not isinstance(error, EngineUnreachable)
        if isinstance(error, EngineTimeout) or not worthwhile(error, same_engine=False):
            self._unfit.add(upstream)

    async def target(self) -> Target | None:
        """Return the target to ask next: another engine at once, otherwise the first one that a probe finds healthy in
        time. None: there is no such engine, or there were too many attempts."""
        tiers = [[it for it in tier if self._can(it)] for tier in self._route.tiers]
        while self._attempts > 0:
            for tier in tiers:
                ready = [it for it in tier if it.upstream not in self._away and it.upstream.breaker.allows()]
                if ready:
                    self._at = least_busy([it for it in ready if self._alike(it)] or ready)
                    return self._at
            upstreams = {it.upstream for tier in tiers for it in tier} - self._unfit
            back = await first_back(upstreams, self._until - time.monotonic())
            if back is None:
                break
            self._away.discard(back)
        return None

    def _can(self, it: Target) -> bool:
        if not self._alike(it):
            # A completion's prompt goes through the chat template at the one, and not at the other.
            begun = self.part.content.tokens > 0 and not self.part.exchange.endpoint.chats
            if begun and it.upstream.dialect.doubtful != self.first.upstream.dialect.doubtful:
                return False
            if not self._route.resume.across_models and it.model != self.first.model:
                return False
            # A call that the first engine forces by itself would not be forced at the other one.
            fields = self.part.exchange.fields
            if not self.part.content.tokens and fields.get("tool_choice") not in (None, "auto", "none"):
                return False
        return bool(self._ways(it))

    def _alike(self, it: Target) -> bool:
        """Whether it is the model that began the answer, on an engine of the same kind."""
        return (it.model, it.upstream.dialect) == (self.first.model, self.first.upstream.dialect)

    def _ways(self, it: Target) -> list[Way]:
        """Return the ways that are left for this target."""
        dialect, alike = it.upstream.dialect, self._alike(it)
        if (dialect.name, alike) not in self._left:
            found = ways(self.part, dialect)
            # What the client has of another model's reasoning does not come again.
            elsewhere = _ELSEWHERE - {"nailed"} if self.part.content.reasoning else _ELSEWHERE
            self._left[dialect.name, alike] = [way for way in found if alike or way in elsewhere]
        return self._left[dialect.name, alike]
