"""Wishes: know the fields that an engine may be asked without, and remember which engine refused which of them.

Clients of the translated APIs send an effort to every model, and a limit of 32,000 tokens or more. An engine that
refuses such a field would make those clients useless, so it is asked again without the field. The refusal is remembered
for each engine, model and value, so that the next request is right at once.
"""

import time
from typing import Any

from gateway.errors import ContextExceeded, EngineRefused, StackError

LIMITS = ("max_completion_tokens", "max_tokens")
KEPT = 600.0  # seconds for which a refusal is remembered; after that, the name may mean another model
MOST = 256  # refusals that are remembered for one engine


class Unwelcome:
    """Remember what one engine refuses."""

    def __init__(self) -> None:
        self._until: dict[tuple[str, str, str], float] = {}  # time.monotonic(), by model, field and value

    def learn(self, model: str, name: str, value: Any) -> None:
        """Note that the engine refused a request for that model because of this field."""
        if len(self._until) >= MOST:
            self._until.clear()
        self._until[model, name, repr(value)[:64]] = time.monotonic() + KEPT

    def has(self, model: str, name: str, value: Any) -> bool:
        """Return whether the engine would refuse this field."""
        return self._until.get((model, name, repr(value)[:64]), 0.0) > time.monotonic()


def without(fields: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Return the fields without these."""
    return {name: value for name, value in fields.items() if name not in names}


def fitted(fields: dict[str, Any], window: int, way: str) -> dict[str, Any]:
    """Return the fields with a limit on the answer's tokens that is no longer than the model's window of tokens.
    `way` is the dialect's: the limit is `cut`, or `left out`."""
    long = tuple(name for name in LIMITS if type(value := fields.get(name)) is int and value >= window)
    if not long:
        return fields
    return fields | dict.fromkeys(long, window) if way == "cut" else without(fields, long)


def refused(error: StackError, fields: dict[str, Any], advice: tuple[str, ...], way: str) -> tuple[str, ...]:
    """Return the names of the fields that an engine refused and can be asked without; empty if there are none."""
    if isinstance(error, EngineRefused) and error.param in advice and error.param in fields:
        return (str(error.param),)
    limits = tuple(name for name in LIMITS if name in fields)
    if way == "left out" and (isinstance(error, ContextExceeded) or error.param in limits):
        return limits
    return ()
