"""Long tests: with LONG=yes, as `make soak` sets it, they go through all of their cases, and otherwise through some."""

import os
from collections.abc import Sequence
from typing import TypeVar

LONG = os.environ.get("LONG") == "yes"
T = TypeVar("T")


def some(cases: Sequence[T], every: int = 3) -> list[T]:
    """Return all cases if the run is long, and otherwise each `every`th, with the first and the last."""
    if LONG:
        return list(cases)
    last = len(cases) - 1
    return [case for number, case in enumerate(cases) if number % every == 0 or number == last]
