"""Routing: from the model name a caller uses to the engines that may answer, in the order to ask them."""

import asyncio
import hashlib
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from gateway.config import Config, Model, Split
from gateway.errors import EngineError, EngineUnavailable, ModelNotFound
from gateway.keys import Key
from gateway.settings import Settings
from gateway.upstream import Upstream

FRESH = 1.0  # seconds for which an engine's own list of models is believed
SAME_ENGINE = 2  # attempts a request may make at one engine


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait, in seconds. `first_token` counts from an attempt's start, `idle` from the engine's last bytes,
    `total` and `hold` from the request's start."""

    connect: float
    first_token: float
    idle: float
    total: float
    hold: float  # after this a stream's head goes out with comment pings, so that nobody in between gives up

    @property
    def shortest(self) -> float:
        return min(self.first_token, self.idle, self.total, self.hold)


@dataclass(frozen=True, slots=True)
class Resume:
    """How often an answer may be continued elsewhere, and how long (seconds) it waits for an engine that can."""

    most: int
    wait: float
    across_models: bool


@dataclass(frozen=True, slots=True)
class Target:
    """A model on an engine, by the engine's own name for it."""

    upstream: Upstream
    model: str


@dataclass(frozen=True, slots=True)
class Route:
    """Where a model name leads: tiers of equal targets, the first one preferred."""

    name: str
    tiers: tuple[tuple[Target, ...], ...]
    patience: Patience
    resume: Resume
    arm: str | None = None

    def pick(self, tried: Sequence[Target]) -> Target:
        """The target to ask next. Raises EngineUnavailable when none is left.

        Of the first tier that has one: a target not asked yet whose breaker allows it, the least busy first. When all
        have been asked, one of them once more; when none is allowed, one that was away.
        """
        for tier in self.tiers:
            fresh = [target for target in tier if target not in tried and target.upstream.breaker.allows()]
            if fresh:
                return least_busy(fresh)
        for tier in self.tiers:
            again = [it for it in tier if 0 < tried.count(it) < SAME_ENGINE and it.upstream.breaker.allows()]
            if again:
                return least_busy(again)
        # Nothing is lost by trying one that was away, and its breaker may not know yet that it is back.
        for tier in self.tiers:
            away = [target for target in tier if target not in tried and target.upstream.breaker.away]
            if away:
                return least_busy(away)
        raise EngineUnavailable("No engine for this model can be reached right now.")


class Routes:
    """All routes, and the lists of models that go with them.

    A name is looked up, never built into a URL: '../api/pull' is just a model nobody has.
    """

    def __init__(self, config: Config, settings: Settings, upstreams: dict[str, Upstream]) -> None:
        self._config = config
        self._settings = settings
        self._names = {used: name for name, model in config.models.items() for used in (name, *model.aliases)}
        self._default = self._names[config.default_model]
        self._routes = {
            name: self._route(name, model, upstreams) for name, model in config.models.items() if not model.split
        }
        # Without a file, whatever else the one engine has may be used too.
        self._open_to = upstreams["engine"] if not settings.stack_config.is_file() else None
        self._listed: dict[str, dict[str, Any]] = {}
        self._asked_at = float("-inf")
        self._lock = asyncio.Lock()
        self._since = int(time.time())

    async def resolve(self, name: str | None, key: Key, headers: dict[bytes, bytes]) -> Route:
        """The route of a model name; the default model's for None. Raises ModelNotFound, with the names there are for
        this key: what it may not use does not exist for it."""
        found = self._default if name is None else self._names.get(name)
        wanted = name or self._default
        if found is None or not self._usable(wanted, key):
            if self._open_to is not None:
                await self._refresh(self._open_to)
                if found is None and wanted in self._listed and self._usable(wanted, key):
                    one = self._routes[self._default]
                    return replace(one, name=wanted, tiers=((Target(self._open_to, wanted),),))
            known = ", ".join(entry["id"] for entry in self._entries(key)) or "none that this key may use"
            raise ModelNotFound(f"The model '{wanted[:200]}' does not exist here. There is: {known}.", param="model")
        split = self._config.models[found].split
        return self._routes[found] if split is None else self._choose(found, split, key.id, headers)

    def _usable(self, name: str, key: Key) -> bool:
        """A key that may use a model may call it by any of its names; one that may use an alias, by that alone."""
        return key.models is None or not key.models.isdisjoint((name, self._names.get(name, name)))

    def default(self) -> list[Route]:
        """The routes that a request for the default model may take."""
        split = self._config.models[self._default].split
        return [self._routes[self._names[arm.model]] for arm in split.arms] if split else [self._routes[self._default]]

    async def entries(self, key: Key) -> list[dict[str, Any]]:
        """OpenAI model objects, of the models that the key may use. Never fails: while an engine is away, the
        configured names are listed."""
        if self._open_to is not None:
            await self._refresh(self._open_to)
        return self._entries(key)

    def _choose(self, name: str, split: Split, key_id: str, headers: dict[bytes, bytes]) -> Route:
        """An arm of a split: by weight, and the same one for the same key or header value on every worker. Without that
        header it is by chance: all of them in one arm would be no split."""
        header = split.sticky.partition(":")[2].lower().encode()
        value = headers.get(header, b"") if header else key_id.encode()
        if split.sticky == "request" or not value:
            point = random.random()  # noqa: S311
        else:
            digest = hashlib.sha256(name.encode() + b"\0" + value).digest()
            point = int.from_bytes(digest[:8], "big") / 2**64
        point *= sum(arm.weight for arm in split.arms)
        for arm in split.arms:
            point -= arm.weight
            if point < 0:
                break
        return replace(self._routes[self._names[arm.model]], arm=arm.name)

    def _route(self, name: str, model: Model, upstreams: dict[str, Upstream]) -> Route:
        replicas = tuple(Target(upstreams[it.engine], it.model) for it in model.targets)
        fallbacks = tuple((Target(upstreams[it.engine], it.model),) for it in model.fallbacks)
        times, env = model.timeouts, self._settings
        patience = Patience(
            connect=times.connect or env.llm_connect_timeout,
            first_token=times.first_token or env.llm_first_token_timeout,
            idle=times.idle or env.llm_idle_timeout,
            total=times.total or env.llm_timeout,
            hold=env.stack_hold,
        )
        how = model.resume
        resume = Resume(
            most=env.stack_resume if how.most is None else how.most,
            wait=env.stack_resume_wait if how.wait is None else how.wait,
            across_models=how.across_models,
        )
        return Route(name, (replicas, *fallbacks), patience, resume)

    def _entries(self, key: Key) -> list[dict[str, Any]]:
        entries = {name: self._entry(name) for name in self._config.models} | self._listed
        for alias, name in self._names.items():
            if alias != name:
                entries[alias] = entries[name] | {"id": alias, "parent": name}
        return [entry for name, entry in entries.items() if self._usable(name, key)]

    def _entry(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._since, "owned_by": "stack"}

    async def _refresh(self, upstream: Upstream) -> None:
        async with self._lock:
            if time.monotonic() - self._asked_at > FRESH:
                with suppress(EngineError):  # the last list stands
                    names = await upstream.models()
                    self._listed = {it["id"]: self._entry(it["id"]) | it for it in names}
                self._asked_at = time.monotonic()  # after the call: those who waited meanwhile need not ask again


def least_busy(targets: list[Target]) -> Target:
    """The one whose engine can begin first; of equals, that with the fewest requests of ours under way."""
    if len(targets) == 1:
        return targets[0]
    loads = [(target.upstream.wait(), target.upstream.outstanding) for target in targets]
    least = min(loads)
    return random.choice([it for it, load in zip(targets, loads, strict=True) if load == least])  # noqa: S311
