"""Listing: the model objects that callers see, with what the engines report about the models.

One object satisfies the clients of OpenAI's API and of Anthropic's.
"""

import datetime as dt
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from gateway.dialects.asking import Facts
from gateway.errors import BadRequest
from gateway.keys.known import Key
from gateway.routing.routes import Route, Routes
from gateway.upstream.model_facts import ModelFacts

_T = TypeVar("_T")


class Listing:
    """List the models of the routes."""

    def __init__(self, routes: Routes) -> None:
        self._routes = routes
        self._facts = ModelFacts()

    async def entries(self, key: Key) -> list[dict[str, Any]]:
        """Return the objects of all models that the key may use. Never fails, and never waits for a silent engine."""
        entries = await self._routes.entries(key)
        return await self._described([(it, str(it["id"])) for it in entries])

    async def entry(self, name: str, key: Key) -> dict[str, Any]:
        """Return the object of a model, by a name in any spelling. Raises ModelNotFound."""
        entry = await self._routes.entry(name, key)
        return (await self._described([(entry, await self._routes.named(name))]))[0]

    async def _described(self, entries: Sequence[tuple[dict[str, Any], str]]) -> list[dict[str, Any]]:
        routes = [self._routes.leading_from(name) for _, name in entries]
        targets = {it for them in routes for route in them for tier in route.tiers for it in tier}
        await self._facts.refresh({it.upstream.name: it.upstream for it in targets}.values())
        return [
            entry | _fields(entry, merged([self._of(route) for route in them]))
            for (entry, _), them in zip(entries, routes, strict=True)
        ]

    def _of(self, route: Route) -> Facts:
        """Return the facts of a route's first tier, or of the next tier if the first is unknown."""
        for tier in route.tiers:
            found = merged([self._facts.of(it.upstream, it.model) for it in tier])
            if found != Facts():
                return found
        return Facts()


def merged(facts: Sequence[Facts]) -> Facts:
    """Return the facts that hold for every target: the smallest context window, what all of them can do, and whether
    any has loaded the model."""
    return Facts(
        context=_all(min, (it.context for it in facts)),
        trained=_all(min, (it.trained for it in facts)),
        capabilities=_all(lambda them: frozenset.intersection(*them), (it.capabilities for it in facts)),
        loaded=_all(any, (it.loaded for it in facts)),
    )


def page(
    entries: list[dict[str, Any]], limit: int | None, after_id: str | None, before_id: str | None
) -> tuple[list[dict[str, Any]], bool]:
    """Return the page of the list that Anthropic's parameters ask for, and whether there are more in that direction.
    Raises BadRequest for an id that is not in the list."""
    ids = [it["id"] for it in entries]
    for name, value in (("after_id", after_id), ("before_id", before_id)):
        if value is not None and value not in ids:
            raise BadRequest(f"'{name}' is '{value[:80]}', which is not a model here.", param=name)
    start = ids.index(after_id) + 1 if after_id is not None else 0
    end = ids.index(before_id) if before_id is not None else len(ids)
    found = entries[start:end]
    if limit is None or len(found) <= limit:
        return found, False
    return (found[-limit:] if before_id is not None and after_id is None else found[:limit]), True


def _fields(entry: dict[str, Any], facts: Facts) -> dict[str, Any]:
    context = facts.context or entry.get("max_model_len")
    created = dt.datetime.fromtimestamp(entry["created"], dt.UTC)
    told = {
        "context_length": context,
        "max_model_len": context,  # vLLM's name
        "max_input_tokens": context,  # Anthropic's name
        "max_context_length": facts.trained,
        "capabilities": None if facts.capabilities is None else sorted(facts.capabilities),
        "loaded": facts.loaded,
    }
    own = {
        "type": "model",
        "display_name": entry["id"],
        "created_at": f"{created:%Y-%m-%dT%H:%M:%SZ}",
        "lifecycle": "active",
    }
    return own | {name: value for name, value in told.items() if value is not None}


def _all(merge: Callable[[list[_T]], _T], values: Iterable[_T | None]) -> _T | None:
    known = [it for it in values if it is not None]
    return merge(known) if known else None
