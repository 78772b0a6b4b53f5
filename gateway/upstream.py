"""Upstream: the HTTP client to the engine, and the one place where its library's exceptions become ours."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Self

import aiohttp
import httpx
from multidict import CIMultiDict
from yarl import URL

from gateway.errors import EngineError, EngineTimeout, EngineUnavailable
from gateway.exchange import Exchange
from gateway.settings import Settings

PATHS = {"chat": "chat/completions", "completion": "completions", "embedding": "embeddings"}
MAX_ANSWER = 256 * 1024 * 1024  # bytes of a blocking answer; a batch of embeddings can be large
LINGER = 0.05  # seconds; an engine's body ends together with its [DONE], or it is not waited for

# aiohttp for the relay (a third of pooled httpx's CPU per request), httpx for the occasional control call.
_SKIP = ("Accept", "Accept-Encoding", "User-Agent", "Content-Type")


class Reply:
    """An engine's answer whose head has arrived. Valid inside `Upstream.post`."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status

    async def next(self) -> bytes:
        """What has arrived of the body; empty at its end. Raises EngineError when the connection breaks before that."""
        try:
            return await self._response.content.readany()
        except aiohttp.ClientError as exc:
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
        with suppress(EngineError, TimeoutError):
            async with asyncio.timeout(LINGER):
                while await self.next():
                    pass


class Upstream:
    """One engine. Open it with `async with`; it owns its connection pools and closes them."""

    def __init__(self, settings: Settings) -> None:
        self.base_url = settings.llm_base_url
        self._urls = {kind: URL(f"{self.base_url}/{path}", encoded=True) for kind, path in PATHS.items()}
        self._connect_timeout = settings.llm_connect_timeout
        self._headers = {"content-type": "application/json", "accept-encoding": "identity", "user-agent": "stack"}
        if settings.llm_api_key is not None:
            self._headers["authorization"] = f"Bearer {settings.llm_api_key.get_secret_value()}"

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,  # how many requests an engine gets is decided before it is called, not here
                use_dns_cache=False,  # asked afresh for each new connection: an engine comes back at a new address
                keepalive_timeout=4.0,  # seconds; below the 5 s after which vLLM's server closes idle connections
            ),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_timeout),  # the relay watches the rest
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=_SKIP,
            trust_env=False,
        )
        self._control = httpx.AsyncClient(headers=self._headers, timeout=self._connect_timeout, trust_env=False)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._session.close()
        await self._control.aclose()

    @asynccontextmanager
    async def post(self, exchange: Exchange) -> AsyncIterator[Reply]:
        """Send a request and yield the reply once its head is here. Leaving closes what is unfinished.

        A connection that breaks before any reply is tried once more: it may have been an idle one that the
        engine closed at that moment. Raises EngineUnavailable, EngineTimeout or EngineError.
        """
        response = await self._send(exchange)
        try:
            yield Reply(response)
        finally:
            response.close()  # does nothing to a connection that went back to the pool at the body's end

    async def _send(self, exchange: Exchange) -> aiohttp.ClientResponse:
        headers = CIMultiDict(self._headers)
        headers["x-request-id"] = exchange.request_id
        for last in (False, True):
            try:
                return await self._session.post(
                    self._urls[exchange.kind], data=exchange.body, headers=headers, allow_redirects=False
                )
            except aiohttp.ConnectionTimeoutError as exc:
                raise EngineTimeout("The engine could not be reached in time.") from exc
            except aiohttp.ClientConnectorError as exc:
                raise EngineUnavailable("The engine can't be reached.") from exc
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as exc:
                if last:
                    raise EngineError("The engine closed the connection without answering.") from exc
            except aiohttp.ClientError as exc:
                raise EngineError("The engine's answer is not valid HTTP.") from exc
        raise AssertionError("unreachable")

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
