"""Breaker: send a failing engine no requests, and find out when it works again.

    closed ──failures in a row──▶ open ──after a while──▶ half-open ──one request──▶ closed, or open for longer
                                       ──a good probe──▶ closed

An engine that was unreachable counts as working when a health probe succeeds. An engine that was silent while its
probes succeeded must first answer a request: it gets one at a time.
"""

import random
import time
from collections.abc import Callable
from typing import Literal

LONGEST = 60.0  # seconds; each opening lasts twice as long as the one before, up to this

State = Literal["closed", "open", "half-open"]


class Breaker:
    """The breaker of one engine in one worker. `on_change(state, reason)` is called at every change. `now` is the
    clock."""

    def __init__(
        self,
        failures: int,
        open_for: float,
        on_change: Callable[[State, str], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._now = now
        self._limit = failures
        self._open_for = open_for
        self._on_change = on_change
        self.state: State = "closed"
        self._failures = 0
        self._openings = 0
        self._until = 0.0
        self._trial = False  # half-open, and the trial request is running
        self._silent = False  # the engine was reachable and silent

    def allows(self) -> bool:
        """Return whether a request may go to the engine now. If the breaker is half-open, only one request at a time
        may."""
        if self.state == "open" and self._now() >= self._until:
            self._change("half-open", "a trial request is due")
        return self.state == "closed" or (self.state == "half-open" and not self._trial)

    @property
    def away(self) -> bool:
        """Whether the breaker is open because the engine was unreachable. A request to such an engine fails fast."""
        return self.state == "open" and not self._silent

    @property
    def gone(self) -> bool:
        """Whether the breaker is not closed because the engine was unreachable, even if another request tries
        it now."""
        return self.state != "closed" and not self._silent

    def began(self) -> bool:
        """Note that a request goes to the engine. Return whether it is the trial request."""
        self._trial = self.state == "half-open"
        return self._trial

    def succeeded(self) -> None:
        """Note that the engine has begun to answer."""
        self._failures = self._openings = 0
        if self.state != "closed":
            self._trial = False
            self._change("closed", "the engine answers again")

    def failed(self, reason: str, *, silent: bool) -> None:
        """Note that the engine was unreachable, broke off its answer, or (`silent`) sent nothing in time."""
        self._failures += 1
        self._silent = silent
        if self.state == "half-open" or (self.state == "closed" and self._failures >= self._limit):
            self._open(reason)

    def gave_up(self, *, trial: bool) -> None:
        """Note that a request ended for a reason that says nothing about the engine, such as a disconnect of its
        client. `trial`: it was the trial request. Another request may have begun before the breaker opened."""
        self._trial = self._trial and not trial

    def probed(self, trouble: str | None, *, silent: bool) -> None:
        """Note the result of a health probe. `trouble` says what is wrong, None if nothing is."""
        if trouble is not None:
            if self.state == "closed":
                self.failed(trouble, silent=silent)
        elif self.state == "open":
            self._failures = 0
            self._change("half-open" if self._silent else "closed", "a health probe succeeded")

    def _open(self, reason: str) -> None:
        # Jitter, so that workers and replicas do not all try again at the same moment.
        pause = min(LONGEST, self._open_for * 2**self._openings) * random.uniform(0.8, 1.2)  # noqa: S311
        self._openings += 1
        self._trial = False
        self._until = self._now() + pause
        self._change("open", reason)

    def _change(self, state: State, reason: str) -> None:
        self.state = state
        self._on_change(state, reason)
