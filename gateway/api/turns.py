"""Turns: run what takes long in one thread, in which the accounts of callers take turns."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from gateway.errors import ClientLeft, QueueShareFull
from gateway.relay.client import Client

TURN = 0.1  # seconds of the thread after which it is another account's turn
MOST = 256  # calls of one account that may wait
_AGAIN = 1.0  # seconds until one of them has probably begun

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class _Call:
    function: Callable[[], Any]
    result: "asyncio.Future[Any]"


class Turns:
    """One thread for the calls of all accounts. An account waits for one turn of each other account at most, however
    many calls those have waiting. A turn is one call, or several short ones. The creator closes it."""

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, name)
        # The calls that wait, by account. The first account has its turn, and the last one is the last to have one.
        self._lines: dict[str, list[_Call]] = {}
        self._used = 0.0  # seconds of the present turn

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        for call in [it for line in self._lines.values() for it in line]:
            call.result.cancel()

    async def run(self, account: str, client: Client | None, function: Callable[[], T]) -> T:
        """Return `function()`. A call that waits is dropped when its client disconnects.

        Raises ClientLeft, and QueueShareFull if too many calls of the account wait."""
        line = self._lines.get(account, [])
        if len(line) >= MOST:
            raise QueueShareFull(
                "This key or user already has its maximum number of requests waiting to be checked. "
                "Retry after the time in Retry-After.",
                _AGAIN,
            )
        call = _Call(function, asyncio.get_running_loop().create_future())
        line.append(call)
        idle = not self._lines
        self._lines[account] = line
        if idle:
            self._begin()
        elif client is not None:
            client.watch(lambda: self._hung_up(line, call))
        try:
            return await call.result  # type: ignore[no-any-return]
        finally:
            if call in line:
                line.remove(call)
            if client is not None and not idle:
                client.watch(None)

    @staticmethod
    def _hung_up(line: list[_Call], call: _Call) -> None:
        if call in line and not call.result.done():
            call.result.set_exception(ClientLeft("The client disconnected."))

    def _begin(self) -> None:
        """Begin the next call: of the account that has its turn, or of the next one."""
        while self._lines:
            account = next(iter(self._lines))
            line = self._lines[account]
            waiting = next((it for it in line if not it.result.done()), None)
            if waiting is not None and self._used < TURN:
                line.remove(waiting)
                self._run(waiting)
                return
            del self._lines[account]
            if waiting is not None:
                self._lines[account] = line
            self._used = 0.0

    def _run(self, call: _Call) -> None:
        began, loop = time.monotonic(), asyncio.get_running_loop()

        def over(done: "asyncio.Future[Any]") -> None:
            self._used += time.monotonic() - began
            error = None if done.cancelled() else done.exception()
            if done.cancelled():
                call.result.cancel()
            elif not call.result.done():
                call.result.set_result(done.result()) if error is None else call.result.set_exception(error)
            # The caller goes on first. Its next call then belongs to the same turn.
            loop.call_soon(self._begin)

        try:
            loop.run_in_executor(self._thread, call.function).add_done_callback(over)
        except RuntimeError as exc:  # there is no thread for it, or this is closed
            call.result.set_exception(exc)
            loop.call_soon(self._begin)
