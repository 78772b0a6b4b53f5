"""GPU: the engines that share one GPU. One of them at a time is awake, and the others sleep.

Such an engine has one model. For the queue and for swaps.py, the GPU is the engine, and its engines are the models.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

from gateway import logs
from gateway.admission.models import Models
from gateway.admission.swaps import number
from gateway.config import Config
from gateway.dialects.dialect import Sleeper
from gateway.endpoints import Kind
from gateway.errors import EngineAsleep, EngineError, EngineUnreachable
from gateway.upstream.client import Upstream

SWAP = 300.0  # seconds in which an engine falls asleep, or wakes
BARRED = 300.0  # seconds until an engine that did not wake is tried again
LOOK = 0.5  # seconds between two looks for an engine that starts


class Memory(Protocol):
    """The memory that holds the models of one queue: that of an engine that loads them, or a GPU's. `known_as`: the
    queue's name."""

    known_as: str

    async def loaded(self) -> Mapping[int, float]:
        """Return the models in memory, by number, and the seconds for which each stays without requests. Raises
        EngineError."""

    async def load(self, upstream: Upstream, kind: Kind, model: str, there: Collection[int]) -> float:
        """Load the model, and return the seconds that this took; 0 if it was loaded already. `there` was in memory
        before. Raises EngineError."""


class Member(NamedTuple):
    """An engine of a GPU, and how it is asked to sleep."""

    upstream: Upstream
    sleeper: Sleeper


class Gpu:
    """A Memory whose models are engines.

    An engine that died cannot start while another one has the GPU's memory, and an engine that wakes at the same moment
    could fail. So it has the GPU for itself for `room` seconds. An engine that does not wake, or did not start in that
    time, is barred: its requests would have the others sleep for nothing.
    """

    def __init__(self, name: str, members: Sequence[Member], models: Models, room: float) -> None:
        # Several gateways mean the same GPU if its engines are the same.
        self.known_as = f"gpu {name} {number(' '.join(sorted(it.upstream.known_as for it in members)))}"
        self.members = {it.upstream.name: it for it in members}
        self.numbers: Mapping[str, int] = {}  # of the engines, in Places
        self._models = models
        self._room = room

    async def loaded(self) -> Mapping[int, float]:
        """Return the engines that are awake. One that does not answer is not."""
        awake = await asyncio.gather(*(_awake(it) for it in self.members.values()))
        found = [name for name, wakes in zip(self.members, awake, strict=True) if wakes]
        for name in found:
            self._models.barred[self.numbers[name]] = 0.0
        return {number(name): math.inf for name in found}

    async def load(self, upstream: Upstream, kind: Kind, model: str, there: Collection[int]) -> float:  # noqa: ARG002
        """Have the other engines sleep, and wake this one. Raises EngineAsleep, or EngineUnreachable if this one does
        not answer. The others sleep even then, so that it can start."""
        began, name = time.monotonic(), upstream.name
        wakes = number(name) not in there
        others = [self._sleep(it, room=wakes) for other, it in self.members.items() if other != name]
        results = await asyncio.gather(*others, return_exceptions=True)
        if failure := next((it for it in results if isinstance(it, BaseException)), None):
            raise failure
        lost = max(it for it in results if isinstance(it, float))
        if not wakes:
            return 0.0
        try:
            await _swap(upstream, self.members[name].sleeper.wake)
        except EngineError as exc:
            self._bar(name, self._room if isinstance(exc, EngineUnreachable) else 0.0)
            raise
        return time.monotonic() - began - lost

    def barred(self, name: str) -> bool:
        """Return whether requests for this engine are rejected."""
        since = self._models.barred[self.numbers[name]]
        return bool(since) and since <= time.monotonic() < since + BARRED

    def _bar(self, name: str, room: float) -> None:
        """Bar an engine when it has had room to start for so many seconds, unless it had room lately."""
        barred, own, now = self._models.barred, self.numbers[name], time.monotonic()
        if not barred[own] or now >= barred[own] + BARRED:
            barred[own] = now + room

    async def _sleep(self, it: Member, *, room: bool) -> float:
        """Have an engine sleep. A dead one first has `room` to start, if there is any. Return the seconds for which it
        had that. Raises EngineAsleep."""
        began, name = time.monotonic(), it.upstream.name
        while True:
            asked = time.monotonic()
            with suppress(EngineUnreachable):
                await _swap(it.upstream, it.sleeper.sleep)
                return asked - began
            if room:
                self._bar(name, self._room)
            if not room or self.barred(name):
                return asked - began
            await asyncio.sleep(LOOK)


def gpus(config: Config, upstreams: Mapping[str, Upstream], models: Models, room: float) -> dict[str, Gpu]:
    """Return the GPU of each engine that shares one, by the engine's name."""
    on: dict[str, list[Member]] = {}
    for name, engine in config.engines.items():
        sleeper = upstreams[name].dialect.sleeper
        if engine.gpu is not None and sleeper is not None:
            on.setdefault(engine.gpu, []).append(Member(upstreams[name], sleeper))
    shared = [Gpu(name, members, models, room) for name, members in on.items() if len(members) > 1]
    return {name: gpu for gpu in shared for name in gpu.members}


def asleep() -> EngineAsleep:
    """Return the error of a request whose engine did not get the GPU."""
    return EngineAsleep("This model's engine did not get the GPU on which engines take turns. Try again later.")


async def _awake(it: Member) -> bool:
    try:
        return not await it.sleeper.asleep(it.upstream)
    except EngineError:
        return False


async def _swap(upstream: Upstream, change: Callable[[Upstream], Awaitable[None]]) -> None:
    """Change an engine's state. Raises EngineAsleep or EngineUnreachable."""
    try:
        async with asyncio.timeout(SWAP):
            await change(upstream)
    except EngineUnreachable:
        raise
    except (EngineError, TimeoutError) as exc:
        reason = exc.message if isinstance(exc, EngineError) else f"it took longer than {SWAP:g} s"
        logs.event("engine_swap_failed", {"engine": upstream.name, "reason": reason}, "warning")
        raise asleep() from exc
