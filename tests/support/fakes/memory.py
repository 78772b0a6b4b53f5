"""The memory of a fake Ollama that has room for some models: a request for another one waits until it is loaded.

As Ollama does it: one load at a time. The models that have to go are those that were used least recently. They go when
nobody uses them any more. A load whose client disconnects is given up.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

PAUSE = 0.01  # seconds between two looks


class Memory:
    """`room` models fit; 0: any number, and nothing is ever loaded. A load takes `seconds`. `loads` names the models
    that were loaded, in their order. Those that are `too_large` are not loaded, after others were unloaded for them;
    `failed` names them."""

    def __init__(self) -> None:
        self.room = 0
        self.seconds = 0.1
        self.models: list[str] = []
        self.loads: list[str] = []
        self.too_large: list[str] = []
        self.failed: list[str] = []
        self.loading = ""
        self.given_up = 0
        self._used: Counter[str] = Counter()
        self._loading = asyncio.Lock()

    @asynccontextmanager
    async def having(self, model: str, gone: Callable[[], bool]) -> AsyncIterator[None]:
        """Have a model in memory in the block. Raises ConnectionError if the client is gone before that, and
        MemoryError if there is no room."""
        if self.room and model not in self.models:
            async with self._loading:
                if model not in self.models:
                    self.loading = model
                    await self._load(model, gone)
        if self.room:
            self.models = [*(it for it in self.models if it != model), model]
        self._used[model] += 1
        try:
            yield
        finally:
            self._used[model] -= 1

    async def _load(self, model: str, gone: Callable[[], bool]) -> None:
        while len(self.models) >= self.room:
            await asyncio.sleep(PAUSE)
            if not self._used[self.models[0]]:
                self.models.pop(0)
        began = time.monotonic()
        while time.monotonic() < began + self.seconds:
            await asyncio.sleep(PAUSE)
            if gone():
                self.given_up += 1
                raise ConnectionResetError
        if model in self.too_large:
            self.failed.append(model)
            raise MemoryError
        self.models.append(model)
        self.loads.append(model)
