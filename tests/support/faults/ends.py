"""Events that end a process: the gateway, a worker of it, or the engine (27 to 29)."""

import os
import signal
from pathlib import Path

import httpx

from tests.support.faults.event import event, status, under_way
from tests.support.faults.outcome import BROKEN, FAILED, LOST, UNREACHABLE, WHOLE, Outcome, cut, error
from tests.support.faults.scene import Scene
from tests.support.processes import descriptors, fake_engine, scrape, wait_for


@event(
    27,
    "SIGTERM mid-answer",
    streaming={WHOLE},
    blocking={WHOLE},
    STACK_DRAIN_DELAY="2",
    STACK_GRACE="30",
)
def sigterm(here: Scene) -> list[Outcome]:
    gate = under_way(here)
    here.gateway.process.send_signal(signal.SIGTERM)
    wait_for(lambda: status(here, "/readyz") == 503)  # for the drain delay, and requests are still served
    assert here.ask(stream=False).outcome() == WHOLE

    def refused() -> bool:
        try:
            status(here, "/livez")
        except httpx.TransportError:
            return True
        return False

    wait_for(refused)
    here.engine.release(gate)
    assert here.gateway.process.wait(30) == 0
    assert here.gateway.log()[-1]["msg"] == "Shutting down: Master"  # the last lines are written
    return here.settle()


@event(
    27,
    "SIGTERM mid-answer, the grace is over",
    streaming={cut("draining")},
    blocking={error(503, "draining")},
    STACK_GRACE="1",
)
def end_of_grace(here: Scene) -> list[Outcome]:
    under_way(here)
    assert here.gateway.stop() == 0
    return here.settle()


def kill_a_worker(here: Scene, number: int) -> list[Outcome]:
    """Just its own requests are lost. The key may have ten at a time: those that were lost count no more."""
    gate = under_way(here)
    (victim, _) = before = here.gateway.workers()
    its = descriptors(victim)
    lost = [socket_to(here.gateway.port, call.from_port) in its for call, _ in here.calls]
    os.kill(victim, number)
    wait_for(lambda: len(here.gateway.workers()) == 2 and victim not in here.gateway.workers())
    here.engine.release(gate)
    assert [call.outcome() for call, _ in here.calls] == [LOST if it else WHOLE for it in lost]
    assert before[1] in here.gateway.workers()
    wait_for(lambda: scrape(here.metrics).total("stack_requests_in_flight") == 0)
    here.engine.release(under_way(here))
    return here.settle()


def socket_to(port: int, from_port: int) -> str:
    """The one at `port` whose other end is at `from_port`, as a process's descriptors name it."""
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines())
    ends = f":{port:04X}", f":{from_port:04X}"
    return next(f"socket:[{row[9]}]" for row in rows if (row[1][-5:], row[2][-5:]) == ends)


@event(28, "SIGKILL of a worker", streaming={WHOLE, LOST}, blocking={WHOLE, LOST}, STACK_LIMIT_CONCURRENT="10")
def sigkill(here: Scene) -> list[Outcome]:
    return kill_a_worker(here, signal.SIGKILL)


@event(28, "SIGSEGV of a worker", streaming={WHOLE, LOST}, blocking={WHOLE, LOST}, STACK_LIMIT_CONCURRENT="10")
def sigsegv(here: Scene) -> list[Outcome]:
    return kill_a_worker(here, signal.SIGSEGV)


@event(
    29,
    "engine killed for memory",
    streaming={cut(BROKEN), UNREACHABLE, WHOLE},
    blocking={UNREACHABLE, error(502, FAILED), WHOLE},
)
def engine_killed(here: Scene) -> list[Outcome]:
    under_way(here)
    here.engine.process.kill()
    here.engine.process.wait()
    assert WHOLE not in {call.outcome() for call, _ in here.calls}
    for stream in (True, False):
        assert here.ask(stream=stream).outcome() == UNREACHABLE
    wait_for(lambda: status(here, "/readyz") == 503)
    assert status(here, "/livez") == 200
    with fake_engine(int(here.engine.url.rpartition(":")[2])) as engine:
        here.engines = (engine,)
        wait_for(lambda: status(here, "/readyz") == 200)
        for stream in (True, False):
            assert here.ask(stream=stream).outcome() == WHOLE
        return here.settle()


EVENTS = (sigterm, end_of_grace, sigkill, sigsegv, engine_killed)
