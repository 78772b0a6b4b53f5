"""A body is read from its connection."""

import asyncio
import tracemalloc
from typing import Any

from gateway.api.reading import read
from gateway.byte_budget import Budget

SIZE = 20_000


async def _in_small_pieces(size: int) -> tuple[bytes, int, int]:
    """Return a body that came in pieces of two bytes, the bytes that it was charged, and the most that were held."""
    left = size

    async def receive() -> dict[str, Any]:
        nonlocal left
        left -= 2
        return {"type": "http.request", "body": left.to_bytes(8, "big")[-2:], "more_body": left > 0}

    charge = Budget(100 * size).charge("key", 0)
    tracemalloc.start()
    try:
        body = await read({"headers": [(b"content-length", b"%d" % size)]}, receive, charge, size)
        return body, charge.size, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_body_in_small_pieces_is_charged_for_all_that_it_holds() -> None:
    body, charged, held = asyncio.run(_in_small_pieces(SIZE))
    assert body == b"".join(it.to_bytes(8, "big")[-2:] for it in range(SIZE - 2, -1, -2))
    assert held < charged + 100_000  # of the loop and of the piece that is being read
