"""Charge a request as the pipeline does, without the pipeline."""

from gateway.keys.known import Key
from gateway.limits.estimates import Estimate
from gateway.limits.rules import Book, Lease


async def admit(book: Book, key: Key, estimate: Estimate) -> Lease:
    """Let a request enter, and reserve its tokens. Raises what refuses it."""
    lease = await book.enter(key)
    try:
        await lease.set_aside(estimate)
    except BaseException:
        lease.settle(0)
        raise
    return lease
