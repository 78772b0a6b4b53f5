"""Database: PostgreSQL as the books of one worker use it. Each question is asked for WAIT at most; once one is not
answered, its connections are given up, and made anew later.

The books go by a clock that all gateways keep together (stack_beat), which nobody sets.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import psycopg

PATIENCE = 10.0  # seconds after its last sign of life for which a worker counts
BEAT = PATIENCE / 5
AGAIN = 1.0  # seconds until a database that could not be used is tried again
WAIT = 3.0  # seconds for the database to answer
TURNS = 2  # connections that take turns
LOST = (psycopg.Error, OSError, TimeoutError)

Connection = psycopg.AsyncConnection[tuple[Any, ...]]
T = TypeVar("T")


class Database:
    """The connections, and who waits for something on them."""

    def __init__(self, url: str, options: str = "", *, spare: bool = False) -> None:
        self._url = url
        self._spare = spare
        self._options = f"-c statement_timeout={int(WAIT * 1000)} {options}"
        self._connections: list[Connection] = []
        self._asking: set[asyncio.Task[Any]] = set()
        self._burials: set[asyncio.Task[Any]] = set()
        self._asked = 0
        self._ahead = float("-inf")  # of time.monotonic() is the gateways' clock

    async def connect(self) -> None:
        """Make the connections. Raises one of LOST."""
        connections: list[Connection] = []
        self._connections = connections
        for _ in range(TURNS + self._spare):
            connect = psycopg.AsyncConnection.connect
            connections.append(await connect(self._url, autocommit=True, options=self._options))

    @property
    def spare(self) -> Connection:
        """The one that takes no turns."""
        return self._connections[TURNS]

    def connection(self) -> Connection:
        """One of those that do. Raises TimeoutError where there is none."""
        if len(self._connections) < TURNS:
            raise TimeoutError("it is lost")
        self._asked += 1
        return self._connections[self._asked % TURNS]

    async def ask(self, what: Coroutine[Any, Any, T], late: Callable[[asyncio.Task[T]], None] | None = None) -> T:
        """Do that in a task of its own, for WAIT at most: psycopg takes seconds to be interrupted. `late` is told of
        what becomes of it where nobody waits any more. Raises one of LOST."""
        task = self.begin(what)
        try:
            await asyncio.wait({task}, timeout=WAIT)
            if task.done() and not task.cancelled():
                late = None
                return task.result()
        finally:
            if late is not None:
                task.add_done_callback(late)
        raise TimeoutError(f"no answer within {WAIT:g} seconds")

    def begin(self, what: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Do that in a task that ends with the connections."""
        return _kept(what, self._asking)

    def give_up(self) -> None:
        """Drop the connections, and all that waits for something on them."""
        connections, self._connections = self._connections, []
        _kept(_bury(connections, set(self._asking)), self._burials)

    async def close(self) -> None:
        """The same, and wait for it."""
        self.give_up()
        await asyncio.gather(*self._burials)

    # -- the clock ----------------------------------------------------------------------------------------------------

    def now(self) -> float:
        return self._ahead + time.monotonic()

    def heard(self, clock: float) -> None:
        """It was that by the gateways' clock, a moment ago."""
        self._ahead = max(self._ahead, clock - time.monotonic())

    async def beat(self, owner: str) -> None:
        """Show that the worker of that name lives."""
        cursor = await self.connection().execute("SELECT stack_beat(%s, %s)", (owner, self.now()))
        (clock,) = await cursor.fetchone() or ()
        self.heard(clock)


async def _bury(connections: list[Connection], asking: set[asyncio.Task[Any]]) -> None:
    """Close them once nothing waits for them any more: the event loop would take the next connection of that number for
    the one that is gone, and not see what comes on it."""
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    for connection in connections:
        with contextlib.suppress(*LOST):
            await connection.close()


def _kept(what: Coroutine[Any, Any, T], among: set[asyncio.Task[Any]]) -> asyncio.Task[T]:
    def done(task: asyncio.Task[T]) -> None:
        among.discard(task)
        if not task.cancelled():
            task.exception()  # else asyncio complains where nobody waited for it

    task = asyncio.create_task(what)
    among.add(task)
    task.add_done_callback(done)
    return task
