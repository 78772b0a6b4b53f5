"""The mock engine: a vLLM-like HTTP endpoint on 127.0.0.1 that costs almost nothing. `python -m bench.mock PORT`.

A raw protocol on uvloop with every reply built beforehand. It reads what HTTP clients send it (heads and bodies
split over reads, any header case, several requests in one read, Content-Length bodies) and hangs up on the rest.
"""

import asyncio
import re
import sys
from collections.abc import Iterator

import uvloop

from bench import chat

TOKEN_S = 0.010  # seconds between two tokens of a paced stream

_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)
_STREAM = re.compile(rb'"stream"\s*:\s*true')
_USAGE = re.compile(rb'"include_usage"\s*:\s*true')
_PACED = re.compile(rb'"user"\s*:\s*"paced"')


def _reply(body: bytes, status: bytes = b"200 OK") -> bytes:
    head = b"HTTP/1.1 %b\r\nserver: mock\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % (status, len(body)) + body


def _pieces(*, usage: bool) -> list[bytes]:
    """Return a stream in the pieces in which a paced one is written: head and role, each token, all the rest."""
    head = b"HTTP/1.1 200 OK\r\nserver: mock\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    role, *chunks = (b"%x\r\n%b\r\n" % (len(event), event) for event in chat.stream_events(usage=usage))
    tokens, rest = chunks[: len(chat.TOKENS)], chunks[len(chat.TOKENS) :]
    return [head + b"transfer-encoding: chunked\r\n\r\n" + role, *tokens, b"".join(rest) + b"0\r\n\r\n"]


BLOCKING = _reply(chat.BLOCKING_REPLY)
PIECES = {usage: _pieces(usage=usage) for usage in (False, True)}
AT_ONCE = {usage: b"".join(pieces) for usage, pieces in PIECES.items()}
MODELS = _reply(b'{"object":"list","data":[{"id":"%b","object":"model","owned_by":"vllm"}]}' % chat.MODEL.encode())
HEALTH = _reply(b"{}")
MISSING = _reply(b'{"error":{"message":"Not Found","type":"NotFoundError","code":404}}', b"404 Not Found")


class Pacer:
    """Pace any number of streams with one timer, as an engine's batch does: each step gives every stream a token."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._streams: list[tuple[asyncio.Transport, Iterator[bytes]]] = []

    def add(self, transport: asyncio.Transport, pieces: list[bytes]) -> None:
        """Write the first piece now and one more at each step."""
        rest = iter(pieces)
        transport.write(next(rest))
        if not self._streams:
            self._loop.call_later(TOKEN_S, self._step, self._loop.time() + TOKEN_S)
        self._streams.append((transport, rest))

    def _step(self, due: float) -> None:
        self._streams = [stream for stream in self._streams if self._write_next(*stream)]
        if self._streams:
            self._loop.call_at(due + TOKEN_S, self._step, due + TOKEN_S)

    @staticmethod
    def _write_next(transport: asyncio.Transport, rest: Iterator[bytes]) -> bool:
        piece = next(rest, None)
        if piece is None or transport.is_closing():
            return False
        transport.write(piece)
        return True


class Engine(asyncio.Protocol):
    """One connection, kept alive."""

    _transport: asyncio.Transport
    _unread = b""

    def __init__(self, pacer: Pacer) -> None:
        self._pacer = pacer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # a stream server's transport is a Transport

    def data_received(self, data: bytes) -> None:
        data = self._unread + data
        while (end := data.find(b"\r\n\r\n") + 4) >= 4:
            length = _LENGTH.search(data, 0, end)
            if length is None and not data.startswith(b"GET "):
                return self._transport.abort()
            next_at = end + (int(length[1]) if length else 0)
            if len(data) < next_at:
                break
            self._answer(data[:next_at])
            data = data[next_at:]
        self._unread = data
        return None

    def _answer(self, request: bytes) -> None:
        if request.startswith(b"POST /v1/chat/completions "):
            if not _STREAM.search(request):
                self._transport.write(BLOCKING)
            elif _PACED.search(request):
                self._pacer.add(self._transport, PIECES[bool(_USAGE.search(request))])
            else:
                self._transport.write(AT_ONCE[bool(_USAGE.search(request))])
        elif request.startswith(b"GET /v1/models "):
            self._transport.write(MODELS)
        else:
            known = request.startswith((b"GET /health ", b"POST /v1/traces "))  # a collector of traces, too
            self._transport.write(HEALTH if known else MISSING)


async def serve(port: int) -> None:
    """Serve until killed."""
    loop = asyncio.get_running_loop()
    pacer = Pacer(loop)
    server = await loop.create_server(lambda: Engine(pacer), "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
