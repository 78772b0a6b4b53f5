"""Turn: one vLLM loads at a time, of all that share a volume and perhaps a GPU.

vLLM counts the free memory of the GPU while it loads. If another vLLM takes or returns memory meanwhile, it gets too
little memory for its cache, or fails. The lock is released when the vLLM that loads answers, or ends. So a vLLM that
fails again and again does not keep the others waiting.
"""

import os
import time
import urllib.request
from fcntl import LOCK_EX, LOCK_NB, flock
from http.client import HTTPException
from pathlib import Path

LOCK = Path.home() / "loading"
HEALTH = "http://127.0.0.1:8000/health"
LONGEST = 1800  # seconds, after which a vLLM that neither answers nor ends no longer keeps the others waiting
EVERY = 0.5  # seconds between two questions


def take() -> None:
    """Wait until no other vLLM loads, and keep the others waiting until the vLLM answers that this process becomes."""
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
        if os.fork() == 0:
            _wait_until_loaded(vllm)
        os._exit(0)
    os.wait()


def _wait_until_loaded(vllm: int) -> None:
    end = time.monotonic() + LONGEST
    while time.monotonic() < end:
        if _ended(vllm) or _answers():
            return
        time.sleep(EVERY)
    print(f"not loaded after {LONGEST // 60} minutes, so another model may load now", flush=True)


def _ended(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


def _answers() -> bool:
    try:
        urllib.request.urlopen(HEALTH, timeout=4).close()
    except (OSError, HTTPException):
        return False
    return True
