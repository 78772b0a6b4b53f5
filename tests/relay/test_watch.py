"""The watch alone, with a clock that a test sets: which timeout holds when, pings, and who may still end it."""

import asyncio
from typing import Any

import pytest

from gateway.errors import AnswerTooLong, ClientLeft, Draining, EngineSilent
from gateway.relay.delivery import Phase
from gateway.relay.watch import Watch
from gateway.routing.routes import Patience
from tests.support.relays import Client, exchange

pytestmark = pytest.mark.anyio
PATIENCE = Patience(connect=5.0, first_token=60.0, idle=30.0, total=600.0, hold=15.0)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Delivery:
    def __init__(self) -> None:
        self.phase = Phase.NOTHING
        self.pings = 0

    def ping(self) -> None:
        self.pings += 1


class Scene:
    """A watch in its task; `at` sets the clock and lets the watch look at it."""

    def __init__(self, *, stream: bool = True) -> None:
        self.now, self.client, self.delivery = 1000.0, Client(), Delivery()
        delivery: Any = self.delivery
        self.watch = Watch(exchange(stream=stream, started=1000.0), PATIENCE, delivery, lambda: self.now)
        self.watch.begin(self.client)

    def at(self, seconds: float) -> None:
        self.now = 1000.0 + seconds
        self.watch._timer.cancel()
        self.watch.tick()

    async def reason(self) -> object:
        """Why the task is cancelled; None: it is not."""
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            return self.watch.caught()
        finally:
            self.watch.end()
        return None


async def test_an_engine_has_the_first_tokens_time_until_it_begins() -> None:
    scene = Scene()
    scene.watch.waits()
    scene.at(59.9)
    assert scene.watch.stopped is None
    scene.at(60.0)
    reason = await scene.reason()
    assert isinstance(reason, EngineSilent)
    assert str(reason) == "The engine sent nothing for 60 seconds."


async def test_an_engine_that_has_begun_has_the_idle_time_from_its_last_word() -> None:
    scene = Scene()
    scene.watch.begun = True
    scene.at(100)
    scene.watch.waits()
    scene.at(129.9)
    assert scene.watch.stopped is None
    scene.at(130)
    assert str(await scene.reason()) == "The engine sent nothing for 30 seconds."


async def test_no_idle_timeout_runs_while_the_engine_owes_nothing() -> None:
    scene = Scene()
    scene.watch.waits()
    scene.watch.waits_no_more()
    scene.at(599)
    assert await scene.reason() is None


async def test_an_answer_ends_when_it_took_the_whole_time_whatever_came_of_it() -> None:
    scene = Scene()
    scene.at(599.9)
    scene.watch.waits()
    scene.at(600)
    assert isinstance(await scene.reason(), AnswerTooLong)


async def test_a_stream_is_pinged_at_each_hold_until_its_engine_begins() -> None:
    scene = Scene()
    for seconds, pings in ((14.9, 0), (15, 1), (20, 1), (30, 2), (45, 3)):
        scene.at(seconds)
        assert scene.delivery.pings == pings, seconds
    scene.watch.begun = True
    scene.at(60)
    assert (scene.delivery.pings, await scene.reason()) == (3, None)


async def test_a_blocking_request_is_never_pinged() -> None:
    scene = Scene(stream=False)
    scene.at(100)
    assert (scene.delivery.pings, await scene.reason()) == (0, None)


async def test_the_timer_comes_back_when_the_next_thing_is_due() -> None:
    scene = Scene()
    loop = asyncio.get_running_loop()
    due = []
    for seconds in (14.0, 590.0):
        scene.watch.begun = seconds > 15
        scene.at(seconds)
        due.append(scene.watch._timer.when() - loop.time())
    assert due == [pytest.approx(1.0, abs=0.1), pytest.approx(10.0, abs=0.1)]
    scene.watch.end()


async def test_a_disconnect_ends_the_exchange() -> None:
    scene = Scene()
    scene.client.hung_up()
    assert isinstance(await scene.reason(), ClientLeft)


async def test_the_first_reason_stands() -> None:
    scene = Scene()
    scene.watch.halt(Draining("stopping"))
    scene.client.hung_up()
    assert isinstance(await scene.reason(), Draining)
    assert asyncio.current_task().cancelling() == 0


async def test_a_complete_answer_cannot_be_halted() -> None:
    scene = Scene()
    scene.delivery.phase = Phase.WHOLE
    scene.client.hung_up()
    scene.at(600)
    assert await scene.reason() is None


async def test_after_its_end_nothing_is_watched() -> None:
    scene = Scene()
    hung_up = scene.client.hung_up
    scene.watch.end()
    assert scene.client.hung_up is None
    hung_up()
    assert scene.watch.stopped is None


async def test_a_silent_engine_leaves_the_exchange_to_be_halted_again() -> None:
    scene = Scene()
    scene.watch.waits()
    scene.at(60)
    with pytest.raises(asyncio.CancelledError):
        await asyncio.sleep(0)
    assert isinstance(scene.watch.caught_silence(), EngineSilent)
    assert scene.watch.caught_silence() is None
    scene.client.hung_up()
    assert isinstance(await scene.reason(), ClientLeft)


async def test_a_client_that_leaves_as_its_engine_falls_silent_has_left() -> None:
    """Both in one turn of the event loop. No other engine may be asked for it."""
    scene = Scene()
    scene.watch.waits()
    scene.at(60.0)
    scene.watch.halt(ClientLeft("The client disconnected."))
    assert scene.watch.caught_silence() is None
    assert isinstance(await scene.reason(), ClientLeft)
