"""Pace: count what ended in the last minutes: requests, failures, tokens and times to the first token.

Each worker counts in cells of its own, by its seat, so nothing is locked. A cell holds some seconds, and is used again
a few minutes later. Whoever reads adds up the cells of all seats. Times are time.monotonic()'s.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from mmap import mmap

from gateway.exchange import Ending
from gateway.shared_memory import MAX_SEATS

CELL = 5  # seconds
CELLS = 64  # of a seat: a little more than five minutes
SPAN = 300  # seconds that are told

_BEGAN, _REQUESTS, _FAILED, _LEFT, _TOKENS, _TTFTS, _TTFT, _DURATION = range(8)
_WIDTH = 8


@dataclass(frozen=True, slots=True)
class Told:
    """What ended in a span of time. Durations are means in seconds, None if there is nothing to take the mean of."""

    requests: int
    failed: int  # neither finished nor left by their client
    left: int  # by their client
    tokens: int  # that were made
    first_token: float | None
    duration: float | None


class Pace:
    """Hold the counts of all workers. The master makes it before it forks. `now` is the clock."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._memory = mmap(-1, 8 + MAX_SEATS * CELLS * _WIDTH * 8)
        view = memoryview(self._memory)
        self._seats = view[:8].cast("q")  # one number, above all seats so far
        self._cells = view[8:].cast("d")

    def ended(self, seat: int, ending: Ending) -> None:
        """Count a request that is over, in the worker that has that seat."""
        number = int(self._now() // CELL)
        at = (seat * CELLS + number % CELLS) * _WIDTH
        cells = self._cells
        if cells[at] != number:
            cells[at : at + _WIDTH] = _EMPTY
            cells[at] = number
            self._seats[0] = max(self._seats[0], seat + 1)
        cells[at + _REQUESTS] += 1
        if ending.error is not None:
            cells[at + (_LEFT if ending.outcome == "client_left" else _FAILED)] += 1
        cells[at + _TOKENS] += ending.tokens_out
        cells[at + _DURATION] += ending.ended - ending.exchange.started
        if ending.first_token_at is not None:
            cells[at + _TTFTS] += 1
            cells[at + _TTFT] += ending.first_token_at - ending.exchange.started

    def told(self, seconds: int = SPAN) -> Told:
        """Return what ended in the last `seconds`, to within one cell."""
        sums = self._sum(int(self._now() // CELL) - seconds // CELL)
        requests, ttfts = sums[_REQUESTS], sums[_TTFTS]
        return Told(
            requests=int(requests),
            failed=int(sums[_FAILED]),
            left=int(sums[_LEFT]),
            tokens=int(sums[_TOKENS]),
            first_token=sums[_TTFT] / ttfts if ttfts else None,
            duration=sums[_DURATION] / requests if requests else None,
        )

    def _sum(self, after: int) -> list[float]:
        """The sums over the cells that began after that number."""
        sums = [0.0] * _WIDTH
        for at in range(0, self._seats[0] * CELLS * _WIDTH, _WIDTH):
            if self._cells[at] > after:
                for number, value in enumerate(self._cells[at : at + _WIDTH].tolist()):
                    sums[number] += value
        return sums


_EMPTY = memoryview(bytes(8 * _WIDTH)).cast("d")
