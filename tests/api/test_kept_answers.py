"""Answers with an Idempotency-Key, without a server: what their clients get from a disk that is full for a moment, and
from a maker with a bug; and what they take of memory."""

import asyncio
import resource
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from starlette.types import Message, Receive, Send

from gateway import sse
from gateway.api.idempotency.answers import Answers
from gateway.api.idempotency.file import CHUNK, FAILED, HEAD_SIZE, WHOLE, Entry, Kind, framed
from gateway.api.idempotency.form import Form
from gateway.api.idempotency.reader import Reader
from gateway.api.idempotency.space import Space
from gateway.errors import EngineUnavailable, StackError
from gateway.relay.trail import Past, Trail
from tests.support.relays import Client

pytestmark = pytest.mark.anyio

LENGTH = 8000
TO_A_BLOCK = [(b"content-type", b"application/json"), (b"content-length", b"%d" % LENGTH)]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def start(headers: list[tuple[bytes, bytes]]) -> Message:
    return {"type": "http.response.start", "status": 200, "headers": headers}


def body(data: bytes, *, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


class Maker:
    """A maker that does what a test says, and counts how often it is asked."""

    def __init__(self, directory: Path) -> None:
        self.setting: dict[str, Any] = {}
        self.runs = 0
        self._directory = directory

    def refused(self) -> StackError | None:
        return None

    async def form(self) -> Form:
        raise NotImplementedError

    def begins(self) -> None:
        pass

    async def past(self, setting: dict[str, Any]) -> Past:
        raise NotImplementedError

    async def run(self, client: Any, send: Send, trail: Trail) -> bool:
        del client
        self.runs += 1
        if self.runs == 1:
            return await self.make(send, trail)
        await send(start([(b"content-length", b"5")]))
        await send(body(b"again"))
        return True

    async def make(self, send: Send, trail: Trail) -> bool:
        raise NotImplementedError

    def files(self) -> list[Path]:
        """The answers' files."""
        return list(self._directory.iterdir())

    def file(self) -> Path:
        """The only answer's file."""
        (file,) = self.files()
        return file

    @contextmanager
    def room_for(self, size: int) -> Iterator[None]:
        """Let the answer's file grow by so many bytes and no more, as on a disk that is full then."""
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.file().stat().st_size + size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _told(error: StackError) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    return error.status, [], error.envelope()


@asynccontextmanager
async def answering(directory: Path) -> AsyncIterator[Answers]:
    settings: Any = SimpleNamespace(
        stack_idempotency_linger=60.0, stack_idempotency_bytes=1 << 28, stack_idempotency_ttl=60.0
    )
    async with Answers(settings, directory) as answers:
        yield answers


async def never() -> Message:
    """Receive nothing: the client stays."""
    message: Message = await asyncio.get_running_loop().create_future()
    return message


async def ask(answers: Answers, maker: Maker, client: Client, receive: Receive = never) -> None:
    await answers.answer(b"name", "key", b"d" * 32, "r-1", maker, client, receive, client.send, Form(_told))


async def test_a_note_without_room_leaves_nothing_in_the_stream(tmp_path: Path) -> None:
    class Noting(Maker):
        async def make(self, send: Send, trail: Trail) -> bool:
            await send(start(sse.HEADERS))
            await send(body(b"data: 1\n\n", more=True))
            with self.room_for(20):
                trail.note({"row": "x" * 100})
            await send(body(b"data: 2\n\n", more=True))
            await send(body(b"data: [DONE]\n\n"))
            return True

    client = Client()
    async with answering(tmp_path) as answers:
        await ask(answers, Noting(tmp_path), client)
    assert (client.body, client.whole) == (b"data: 1\n\ndata: 2\n\ndata: [DONE]\n\n", True)


async def test_after_a_note_without_room_no_other_one_is_written(tmp_path: Path) -> None:
    """Whoever goes on has a beginning of the notes, and none is missing in their middle."""

    class Noting(Maker):
        async def make(self, send: Send, trail: Trail) -> bool:
            trail.note({"chunk": "first"})
            with self.room_for(20):
                trail.note({"chunk": "second"})
            trail.note({"chunk": "third"})
            self.kept = self.file().read_bytes()
            await send(start([(b"content-length", b"1")]))
            await send(body(b"."))
            return True

    maker = Noting(tmp_path)
    async with answering(tmp_path) as answers:
        await ask(answers, maker, Client())
    assert [it in maker.kept for it in (b"first", b"second", b"third")] == [True, False, False]


@pytest.mark.parametrize("room", [0, 120, LENGTH // 2])  # also without room for an error
async def test_a_blocking_answer_without_room_is_sent_and_not_kept(tmp_path: Path, room: int) -> None:
    class Blocking(Maker):
        async def make(self, send: Send, trail: Trail) -> bool:
            await send(start(TO_A_BLOCK))
            with self.room_for(room):
                trail.note({"chunk": "x" * LENGTH})
                await send(body(b"x" * LENGTH))
            return True

    client, maker = Client(), Blocking(tmp_path)
    async with answering(tmp_path) as answers:
        await ask(answers, maker, client)
        assert not maker.files()
    assert (client.status, client.whole, client.body, maker.runs) == (200, True, b"x" * LENGTH, 1)


async def test_a_stream_without_room_even_for_an_error_is_refused_and_not_made_again(tmp_path: Path) -> None:
    class Streaming(Maker):
        async def make(self, send: Send, trail: Trail) -> bool:
            del trail
            await send(start(sse.HEADERS))
            with self.room_for(20):
                await send(body(b"data: " + b"x" * LENGTH + b"\n\n", more=True))
            return False

    client, maker = Client(), Streaming(tmp_path)
    async with answering(tmp_path) as answers:
        with pytest.raises(EngineUnavailable, match="too large to keep") as refused:
            await ask(answers, maker, client)
    assert (client.status, maker.runs, dict(refused.value.headers)) == (0, 1, {"x-should-retry": "false"})


class Damaged(Maker):
    """Makes a stream, which is whole."""

    async def make(self, send: Send, trail: Trail) -> bool:
        trail.note({"row": "x" * 100})
        await send(start(sse.HEADERS))
        for number in range(9):
            await send(body(b"data: %d\n\n" % number, more=True))
        await send(body(b"data: [DONE]\n\n"))
        return True

    def damage(self, first: int, last: int | None) -> None:
        """Let the answer's file lack these bytes, as after a power failure: its tail, or zeros in its middle."""
        data = self.file().read_bytes()
        rest = b"" if last is None else bytes(len(data[first:last])) + data[last:]
        with self.file().open("r+b") as file:
            file.truncate(len(data[:first]))
            file.seek(0, 2)
            file.write(rest)


@pytest.mark.parametrize("first", [HEAD_SIZE, HEAD_SIZE + 20, -100, -12, -5, -3])
async def test_an_answer_that_lost_its_tail_in_a_power_failure_is_made_anew(tmp_path: Path, first: int) -> None:
    maker, client = Damaged(tmp_path), Client()
    async with answering(tmp_path) as answers:
        await ask(answers, maker, Client())
        maker.damage(first, None)
        await ask(answers, maker, client)
    assert (client.body, client.whole, maker.runs) == (b"again", True, 2)


async def test_an_answer_that_lost_its_beginning_in_a_power_failure_is_made_anew(tmp_path: Path) -> None:
    maker, client = Damaged(tmp_path), Client()
    async with answering(tmp_path) as answers:
        await ask(answers, maker, Client())
        maker.damage(HEAD_SIZE, HEAD_SIZE + 20)
        await ask(answers, maker, client)
    assert (client.body, client.whole, maker.runs) == (b"again", True, 2)


async def test_an_answer_that_lost_its_middle_in_a_power_failure_does_not_end_as_a_whole_one(tmp_path: Path) -> None:
    maker, client, later = Damaged(tmp_path), Client(), Client()
    async with answering(tmp_path) as answers:
        await ask(answers, maker, Client())
        maker.damage(-100, -50)
        await ask(answers, maker, client)
        await ask(answers, maker, later)
    assert (client.was_cut, b"answer_lost" in client.body, b"[DONE]" in client.body) == (True, True, False)
    assert (later.body, maker.runs) == (b"again", 2)


async def test_an_answer_that_lacks_a_part_of_its_length_is_cut(tmp_path: Path) -> None:
    head = framed(Kind.START, orjson.dumps([200, [["content-length", str(LENGTH)]]]))
    entry = Entry.create(tmp_path / "answer", b"d" * 32, head + framed(Kind.BODY, b"x" * (LENGTH - 1)))
    assert entry is not None
    entry.write_state(FAILED)
    client = Client()
    assert await Reader(entry, None, client, Form(_told), lambda: None, again=False).run(never, client.send)
    assert (len(client.body), client.whole, client.was_cut) == (LENGTH - 1, False, True)
    entry.close()


async def test_a_bug_before_the_answer_begins_is_one_error_for_all_its_clients(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    both = asyncio.Barrier(3)  # the clients and the maker

    async def receive() -> Message:
        await both.wait()
        return await never()

    class Broken(Maker):
        async def make(self, send: Send, trail: Trail) -> bool:
            del trail
            await send(start(TO_A_BLOCK))
            await both.wait()
            raise ZeroDivisionError

    clients, maker = [Client(), Client()], Broken(tmp_path)
    async with answering(tmp_path) as answers, asyncio.TaskGroup() as group:
        for client in clients:
            group.create_task(ask(answers, maker, client, receive))
    assert [(it.status, it.whole, orjson.loads(it.body)["error"]["code"]) for it in clients] == [
        (500, True, "internal_error")
    ] * 2
    assert maker.runs == 1
    assert "ZeroDivisionError" in caplog.text


async def test_a_bug_in_the_middle_of_a_stream_cuts_it(tmp_path: Path) -> None:
    class Broken(Maker):
        async def make(self, send: Send, trail: Trail) -> bool:
            del trail
            await send(start(sse.HEADERS))
            await send(body(b"data: 1\n\n", more=True))
            raise ZeroDivisionError

    client, maker = Client(), Broken(tmp_path)
    async with answering(tmp_path) as answers:
        await ask(answers, maker, client)
    assert (client.body, client.was_cut, client.whole, maker.runs) == (b"data: 1\n\n", True, False, 1)


def large(directory: Path) -> tuple[Entry, bytes]:
    """A whole blocking answer, and its body of 8 MB."""
    said = b"".join(b"%08d" % number for number in range(1 << 20))
    head = framed(Kind.START, orjson.dumps([200, [["content-length", str(len(said))]]]))
    entry = Entry.create(directory / "answer", b"d" * 32, head + framed(Kind.BODY, said) + framed(Kind.END))
    assert entry is not None
    entry.write_state(WHOLE)
    return entry, said


async def test_a_large_body_is_sent_in_chunks(tmp_path: Path) -> None:
    entry, said = large(tmp_path)
    client, sizes = Client(), []

    async def send(message: Message) -> None:
        sizes.append(len(message.get("body", b"")))
        await client.send(message)

    assert await Reader(entry, None, client, Form(_told), lambda: None, again=True).run(never, send)
    assert (client.body == said, client.whole, max(sizes)) == (True, True, CHUNK)
    entry.close()


async def test_clients_that_do_not_read_hold_a_few_chunks_of_a_large_answer(tmp_path: Path) -> None:
    entry, said = large(tmp_path)
    count = 10
    blocked = asyncio.Barrier(count + 1)

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            await blocked.wait()
            await never()

    tracemalloc.start()
    try:
        readers = [Reader(entry, None, Client(), Form(_told), lambda: None, again=True) for _ in range(count)]
        tasks = [asyncio.create_task(it.run(never, send)) for it in readers]
        await blocked.wait()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    entry.close()
    assert held < count * 3 * CHUNK < len(said)


async def test_bytes_for_which_there_is_no_space_take_none_of_it(tmp_path: Path) -> None:
    space = Space(tmp_path, most=1000, ttl=60, making=())
    space.make_room()
    assert space.take("a", 400)
    assert not any(space.take("a", 400) for _ in range(3)), "a key has half of the space"
    assert space.take("a", 100)
    assert space.take("b", 500)
    assert not space.take("b", 1)
