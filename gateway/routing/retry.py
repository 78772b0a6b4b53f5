"""Retry: decide whether a failed request may be tried again, where, and after how long."""

import random

from gateway.config import Retries
from gateway.errors import (
    EngineAsleep,
    EngineDisobeyed,
    EngineError,
    EngineFailed,
    EngineLost,
    EngineOverloaded,
    EngineRefused,
    EngineSilent,
    EngineTimeout,
    EngineUnauthorized,
    EngineUnreachable,
    EngineUnsupported,
    LoadFailed,
    ModelLoading,
    StackError,
)

RESERVE = 10.0  # retries that all workers of a quiet gateway together may make at once


class Budget:
    """Limit retries to a share of the live traffic, so that they cannot make an overload worse. Each request adds
    `share` of a retry, up to a reserve, and each retry takes one. Each worker has its part of the gateway's reserve."""

    def __init__(self, share: float, workers: int) -> None:
        self._share = share
        self._reserve = max(1.0, RESERVE / workers)
        self._balance = self._reserve if share else 0.0

    def request(self) -> None:
        """Count a new request."""
        self._balance = min(self._reserve, self._balance + self._share)

    def take(self) -> bool:
        """Return whether the budget allows one more retry, and pay for it."""
        if self._balance < 1:
            return False
        self._balance -= 1
        return True


def worthwhile(error: StackError, *, same_engine: bool) -> bool:
    """Return whether another attempt could succeed. A mistake in the request fails everywhere.

    The same engine is asked again only after a failure that passes: a refused or broken connection, or a failure of its
    own. An engine that is full, asleep, loading or silent, or that could not load the model, is not asked again at
    once, but another engine may be.
    """
    if isinstance(error, EngineUnsupported):
        return not same_engine
    if not isinstance(error, EngineError) or isinstance(error, EngineRefused | EngineFailed | EngineDisobeyed):
        return False
    passes_slowly = EngineAsleep | EngineOverloaded | LoadFailed | ModelLoading | EngineTimeout | EngineUnauthorized
    return not (same_engine and isinstance(error, passes_slowly))


def blames_the_engine(error: StackError) -> bool:
    """Return whether the breaker counts this failure: the engine is unreachable, gone or silent.

    An engine that answers counts as working, whatever it answers. Otherwise one caller's bad requests, each answered
    with a 500, would close the engine to all other callers.
    """
    return isinstance(error, EngineLost | EngineUnreachable | EngineSilent)


def backoff(attempt: int, retries: Retries) -> float:
    """Return the seconds before attempt number `attempt` (2 is the first retry) at an engine that was just asked. The
    pause doubles with each attempt, with jitter (between half and all of it)."""
    longest: float = min(retries.backoff_max, retries.backoff * 2 ** (attempt - 2))
    return longest * random.uniform(0.5, 1.0)  # noqa: S311
