"""Health: report whether a request could be answered now, and probe the engines in the background."""

import asyncio
import time
from contextlib import suppress

from gateway.config import Breaker as BreakerConfig
from gateway.errors import Draining, EngineError, EngineSilent, ModelLoading, StackError
from gateway.routing.retry import blames_the_engine
from gateway.routing.routes import Routes, Target
from gateway.shared_memory import Flag
from gateway.upstream.client import Upstream
from gateway.upstream.model_names import canonical
from gateway.upstream.progress import Progress

FRESH = 1.0  # seconds for which the engines' last answers are repeated
WHEN_OPEN = 1.0  # seconds between probes of an engine whose breaker is open


class Health:
    """Report the readiness of the default model. Its engines are asked at most once a second. The states of other
    engines come from the probes, because a silent one would delay the answer.
    """

    def __init__(self, routes: Routes, upstreams: dict[str, Upstream], progress: Progress, draining: Flag) -> None:
        self._routes = routes
        self._upstreams = upstreams
        self._progress = progress
        self._draining = draining
        self._lock = asyncio.Lock()
        self._asked_at = float("-inf")
        self._found: tuple[StackError | None, dict[str, str]] = (None, {})

    async def look(self) -> tuple[StackError | None, dict[str, str]]:
        """Return why a request could not be answered now (None if it could), and each engine's state in a
        word or two."""
        if self._draining:
            return Draining("The gateway is stopping."), {}
        async with self._lock:
            if time.monotonic() - self._asked_at > FRESH:
                self._found = await self._ask()
                self._asked_at = time.monotonic()
            return self._found

    def seen(self) -> dict[str, tuple[str, StackError | None]]:
        """Each engine's state in a word or two, and what was wrong with it when it was last probed. Asks nobody."""
        return {name: (_state(it), it.trouble) for name, it in self._upstreams.items()}

    async def _ask(self) -> tuple[StackError | None, dict[str, str]]:
        targets = list(dict.fromkeys(it for route in self._routes.default() for tier in route.tiers for it in tier))
        found = await asyncio.gather(*(_trouble(target) for target in targets))
        troubles = [it and self._progress.explain(it, target.model) for it, target in zip(found, targets, strict=True)]
        states = {name: _state(it) for name, it in self._upstreams.items()}
        for target, trouble in zip(targets, troubles, strict=True):
            if trouble is not None:
                states[target.upstream.name] = str(trouble.code)
        return (None if None in troubles else troubles[0]), states


class Probes:
    """Probe the health of each engine in the background, so that a dead engine is noticed before a request reaches it,
    and a recovered engine is used at once. Use it with `async with`."""

    def __init__(self, config: BreakerConfig, upstreams: dict[str, Upstream]) -> None:
        self._every = config.probe_every
        self._upstreams = upstreams

    async def __aenter__(self) -> None:
        self._tasks = [asyncio.create_task(self._watch(upstream)) for upstream in self._upstreams.values()]

    async def __aexit__(self, *exc: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _watch(self, upstream: Upstream) -> None:
        await upstream.probe()  # for /readyz; the breaker now depends on a request
        while True:
            pause = min(WHEN_OPEN, self._every) if upstream.breaker.state == "open" else self._every
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await upstream.changed.wait()
                upstream.changed.clear()
                continue  # the state has changed, and the pause with it
            trouble = await upstream.probe()
            # An engine that answers counts as working, even if it is still loading.
            broken = trouble is not None and blames_the_engine(trouble)
            silent = isinstance(trouble, EngineSilent)
            upstream.breaker.probed(trouble.message if trouble is not None and broken else None, silent=silent)


def _state(upstream: Upstream) -> str:
    if upstream.breaker.state != "closed":
        return upstream.breaker.state
    return str(upstream.trouble.code) if upstream.trouble is not None else "ok"


async def _trouble(target: Target) -> StackError | None:
    """Return what keeps a target from answering, or None."""
    if trouble := await target.upstream.probe():
        return trouble
    try:
        dialect = target.upstream.dialect.name
        names = {canonical(dialect, it["id"]) for it in await target.upstream.models()}
    except EngineError as exc:
        return exc
    if canonical(dialect, target.model) not in names:
        return ModelLoading(f"The engine runs, but does not have the model '{target.model}' (yet).")
    return None
