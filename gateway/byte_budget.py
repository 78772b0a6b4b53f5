"""Byte budget: count how many bytes of requests a worker holds, by key, and decide whether it can hold more.

A request is charged from before its body is read until nothing refers to it any more. Its time in the queue, its
answer, and a wait for a lost engine are therefore included. Without space, new work is refused. Admitted work is never
refused.
"""

import gc
import os
import time
from pathlib import Path

from gateway.errors import EngineError, GatewayBusy, TooLarge

SHARE = 4  # all workers' requests may hold one part in SHARE of the gateway's memory
OVERDRAFT = 2  # answers are read until OVERDRAFT times the budget is held, even if new requests are refused

TIDY = 1.0  # seconds between two runs of the garbage collector for space


class Budget:
    """Count the bytes that one worker's requests hold. A key may hold as many bytes as it leaves free, so that space
    for other keys remains. A key may always have one request, if there is space for it.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self._tidied_at = float("-inf")
        self._by_key: dict[str, int] = {}

    def charge(self, key_id: str, size: int) -> "Charge":
        """Hold `size` bytes for a key. Raises TooLarge if they never fit, and GatewayBusy if they do not fit now."""
        charge = Charge(self, key_id)
        charge.resize(size)
        return charge

    def change(self, key_id: str, by: int) -> None:
        """Add `by` bytes to the count, or subtract them if `by` is negative."""
        self.held += by
        left = self._by_key.get(key_id, 0) + by
        if left:
            self._by_key[key_id] = left
        else:
            self._by_key.pop(key_id, None)

    def has_room(self, key_id: str, own: int, more: int) -> bool:
        """Return whether a request that holds `own` bytes may hold `more` in addition."""
        return self._fits(key_id, own, more) or (self._tidies() and self._fits(key_id, own, more))

    def may_be_answered(self, key_id: str, own: int, more: int) -> bool:
        """Return whether a request that holds `own` bytes may hold `more` of an engine's answer. The requests of one
        key may hold the budget together, which is a part of OVERDRAFT times the budget; a single one may hold all."""
        of_key = self._by_key.get(key_id, 0)
        fits = self.held + more <= OVERDRAFT * self.limit
        return fits and (of_key == own or of_key + more <= self.limit)

    def _tidies(self) -> bool:
        """Run the garbage collector, at most once a second: errors and frames that refer to each other hold requests
        that have ended. Return whether it ran."""
        now = time.monotonic()
        if now - self._tidied_at < TIDY:
            return False
        self._tidied_at = now
        gc.collect()
        return True

    def _fits(self, key_id: str, own: int, more: int) -> bool:
        free = self.limit - self.held - more
        others = self._by_key.get(key_id, 0) - own
        return free >= 0 and (others == 0 or others + own + more <= free)


class Charge:
    """Hold the bytes of one request. They are given back when the last reference to the charge is deleted, because only
    then the memory is free."""

    __slots__ = ("_budget", "_key_id", "size")

    def __init__(self, budget: Budget, key_id: str) -> None:
        self._budget = budget
        self._key_id = key_id
        self.size = 0

    def resize(self, size: int) -> None:
        """Hold `size` bytes instead. Raises TooLarge if they never fit, and GatewayBusy if they do not fit now."""
        more = size - self.size
        if more > 0 and not self._budget.has_room(self._key_id, self.size, more):
            if size > self._budget.limit:
                raise TooLarge(
                    "The request needs more memory than the gateway has for requests. "
                    "Send a smaller body, or continue or read a smaller stored response."
                )
            raise GatewayBusy("The gateway has no memory for another request now. Try again shortly.")
        self._add(more)

    def add_answer(self, size: int) -> None:
        """Hold `size` more bytes, of an engine's answer. An admitted request may continue when new ones are refused.

        Raises EngineError if so much is held, in all or by its key, that continuing would endanger others' answers.
        """
        if not self._budget.may_be_answered(self._key_id, self.size, size):
            raise EngineError(
                "The engine's answer is larger than the gateway's free memory. Ask for a stream, or retry later."
            )
        self._add(size)

    def _add(self, size: int) -> None:
        self._budget.change(self._key_id, size)
        self.size += size

    def __del__(self) -> None:
        if self.size:
            self._budget.change(self._key_id, -self.size)


def per_worker(budget: int | None, workers: int) -> Budget:
    """Return a worker's part of `budget` bytes for all workers. None stands for a share of the gateway's memory."""
    return Budget((budget or usable() // SHARE) // workers)


def usable(root: Path = Path("/")) -> int:
    """Return how many bytes of memory this process may use: the smallest limit of its control groups, or the machine's
    memory. `root` is the directory that holds /proc and /sys."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([physical, *_limits(root)])


def _limits(root: Path) -> list[int]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        file = "memory.limit_in_bytes" if controllers else "memory.max"
        # In a container the path may be the host's, which is not visible there. The mounted directory is then the group
        # itself.
        group = mount / path.strip("/")
        directories = [it for it in (group, *group.parents) if it.is_relative_to(mount)]
        found += [limit for it in directories if (limit := _number(it / file))]
    return found


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() and int(text) > 0 else None  # "max": none
