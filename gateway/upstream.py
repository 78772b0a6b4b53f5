"""Upstream: the client to the engine, and the one place where foreign exceptions become ours."""

import asyncio
import errno
import time
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from types import TracebackType
from typing import Any, Self

import httpx
import orjson

from gateway.breaker import Breaker
from gateway.config import Engine
from gateway.dialects import DIALECTS, refusal
from gateway.errors import EngineError, EngineLost, EngineSilent, EngineUnreachable, Exhausted, StackError
from gateway.exchange import Kind
from gateway.http1 import BrokenError, Connection, Pool, Target

PATHS = {"chat": "chat/completions", "completion": "completions", "embedding": "embeddings"}
MAX_ANSWER = 256 * 1024 * 1024  # bytes of a blocking answer; a batch of embeddings can be large
CONTROL_TIMEOUT = 5.0  # seconds for a control call, such as a health probe
PROBE_EVERY = 0.5  # seconds between health probes of an engine that somebody waits for
_MODEL_FIELDS = {"id": str, "created": int, "owned_by": str}
LINGER = 0.05  # seconds; an engine's body ends together with its [DONE], or it is not waited for


class Reply:
    """An engine's answer whose head has arrived. Use it with `with`: leaving drops what is unfinished."""

    def __init__(self, connection: Connection, pool: Pool) -> None:
        self._connection = connection
        self._pool = pool
        self.status = connection.status

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pump(None)
        self._pool.release(self._connection)

    async def next(self) -> bytes:
        """What has arrived of the body; empty at its end. Raises EngineError when it breaks off before that."""
        try:
            return await self._connection.read()
        except BrokenError as exc:
            raise EngineLost("The connection to the engine broke.", code="engine_broken_stream") from exc

    def pump(self, sink: Callable[[bytes], bool] | None) -> None:
        """See Connection.pump."""
        self._connection.pump(sink)

    async def read(self, waits: Callable[[], None]) -> bytes:
        """The whole body; `waits` is called before each wait for more. Raises EngineError when it breaks off or is
        larger than MAX_ANSWER."""
        parts: list[bytes] = []
        size = 0
        while True:
            waits()
            data = await self.next()
            if not data:
                return b"".join(parts)
            size += len(data)
            if size > MAX_ANSWER:
                raise EngineError(f"The engine's answer is larger than {MAX_ANSWER} bytes.")
            parts.append(data)

    async def finish(self) -> None:
        """Wait a moment for the body's end, after which the connection can be used again; drop what still comes."""
        self.pump(None)
        if not self._connection.complete:
            with suppress(EngineError, TimeoutError):
                async with asyncio.timeout(LINGER):
                    while await self.next():
                        pass


class Upstream:
    """One engine. Open it with `async with`; it owns its connections and closes them."""

    def __init__(self, name: str, engine: Engine, breaker: Breaker) -> None:
        self.name = name
        self.base_url = engine.base_url
        self.dialect = DIALECTS[engine.dialect]
        self.breaker = breaker
        self.changed = asyncio.Event()  # set at each change of the breaker's state
        self.outstanding = 0  # requests of this worker's that it is working on
        self.trouble: StackError | None = None  # what was wrong with it when it was last probed
        self.wait: Callable[[], float] = float  # seconds until it could begin with a new one, roughly
        self._probing = asyncio.Lock()
        self._probed_at = float("-inf")
        self._well = False
        self._target = target = Target.of(self.base_url)
        headers = {"content-type": "application/json", "accept-encoding": "identity", "user-agent": "stack"}
        if engine.api_key is not None:
            headers["authorization"] = f"Bearer {engine.api_key.get_secret_value()}"
        self._control_headers = headers
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._heads = {
            kind: f"POST {target.path}/{path} HTTP/1.1\r\nhost: {target.authority}\r\n{lines}"
            for kind, path in PATHS.items()
        }

    async def __aenter__(self) -> Self:
        self._pool = Pool(self._target)
        self._control = httpx.AsyncClient(
            headers=self._control_headers,
            timeout=CONTROL_TIMEOUT,
            limits=httpx.Limits(max_connections=None),  # no probe waits behind patient calls
            trust_env=False,
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._pool.close()
        await self._control.aclose()

    async def probe(self) -> StackError | None:
        """Ask whether it could generate now; returns what is wrong, or None."""
        try:
            response = await self.ask(self.dialect.health)
            well = response.status_code == HTTPStatus.OK
            self.trouble = None if well else refusal(response.status_code, response.content)
        except EngineError as exc:
            self.trouble = exc
        return self.trouble

    async def back(self) -> None:
        """Return once a probe from now on finds it well. Those who wait share the probes."""
        since = time.monotonic()
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

    async def post(self, kind: Kind, body: bytes, request_id: str, connect_timeout: float) -> Reply:
        """Send a request; returns the reply once its head is here.

        A kept connection that turns out to be dead is replaced in silence: the engine closed it while it was idle.
        Raises EngineUnreachable, EngineSilent, EngineLost, EngineError or Exhausted.
        """
        head = f"{self._heads[kind]}x-request-id: {request_id}\r\ncontent-length: {len(body)}\r\n\r\n"
        request = head.encode("ascii") + body
        fresh = False
        while True:
            connection = await self._connect(connect_timeout, fresh=fresh)
            try:
                connection.send(request)
                await connection.head()
            except BrokenError as exc:
                connection.abort()
                if exc.answered:
                    raise EngineError("The engine's answer can't be used.") from exc
                if not connection.reused:
                    raise EngineLost("The engine closed the connection without answering.") from exc
                fresh = True
            except BaseException:
                connection.abort()
                raise
            else:
                return Reply(connection, self._pool)

    async def _connect(self, connect_timeout: float, *, fresh: bool) -> Connection:
        try:
            return await self._pool.acquire(connect_timeout, fresh=fresh)
        except TimeoutError as exc:
            raise EngineSilent("The engine could not be reached in time.") from exc
        except (OSError, UnicodeError) as exc:  # a name that can't be a name is a UnicodeError
            if isinstance(exc, OSError) and exc.errno in (errno.EMFILE, errno.ENFILE):
                raise Exhausted("The gateway has as many connections open as it may. Try again shortly.") from exc
            raise EngineUnreachable("The engine can't be reached.") from exc

    async def ask(self, path: str, body: dict[str, Any] | None = None, *, patient: bool = False) -> httpx.Response:
        """A control call: GET `path`, or POST `body` to it, relative to the base URL, or to the server's root if it
        starts with '/'. With `patient` it takes what it takes: whoever waits for it watches a clock of his own.

        Raises EngineUnreachable or EngineSilent; any status is returned.
        """
        url = self.base_url.removesuffix("/v1") + path if path.startswith("/") else f"{self.base_url}/{path}"
        timeout = httpx.Timeout(None, connect=CONTROL_TIMEOUT) if patient else httpx.USE_CLIENT_DEFAULT
        try:
            async with asyncio.timeout(CONTROL_TIMEOUT):
                await self._pool.addresses()  # httpx has lookups of its own: one that isn't over holds up others
            if body is None:
                return await self._control.get(url, timeout=timeout)
            return await self._control.post(url, content=orjson.dumps(body), timeout=timeout)
        except (httpx.TimeoutException, TimeoutError) as exc:
            raise EngineSilent("The engine did not answer in time.") from exc
        except (httpx.HTTPError, OSError, UnicodeError) as exc:
            raise EngineUnreachable("The engine can't be reached.") from exc

    async def models(self) -> list[dict[str, Any]]:
        """The models it has, by OpenAI's fields alone: engines add paths and permissions that are nobody's business.

        Raises EngineError when it can't be asked or understood.
        """
        response = await self.ask("models")
        if response.status_code != HTTPStatus.OK:
            raise EngineError("The engine does not list its models now.")
        try:
            entries = response.json()["data"]
            return [
                {name: it[name] for name, kind in _MODEL_FIELDS.items() if isinstance(it.get(name), kind)}
                for it in entries
                if isinstance(it["id"], str)
            ]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise EngineError("The engine's list of models can't be read.") from None
