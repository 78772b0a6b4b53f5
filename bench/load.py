"""The load: wrk for answers that come at once, and a raw client for paced streams. Every answer is checked."""

import asyncio
import http.client
import json
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import uvloop

from bench import chat
from bench.mock import TOKEN_S
from bench.service import KEY, BenchError

_PATH = "/v1/chat/completions"
_HEADERS = {"Host": "127.0.0.1", "Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}


@dataclass(frozen=True)
class WrkResult:
    """The result of wrk. Requests are complete answers with a success status."""

    requests: int
    seconds: float
    p50_ms: float


def run_wrk(port: int, body: bytes, size: int, *, connections: int, seconds: int, path: str = _PATH) -> WrkResult:
    """Send `body` over `connections` connections for whole `seconds`.

    Raises BenchError if one answer failed, or if together they are too small to have `size` bytes each.
    """
    script, url = str(Path(__file__).with_name("wrk.lua")), f"http://127.0.0.1:{port}{path}"
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "5s", "-s", script, url]
    env = os.environ | {"BENCH_BODY": body.decode(), "BENCH_KEY": KEY}
    output = subprocess.run(command, env=env, stdout=subprocess.PIPE, timeout=seconds + 10, check=True).stdout
    result = json.loads(output.splitlines()[-1])
    if any(result["failed"]) or not result["requests"] or result["bytes"] < result["requests"] * size:
        raise BenchError(f"wrong answers from {url} (failed: connect, read, write, status, timeout): {result}")
    return WrkResult(result["requests"], result["us"] / 1e6, result["p50_us"] / 1e3)


def check_answers(port: int) -> None:
    """Ask for one blocking answer and one stream. Raises BenchError unless both are the engine's, byte for byte."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    for body, reply in ((chat.BLOCKING, chat.BLOCKING_REPLY), (chat.STREAM, chat.STREAM_REPLY)):
        connection.request("POST", _PATH, body, _HEADERS)
        response = connection.getresponse()
        _check(response.status, response.read(), reply)
    connection.close()


def check_translated(port: int, path: str, body: bytes, last: bytes) -> int:
    """Ask for one stream of a translated API and return its size in bytes. Raises BenchError unless it has all tokens
    in order, and ends with the event of type `last`."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("POST", path, body, _HEADERS)
    response = connection.getresponse()
    text = response.read()
    connection.close()
    told = re.findall(rb'"(?:delta|text)":"( token\d\d)"', text)
    final = text.rstrip().rpartition(b"\n\n")[2]
    if [it.decode() for it in told] != chat.TOKENS or not final.startswith(b"event: " + last):
        raise BenchError(f"a wrong stream from {path}: {response.status}, ending {text[-300:]!r}")
    return len(text)


def run_paced(port: int, *, connections: int, streams_each: int) -> int:
    """Hold `connections` paced streams, `streams_each` one after the other on each; return the number of tokens
    received.

    Raises BenchError unless every stream is the engine's, byte for byte, and came spread over its time.
    """

    async def hold_one() -> None:
        client = (await asyncio.get_running_loop().create_connection(PacedClient, "127.0.0.1", port))[1]
        for _ in range(streams_each):
            spread = await client.stream()
            if spread < 0.8 * TOKEN_S * len(chat.TOKENS):
                raise BenchError(f"a paced stream on port {port} came in a heap, within {spread:.3f} s")
        client.transport.close()

    async def hold_all() -> None:
        async with asyncio.timeout(30):
            await asyncio.gather(*(hold_one() for _ in range(connections)))

    try:
        uvloop.run(hold_all())
    except TimeoutError:
        raise BenchError(f"the paced streams on port {port} did not end within 30 s") from None
    return connections * streams_each * len(chat.TOKENS)


class PacedClient(asyncio.Protocol):
    """One kept-alive connection with one paced stream at a time. The caller closes `transport`."""

    transport: asyncio.Transport
    _ended: asyncio.Future[None]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # a stream client's transport is a Transport
        self._loop = asyncio.get_running_loop()

    async def stream(self) -> float:
        """Ask, read the whole answer and check it. Returns the seconds from its first byte to its last."""
        head = "".join(f"{name}: {value}\r\n" for name, value in _HEADERS.items())
        request = f"POST {_PATH} HTTP/1.1\r\n{head}Content-Length: {len(chat.PACED)}\r\n\r\n".encode() + chat.PACED
        self._received, self._ended = bytearray(), self._loop.create_future()
        self.transport.write(request)
        await self._ended
        seconds = self._loop.time() - self._first_at
        answer_head, _, body = bytes(self._received).partition(b"\r\n\r\n")
        status = int(answer_head[9:12])
        _check(status, _dechunk(body) if status == http.HTTPStatus.OK else body, chat.STREAM_REPLY)
        return seconds

    def data_received(self, data: bytes) -> None:
        if not self._received:
            self._first_at = self._loop.time()
        self._received += data
        whole = self._received.endswith(b"0\r\n\r\n") or self._received[9:12] != b"200"
        if whole and not self._ended.done():
            self._ended.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._ended.done():
            self._ended.set_exception(BenchError(f"hung up within a stream: {exc}, {bytes(self._received[-300:])!r}"))


def _check(status: int, body: bytes, reply: bytes) -> None:
    if status != http.HTTPStatus.OK or body != reply:
        raise BenchError(f"not what the engine said: {status}, {len(body)} bytes, ending {body[-300:]!r}")


def _dechunk(body: bytes) -> bytes:
    payload = b""
    while size := int(body[: body.index(b"\r\n")], 16):
        start = body.index(b"\r\n") + 2
        payload, body = payload + body[start : start + size], body[start + size + 2 :]
    return payload
