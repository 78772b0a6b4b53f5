"""The client of the engines, before a server on a real socket."""

import asyncio

import pytest

from gateway.config import Engine
from gateway.errors import EngineError, EngineLost
from gateway.upstream.breaker import Breaker
from gateway.upstream.client import Upstream
from gateway.upstream.http1 import HIGH_WATER, Pool, Target


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer /large with one byte more than may wait, and every other path with "ok"."""
    try:
        while head := await reader.readuntil(b"\r\n\r\n"):
            body = bytes(HIGH_WATER + 1) if b"/large" in head else b"ok"
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def _after_a_large_answer_that_nobody_reads() -> tuple[int, bytes]:
    async with await asyncio.start_server(_serve, "127.0.0.1", 0) as server:
        pool = Pool(Target.of(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"))
        first = await pool.acquire(10, fresh=False)
        first.send(b"GET /large HTTP/1.1\r\nhost: x\r\n\r\n", b"")
        while not first.complete:  # noqa: ASYNC110
            await asyncio.sleep(0)  # nothing of it is taken, so nothing wakes a reader
        pool.release(first)
        second = await pool.acquire(10, fresh=False)
        second.send(b"GET /small HTTP/1.1\r\nhost: x\r\n\r\n", b"")
        async with asyncio.timeout(10):
            answer = await second.head(), await second.read()
        pool.release(second)
        pool.close()
        return answer


def test_a_connection_whose_answer_was_not_read_serves_no_other_request() -> None:
    """The reading of that connection has stopped, and the next answer on it would never come."""
    assert asyncio.run(_after_a_large_answer_that_nobody_reads()) == (200, b"ok")


async def _asked(answer: bytes) -> EngineError:
    """What a request comes to if its engine sends these bytes and closes the connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"{}")
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        engine = Engine.model_validate({"dialect": "vllm", "base_url": url})
        async with Upstream("engine", engine, Breaker(3, 1.0, lambda *_: None)) as upstream:
            with pytest.raises(EngineError) as caught:
                await upstream.post("chat", b"{}", lambda: "id", 10)
            return caught.value


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"


@pytest.mark.parametrize("size", [0, 1, 9, 20, len(HEAD)])
def test_an_engine_that_dies_in_the_head_of_its_answer_is_lost(size: int) -> None:
    assert type(asyncio.run(_asked(HEAD[:size]))) is EngineLost


def test_an_answer_that_is_not_http_is_an_error_of_an_engine_that_lives() -> None:
    assert type(asyncio.run(_asked(b"what?\r\n\r\n"))) is EngineError
