"""Answer: what there is of one answer, begun by one engine and maybe continued by others."""

from dataclasses import replace

from gateway.errors import StackError
from gateway.exchange import Exchange, Usage
from gateway.fold import Fold, streamable
from gateway.resume import Search, hand_over, possible
from gateway.routing import Route, Target
from gateway.seam import Seam
from gateway.sse import Tap


class Answer:
    """One answer in the making. After `breaks`, there is a `search` for an engine that goes on with it."""

    def __init__(self, exchange: Exchange, route: Route) -> None:
        self._exchange = exchange
        self._route = route
        self._first: Target | None = None  # who began it
        self.tap: Tap | None = None  # what was read of it, by the reader of whoever began to answer last
        self.search: Search | None = None
        self.resumes = 0
        self.fold: Fold | None = None  # adds it up, where the client waits for the whole
        self.usage: Usage | None = None
        self.tokens = 0  # content events seen: what was made, where the engine doesn't get to say
        self.finish_reason: str | None = None

    def ask(self, target: Target) -> tuple[Exchange, Tap]:
        """What to ask of this target, and the reader of the stream that it answers with."""
        exchange = self._exchange
        if self.search is not None:
            seam = self._seam(self.search, target)
            return seam.handover.exchange, seam
        self.fold = None
        if not exchange.stream:
            self.fold = Fold(exchange.fields["messages"] if exchange.kind == "chat" else [])
            exchange = replace(exchange, fields=streamable(exchange.fields))
        hide = exchange.stream and not exchange.wants_usage
        return exchange, Tap(hide_usage=hide, choices=exchange.choices, learn=self.fold.add if self.fold else None)

    def takes(self, target: Target, tap: Tap) -> bool:
        """This target has begun to answer. Returns whether it goes on with what another began."""
        search, self.search = self.search, None
        self._first, self.tap = search.first if search else target, tap
        self.resumes += search is not None
        return search is not None

    def learn(self) -> None:
        """What was said so far."""
        if tap := self.tap:
            self.usage, self.tokens, self.finish_reason = tap.usage, tap.tokens, tap.finish_reason

    def breaks(self, error: StackError, *, sent: bool) -> Search | None:
        """An attempt ended so. Returns a search for an engine that goes on; None where there is nothing to go on with,
        or that can't be. `sent`: the client has something of the answer."""
        first, tap = self._first, self.tap
        if self.search or not first or not tap or self.resumes >= self._route.resume.most:
            return self.search
        if (sent or tap.tokens) and possible(self._exchange, tap, error):
            self.search = Search(error, self._route, first, tap)
        return self.search

    def complete(self, search: Search) -> bytes:
        """Its end, where the caller's limit leaves nothing to be made; else empty."""
        seam = self._seam(search, search.first)
        if seam.handover.left:
            return b""
        end = seam.close("length")
        self.takes(search.first, seam)
        return end

    def _seam(self, search: Search, target: Target) -> Seam:
        first, dialect = search.first.upstream.dialect, target.upstream.dialect
        handover = hand_over(self._exchange, search.answer, first, dialect)
        return Seam(search.answer, handover, self.resumes + 1, self.fold.add if self.fold else None)
