"""Queue errors: what a request is told that gets no place in a queue, or no slot in time."""

from typing import Literal

from gateway.admission.memory import Reason
from gateway.errors import QueueFull, QueueShareFull, QueueTimeout, StackError


def refusal(reason: Reason | Literal["timeout"], wait: float, *, absent: bool = False) -> StackError:
    """Return the error of a request that gets no slot. The request may return after `wait` seconds. `absent`: its model
    is not loaded."""
    if reason == "full":
        return QueueFull("The queue for the engine is full. Retry after the time in Retry-After.", wait)
    if reason == "share":
        return QueueShareFull(
            "This key or user already has its maximum number of requests waiting. Retry after the time in Retry-After.",
            wait,
        )
    if absent and reason in ("deadline", "timeout"):
        return QueueTimeout(
            "The model is not loaded, and the engine serves another model first. Retry after the time in Retry-After.",
            wait,
        )
    if reason == "deadline":
        return QueueTimeout(
            "The engine is too busy to begin this request in time. Retry after the time in Retry-After.", wait
        )
    return QueueTimeout("The engine had no free slot in time. Retry after the time in Retry-After.", wait)
