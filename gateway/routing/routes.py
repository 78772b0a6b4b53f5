"""Routing: turn a caller's model name into the engines that may answer, in the order to ask them."""

import asyncio
import hashlib
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from gateway.config import FIRST, Config, Model, Split, names_no_models
from gateway.errors import EngineError, EngineUnavailable, ModelNotFound
from gateway.keys.known import Key
from gateway.settings import Settings
from gateway.upstream.client import Upstream
from gateway.upstream.model_names import ModelNames

FRESH = 1.0  # seconds for which an engine's own list of models is used
PATIENCE = 0.5  # seconds for the engine to list its models; a later list counts the next time
SAME_ENGINE = 2  # attempts that a request may make at one engine


@dataclass(frozen=True, slots=True)
class Patience:
    """The timeouts of a request, in seconds. `first_token` counts from the start of an attempt, `idle` from the
    engine's last bytes, and `total` and `hold` from the start of the request."""

    connect: float
    first_token: float
    idle: float
    total: float
    hold: float  # after this time a stream's head is sent, with comment pings, so that no proxy closes the connection

    @property
    def shortest(self) -> float:
        return min(self.first_token, self.idle, self.total, self.hold)


@dataclass(frozen=True, slots=True)
class Resume:
    """How often another engine may continue an answer, and how many seconds the answer waits for such an engine."""

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
    """The targets of a model name, in tiers of equal targets. The first tier is preferred."""

    name: str
    tiers: tuple[tuple[Target, ...], ...]
    patience: Patience
    resume: Resume
    arm: str | None = None
    called: tuple[str, ...] = ()  # all names of this route: first those of a split that chose it, then its own

    def pick(self, tried: Sequence[Target], *, patient: bool = False) -> Target:
        """Return the target to ask next. Raises EngineUnavailable if none is left.

        The first tier that has a usable target decides. A target that was not asked yet and whose breaker allows it
        comes first, the least busy of them. When all targets were asked, one of them is asked once more. If no breaker
        allows a request, an engine that was unreachable is asked. A `patient` request may also be sent to such an
        engine while another request tries it.
        """
        if (target := self.fresh(tried)) is not None:
            return target
        for tier in self.tiers:
            again = [it for it in tier if 0 < tried.count(it) < SAME_ENGINE and it.upstream.breaker.allows()]
            if again:
                return least_busy(again)
        # A request to an unreachable engine fails fast, and the breaker may not know yet that the engine is back.
        for tier in self.tiers:
            untried = [(target, target.upstream.breaker) for target in tier if target not in tried]
            away = [target for target, breaker in untried if breaker.away or (patient and breaker.gone)]
            if away:
                return least_busy(away)
        raise EngineUnavailable("All engines of this model are unreachable right now.")

    def fresh(self, tried: Sequence[Target]) -> Target | None:
        """Return the least busy of the targets that were not asked yet and whose breakers allow it, in the first tier
        that has one."""
        for tier in self.tiers:
            fresh = [target for target in tier if target not in tried and target.upstream.breaker.allows()]
            if fresh:
                return least_busy(fresh)
        return None


class Routes:
    """Hold all routes, and the engines' lists of models.

    A name is only looked up, and never becomes a part of a URL: '../api/pull' is just an unknown model.
    """

    def __init__(self, config: Config, settings: Settings, upstreams: dict[str, Upstream]) -> None:
        self._config = config
        self._settings = settings
        self._spellings = ModelNames(config)
        self._names = self._spellings.models
        self._default = self._names[config.default_model]
        self._routes = {
            name: self._route(name, model, upstreams) for name, model in config.models.items() if not model.split
        }
        self._open_to = upstreams[FIRST] if names_no_models(settings) else None
        self._listed: dict[str, dict[str, Any]] = {}
        self._asked_at = float("-inf")
        self._lock = asyncio.Lock()
        self._refreshing: asyncio.Task[None] | None = None  # the last refresh, which may still be running
        self._since = int(time.time())

    async def resolve(self, name: str | None, key: Key, headers: dict[bytes, bytes]) -> Route:
        """Return the route of a model name, or of the default model for None. Raises ModelNotFound with the names that
        this key may use. A model that the key may not use is treated as unknown."""
        wanted = self._default if name is None else await self._find(name)
        if wanted is None or not self._usable(wanted, key):
            if self._open_to is not None:
                await self._refresh(self._open_to)
            known = ", ".join(entry["id"] for entry in self._entries(key)) or "no model for this key"
            raise ModelNotFound(
                f"The model '{(name or self._default)[:200]}' does not exist here. Available: {known}.", param="model"
            )
        if wanted not in self._names and self._open_to is not None:
            one = self._routes[self._default]
            return replace(one, name=wanted, tiers=((Target(self._open_to, wanted),),), called=(wanted,))
        return self._chosen(self._names[wanted], key.id, headers)

    async def named(self, name: str) -> str:
        """Return the configured name of the model, or of the split, that a request for `name` gets. Raises
        ModelNotFound."""
        found = await self._find(name)
        if found is None:
            raise ModelNotFound(f"The model '{name[:200]}' does not exist here.", param="model")
        return self._names.get(found, found)

    async def _find(self, name: str) -> str | None:
        """Return the configured name for a caller's `name`; None if there is none."""
        found = self._spellings.find(name)
        if found is None and self._open_to is not None:
            await self._refresh(self._open_to)
            found = self._spellings.find(name, self._listed)
        return found

    def check(self, name: str | None, key: Key) -> None:
        """Check that the key may still use a model that it could use before. Raises ModelNotFound."""
        if not self._usable(self._spellings.find(name or self._default, self._listed) or name or self._default, key):
            raise ModelNotFound(
                f"This key may not use the model '{(name or self._default)[:200]}' any more.", param="model"
            )

    def _usable(self, name: str, key: Key) -> bool:
        """Return whether the key may use this name. A key that may use a model may use all its names. A key that may
        use an alias may use only that alias."""
        if key.models is None or not key.models.isdisjoint(names := {name, self._names.get(name, name)}):
            return True
        return any(self._spellings.find(it, self._listed) in names for it in key.models)

    def default(self) -> list[Route]:
        """Return the routes that a request for the default model may take."""
        return self.leading_from(self._default)

    def leading_from(self, name: str) -> list[Route]:
        """Return the routes that a request for a listed name may take."""
        if name in self._names:
            split = self._config.models[self._names[name]].split
            return [self._routes[self._names[it]] for it in ([arm.model for arm in split.arms] if split else [name])]
        if self._open_to is None:
            return []
        return [replace(self._routes[self._default], name=name, tiers=((Target(self._open_to, name),),))]

    async def entries(self, key: Key) -> list[dict[str, Any]]:
        """Return OpenAI's objects of the models that the key may use. Never fails, and never waits for a silent engine:
        while it is unreachable, the configured names are listed."""
        if self._open_to is not None:
            if self._refreshing is None or self._refreshing.done():
                self._refreshing = asyncio.create_task(self._refresh(self._open_to))
            await asyncio.wait([self._refreshing], timeout=PATIENCE)
        return self._entries(key)

    async def entry(self, name: str, key: Key) -> dict[str, Any]:
        """Return the object of a model, by a name in any spelling. Raises ModelNotFound."""
        found = await self._find(name)
        for entry in await self.entries(key):
            if entry["id"] == found:
                return entry | {"id": name}
        raise ModelNotFound(f"The model '{name[:200]}' does not exist here.", param="model")

    def _chosen(self, name: str, key_id: str, headers: dict[bytes, bytes]) -> Route:
        split = self._config.models[name].split
        return self._routes[name] if split is None else self._choose(name, split, key_id, headers)

    def _choose(self, name: str, split: Split, key_id: str, headers: dict[bytes, bytes]) -> Route:
        """Choose an arm of a split by weight. The same key or header value gets the same arm on every worker. A request
        without the header gets a random arm, because one fixed arm would not be a split."""
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
        route = self._routes[self._names[arm.model]]
        return replace(route, arm=arm.name, called=(*self._called(name), *route.called))

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
        return Route(name, (replicas, *fallbacks), patience, resume, called=self._called(name))

    def _called(self, name: str) -> tuple[str, ...]:
        return name, *self._config.models[name].aliases

    def _entries(self, key: Key) -> list[dict[str, Any]]:
        entries = {name: self._entry(name) for name in self._config.models}
        for name, listed in self._spellings.merged(self._listed).items():
            model = self._names.get(name, name)
            entries[model] = self._entry(model) | self._listed[listed] | {"id": model}
        for alias, name in self._names.items():
            if alias != name:
                entries[alias] = entries[name] | {"id": alias, "parent": name}
        return [entry for name, entry in entries.items() if self._usable(name, key)]

    def _entry(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._since, "owned_by": "stack"}

    async def _refresh(self, upstream: Upstream) -> None:
        async with self._lock:
            if time.monotonic() - self._asked_at > FRESH:
                with suppress(EngineError):  # the last list is kept
                    names = await upstream.models()
                    self._listed = {it["id"]: self._entry(it["id"]) | it for it in names}
                # Set after the call, so that requests which waited for it do not ask again
                self._asked_at = time.monotonic()


def least_busy(targets: list[Target]) -> Target:
    """Return the target whose engine can begin first. Of equal ones, return the one with the fewest running requests of
    this worker."""
    if len(targets) == 1:
        return targets[0]
    loads = [(target.upstream.wait(), target.upstream.outstanding) for target in targets]
    least = min(loads)
    return random.choice([it for it, load in zip(targets, loads, strict=True) if load == least])  # noqa: S311
