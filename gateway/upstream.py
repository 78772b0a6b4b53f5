"""Upstream: the client to the engine, and the one place where foreign exceptions become ours."""

import asyncio
from contextlib import suppress
from types import TracebackType
from typing import Self

import httpx

from gateway.errors import EngineError, EngineTimeout, EngineUnavailable
from gateway.exchange import Exchange
from gateway.http1 import BrokenError, Connection, Pool, Target
from gateway.settings import Settings

PATHS = {"chat": "chat/completions", "completion": "completions", "embedding": "embeddings"}
MAX_ANSWER = 256 * 1024 * 1024  # bytes of a blocking answer; a batch of embeddings can be large
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
        self._pool.release(self._connection)

    async def next(self) -> bytes:
        """What has arrived of the body; empty at its end. Raises EngineError when it breaks off before that."""
        try:
            return await self._connection.read()
        except BrokenError as exc:
            raise EngineError("The connection to the engine broke.", code="engine_broken_stream") from exc

    async def read(self) -> bytes:
        """The whole body. Raises EngineError when it breaks off or is larger than MAX_ANSWER."""
        parts, size = [], 0
        while data := await self.next():
            size += len(data)
            if size > MAX_ANSWER:
                raise EngineError(f"The engine's answer is larger than {MAX_ANSWER} bytes.")
            parts.append(data)
        return b"".join(parts)

    async def finish(self) -> None:
        """Wait a moment for the body's end, after which the connection can be used again; drop what still comes."""
        if not self._connection.complete:
            with suppress(EngineError, TimeoutError):
                async with asyncio.timeout(LINGER):
                    while await self.next():
                        pass


class Upstream:
    """One engine. Open it with `async with`; it owns its connections and closes them."""

    def __init__(self, settings: Settings) -> None:
        self.base_url = settings.llm_base_url
        self._target = target = Target.of(self.base_url)
        self._connect_timeout = settings.llm_connect_timeout
        headers = {"content-type": "application/json", "accept-encoding": "identity", "user-agent": "stack"}
        if settings.llm_api_key is not None:
            headers["authorization"] = f"Bearer {settings.llm_api_key.get_secret_value()}"
        self._control_headers = headers
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._heads = {
            kind: f"POST {target.path}/{path} HTTP/1.1\r\nhost: {target.authority}\r\n{lines}"
            for kind, path in PATHS.items()
        }

    async def __aenter__(self) -> Self:
        self._pool = Pool(self._target, connect_timeout=self._connect_timeout)
        self._control = httpx.AsyncClient(headers=self._control_headers, timeout=self._connect_timeout, trust_env=False)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._pool.close()
        await self._control.aclose()

    async def post(self, exchange: Exchange) -> Reply:
        """Send a request; returns the reply once its head is here.

        A kept connection that turns out to be dead is replaced: the engine closed it while it was idle. A new one
        that ends without an answer is tried once more. Raises EngineUnavailable, EngineTimeout or EngineError.
        """
        head = (
            f"{self._heads[exchange.kind]}x-request-id: {exchange.request_id}\r\ncontent-length: {len(exchange.body)}"
        )
        request = b"%s\r\n\r\n%s" % (head.encode("ascii"), exchange.body)
        again = True
        while True:
            connection = await self._connect()
            try:
                connection.send(request)
                await connection.head()
            except BrokenError as exc:
                connection.abort()
                if exc.answered:
                    raise EngineError("The engine's answer is not valid HTTP.") from exc
                if not connection.reused:
                    if not again:
                        raise EngineError("The engine closed the connection without answering.") from exc
                    again = False
            except BaseException:
                connection.abort()
                raise
            else:
                return Reply(connection, self._pool)

    async def _connect(self) -> Connection:
        try:
            return await self._pool.acquire()
        except TimeoutError as exc:
            raise EngineTimeout("The engine could not be reached in time.") from exc
        except OSError as exc:
            raise EngineUnavailable("The engine can't be reached.") from exc

    async def get(self, path: str) -> httpx.Response:
        """A control call: GET `path`, relative to the base URL, or to the server's root if it starts with '/'.

        Raises EngineUnavailable or EngineTimeout; any status is returned.
        """
        url = self.base_url.removesuffix("/v1") + path if path.startswith("/") else f"{self.base_url}/{path}"
        try:
            return await self._control.get(url)
        except httpx.TimeoutException as exc:
            raise EngineTimeout("The engine did not answer in time.") from exc
        except httpx.HTTPError as exc:
            raise EngineUnavailable("The engine can't be reached.") from exc
