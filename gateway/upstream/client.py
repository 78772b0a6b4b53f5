"""Upstream: the client of one engine. Only this module turns exceptions of the network into the gateway's own.

This file is long because each foreign exception is translated beside the call that raises it.
"""

import asyncio
import errno
import time
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from types import TracebackType
from typing import Any, Self

import orjson

from gateway.config import Engine
from gateway.dialects import DIALECTS
from gateway.dialects.asking import Told
from gateway.endpoints import ENDPOINTS, Kind
from gateway.errors import (
    EngineError,
    EngineLost,
    EngineSilent,
    EngineUnreachable,
    Exhausted,
    ModelLoading,
    StackError,
)
from gateway.multipart import CONTENT_TYPE
from gateway.upstream.breaker import Breaker
from gateway.upstream.engine_errors import refusal
from gateway.upstream.http1 import BrokenError, Connection, Pool, Target
from gateway.upstream.load import GpuState, Load
from gateway.upstream.wishes import Unwelcome

_JSON = "application/json"
# Bytes of the answer to a control call; the tokens of a long prompt are the longest answer
MAX_CONTROL = 8 * 1024 * 1024
MAX_REFUSAL = 1024 * 1024  # bytes of an answer that refuses a request
MAX_TROUBLE = 4096  # bytes of the answer to a health probe that are read for what is wrong
CONTROL_TIMEOUT = 5.0  # seconds for a control call, such as a health probe, from its start to its end
PROBE_EVERY = 0.5  # seconds between health probes of an engine for which requests wait
_MODEL_FIELDS = {"id": str, "created": int, "owned_by": str, "max_model_len": int}
STALE = 1.0  # seconds; a kept connection that breaks later than this after a request was not closed while it was idle
LINGER = 0.05  # seconds to wait for the end of a body after its [DONE]


class Reply:
    """An engine's answer whose head has arrived. Use it with `with`: leaving the block drops an unfinished answer."""

    def __init__(self, connection: Connection, pool: Pool, *, keep: bool) -> None:
        self._connection = connection
        self._pool = pool
        self._keep = keep  # its connection may be used again
        self.status = connection.status
        self.content_type = connection.content_type

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pump(None)
        if self._keep:
            self._pool.release(self._connection)
        else:
            self._connection.abort()

    async def next(self) -> bytes:
        """Return the next piece of the body, or b"" at its end. Raises EngineError if the body breaks off."""
        try:
            return await self._connection.read()
        except BrokenError as exc:
            raise EngineLost("The connection to the engine broke.", code="engine_broken_stream") from exc

    def pump(self, sink: Callable[[bytes], bool] | None) -> None:
        """See Connection.pump."""
        self._connection.pump(sink)

    async def read(
        self, most: int, *, waits: Callable[[], None] | None = None, holds: Callable[[int], None] | None = None
    ) -> bytes:
        """Return the whole body. `waits` is called before each wait for more, and `holds` with the size of each piece.
        Raises EngineError if the body breaks off or has more than `most` bytes."""
        parts: list[bytes] = []
        size = 0
        while True:
            if waits is not None:
                waits()
            data = await self.next()
            if not data:
                return b"".join(parts)
            size += len(data)
            if size > most:
                raise EngineError(f"The engine's answer is larger than {most} bytes.")
            if holds is not None:
                holds(len(data))
            parts.append(data)

    async def finish(self) -> None:
        """Wait for at most LINGER seconds for the end of the body, so that the connection can be used again. Drop what
        still comes."""
        self.pump(None)
        if not self._connection.complete:
            with suppress(EngineError, TimeoutError):
                async with asyncio.timeout(LINGER):
                    while await self.next():
                        pass


class Upstream:
    """The client of one engine. Use it with `async with`. It owns its connections and closes them."""

    def __init__(self, name: str, engine: Engine, breaker: Breaker) -> None:
        self.name = name
        self.base_url = engine.base_url
        self.dialect = DIALECTS[engine.dialect]
        self.context = engine.context  # tokens of its context window, as the operator says
        self.breaker = breaker
        self.unwelcome = Unwelcome()
        self.changed = asyncio.Event()  # set whenever the breaker's state changes
        self.outstanding = 0  # requests of this worker on which the engine is working
        self.trouble: StackError | None = None  # the result of the last probe; None: the engine worked
        # About how many seconds until it could begin a new request for a model
        self.wait: Callable[[str], float] = lambda _: 0.0
        self.load: Callable[[], Load] = Load  # of its slots and queue
        self.gpu_state: Callable[[], GpuState] = lambda: "awake"  # as far as is known
        # When a request first waited for it, time.monotonic(); None: it is not down
        self.down_since: float | None = None
        self._awaited = 0  # requests that wait for it
        self._probing = asyncio.Lock()
        self._probed_at = float("-inf")
        self._well = False
        self._target = target = Target.of(self.base_url)
        headers = {"content-type": _JSON, "accept-encoding": "identity", "user-agent": "stack"}
        if engine.api_key is not None:
            headers["authorization"] = f"Bearer {engine.api_key.get_secret_value()}"
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._lines = f" HTTP/1.1\r\nhost: {target.authority}\r\n{lines}"
        of_form = self._lines.replace(_JSON, CONTENT_TYPE, 1)
        self._heads = {
            kind: f"POST {target.path}/{it.asks}{of_form if it.form else self._lines}" for kind, it in ENDPOINTS.items()
        }
        self._root = target.path.removesuffix("/v1")  # paths that begin with '/' are relative to this one

    @property
    def known_as(self) -> str:
        """The name by which several gateways know the same engine."""
        return f"{self.name} {self.base_url}"

    async def __aenter__(self) -> Self:
        self._pool = Pool(self._target)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._pool.close()

    async def probe(self) -> StackError | None:
        """Ask whether the engine could generate now. Return what is wrong, or None."""
        try:
            response = await self.ask(self.dialect.health)
            well = response.status == HTTPStatus.OK
            told = Told(response.status, response.content[:MAX_TROUBLE])  # kept, and shown again and again
            self.trouble = None if well else self.refusal(told)
            self.down_since = None if well else self.down_since
        except EngineError as exc:
            self.trouble = exc.with_traceback(None)  # a traceback would keep the request for which this was asked
        return self.trouble

    async def died(self, settle: float) -> bool:
        """Return whether the engine is down just after it broke off an answer. It is probed now and again after
        `settle` seconds, because an engine that restarts may answer the first probe."""
        gone = await self.probe() is not None
        await asyncio.sleep(settle)
        return gone or await self.probe() is not None

    async def back(self) -> None:
        """Return when a probe succeeds that began after this call. All waiting requests share the probes."""
        since = time.monotonic()
        if self.down_since is None:
            self.down_since = since
        self._well = self._well and self._awaited > 0
        self._awaited += 1
        try:
            while True:
                await asyncio.sleep(PROBE_EVERY)
                async with self._probing:
                    if self._probed_at < max(since, time.monotonic() - PROBE_EVERY):
                        self._probed_at, self._well = time.monotonic(), False
                        self._well = await self.probe() is None
                        if self._well:
                            self.breaker.probed(None, silent=False)
                if self._well:
                    return
        finally:
            self._awaited -= 1

    @property
    def absence(self) -> StackError | None:
        """The error for a new request while others already wait for this engine to come back; None if it may
        be asked."""
        if not self._awaited or self._well:
            return None
        if isinstance(self.trouble, ModelLoading):
            return ModelLoading(self.trouble.message)
        return EngineUnreachable("The engine is unreachable.")

    async def post(
        self,
        kind: Kind,
        body: bytes,
        new_id: Callable[[], str],
        connect_timeout: float,
        *,
        path: str = "",
        lines: str = "",
    ) -> Reply:
        """Send a request under a new id, and return the reply when its head has arrived. The request goes to `path`
        below the server's root, or to the endpoint of its kind. `lines` are further lines of its head.

        If an idle connection breaks at once, the engine had closed it, and the request is sent on another connection.
        If the connection breaks later, or the engine accepts no other one, the request is not sent again, because it
        could kill the engine a second time. Raises EngineUnreachable, EngineSilent, EngineLost, EngineError or
        Exhausted.
        """

        begins = f"POST {self._root}{path}{self._lines}" if path else self._heads[kind]

        def head() -> str:
            return f"{begins}x-request-id: {new_id()}\r\n{lines}content-length: {len(body)}\r\n\r\n"

        return await self._send(head, body, connect_timeout)

    async def _send(
        self, head: Callable[[], str], body: bytes, connect_timeout: float, *, alone: bool = False
    ) -> Reply:
        """Send a request. `alone`: on a connection that no other request uses."""
        fresh = False
        while True:
            try:
                connection = await self._connect(connect_timeout, fresh=fresh or alone)
            except EngineUnreachable as exc:
                if fresh:  # the engine was reachable when the request was sent
                    raise EngineLost("The engine closed the connection without answering.") from exc
                raise
            sent = time.monotonic()
            try:
                connection.send(head().encode("ascii"), body)
                await connection.head()
            except BrokenError as exc:
                connection.abort()
                if exc.malformed:
                    raise EngineError("The engine's answer cannot be used.") from exc
                if exc.answered or not connection.reused or time.monotonic() > sent + STALE:
                    raise EngineLost("The engine closed the connection without answering.") from exc
                fresh = True
            except BaseException:
                connection.abort()
                raise
            else:
                return Reply(connection, self._pool, keep=not alone)

    async def _connect(self, connect_timeout: float, *, fresh: bool) -> Connection:
        try:
            return await self._pool.acquire(connect_timeout, fresh=fresh)
        except TimeoutError as exc:
            raise EngineSilent("The engine could not be reached in time.") from exc
        except (OSError, UnicodeError) as exc:  # a malformed host name is a UnicodeError
            if isinstance(exc, OSError) and exc.errno in (errno.EMFILE, errno.ENFILE):
                raise Exhausted("The gateway has its maximum number of open connections. Try again shortly.") from exc
            raise EngineUnreachable("The engine is unreachable.") from exc

    async def ask(self, path: str, body: dict[str, Any] | None = None, *, patient: bool = False) -> Told:
        """Make a control call: GET `path`, or POST `body` to it. The path is relative to the base URL, or to the
        server's root if it begins with '/'. A `patient` call has no timeout of its own, because its caller has one.

        Returns an answer of any status. Raises EngineUnreachable, EngineSilent, or EngineError for an answer that
        cannot be used or is larger than MAX_CONTROL.
        """
        target = self._root + path if path.startswith("/") else f"{self._target.path}/{path}"
        content = orjson.dumps(body) if body is not None else b""
        method = "GET" if body is None else "POST"
        head = f"{method} {target}{self._lines}connection: close\r\ncontent-length: {len(content)}\r\n\r\n"
        try:
            async with asyncio.timeout(None if patient else CONTROL_TIMEOUT):
                # On a connection of its own, because a request on a kept connection may be sent twice if the connection
                # is dead.
                with await self._send(lambda: head, content, CONTROL_TIMEOUT, alone=True) as reply:
                    return Told(reply.status, await reply.read(MAX_CONTROL))
        except TimeoutError as exc:
            raise EngineSilent("The engine did not answer in time.") from exc
        except (EngineLost, Exhausted) as exc:
            raise EngineUnreachable("The engine is unreachable.") from exc

    def refusal(self, told: Told) -> StackError:
        """Return what an answer to a control call with any status but 200 means."""
        return refusal(self.dialect, told.status, told.content)

    async def models(self) -> list[dict[str, Any]]:
        """Return the engine's models, with OpenAI's fields only: engines add paths and permissions that callers must
        not see.

        Raises EngineError if the list cannot be fetched or read.
        """
        response = await self.ask("models")
        if response.status != HTTPStatus.OK:
            raise EngineError("The engine does not list its models right now.")
        try:
            entries = response.json()["data"]
            return [
                {name: it[name] for name, kind in _MODEL_FIELDS.items() if isinstance(it.get(name), kind)}
                for it in entries
                if isinstance(it["id"], str)
            ]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise EngineError("The engine's list of models cannot be read.") from None
