"""The sleep mode of a fake vLLM, whose GPU has room for one engine that is awake.

The GPU is a file, and its memory a lock on that, which the system takes back when its holder dies. As vLLM does it: an
engine starts awake, and does not start without memory. A request to one that sleeps waits until it wakes.
"""

import asyncio
import fcntl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

NO_MEMORY = 500, {"error": {"message": "CUDA Error: out of memory", "type": "InternalServerError", "code": 500}}


class Gpu:
    """`did`: each /sleep and /wake_up, with the requests that ran then. `early`: requests that came while it slept.
    `seconds`: what each of the two takes. `wakes`: it does not refuse to."""

    def __init__(self, path: str) -> None:
        self.seconds = 0.1
        self.wakes = True
        self.did: list[tuple[str, int]] = []
        self.early = 0
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._awake = asyncio.Event()
        self._file = Path(path).open("a")  # noqa: SIM115 (it stays open until the process ends)
        if not self._take():
            raise SystemExit("Free memory on device is less than desired GPU memory utilization")

    def _take(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        self._awake.set()
        return True

    async def answer(self, target: str) -> tuple[int, Any] | None:
        """Do what a control call asks for, and return the answer; None to any other call."""
        path, asked = urlsplit(target).path, parse_qs(urlsplit(target).query)
        if path == "/_gpu":
            return 200, {"did": self.did, "early": self.early, "awake": self._awake.is_set()}
        if path == "/is_sleeping":
            return 200, {"is_sleeping": not self._awake.is_set()}
        if path not in ("/sleep", "/wake_up"):
            return None
        self.did.append((path, self._running))
        if path == "/sleep" and asked["mode"] == ["wait"]:
            await self._idle.wait()
        await asyncio.sleep(self.seconds)
        if path == "/wake_up":
            return (200, {}) if self.wakes and self._take() else NO_MEMORY
        self._awake.clear()
        fcntl.flock(self._file, fcntl.LOCK_UN)
        return 200, {}

    @asynccontextmanager
    async def works(self) -> AsyncIterator[None]:
        """Work on a request in the block, which begins when the engine is awake."""
        self.early += not self._awake.is_set()
        await self._awake.wait()
        self._running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()
