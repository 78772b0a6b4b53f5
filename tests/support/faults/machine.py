"""Events of the machine: its log, its clock and its file descriptors (31, 32, 36)."""

import json
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.support.faults.callers import Call
from tests.support.faults.event import event, under_way
from tests.support.faults.outcome import OVERLOADED, SILENT, WHOLE, Outcome, error
from tests.support.faults.scene import Scene
from tests.support.processes import descriptors, scrape, wait_for


@event(
    31,
    "log pipe blocked",
    streaming={WHOLE},
    blocking={WHOLE},
    log="pipe",
    STACK_LOG_LEVEL="DEBUG",
    STACK_LOG_CONTENT="true",
)
def log_blocked(here: Scene) -> list[Outcome]:
    """Nobody reads the log until the end. The pipe holds 64 KiB, and each worker's buffer 4 MiB."""
    for _ in range(20):
        for stream in (True, False):
            here.ask(stream=stream, messages=[{"role": "user", "content": "x" * 1_000_000}])
    outcomes = here.settle()
    dropped = scrape(here.metrics).total("stack_log_lines_dropped_total")
    assert dropped > 0
    with here.gateway.log_path.open("rb") as pipe:
        told = 0
        while told < dropped:  # whole lines only
            line = json.loads(pipe.readline())
            told += line["count"] if line["msg"] == "log_lines_dropped" else 0
        assert told == dropped
        here.gateway.process.terminate()
        while line["msg"] != "Shutting down: Master":
            line = json.loads(pipe.readline())
        assert here.gateway.process.wait(30) == 0
    return outcomes


@event(31, "disk full", streaming={WHOLE}, blocking={WHOLE}, log="/dev/full")
def log_full(here: Scene) -> list[Outcome]:
    for _ in range(5):
        for stream in (True, False):
            here.ask(stream=stream)
    outcomes = here.settle()
    wait_for(lambda: scrape(here.metrics).total("stack_log_lines_dropped_total") >= 3 * len(outcomes))
    assert here.gateway.stop() == 0
    return outcomes


@event(
    32,
    "clock jumps an hour",
    streaming={WHOLE, error(504, SILENT)},
    blocking={WHOLE},
    LLM_FIRST_TOKEN_TIMEOUT="1",
    STACK_LIMIT_REQUESTS_PER_MINUTE="60",
)
def clock_jumps(here: Scene) -> list[Outcome]:
    """Forth, and two back. What is under way goes on, what is due is due as ever, and a minute's limit flows back by
    one a second."""
    began = time.monotonic()
    gate = under_way(here)
    workers = here.gateway.workers()
    for jump in (3600, -3600):
        with here.clock.open("r+") as file:
            file.write(f"{jump:8}")
        assert here.ask(stream=True, script=[["hang"]]).outcome() == error(504, SILENT)
        wait_for(lambda now=jump: abs(here.gateway.log()[-1]["ts"] / 1000 - time.time() - now) < 600)
        call = here.ask(stream=False)
        assert call.outcome() == WHOLE
        left = int(call.got.partition(b"x-ratelimit-remaining-requests: ")[2].split(b"\r\n")[0])
        assert left <= 60 - len(here.calls) + time.monotonic() - began
        assert here.engine.running() == 10
    here.engine.release(gate)
    assert here.gateway.workers() == workers
    return here.settle()


@event(36, "file descriptors exhausted", streaming={WHOLE}, blocking={WHOLE, OVERLOADED}, STACK_READ_TIMEOUT="60")
def descriptors_exhausted(here: Scene) -> list[Outcome]:
    """What is under way goes on; what needs a new connection to the engine is told so; and all is well again after."""
    gate = under_way(here)
    workers = here.gateway.workers()
    exhausted, callers = threading.Event(), set[int]()

    def connects_in_time(call: Call, raw: socket.socket) -> None:
        raw.connect(("127.0.0.1", call.port))
        callers.add(raw.getsockname()[1])
        exhausted.wait(60)
        raw.sendall(call.head + call.body)
        call.read(raw)

    most = 100
    calls = [here.ask(stream=False, caller=connects_in_time) for _ in range(20)]
    wait_for(lambda: len(callers & accepted_by(here.gateway.port)) == len(calls))
    for pid in workers:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, most))
    with ExitStack() as held:
        for full, other in (workers, workers[::-1]):
            with stopped(other):  # otherwise one that is exhausted could go on accepting all, and hanging up

                def is_exhausted(worker: int = full) -> bool:
                    for _ in range(8):
                        held.enter_context(socket.create_connection(("127.0.0.1", here.gateway.port)))
                    return len(descriptors(worker)) >= most - 4

                wait_for(is_exhausted)
        exhausted.set()
        assert OVERLOADED in {call.outcome() for call in calls}
    # Until then libuv accepts whoever comes and hangs up, to get rid of them.
    wait_for(lambda: max(len(descriptors(it)) for it in workers) < most - 16)
    here.engine.release(gate)
    for stream in (True, False) * 5:
        wait_for(lambda stream=stream: here.ask(stream=stream).outcome() == WHOLE)
    assert here.gateway.workers() == workers
    assert len(here.gateway.log()) < 1000
    assert not any(line["msg"] == "engine_state" for line in here.gateway.log())  # it was not the engine's fault
    return here.settle()


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def accepted_by(port: int) -> set[int]:
    """Return the ports of the clients whose connections to this port were accepted: only then they have an inode."""
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return {int(row[2][-4:], 16) for row in rows if row[1].endswith(f":{port:04X}") and row[9] != "0"}


EVENTS = (log_blocked, log_full, clock_jumps, descriptors_exhausted)
