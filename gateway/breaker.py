"""Breaker: leaves an engine alone that keeps failing, and finds out when it is back.

closed ──failures in a row──▶ open ──after a while──▶ half-open ──one request──▶ closed, or open for longer
                                   ──a good probe──▶ closed

An engine that was away is back when a health probe succeeds. One that was silent while its probes succeed is only
believed half: one request at a time has to show that it answers.
"""

import random
import time
from collections.abc import Callable
from typing import Literal

LONGEST = 60.0  # seconds; each opening lasts twice as long as the one before, up to this

State = Literal["closed", "open", "half-open"]


class Breaker:
    """One engine's, in one worker. `on_change(state, reason)` is told of every change."""

    def __init__(self, failures: int, open_for: float, on_change: Callable[[State, str], None]) -> None:
        self._limit = failures
        self._open_for = open_for
        self._on_change = on_change
        self.state: State = "closed"
        self._failures = 0
        self._openings = 0
        self._until = 0.0
        self._trial = False  # half-open, and the one request is under way
        self._silent = False  # it was silent, not away

    def allows(self) -> bool:
        """Whether a request may go to the engine now. Half-open, this is True for a single one at a time."""
        if self.state == "open" and time.monotonic() >= self._until:
            self._change("half-open", "time to try again")
        return self.state == "closed" or (self.state == "half-open" and not self._trial)

    @property
    def away(self) -> bool:
        """Whether it is open because the engine could not be reached: to ask it all the same costs little."""
        return self.state == "open" and not self._silent

    def began(self) -> None:
        """A request goes to the engine."""
        self._trial = self.state == "half-open"

    def succeeded(self) -> None:
        """The engine has begun to answer."""
        self._failures = self._openings = 0
        if self.state != "closed":
            self._trial = False
            self._change("closed", "it answers again")

    def failed(self, reason: str, *, silent: bool) -> None:
        """The engine could not be reached, broke off, or (`silent`) did not say a word in time."""
        self._failures += 1
        self._silent = silent
        if self.state == "half-open" or (self.state == "closed" and self._failures >= self._limit):
            self._open(reason)

    def gave_up(self) -> None:
        """The request ended for a reason that says nothing about the engine, such as its client's leaving."""
        self._trial = False

    def probed(self, trouble: str | None, *, silent: bool) -> None:
        """A health probe came back, with what is wrong, or None."""
        if trouble is not None:
            if self.state == "closed":
                self.failed(trouble, silent=silent)
        elif self.state == "open":
            self._failures = 0
            self._change("half-open" if self._silent else "closed", "a probe found it well")

    def _open(self, reason: str) -> None:
        # Jitter, so that workers and replicas don't all come back in the same moment.
        pause = min(LONGEST, self._open_for * 2**self._openings) * random.uniform(0.8, 1.2)  # noqa: S311
        self._openings += 1
        self._trial = False
        self._until = time.monotonic() + pause
        self._change("open", reason)

    def _change(self, state: State, reason: str) -> None:
        self.state = state
        self._on_change(state, reason)
