"""A relay with an engine and a client in the same process: what the client gets, and what is settled at the end."""

import asyncio
from dataclasses import replace
from typing import Any

import orjson
import pytest

from gateway.byte_budget import OVERDRAFT, Budget
from gateway.dialects import DIALECTS
from gateway.dialects.asking import Window
from gateway.dialects.ollama import OLLAMA
from gateway.errors import (
    ClientLeft,
    ContextExceeded,
    EngineError,
    EngineLost,
    EngineRefused,
    EngineUnreachable,
    InvalidKey,
    StackError,
)
from gateway.exchange import Exchange
from gateway.keys.known import Key
from gateway.relay.attempt import PARSED
from gateway.relay.relay import Relay
from gateway.translation.face import Writer
from gateway.upstream.context_window import Contexts
from tests.support.relays import (
    ANSWER,
    DONE,
    Books,
    Client,
    CountedLease,
    Engine,
    Reply,
    Shout,
    chunk,
    exchange,
    route,
    rules,
)

pytestmark = pytest.mark.anyio
KEY = Key("key", "key")
SAID = chunk("Hello") + chunk(" there") + chunk(reason="stop") + DONE
WHOLE = orjson.dumps(
    {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }
)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Scene:
    """One relay, and all that it touches."""

    def __init__(
        self,
        *engines: Engine,
        books: Books | None = None,
        writer: Writer | None = None,
        stream: bool = True,
        it: Exchange | None = None,
        **changes: Any,
    ) -> None:
        self.client, self.lease, self.books = Client(), CountedLease(), books or Books()
        it = it or exchange(stream=stream)
        self.relay = Relay(it, route(*engines), KEY, self.lease, rules(self.books, **changes), writer)

    async def run(self) -> bool:
        return await self.relay.run(self.client, self.client.send)


def broken(*pieces: bytes) -> Reply:
    return Reply(list(pieces), EngineLost("The connection to the engine broke.", code="engine_broken_stream"))


async def test_a_streams_events_are_the_engines_own_bytes() -> None:
    scene = Scene(Engine([Reply(ANSWER.copy())]))
    assert await scene.run()
    assert (scene.client.status, scene.client.body, scene.client.whole) == (200, SAID, True)
    assert scene.client.pushed == 2, "what follows the first token goes straight to the connection"
    assert scene.lease.settled == [5]
    assert [(it.outcome, it.tokens_in, it.tokens_out, it.attempts) for it in scene.books.endings[:1]] == [
        ("finished", 3, 2, 1)
    ]


async def test_a_blocking_answer_is_the_engines_own_bytes() -> None:
    scene = Scene(Engine([Reply([WHOLE])]), stream=False)
    assert await scene.run()
    assert (scene.client.body, scene.client.headers[b"content-type"]) == (WHOLE, b"application/json")
    assert scene.lease.settled == [5]


async def test_a_writer_gets_each_chunk_and_the_usage_and_writes_the_stream() -> None:
    scene = Scene(Engine([Reply(ANSWER.copy())]), writer=Shout())
    assert await scene.run()
    assert scene.client.body == b"HEAD\nHELLO THEREUSAGE 5\n\nEND\n"
    assert (scene.client.whole, scene.lease.settled) == (True, [5])


async def test_a_writer_writes_a_blocking_answer() -> None:
    scene = Scene(Engine([Reply([WHOLE])]), stream=False, writer=Shout())
    assert await scene.run()
    assert orjson.loads(scene.client.body) == {"said": "HELLO"}
    assert scene.client.headers[b"content-length"] == b"%d" % len(scene.client.body)


async def test_a_writer_writes_the_sum_of_a_stream_whose_client_waits_for_the_whole() -> None:
    engine = Engine([Reply(ANSWER.copy())], dialect=replace(DIALECTS["vllm"], deaf=True))
    scene = Scene(engine, stream=False, writer=Shout())
    assert await scene.run()
    assert engine.asked[0]["stream"] is True
    assert orjson.loads(scene.client.body) == {"said": "HELLO THERE"}


@pytest.mark.parametrize("entry", [{"logprob": -1.5}, {"prob": 0.2}, None])
async def test_the_sum_of_a_stream_holds_memory_as_a_blocking_answer_does(entry: dict[str, Any] | None) -> None:
    """Events with log probabilities take several times their size when they are parsed."""
    logprobs = None if entry is None else {"content": [{"token": "Hello", "top_logprobs": []} | entry]}
    choice = {"index": 0, "delta": {"content": "Hello"}, "logprobs": logprobs, "finish_reason": None}
    first, budget = b"data: %b\n\n" % orjson.dumps({"id": "c-1", "choices": [choice]}), Budget(10_000)
    rest = chunk(reason="stop") + DONE

    def scene(budget: Budget) -> Scene:
        charge = budget.charge("key", 1)
        engine = Engine([Reply([first, rest]) for _ in range(9)], dialect=replace(DIALECTS["vllm"], deaf=True))
        return Scene(engine, it=replace(exchange(stream=False), charge=charge))

    held = len(first) * (1 if entry is None else PARSED) + len(rest)
    with_room = scene(budget)
    assert await with_room.run()
    assert budget.held == 1 + held
    with pytest.raises(EngineError, match="larger than the gateway's free memory"):
        await scene(Budget(held // OVERDRAFT)).run()


async def test_a_writer_ends_an_answer_that_broke() -> None:
    scene = Scene(Engine([broken(chunk("Hello"))]), writer=Shout())
    assert not await scene.run()
    assert scene.client.body == b"HEAD\nHELLO\nFAILED engine_broken_stream\n"
    assert (scene.client.whole, scene.client.was_cut) == (False, True)


async def test_a_writer_is_told_of_an_answer_that_another_engine_went_on_with_as_of_one() -> None:
    rest = [chunk(" there"), chunk(reason="stop"), DONE]
    scene = Scene(Engine([broken(chunk("Hello"))]), Engine([Reply(rest)], name="other"), writer=Shout())
    assert await scene.run()
    assert scene.client.body == b"HEAD\nHELLO: resumed 1\n THERE\nEND\n"


async def test_a_chunk_that_a_writer_refuses_ends_the_stream_with_its_error() -> None:
    class Picky(Shout):
        def chunk(self, chunk: dict[str, Any]) -> bytes:
            if (written := super().chunk(chunk)) == b" THERE":
                raise EngineError("No event can say this.", code="unsayable")
            return written

    scene = Scene(Engine([Reply(ANSWER.copy())]), writer=Picky())
    assert not await scene.run()
    assert scene.client.body == b"HEAD\nHELLO\nFAILED unsayable\n"


async def test_an_error_before_the_first_event_keeps_its_status_and_goes_to_no_writer() -> None:
    scene = Scene(Engine([EngineRefused("No.", status=422)]), writer=Shout())
    with pytest.raises(EngineRefused):
        await scene.run()
    assert (scene.client.status, scene.client.body) == (0, b"")
    assert scene.lease.settled == [0]


async def test_a_broken_stream_ends_with_an_error_event_and_a_cut() -> None:
    scene = Scene(Engine([broken(chunk("Hello"))]))
    assert not await scene.run()
    events = scene.client.body.removeprefix(chunk("Hello"))
    assert orjson.loads(events.removeprefix(b"data: "))["error"]["code"] == "engine_broken_stream"
    assert (scene.client.whole, scene.client.was_cut) == (False, True)


async def test_an_engine_that_cannot_be_reached_is_replaced_before_anything_was_sent() -> None:
    away = EngineUnreachable("The engine can't be reached.")
    scene = Scene(Engine([away]), Engine([Reply(ANSWER.copy())], name="other"))
    assert await scene.run()
    assert scene.client.body == SAID
    assert (scene.books.endings[0].engine, scene.books.endings[0].attempts) == ("other", 2)


@pytest.mark.parametrize("step", ["started", "finished", "clear"])
@pytest.mark.parametrize("stream", [True, False])
async def test_the_lease_is_settled_once_whatever_raises_while_it_is_written_down(step: str, *, stream: bool) -> None:
    books = Books(step)
    scene = Scene(Engine([Reply(ANSWER.copy() if stream else [WHOLE])]), books=books, stream=stream)
    try:
        await scene.run()
    except ZeroDivisionError:
        assert not scene.client.status, "a bug raises only if nothing was sent"
    assert step in books.told
    assert (len(scene.lease.settled), scene.lease.open) == (1, False)


async def test_the_lease_is_settled_when_the_client_cannot_be_watched() -> None:
    class Unwatchable(Client):
        def watch(self, hung_up: Any) -> None:
            if hung_up is not None:
                raise ZeroDivisionError

    scene = Scene(Engine([]))
    scene.client = Unwatchable()
    with pytest.raises(ZeroDivisionError):
        await scene.run()
    assert scene.lease.settled == [0]


@pytest.mark.parametrize("reason", [InvalidKey("This key was taken back."), ClientLeft("The client left.")])
async def test_a_relay_that_is_halted_tells_its_client_why_unless_that_left(reason: StackError) -> None:
    scene = Scene(Engine([]))
    never: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()

    async def post(*_: object, **__: object) -> Reply:
        scene.relay.halt(reason)
        return await never

    target = scene.relay._route.tiers[0][0]
    target.upstream.post = post  # type: ignore[assignment, method-assign]
    if isinstance(reason, ClientLeft):
        assert not await scene.run()
    else:
        with pytest.raises(type(reason)):
            await scene.run()
    assert scene.books.endings[0].outcome == reason.outcome
    assert len(scene.lease.settled) == 1
    assert asyncio.current_task().cancelling() == 0


async def test_a_client_that_leaves_in_a_later_round_pays_for_the_rounds_before_it_too() -> None:
    """An Ollama makes one choice after the other. The first one has two tokens, and the second one may have 50."""
    it = replace(exchange(stream=False, n=2, max_tokens=50), choices=2)
    engine = Engine([Reply([WHOLE])], dialect=DIALECTS["ollama"])
    scene = Scene(engine, it=it)
    scene.lease.estimate = scene.relay._services.estimates.of(it, "model")
    first = engine.post

    async def post(*args: Any, **more: Any) -> Reply:
        if engine.replies:
            return await first(*args, **more)
        scene.relay.halt(ClientLeft("The client left."))
        return await asyncio.get_running_loop().create_future()

    engine.post = post  # type: ignore[method-assign]
    assert not await scene.run()
    assert len(engine.asked) == 1, "the second one never got an answer"
    assert scene.lease.settled == [3 + 2 + 50]


@pytest.mark.parametrize(("left", "stream"), [(True, True), (True, False), (False, True)])
async def test_a_prompt_that_an_ollama_reads_for_a_check_is_charged_unless_it_is_refused(
    left: bool, stream: bool
) -> None:
    """The client leaves while the engine reads the prompt, or the prompt is too long."""
    ways = OLLAMA.endpoints["chat"]
    assert ways is not None

    async def window(*_: object) -> Window:
        return Window(10)

    async def count(*_: object) -> int:
        if not left:
            raise ContextExceeded("It is too long.", param="messages", tokens=11, limit=10)
        scene.relay.halt(ClientLeft("The client left."))
        return await asyncio.get_running_loop().create_future()

    reads = replace(OLLAMA, window=window, endpoints={"chat": replace(ways, count=count)})
    it = replace(exchange(stream=stream, max_tokens=50), resume=stream)
    scene = Scene(Engine([], dialect=reads), it=it, contexts=Contexts())
    scene.lease.estimate = scene.relay._services.estimates.of(it, "model")
    assert scene.lease.estimate.prompt > 0
    if left:
        assert not await scene.run()
        assert scene.lease.settled == [scene.lease.estimate.prompt], "nothing of the answer was made"
    else:
        with pytest.raises(ContextExceeded):
            await scene.run()
        assert scene.lease.settled == [0]


async def test_what_came_in_a_stream_is_not_charged_twice_after_a_blocking_answer_that_failed() -> None:
    """The first engine hides what it makes. The fallback streams, so what it makes is seen."""
    it = exchange(stream=False, max_tokens=50)
    streams = Engine([Reply([chunk("Hello")])], name="other", dialect=replace(DIALECTS["vllm"], deaf=True))
    scene = Scene(Engine([EngineUnreachable("The engine can't be reached.")]), streams, it=it)
    scene.lease.estimate = scene.relay._services.estimates.of(it, "model")
    reply = streams.replies[0]
    assert isinstance(reply, Reply)
    first = reply.next

    async def following() -> bytes:
        if reply._pieces:
            return await first()
        scene.relay.halt(ClientLeft("The client left."))
        return await asyncio.get_running_loop().create_future()

    reply.next = following  # type: ignore[method-assign]
    assert not await scene.run()
    assert scene.lease.settled == [scene.lease.estimate.prompt + 1]
