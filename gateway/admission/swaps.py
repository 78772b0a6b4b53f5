"""Swaps: decide when an engine changes the models in its memory, if not all of its models fit into it.

This is arithmetic without a lock or a clock of its own. models.py applies it in the host's memory, and postgres.py in
the database. Models are numbers (`number`). 0 is the model of a request for which nothing has to be loaded. Times are
seconds of the caller's clock.
"""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

import orjson

GUESS = 5.0  # seconds that a load takes, until one was measured
RECENT = 0.5  # the weight of the last load in the mean of a model's loads
LEAST = 0.01  # seconds; a load that was faster counts as this
LATE = 5.0  # seconds beyond twice its cost after which a load that has not ended is given up
MOST = 32  # models whose costs are remembered for each engine
BARRED = 60.0  # seconds, at least, until a model that could not be loaded is loaded again
MOST_BARRED = 8  # models of each engine that are barred at a time


class Waiting(NamedTuple):
    """A request that waits for a slot: its model, its tag, and since when it waits."""

    model: int
    tag: float
    since: float


class Limit(NamedTuple):
    """How long a request waits at most for the end of another model's stay, in seconds. `wait`: the operator's number;
    0 for one that follows from the measured loads, and is at most `most`."""

    wait: float = 0.0
    most: float = 30.0


UNSET = Limit()


@dataclass(frozen=True, slots=True)
class Loads:
    """What an engine has loaded, as far as the gateway knows, and what its loads cost.

    A model's stay begins when its load ends, and ends when the load of another model begins.
    """

    loaded: frozenset[int] = frozenset()
    costs: dict[int, float] = field(default_factory=dict)  # the seconds that a load of each model takes
    ends: dict[int, float] = field(default_factory=dict)  # when the last load of each of them ended
    barred: dict[int, float] = field(default_factory=dict)  # until when a model that could not be loaded is not asked
    scarce: bool = False  # a load has displaced another model, so the models do not all fit
    exclusive: bool = False  # only one fits at a time, which need not be learned
    last: int = 0  # the model whose load began last
    since: float = 0.0  # when its stay began
    before: float = 0.0  # how long the stay before it lasted
    begun: float = 0.0  # when its load began; 0: nothing is being loaded

    def dump(self) -> bytes:
        """Return it as JSON, of about 3,500 bytes at most."""
        told = {name: getattr(self, name) for name in ("scarce", "exclusive", "last", "since", "before", "begun")}
        for name in ("costs", "ends", "barred"):
            told[name] = {str(model): round(value, 3) for model, value in getattr(self, name).items()}
        if not self.barred:
            del told["barred"]  # gateways of an older version do not know it
        return orjson.dumps({"loaded": sorted(self.loaded), **told})

    @classmethod
    def parse(cls, told: dict[str, Any]) -> "Loads":
        """Return what `dump` wrote."""
        known = {name: told[name] for name in told.keys() & cls.__dataclass_fields__.keys()}  # of any version
        for name in ("costs", "ends", "barred"):
            known[name] = {int(model): float(value) for model, value in known.get(name, {}).items()}
        return cls(**{**known, "loaded": frozenset(told["loaded"])})

    def moved(self, seconds: float) -> "Loads":
        """Return the same by a clock that is that far ahead."""
        ends = {model: it + seconds for model, it in self.ends.items()}
        barred = {model: it + seconds for model, it in self.barred.items()}
        begun = self.begun + seconds if self.begun else 0.0
        return replace(self, ends=ends, barred=barred, since=self.since + seconds, begun=begun)

    def cost(self, model: int) -> float:
        """Return the seconds that a load of the model takes, or a guess."""
        return self.costs.get(model) or max(self.costs.values(), default=GUESS)

    def there_and_back(self, model: int) -> float:
        """Return what a swap to the model and back costs, in seconds."""
        return self.cost(model) + self.cost(self.last)

    def loading(self, now: float) -> bool:
        """Return whether a load is going on that can still be expected to end."""
        return bool(self.begun) and now < self.begun + 2 * self.cost(self.last) + LATE

    def absent(self, model: int) -> bool:
        """Return whether requests for the model have to wait until it is loaded."""
        return self.scarce and bool(model) and model not in self.loaded

    def bars(self, model: int, now: float) -> bool:
        """Return whether the model could not be loaded lately. Each of its requests could unload the others for
        nothing."""
        return now < self.barred.get(model, 0.0)

    def begins(self, model: int, now: float) -> "Loads":
        """Return what is true once a request for this model has got a slot. If its load begins, no other model is
        served."""
        if not self.absent(model) or (self.begun and self.last == model):
            return self
        return replace(self, loaded=frozenset(), last=model, before=now - self.since, begun=now)

    def ended(
        self,
        model: int,
        there: Collection[int],
        after: Collection[int],
        now: float,
        took: float,
        *,
        failed: bool = False,
    ) -> "Loads":
        """Return what is true once a load of the model has ended. `there` was loaded before, and `after` is loaded now.
        `took`: the seconds; 0 if there was no load. `failed`: the engine could not load the model."""
        costs, ends = self.costs, self.ends
        if took:
            took = max(took, LEAST)
            mean = costs.get(model, took)
            kept = [it for it in costs if it != model][1 - MOST :]
            costs = {**{it: costs[it] for it in kept}, model: mean + RECENT * (took - mean)}
            ends = {**{it: ends[it] for it in kept}, model: now}
        loaded = frozenset({*after, model} if took and not failed else after)
        barred = {it: until for it, until in self.barred.items() if it not in loaded and until > now}
        if failed:
            kept = [it for it in barred if it != model][1 - MOST_BARRED :]
            barred = {**{it: barred[it] for it in kept}, model: now + max(BARRED, 2 * took)}
        # If it is not loaded, the engine was perhaps restarted, and nothing was displaced.
        displaced = (self.loaded | set(there)) - loaded if model in loaded else set()
        scarce = self.exclusive or bool(displaced) or (self.scarce and not costs.keys() <= loaded)
        before = self.before if self.begun or not took else now - took - self.since
        since = now if took or self.begun else self.since
        last = model if took else self.last
        return Loads(loaded, costs, ends, barred, scarce, self.exclusive, last, since, before)

    def seen(self, after: Collection[int]) -> "Loads":
        """Return what is true if these models are loaded now, and no load has just ended. A model that is missing was
        unloaded because nobody used it, and not displaced."""
        scarce = self.exclusive or (self.scarce and not self.costs.keys() <= set(after))
        barred = {it: until for it, until in self.barred.items() if it not in after}
        return replace(self, loaded=frozenset(after), barred=barred, scarce=scarce)

    def bound(self, model: int, limit: Limit) -> float:
        """Return how long a request for the model waits at most until no other model gets requests, in seconds."""
        return limit.wait or min(2 * self.there_and_back(model), limit.most)

    def waits_since(self, it: Waiting) -> float:
        """Return since when the request's model waits: since it came, or since its model was loaded last."""
        return max(it.since, self.ends.get(it.model, 0.0))

    def turn(self, model: int, now: float, limit: Limit, since: float) -> float:
        """Return in about how many seconds a request for the model, which waits since then, may get a slot as far as
        its model is concerned: to load it, or because it is loaded then."""
        if not self.absent(model):
            return 0.0
        if self.loading(now) and self.last == model:
            return max(0.0, self.begun + self.cost(model) - now)
        return max(0.0, max(since, self.since) + self.bound(model, limit) - now) if self.loaded else 0.0

    def due(self, model: int, now: float, limit: Limit, since: float) -> float:
        """Return in about how many seconds the model is loaded; 0 if it is, or if all models fit."""
        begins = self.absent(model) and not (self.loading(now) and self.last == model)
        return self.turn(model, now, limit, since) + (self.cost(model) if begins else 0.0)


EXCLUSIVE = Loads(scarce=True, exclusive=True)


def decide(
    loads: Loads, waiting: Sequence[Waiting], now: float, *, busy: bool, virtual: float, pace: float, limit: Limit
) -> int:
    """Return the model to load as soon as the engine is idle; 0: go on with the loaded ones.

    `busy`: the engine works on requests. `virtual`: the tag of those. `pace`: the seconds between the ends of two
    requests. A swap is made if the loaded models have nothing to do; if a request for another model is behind by more
    work than the swap and the way back cost; or if one has waited through this stay for as long as it may. The model
    that waits for longest is next, once it has waited for as long as it may. Two stays in a row are together never
    shorter than their loads, so at most half of the time is spent on loads, whatever is asked for.
    """
    if loads.loading(now):
        return loads.last if any(it.model == loads.last for it in waiting) else 0
    away = [it for it in waiting if loads.absent(it.model)]
    if not away:
        return 0
    first = min(away, key=lambda it: (it.tag, it.since))
    longest = min(away, key=loads.waits_since)
    here = [it.tag for it in waiting if not loads.absent(it.model)]
    bound = loads.bound(longest.model, limit)
    target = longest.model if now - loads.waits_since(longest) >= bound else first.model
    if not loads.loaded:
        return target
    idle = not here and not busy
    waits = now - max(loads.since, min(it.since for it in away)) >= bound
    behind = (min(here, default=virtual) - first.tag) * pace >= loads.there_and_back(first.model)
    rested = now - loads.since + loads.before >= loads.there_and_back(target)
    return target if rested and (idle or waits or behind) else 0


@lru_cache(maxsize=1024)
def number(name: str) -> int:
    """Return the number of a model, by the one spelling of its name. It fits a bigint of PostgreSQL."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1 or 1
