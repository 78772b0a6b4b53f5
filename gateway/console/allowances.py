"""Allowances: bound the processor time that a worker lets the console's visitors use, together and each."""

import time
from collections.abc import Callable

from gateway.console.door import TooOften

LEAST = 0.01  # seconds that any page is charged: the millisecond of the worker, which answers wait for, counts tenfold
TOO_OFTEN = "The console was asked for too many pages. Try again shortly."
# The part of the rate, and of the reserve, of all visitors of a kind that one of them may use.
RATE, RESERVE = 0.25, 0.5
KEPT = 1024  # visitors of a kind whose allowance is remembered


class Allowance:
    """Bound the time to `rate` seconds in a second, and `burst` seconds at once. `within`: an allowance that is used up
    with this one. `now` is the clock."""

    def __init__(
        self, rate: float, burst: float, now: Callable[[], float] = time.monotonic, within: "Allowance | None" = None
    ) -> None:
        self._rate, self._burst, self._now, self._within = rate, burst, now, within
        self._left, self._at = burst, now()

    def take(self) -> None:
        """Begin a page. Raises TooOften if the time is used up."""
        now = self._now()
        self._left = min(self._burst, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < LEAST:
            raise TooOften(TOO_OFTEN, (LEAST - self._left) / self._rate)
        if self._within is not None:
            self._within.take()
        self._left -= LEAST

    def charge(self, seconds: float) -> None:
        """Charge the `seconds` that a page took elsewhere."""
        self._left -= seconds
        if self._within is not None:
            self._within.charge(seconds)


class Allowances:
    """The allowance of each visitor of a kind, within one for all of them. Arguments: see Allowance."""

    def __init__(self, rate: float, burst: float, now: Callable[[], float] = time.monotonic) -> None:
        self._each = rate * RATE, burst * RESERVE, now, Allowance(rate, burst, now)
        self._of: dict[str, Allowance] = {}  # the one that was used last is the last

    def of(self, who: str) -> Allowance:
        """Return the allowance of a visitor. Beyond KEPT visitors, the one that was away for longest is forgotten."""
        found = self._of[who] = self._of.pop(who) if who in self._of else Allowance(*self._each)
        if len(self._of) > KEPT:
            del self._of[next(iter(self._of))]
        return found
