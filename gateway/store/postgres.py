"""Database: use PostgreSQL for the books of one worker, and be a member of the gateways that share them.

Each query waits for at most WAIT seconds. After a query without an answer, the connections are given up, and made again
later. The books use a clock that all gateways advance together (stack_beat), and that nobody sets.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import psycopg
from psycopg import conninfo

PATIENCE = 10.0  # seconds for which a worker counts after its last beat
BEAT = PATIENCE / 5
AGAIN = 1.0  # seconds until an unavailable database is tried again
WAIT = 3.0  # seconds for the database to answer
TURNS = 2  # connections that share the queries
LOST = (psycopg.Error, OSError, TimeoutError)

Connection = psycopg.AsyncConnection[tuple[Any, ...]]
T = TypeVar("T")

log = logging.getLogger("stack")


class LostError(Exception):
    """Say that the database cannot be used."""


class Database:
    """Own the connections, and the tasks that wait for a query on them."""

    def __init__(self, url: str, options: str = "", *, spare: bool = False) -> None:
        self._conninfo = with_options(url, f"-c statement_timeout={int(WAIT * 1000)} {options}")
        self._spare = spare
        self._connections: list[Connection] = []
        self._asking: set[asyncio.Task[Any]] = set()
        self._burials: set[asyncio.Task[Any]] = set()
        self._asked = 0
        self._ahead = float("-inf")  # seconds by which the gateways' clock is ahead of time.monotonic()
        self._beaten = float("inf")  # the last beat, by the gateways' clock; infinite before the first one

    async def connect(self) -> None:
        """Make the connections. Raises one of LOST."""
        connections: list[Connection] = []
        self._connections = connections
        self._beaten = float("inf")
        for _ in range(TURNS + self._spare):
            connect = psycopg.AsyncConnection.connect
            connections.append(await connect(self._conninfo, autocommit=True))

    @property
    def spare(self) -> Connection:
        """The connection that is not used for queries in turn."""
        return self._connections[TURNS]

    def connection(self) -> Connection:
        """Return the next connection in turn. Raises TimeoutError if there is none."""
        if len(self._connections) < TURNS:
            raise TimeoutError("the connection is lost")
        self._asked += 1
        return self._connections[self._asked % TURNS]

    async def ask(self, what: Coroutine[Any, Any, T], late: Callable[[asyncio.Task[T]], None] | None = None) -> T:
        """Run a query in a task of its own, and wait for its result for at most WAIT seconds, because psycopg takes
        seconds to be interrupted. If the caller no longer waits, `late` gets the finished task. Raises one of LOST."""
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
        """Run a query in a task that ends with the connections."""
        return _kept(what, self._asking)

    def give_up(self) -> None:
        """Drop the connections, and cancel all tasks that wait for an answer on them."""
        connections, self._connections = self._connections, []
        _kept(_bury(connections, set(self._asking)), self._burials)

    async def close(self) -> None:
        """Drop the connections as `give_up` does, and wait until they are closed."""
        self.give_up()
        await asyncio.gather(*self._burials)

    # -- the clock ----------------------------------------------------------------------------------------------------

    def now(self) -> float:
        return self._ahead + time.monotonic()

    def heard(self, clock: float) -> None:
        """Set the clock forward to what another gateway has just reported."""
        self._ahead = max(self._ahead, clock - time.monotonic())

    async def beat(self, owner: str) -> None:
        """Report that the worker of that name is alive.

        Raises TimeoutError if it was silent for so long that others may have taken what it had. Then the name is gone.
        The gateways' clock decides, because the host's own may have stood still too.
        """
        cursor = await self.connection().execute("SELECT stack_beat(%s, %s)", (owner, self.now()))
        (clock,) = await cursor.fetchone() or ()
        self.heard(clock)
        silent, self._beaten = clock - self._beaten, clock
        if silent >= PATIENCE:
            await self.forget(owner)
            raise TimeoutError(f"this worker stood still for {silent:.0f} seconds")

    async def forget(self, owner: str) -> None:
        """Remove the worker of that name, and all that it has."""
        await self.connection().execute("DELETE FROM account_owners WHERE id = %s", (owner,))


class Member:
    """Be one worker among all that share a database, under a name of its own (`owner`), which is another one after
    each loss, and empty while the database is lost. `what` names the worker's book in log lines.

    `joined` is called with a new name once it is known to the database, and may already set `owner`. `left` is called
    after each loss.
    """

    def __init__(
        self,
        database: Database,
        what: str,
        joined: Callable[[str], Coroutine[Any, Any, None]],
        left: Callable[[], None],
    ) -> None:
        self.database = database
        self.owner = ""
        self._what = what
        self._joined = joined
        self._left = left
        self._trouble = False

    async def attend(self, stays: Callable[[str], Coroutine[Any, Any, None]]) -> None:
        """Call `stays` while this worker is a member, and join again if it is not. Never raises, whatever happens to
        the database."""
        try:
            await self.database.ask(stays(self.owner) if self.owner else self._join())
        except LOST as exc:
            self.lose(exc)
        except Exception as exc:
            log.exception("a bug in the %s", self._what)
            self.lose(exc)

    async def ask(self, what: Coroutine[Any, Any, T], late: Callable[[asyncio.Task[T]], None] | None = None) -> T:
        """See Database.ask. Raises LostError, also if this worker is not a member now."""
        owner = self.owner
        if not owner:
            what.close()
            raise LostError
        try:
            return await self.database.ask(what, late)
        except LOST as exc:
            self.lose(exc, owner)
            raise LostError from exc

    def lose(self, exc: BaseException, owner: str | None = None) -> None:
        """Note that the database is lost. Does nothing if the loss concerns an earlier `owner`, because it is known
        then."""
        if owner is not None and owner != self.owner:
            return
        if not self._trouble:
            log.error("the %s' database cannot be used, so each host counts by itself: %s", self._what, exc)
        self._trouble = True
        self.owner = ""
        self._left()
        self.database.give_up()

    async def _join(self) -> None:
        """Begin anew, under another name: what was under way as the old one counts no longer, whatever became of it."""
        owner = secrets.token_hex(8)
        await self.database.connect()
        await self.database.beat(owner)
        await self._joined(owner)
        self.owner = owner
        if self._trouble:
            log.info("the %s' database is reachable again", self._what)
        self._trouble = False


def with_options(url: str, options: str) -> str:
    """Return a URL as libpq's connection string, with these options behind the URL's own, so that these count."""
    own = conninfo.conninfo_to_dict(url).get("options", "")
    return conninfo.make_conninfo(url, options=f"{own} {options}")


async def _bury(connections: list[Connection], asking: set[asyncio.Task[Any]]) -> None:
    """Close the connections when no task waits on them any more. Otherwise the event loop would take a new connection
    with the same descriptor for the old one, and miss its data."""
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
            task.exception()  # otherwise asyncio logs an exception that no caller took

    task = asyncio.create_task(what)
    among.add(task)
    task.add_done_callback(done)
    return task
