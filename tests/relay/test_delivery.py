"""The delivery alone: what a client gets, in which order, and which phase that is."""

from typing import Any

import orjson
import pytest

from gateway.errors import EngineError, EngineUnavailable
from gateway.relay.answer import Answer
from gateway.relay.delivery import Delivery, Phase
from gateway.translation.face import Writer
from tests.support.relays import Client, Shout, Visit, exchange, route

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Scene:
    def __init__(self, *, stream: bool = True, writer: Writer | None = None) -> None:
        self.client, self.visit = Client(), Visit()
        self.answer = Answer(exchange(stream=stream), route(), writer)
        self.copy: list[bytes] = []
        self.answered_after: list[bytes] = []  # what the client had when its answer was said to be whole
        visit: Any = self.visit
        headers = [(b"x-standing", b"1")]
        self.delivery = Delivery(self.answer, visit, lambda: headers, self._answered, self.copy)
        self.delivery.open(self.client, self.client.send)

    async def _answered(self) -> None:
        self.answered_after.append(self.client.body)


async def test_the_head_goes_out_with_the_first_event_and_the_phase_grows() -> None:
    scene = Scene()
    delivery, phases = scene.delivery, [scene.delivery.phase]
    await delivery.forward(b"one\n", last=False)
    phases.append(delivery.phase)
    await delivery.forward(b"two\n", last=True)
    phases.append(delivery.phase)
    assert phases == [Phase.NOTHING, Phase.EVENTS, Phase.WHOLE]
    assert (scene.client.body, scene.client.whole, scene.copy) == (b"one\ntwo\n", True, [b"one\n", b"two\n"])
    assert scene.client.headers[b"content-type"].startswith(b"text/event-stream")
    assert scene.client.headers[b"x-standing"] == b"1"
    assert scene.answered_after == [b"one\n"], "it is written down before the last bytes go out"


async def test_a_ping_sends_the_head_and_the_first_event_tells_how_long_it_was_queued_since() -> None:
    scene = Scene()
    scene.visit.milliseconds = 10
    scene.delivery.ping()
    await scene.delivery._pinging
    assert (scene.delivery.phase, scene.client.body) == (Phase.HEAD, b": ping\n")
    assert scene.client.headers[b"x-stack-queue-ms"] == b"10"
    scene.visit.milliseconds = 25
    await scene.delivery.forward(b"one\n", last=False)
    await scene.delivery.forward(b"two\n", last=False)
    assert scene.client.body == b": ping\n: queued 25 ms\none\ntwo\n"


async def test_an_event_comes_after_the_ping_that_is_on_its_way() -> None:
    scene = Scene()
    scene.delivery.ping()
    scene.delivery.ping()
    await scene.delivery.forward(b"one\n", last=False)
    assert scene.client.body == b": ping\none\n"


async def test_a_ping_that_is_on_its_way_is_not_sent_after_the_end() -> None:
    scene = Scene()
    scene.delivery.ping()
    await scene.delivery.close()
    assert (scene.client.body, scene.client.status) == (b"", 0)


async def test_a_blocking_answer_has_its_length_and_how_often_it_was_resumed() -> None:
    scene = Scene(stream=False)
    scene.answer.resumes = 2
    body = b'{"a": 1}'
    await scene.delivery.reply(scene.delivery.written(body, orjson.loads(body), changed=False))
    assert (scene.client.body, scene.client.whole, scene.delivery.phase) == (body, True, Phase.WHOLE)
    assert scene.client.headers[b"content-length"] == b"8"
    assert scene.client.headers[b"x-stack-resumes"] == b"2"
    assert scene.answered_after == [b""]


def test_a_blocking_answer_that_was_changed_is_written_anew() -> None:
    scene = Scene(stream=False)
    assert scene.delivery.written(b'{"a": 1}', {"a": 2}, changed=True) == b'{"a":2}'


async def test_a_failed_stream_ends_with_its_error_the_retry_seconds_and_a_broken_connection() -> None:
    scene = Scene()
    await scene.delivery.forward(b"one\n", last=False)
    await scene.delivery.farewell(EngineUnavailable("The engine is away. Try again shortly."))
    event = orjson.loads(scene.client.body.removeprefix(b"one\ndata: "))
    assert event["error"]["message"] == "The engine is away. Retry in 5 seconds."
    assert (scene.client.whole, scene.client.was_cut) == (False, True)


async def test_a_blocking_answer_that_breaks_is_cut_without_a_word() -> None:
    scene = Scene(stream=False)
    await scene.delivery.farewell(EngineError("broken"))
    assert (scene.client.body, scene.client.was_cut) == (b"", True)


async def test_a_writers_head_goes_out_once_with_the_first_ping_or_event() -> None:
    scene = Scene(writer=Shout())
    scene.delivery.ping()
    await scene.delivery._pinging
    scene.delivery.ping()
    await scene.delivery.forward(b"ONE\n", last=False)
    await scene.delivery.farewell(EngineError("broken"))
    assert scene.client.body == b"HEAD\nWAIT\nWAIT\nONE\n\nFAILED engine_error\n"
    other = Scene(writer=Shout())
    await other.delivery.forward(b"ONE\n", last=False)
    assert other.client.body == b"HEAD\nONE\n"
