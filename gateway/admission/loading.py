"""Loading: have models loaded before they are asked, and learn what is loaded and how long a load takes.

This is only done on engines that load models when they are asked for them, if the configuration has several models on
the engine, and on GPUs that several engines share (gpu.py). The decision which model is loaded next is in swaps.py.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress

from gateway import logs
from gateway.admission.gpu import Gpu, Memory, asleep
from gateway.admission.memory import Places, Woken
from gateway.admission.postgres import PostgresQueues
from gateway.admission.swaps import Loads, number
from gateway.admission.visit import Visit
from gateway.config import FIRST, Config
from gateway.dialects.dialect import Loader
from gateway.endpoints import Kind
from gateway.errors import EngineError, LoadFailed, unloadable
from gateway.metrics import Metrics
from gateway.shared_memory import BusyError
from gateway.store.postgres import LostError
from gateway.upstream.client import Upstream
from gateway.upstream.load import GpuState
from gateway.upstream.model_names import canonical

FRESH = 10.0  # seconds for which it is taken for known what an engine has loaded
KEEP = 240  # seconds for which a model stays loaded without requests, at least, if not all models fit
AGAIN = 0.1  # seconds until the shared memory is tried again


def several(config: Config, *, any_model: bool) -> set[str]:
    """Return the engines on which several models may be used. `any_model`: the one engine's own list counts."""
    models: dict[str, set[str]] = {}
    for model in config.models.values():
        for target in (*model.targets, *model.fallbacks):
            dialect = config.engines[target.engine].dialect
            models.setdefault(target.engine, set()).add(canonical(dialect, target.model))
    return {name for name, them in models.items() if len(them) > 1} | ({FIRST} if any_model else set())


class _Own:
    """A Memory that is an engine's own."""

    def __init__(self, loader: Loader, upstream: Upstream) -> None:
        self._loader = loader
        self._upstream = upstream
        self.known_as = upstream.known_as

    async def loaded(self) -> Mapping[int, float]:
        """See Memory.loaded."""
        return {number(name): left for name, left in (await self._loader.loaded(self._upstream)).items()}

    async def load(self, upstream: Upstream, kind: Kind, model: str, there: Collection[int]) -> float:
        """See Memory.load."""
        began = time.monotonic()
        if number(canonical(upstream.dialect.name, model)) in there:
            return 0.0
        try:
            loaded = await self._loader.load(upstream, kind, model, None)
        except LoadFailed as exc:
            exc.took = time.monotonic() - began
            raise
        return time.monotonic() - began if loaded else 0.0


class Loading:
    """Load models for the requests of one worker. `woken` is called with places that get a slot by that.

    The queues in the database, if there are any, know what is loaded. The host's memory is told the same, in case the
    database is lost, and for estimates.
    """

    def __init__(
        self,
        places: Places,
        far: PostgresQueues | None,
        swapping: set[str],
        gpus: Mapping[str, Gpu],
        woken: Callable[[Woken], None],
        metrics: Metrics,
    ) -> None:
        self._places = places
        self._gpus = gpus
        self._metrics = metrics
        self._far = far
        self._swapping = swapping
        self._woken = woken
        self._tasks: dict[tuple[str, int], asyncio.Task[None]] = {}

    async def close(self) -> None:
        """Load no more."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def number(self, upstream: Upstream, model: str) -> int:
        """Return the number of the model on an engine that may have to load it, or that of an engine that may have to
        wake; 0 for any other engine."""
        if upstream.name in self._gpus:
            return number(upstream.name)
        if upstream.dialect.loader is None or upstream.name not in self._swapping:
            return 0
        return number(canonical(upstream.dialect.name, model))

    def wait(self, upstream: Upstream, engine: int, model: str) -> float:
        """Return about how many seconds a new request for the model would wait."""
        return self._places.wait(engine, self.number(upstream, model))

    def left(self, visit: Visit) -> float | None:
        """See Visit.loading."""
        if visit.loads_since is not None:
            cost = self._places.models.loads(visit.at).cost(visit.model)
            return max(0.0, visit.loads_since + cost - time.monotonic())
        if visit.since is None or not visit.model:
            return None
        return self._places.models.due(visit.at, visit.model, visit.since) or None

    def serves(self, upstream: Upstream, engine: int) -> bool:
        """Return whether the slots of this queue are those of the engine: it has no GPU in common with others, or is
        awake. Needs no lock."""
        return upstream.name not in self._gpus or number(upstream.name) in self._places.models.loads(engine).loaded

    def gpu_state(self, upstream: Upstream, engine: int) -> GpuState:
        """See Upstream.gpu_state. Needs no lock."""
        if self.serves(upstream, engine):
            return "awake"
        if self._gpus[upstream.name].barred(upstream.name):
            return "barred"
        loads = self._places.models.loads(engine)
        if loads.begun and loads.last == number(upstream.name):
            return "waking"
        return "asleep" if loads.loaded or loads.begun else "unknown"

    async def check(self, upstream: Upstream, engine: int, model: str) -> None:
        """Raise EngineAsleep if the engine did not wake lately, and is not awake now. Its requests would have the other
        engines of its GPU sleep for nothing. Raise LoadFailed if it could not load the model lately."""
        gpu, wanted = self._gpus.get(upstream.name), self.number(upstream, model)
        if wanted and self._places.models.bars(engine, wanted) and (memory := self._memory(upstream)) is not None:
            await self._loads(memory, engine)
            if self._places.models.bars(engine, wanted):
                raise unloadable()
        if gpu is not None and gpu.barred(upstream.name):
            await self._loads(gpu, engine)
            if gpu.barred(upstream.name):
                raise asleep()

    async def ready(self, upstream: Upstream, model: str, visit: Visit) -> None:
        """Return when the engine has loaded the model, for a request that has a slot. Raises EngineError.

        A load goes on if its request is cancelled. Otherwise clients that disconnect could have models loaded for
        nothing again and again, because Ollama gives up a load whose client disconnects.
        """
        engine, wanted, memory = visit.at, self.number(upstream, model), self._memory(upstream)
        if not wanted or memory is None:
            return
        if wanted in (await self._loads(memory, engine)).loaded:
            self._use(upstream, engine)
            return
        key = upstream.name, wanted
        if (task := self._tasks.get(key)) is None:
            load = self._load(memory, upstream, engine, visit.exchange.kind, model)
            task = self._tasks[key] = asyncio.create_task(load)
            task.add_done_callback(lambda it: self._ended(key, it))
        visit.loads_since = time.monotonic()
        try:
            await asyncio.shield(task)
        finally:
            visit.loads_since = None

    def _ended(self, key: tuple[str, int], task: asyncio.Task[None]) -> None:
        del self._tasks[key]
        if not task.cancelled():
            task.exception()  # otherwise asyncio logs an exception for which no request waits any more

    def _memory(self, upstream: Upstream) -> Memory | None:
        if upstream.name in self._gpus:
            return self._gpus[upstream.name]
        return _Own(upstream.dialect.loader, upstream) if upstream.dialect.loader is not None else None

    def _use(self, upstream: Upstream, engine: int) -> None:
        """Give the queue of a GPU the slots of this engine, which is the one that is awake."""
        if (gpu := self._gpus.get(upstream.name)) is not None:
            self._places.slots[engine] = self._places.slots[gpu.numbers[upstream.name]]

    async def _loads(self, memory: Memory, engine: int) -> Loads:
        """Return what the engine has loaded. The engine itself is asked from time to time, because it also unloads
        models that nobody uses."""
        loads = await self._known(memory, engine)
        if time.monotonic() < self._places.models.asked_at[engine] + FRESH or loads.begun:
            return loads
        self._places.models.asked_at[engine] = time.monotonic()
        try:
            after = await memory.loaded()
        except EngineError:
            return loads
        with suppress(BusyError):
            self._woken(self._places.looked(engine, self._places.models.loads(engine), after))
        if self._far is not None:
            with suppress(LostError):
                await self._far.looked(memory.known_as, loads, after)
        return await self._known(memory, engine)

    async def _known(self, memory: Memory, engine: int) -> Loads:
        if self._far is not None:
            with suppress(LostError):
                return await self._far.loads(memory.known_as)
        return self._places.models.loads(engine)

    async def _load(self, memory: Memory, upstream: Upstream, engine: int, kind: Kind, model: str) -> None:
        wanted = self.number(upstream, model)
        there: Mapping[int, float] = {}
        try:
            there = await memory.loaded()
            if wanted not in there and self._places.models.bars(engine, wanted):
                raise unloadable()  # the request waited while the model was loaded in vain
            took = await memory.load(upstream, kind, model, there)
            after = await memory.loaded()
        except EngineError as exc:
            after, took = {}, exc.took if isinstance(exc, LoadFailed) else 0.0
            with suppress(EngineError):
                after = await memory.loaded()
            await self._note(memory, engine, wanted, there, after, took, failed=took > 0)
            if took:
                fields = {"engine": upstream.name, "model": model, "seconds": round(took, 3)}
                logs.event("model_load_failed", fields, "warning")
            raise
        self._use(upstream, engine)
        await self._note(memory, engine, wanted, there, after, took)
        scarce = self._places.models.loads(engine).scarce
        if took:
            fields = {"engine": upstream.name, "model": model, "seconds": round(took, 3), "all_fit": not scarce}
            logs.event("model_loaded", fields)
            self._metrics.loaded(upstream.name, took)
        if (loader := upstream.dialect.loader) is not None and scarce and after.get(wanted, 0.0) < KEEP:
            with suppress(EngineError):
                await loader.load(upstream, kind, model, KEEP)

    async def _note(
        self,
        memory: Memory,
        engine: int,
        model: int,
        there: Mapping[int, float],
        after: Mapping[int, float],
        took: float,
        *,
        failed: bool = False,
    ) -> None:
        while True:
            with suppress(BusyError):
                self._woken(self._places.loaded(engine, model, there, after, took, failed=failed))
                break
            await asyncio.sleep(AGAIN)
        if self._far is not None:
            with suppress(LostError):
                await self._far.loaded(memory.known_as, model, there, after, took, failed=failed)
