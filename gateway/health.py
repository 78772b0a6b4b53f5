"""Health: is the process alive (never asks the engine), and could a request be answered now (asks it)."""

import asyncio
import time
from typing import Protocol

from gateway.dialects import DIALECTS, refusal
from gateway.errors import Draining, EngineError, ModelLoading, StackError
from gateway.progress import Progress
from gateway.routing import Models
from gateway.settings import Settings
from gateway.upstream import Upstream

FRESH = 1.0  # seconds for which an answer of the engine's is repeated


class Drain(Protocol):
    """Whether the gateway has been told to stop. One byte shared by all workers, or a fixed answer."""

    def __bool__(self) -> bool: ...


class Health:
    """Readiness, asked of the engine at most once a second however many ask."""

    def __init__(
        self, settings: Settings, upstream: Upstream, models: Models, progress: Progress, drain: Drain
    ) -> None:
        self._path = DIALECTS[settings.llm_backend].health
        self._model = settings.llm_model
        self._upstream = upstream
        self._models = models
        self._progress = progress
        self._drain = drain
        self._lock = asyncio.Lock()
        self._asked_at = float("-inf")
        self._trouble: StackError | None = None

    async def trouble(self) -> StackError | None:
        """Why a request could not be answered now, or None when it could."""
        if self._drain:
            return Draining("The gateway is stopping.")
        async with self._lock:
            if time.monotonic() - self._asked_at > FRESH:
                trouble = await self._ask()
                self._trouble = trouble and self._progress.explain(trouble)
                self._asked_at = time.monotonic()
            return self._trouble

    async def _ask(self) -> StackError | None:
        try:
            response = await self._upstream.get(self._path)
            if response.status_code != 200:
                return refusal(response.status_code, response.content)
            if not await self._models.serves_default():
                return ModelLoading(f"The engine runs, but does not have the model '{self._model}' (yet).")
        except EngineError as exc:
            return exc
        return None
