"""Retry: may a request that failed be tried again, where, and after how long?"""

import random

from gateway.config import Retries
from gateway.errors import (
    EngineError,
    EngineLost,
    EngineOverloaded,
    EngineRefused,
    EngineSilent,
    EngineTimeout,
    EngineUnauthorized,
    EngineUnreachable,
    ModelLoading,
    StackError,
)

RESERVE = 10.0  # retries that a quiet gateway may make at once, all its workers together


class Budget:
    """Retries may add a share of the live traffic and no more, so that they can't make a bad moment worse (a retry
    storm). Each request brings `share` of a retry, up to a reserve; each retry takes one. Each worker keeps its part of
    the gateway's one budget: shares of traffic add up by themselves."""

    def __init__(self, share: float, workers: int) -> None:
        self._share = share
        self._reserve = max(1.0, RESERVE / workers)
        self._balance = self._reserve if share else 0.0

    def request(self) -> None:
        """A new request has come."""
        self._balance = min(self._reserve, self._balance + self._share)

    def take(self) -> bool:
        """Whether one more attempt is affordable; if so it is paid for."""
        if self._balance < 1:
            return False
        self._balance -= 1
        return True


def worthwhile(error: StackError, *, same_engine: bool) -> bool:
    """Whether another attempt could end better. What is wrong with the request stays wrong everywhere.

    On the same engine only for what passes: a connection that was refused or broke, a failure of its own. One that
    is full, loading or silent is not asked again at once; another engine may be.
    """
    if not isinstance(error, EngineError) or isinstance(error, EngineRefused):
        return False
    return not (same_engine and isinstance(error, EngineOverloaded | ModelLoading | EngineTimeout | EngineUnauthorized))


def blames_the_engine(error: StackError) -> bool:
    """Whether a failure says that the engine is broken, as the breaker counts it: it is away, gone or silent.

    One that answers is at work, whatever it says: else one caller's bad requests, each of them a 500, would close the
    engine to all others.
    """
    return isinstance(error, EngineLost | EngineUnreachable | EngineSilent)


def backoff(attempt: int, retries: Retries) -> float:
    """Seconds before attempt number `attempt` (2 is the first retry) at an engine that was just asked: exponential,
    with full jitter (between half and all of it)."""
    longest: float = min(retries.backoff_max, retries.backoff * 2 ** (attempt - 2))
    return longest * random.uniform(0.5, 1.0)  # noqa: S311
