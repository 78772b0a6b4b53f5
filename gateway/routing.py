"""Routing: from the model name a caller uses to the name the engine knows, and the list of both."""

import asyncio
import time
from contextlib import suppress
from typing import Any

from gateway.errors import EngineError, ModelNotFound
from gateway.settings import Settings
from gateway.upstream import Upstream

FRESH = 1.0  # seconds for which the engine's own list is believed


class Models:
    """Which models there are: the configured one, its aliases, and whatever else the engine lists.

    A name is looked up, never built into a URL: '../api/pull' is just a model nobody has.
    """

    def __init__(self, settings: Settings, upstream: Upstream) -> None:
        self._default = settings.llm_model
        self._aliases = settings.stack_model_aliases
        self._upstream = upstream
        self._engine: dict[str, dict[str, Any]] = {}
        self._asked_at = float("-inf")
        self._lock = asyncio.Lock()
        self._since = int(time.time())

    async def resolve(self, name: str | None) -> str:
        """The engine's name for a model; the default one for None. Raises ModelNotFound, with the names there are."""
        if name is None or name == self._default:
            return self._default
        if target := self._aliases.get(name):
            return target
        await self._refresh()
        if name in self._engine:
            return name
        known = ", ".join(entry["id"] for entry in self._entries())
        raise ModelNotFound(f"The model '{name[:200]}' does not exist here. There is: {known}.", param="model")

    async def entries(self) -> list[dict[str, Any]]:
        """OpenAI model objects. Never fails: while the engine is away, the configured names are listed."""
        await self._refresh()
        return self._entries()

    async def serves_default(self) -> bool:
        """Whether the engine lists the configured model. Raises EngineError when it can't be asked."""
        await self._ask()
        return self._default in self._engine

    def _entries(self) -> list[dict[str, Any]]:
        entries = {self._default: self._entry(self._default)} | self._engine
        for alias, target in self._aliases.items():
            entries[alias] = entries.get(target, self._entry(target)) | {"id": alias, "parent": target}
        return list(entries.values())

    def _entry(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._since, "owned_by": "stack"}

    async def _refresh(self) -> None:
        async with self._lock:
            if time.monotonic() - self._asked_at > FRESH:
                with suppress(EngineError):  # the last list stands
                    await self._ask()

    async def _ask(self) -> None:
        self._asked_at = time.monotonic()
        response = await self._upstream.get("models")
        try:
            entries = response.json()["data"] if response.status_code == 200 else None
            if entries is not None:
                self._engine = {str(entry["id"]): self._entry(str(entry["id"])) | _plain(entry) for entry in entries}
        except (ValueError, KeyError, TypeError):
            raise EngineError("The engine's list of models can't be read.") from None


def _plain(entry: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's four fields of a model object; engines add paths and permissions that are nobody's business."""
    return {name: entry[name] for name in ("id", "created", "owned_by") if entry.get(name) is not None}
