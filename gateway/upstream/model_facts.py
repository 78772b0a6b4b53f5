"""Model facts: remember what the engines report about their models. They are asked from time to time, and no request
waits for a slow one."""

import asyncio
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from gateway.dialects.asking import ANY, Facts
from gateway.errors import EngineError
from gateway.upstream.client import Upstream
from gateway.upstream.model_names import canonical

FRESH = 5.0  # seconds for which an engine's report is used
PATIENCE = 0.5  # seconds to wait for an engine's answer; a later answer is used the next time


@dataclass(slots=True)
class _Known:
    facts: Mapping[str, Facts] = field(default_factory=dict)  # by the canonical spelling of each name
    asked_at: float = float("-inf")
    asking: asyncio.Task[None] | None = None
    late: bool = False  # it did not answer in time when it was last asked


class ModelFacts:
    """Remember the facts of all models on all engines. One per worker."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}

    async def refresh(self, upstreams: Iterable[Upstream]) -> None:
        """Ask the engines that were not asked in the last FRESH seconds, all at the same time. An engine that was late
        the last time is asked without waiting for it. Never raises."""
        waited = []
        for upstream in upstreams:
            known = self._known.setdefault(upstream.name, _Known())
            if known.asking is None:
                if time.monotonic() - known.asked_at < FRESH:
                    continue
                known.asking = asyncio.create_task(_ask(upstream, known))
            if not known.late:
                waited.append((known, known.asking))
        if not waited:
            return
        await asyncio.wait([task for _, task in waited], timeout=PATIENCE)
        for known, task in waited:
            known.late = known.late or not task.done()

    def of(self, upstream: Upstream, model: str) -> Facts:
        """Return what is known about a model, by the engine's name for it. Ollama reports the window only of a loaded
        model. Before that, the window is the one that the operator configured, or the model's own if that is smaller.
        """
        known = self._known.get(upstream.name, _Known()).facts
        facts = known.get(canonical(upstream.dialect.name, model)) or known.get(ANY)
        if facts is None:
            return Facts()
        if facts.loaded and upstream.gpu_state() != "awake":
            facts = replace(facts, loaded=False)
        if facts.context is None and upstream.context is not None:
            return replace(facts, context=min(upstream.context, facts.trained or upstream.context))
        return facts


async def _ask(upstream: Upstream, known: _Known) -> None:
    """Store what the engine reports now. While it is unreachable, its last report stays, except for what it
    has loaded."""
    try:
        told = await upstream.dialect.models(upstream)
        known.late = False
    except EngineError:
        told = {name: replace(it, loaded=None) for name, it in known.facts.items()}
    finally:
        known.asking, known.asked_at = None, time.monotonic()
    # Ollama reports the window only of loaded models. It will be the same the next time that the model is loaded.
    known.facts = {name: it if it.context else replace(it, context=_window(known, name)) for name, it in told.items()}


def _window(known: _Known, name: str) -> int | None:
    return known.facts[name].context if name in known.facts else None
