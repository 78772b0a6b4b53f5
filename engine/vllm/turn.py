"""Turn: one vLLM loads at a time, of all that share a volume and perhaps a GPU.

vLLM counts the free memory of the GPU while it loads. If another vLLM takes or returns memory meanwhile, it gets too
little memory for its cache, or fails. The lock is released when the vLLM that loads answers, or ends. So a vLLM that
fails again and again does not keep the others waiting.

If the models take turns on the GPU, each vLLM falls asleep before it releases the lock.
"""

import asyncio
import math
import os
import time
import urllib.request
from collections.abc import Awaitable, Callable
from fcntl import LOCK_EX, LOCK_NB, LOCK_UN, flock
from http.client import HTTPException
from pathlib import Path
from typing import Any, TextIO

OWN = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # asks this container's vLLM, and no proxy
LOCK = Path.home() / "loading"
HEALTH = "http://127.0.0.1:8000/health"
SLEEP = "http://127.0.0.1:8000/sleep?level=1"
LONGEST = 1800  # seconds, after which a vLLM that neither answers nor ends no longer keeps the others waiting
EVERY = 0.5  # seconds between two questions
OPEN = Path("/tmp/open")  # noqa: S108 - the container's own; it exists when this vLLM has fallen asleep
LOOK = 0.1  # seconds between two looks for it


def take(*, sleeps: bool) -> None:
    """Wait until no other vLLM loads, and keep the others waiting until the vLLM answers that this process becomes, or
    until it `sleeps`."""
    OPEN.unlink(missing_ok=True)
    lock = LOCK.open("w")
    try:
        flock(lock, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        print("waiting until another model is loaded", flush=True)
        flock(lock, LOCK_EX)
    # This process closes the file when it becomes vLLM, and then the grandchild alone holds the lock. A child would
    # become a child of vLLM, which does not expect one.
    vllm = os.getpid()
    if os.fork() == 0:
        if os.fork() == 0 and _loaded(vllm, lock) and sleeps:
            _sleep()
        os._exit(0)
    os.wait()


class Door:
    """ASGI middleware in vLLM: requests of other containers wait until vLLM has fallen asleep for the first time.

    Otherwise the gateway could find it awake just before, and vLLM keeps a request that reaches it in its sleep until
    somebody wakes it.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: object, send: object) -> None:
        client = scope.get("client")
        while client and client[0] != "127.0.0.1" and not OPEN.exists():  # noqa: ASYNC110, ASYNC240 - in memory
            await asyncio.sleep(LOOK)
        await self.app(scope, receive, send)


def _loaded(vllm: int, lock: TextIO) -> bool:
    """Return whether vLLM has loaded; otherwise it has ended."""
    end = time.monotonic() + LONGEST
    while not _answers():
        if _ended(vllm):
            return False
        if time.monotonic() > end:
            print(f"not loaded after {LONGEST // 60} minutes, so another model may load now", flush=True)
            flock(lock, LOCK_UN)
            end = math.inf
        time.sleep(EVERY)
    return True


def _sleep() -> None:
    """Have vLLM sleep, so that the next one finds the GPU free. If it cannot sleep, the next one fails."""
    try:
        OWN.open(SLEEP, data=b"", timeout=LONGEST).close()
    except (OSError, HTTPException) as exc:
        print(f"vLLM did not fall asleep: {exc}", flush=True)
    OPEN.touch()


def _ended(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


def _answers() -> bool:
    try:
        OWN.open(HEALTH, timeout=4).close()
    except (OSError, HTTPException):
        return False
    return True
