"""Accounts take turns in a thread."""

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest

from gateway.api import turns
from gateway.api.turns import Turns
from gateway.errors import QueueShareFull

Crowd = Callable[[Turns, Callable[[str], Callable[[], None]]], Awaitable[object]]


def _order(crowd: Crowd) -> list[str]:
    """Return the order in which calls ran that all wait behind one of account a."""
    order: list[str] = []

    async def run() -> None:
        gate, them = threading.Event(), Turns("test")

        def call(name: str) -> Callable[[], None]:
            return lambda: order.append(name)

        try:
            first = asyncio.create_task(them.run("a", None, gate.wait))
            await asyncio.sleep(0)
            rest = asyncio.ensure_future(crowd(them, call))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            gate.set()
            await asyncio.gather(first, rest)
        finally:
            them.close()

    asyncio.run(run())
    return order


def test_accounts_take_turns_whatever_number_of_calls_each_has_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "TURN", 1e-9)  # each call takes a whole turn
    names = ["a1", "a2", "a3", "b1", "b2", "c1"]
    order = _order(lambda them, call: asyncio.gather(*(them.run(it[0], None, call(it)) for it in names)))
    assert order == ["b1", "c1", "a1", "b2", "a2", "a3"]


def test_the_short_steps_of_one_request_are_one_turn() -> None:
    async def crowd(them: Turns, call: Callable[[str], Callable[[], None]]) -> None:
        async def steps(account: str) -> None:
            for number in range(3):
                await them.run(account, None, call(f"{account}{number}"))

        await asyncio.gather(steps("b"), steps("c"))

    assert _order(crowd) == ["b0", "b1", "b2", "c0", "c1", "c2"]


def test_an_account_has_a_maximum_of_waiting_calls() -> None:
    async def crowd(them: Turns, call: Callable[[str], Callable[[], None]]) -> None:
        waiting = [asyncio.create_task(them.run("a", None, call("a"))) for _ in range(turns.MOST)]
        await asyncio.sleep(0)
        with pytest.raises(QueueShareFull):
            await them.run("a", None, call("a"))
        await asyncio.gather(them.run("b", None, call("b")), *waiting)

    order = _order(crowd)
    assert order.count("a") == turns.MOST
    assert order.count("b") == 1


def test_calls_that_fail_or_are_cancelled_give_their_place_to_the_next() -> None:
    async def crowd(them: Turns, call: Callable[[str], Callable[[], None]]) -> None:
        cancelled = [asyncio.create_task(them.run("a", None, call("cancelled"))) for _ in range(2)]
        failed = asyncio.create_task(them.run("a", None, lambda: {}["x"]))
        last = asyncio.create_task(them.run("a", None, call("last")))
        await asyncio.sleep(0)
        for it in cancelled:
            it.cancel()
        await last
        assert isinstance(failed.exception(), KeyError)

    assert _order(crowd) == ["last"]
