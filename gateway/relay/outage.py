"""Outage: make a request whose engines are all down wait for one of them, as an answer that broke off does.

The request keeps the slot of the engine that failed. The queue behind it therefore stands still, with its order and its
bounds, and the requests with a slot are the first to be asked when the engine is back.
"""

import asyncio
import time
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet

from gateway.admission.visit import Visit
from gateway.errors import EngineLost, EngineUnreachable, ModelLoading, StackError
from gateway.exchange import Exchange
from gateway.routing.routes import Route, Target, least_busy
from gateway.upstream.client import Upstream
from gateway.upstream.progress import Progress

ROUNDS = 3  # waits for one request that end with another failure than a refused connection


class Outage:
    """The wait of one request for its engines. `killed`: the engines that died while they worked on it, as far as is
    known."""

    def __init__(
        self, exchange: Exchange, route: Route, progress: Progress, visit: Visit, killed: AbstractSet[Upstream]
    ) -> None:
        self.waits = False  # the request is waiting now
        self.allowed = exchange.resume and route.resume.most > 0 and route.resume.wait > 0
        self._started = exchange.started
        self._route = route
        self._progress = progress
        self._visit = visit
        self._killed = killed
        self._rounds = ROUNDS

    def keeps_slot(self, error: StackError) -> bool:
        """Return whether a request with this error may keep its slot, because its engine may be down."""
        return self.allowed and isinstance(error, EngineUnreachable | EngineLost | ModelLoading)

    def covers(self, error: StackError, upstream: Upstream) -> bool:
        """Return whether to wait for an engine after this error of `upstream`.

        A request does not wait for a model that is still being fetched. Its caller gets the progress at once.
        """
        if not self.keeps_slot(error):
            return False
        if isinstance(error, EngineLost) and not self._down(upstream):
            return False
        models = (target.model for tier in self._route.tiers for target in tier)
        return self._progress.explain(error, *models) is error

    def _down(self, upstream: Upstream) -> bool:
        """Return whether an engine that lost the request is down. If a model's process dies and its server does not,
        the request may be the reason."""
        return upstream in self._killed and (not upstream.dialect.dies_apart or upstream.trouble is not None)

    async def target(self, error: StackError, upstream: Upstream, unfit: Sequence[Target]) -> Target:
        """Return the target whose engine is back first, after this error of `upstream`. Those that are `unfit` cannot
        serve the request. Raises the error if the request may not wait, or if no engine is back in time.

        The wait counts from the request's arrival, or from the moment when `upstream` was first missed. It counts as a
        wait in a queue.
        """
        if not self.covers(error, upstream):
            raise error
        self._rounds -= not isinstance(error, EngineUnreachable)
        now = time.monotonic()
        since = now if upstream.down_since is None else max(upstream.down_since, self._started)
        seconds = min(self._visit.left, self._route.patience.first_token, since + self._route.resume.wait - now)
        if self._rounds < 0 or seconds <= 0:
            raise error
        targets = [target for tier in self._route.tiers for target in tier if target not in unfit]
        self.waits = True
        try:
            with self._visit.outside("outage"):
                back = await first_back({it.upstream for it in targets}, seconds)
        finally:
            self.waits = False
        if back is None:
            raise error
        return least_busy([it for it in targets if it.upstream is back])


async def first_back(upstreams: Iterable[Upstream], seconds: float) -> Upstream | None:
    """Return the first of these engines whose next health probe succeeds; None if none does in time."""
    waits = {asyncio.create_task(it.back()): it for it in upstreams}
    if not waits:
        return None
    try:
        done, _ = await asyncio.wait(waits, timeout=max(0.0, seconds), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waits:
            task.cancel()
    return waits[done.pop()] if done else None
