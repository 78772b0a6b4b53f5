"""The process that makes the console's pages: when there is one, what ends it, and what a visitor sees meanwhile."""

import asyncio
import multiprocessing
import os
import signal
import socket
import sqlite3
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import Response

from gateway.console.ask import Ask
from gateway.console.door import Visitor
from gateway.console.process import BUSY, LARGEST, QUEUE, UNSURE, Client, Server, listen
from gateway.errors import GatewayBusy
from gateway.keys.known import Key
from gateway.keys.limit_fields import Limits
from gateway.server.console import FIRST_KILLED, NICE
from gateway.shared_memory import Flag
from tests.support.console import Visit, console_gateway, visiting
from tests.support.keys import ADMIN
from tests.support.processes import FakeEngine, GatewayProcess, running_gateway, wait_for

_fork = multiprocessing.get_context("fork")
OTHER = "sk-other-admin-0123456789abcdef"
OPERATOR = Visitor("token", None)
FORM = Ask(OPERATOR, form={"name": "x"})


def lives(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def only(gateway: GatewayProcess, *, but: int = 0) -> int:
    """The pid of the gateway's one process for the console, once it is another one."""
    return wait_for(lambda: it[0] if len(it := gateway.consoles()) == 1 and it[0] != but else 0)


def files(pid: int) -> set[str]:
    """What a process has open."""
    return {str(it.readlink()) for it in Path(f"/proc/{pid}/fd").iterdir()}


def reload(gateway: GatewayProcess, keys: Path, key: str) -> None:
    """Have a file with that key read, and wait for the new workers."""
    keys.write_text(key)
    old = set(gateway.workers())
    gateway.process.send_signal(signal.SIGHUP)
    wait_for(lambda: len(it := gateway.workers()) == len(old) and not old & set(it))


# -- beside a gateway -------------------------------------------------------------------------------------------------


def test_after_the_death_of_the_process_the_next_page_comes(console: GatewayProcess, operator: Visit) -> None:
    for _ in range(2):
        pid = only(console)
        os.kill(pid, signal.SIGKILL)
        assert operator.get("/console/limits").status_code == 200
        only(console, but=pid)
    assert console.told("the console's process has ended", 2)[0]["level"] == "warning"


def test_a_page_that_waits_while_the_process_dies_comes_from_its_successor(
    console: GatewayProcess, operator: Visit
) -> None:
    pid = only(console)
    held = files(pid)

    def sockets() -> list[str]:
        """The socket at which pages are asked for, and the connections that nobody has accepted."""
        lines = [it.split() for it in Path("/proc/net/unix").read_text().splitlines()]
        mine = {it[-1] for it in lines if f"socket:[{it[6]}]" in held and it[-1].endswith("/console")}
        return [it[-1] for it in lines if it[-1] in mine]

    os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        page = pool.submit(operator.get, "/console/limits")
        wait_for(lambda: len(sockets()) == 2)
        os.kill(pid, signal.SIGKILL)
        assert page.result().status_code == 200


def test_a_page_comes_while_another_waits_for_the_store(console: GatewayProcess, operator: Visit) -> None:
    name = f"slow-{time.monotonic_ns()}"
    token = operator.token("/console/keys/new")
    with visiting(console) as other, ExitStack() as stack:
        store = stack.enter_context(
            closing(
                sqlite3.connect(
                    next(it for it in files(console.workers()[0]) if it.endswith("/stack.db")), isolation_level=None
                )
            )
        )
        pool = stack.enter_context(ThreadPoolExecutor(1))
        store.execute("BEGIN IMMEDIATE")
        made = pool.submit(operator.post, "/console/keys", {"form_token": token, "name": name, "owner": ""})
        assert other.get("/console/limits").status_code == 200
        assert not made.done()
        store.execute("ROLLBACK")
        assert made.result().status_code == 201


def test_a_death_during_the_drain_delay_does_not_end_it(engine: FakeEngine, tmp_path: Path) -> None:
    """A load balancer would not have seen yet that the gateway is about to stop."""
    with console_gateway(tmp_path / "log", engine.url, STACK_DRAIN_DELAY="60", STACK_WORKERS="2") as gateway:
        pid, worker = only(gateway), gateway.workers()[0]
        gateway.process.send_signal(signal.SIGTERM)
        wait_for(lambda: gateway.told("draining"))
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: worker not in gateway.workers())
        os.kill(pid, signal.SIGKILL)
        only(gateway, but=pid)  # which is started during the delay, by whoever has buried the two
        assert httpx.get(gateway.url + "/livez").status_code == 200
        assert gateway.stop() == 0  # a second signal ends it


def test_workers_come_before_the_process(console: GatewayProcess) -> None:
    """The process has a lower priority, is the first that is killed when memory is short, and has no socket that
    clients connect to."""
    pid = only(console)
    own, workers = os.getpriority(os.PRIO_PROCESS, pid), console.workers()
    assert own == min(19, os.getpriority(os.PRIO_PROCESS, workers[0]) + NICE)
    assert int(Path(f"/proc/{pid}/oom_score_adj").read_text()) == FIRST_KILLED
    listening = {
        line.split()[9]
        for line in Path("/proc/net/tcp").read_text().splitlines()
        if line.split()[1].endswith(f":{console.port:04X}") and line.split()[3] == "0A"
    }
    held = [{f"socket:[{it}]" for it in listening} & files(each) for each in (workers[0], pid)]
    assert (bool(held[0]), bool(held[1])) == (True, False)


def test_there_is_a_process_if_there_is_an_admin_key(engine: FakeEngine, tmp_path: Path) -> None:
    """A reload starts, replaces and ends the process. It ends with the gateway."""
    keys = tmp_path / "keys"
    keys.write_text("")
    with running_gateway(tmp_path / "log", engine.url, STACK_ADMIN_KEYS_FILE=str(keys)) as gateway:
        assert gateway.consoles() == []
        before = 0
        for key in (ADMIN, OTHER):
            reload(gateway, keys, key)
            before = only(gateway, but=before)
            with visiting(gateway, key) as visit:
                assert visit.get("/console/limits").status_code == 200
        with visiting(gateway, None) as visit:
            assert visit.sign_in(ADMIN).status_code == 401
        reload(gateway, keys, "")
        wait_for(lambda: gateway.consoles() == [])
        reload(gateway, keys, ADMIN)
        last = only(gateway)
        assert gateway.stop() == 0
        assert not lives(last)


def test_the_process_ends_when_the_master_is_killed(engine: FakeEngine, tmp_path: Path) -> None:
    with console_gateway(tmp_path / "log", engine.url) as gateway:
        pid, workers = only(gateway), gateway.workers()
        gateway.process.kill()
        for it in workers:
            os.kill(it, signal.SIGKILL)
        wait_for(lambda: not lives(pid))


# -- alone ------------------------------------------------------------------------------------------------------------


class Scripted:
    """Views that do what their names say."""

    def __init__(self) -> None:
        self.made = _fork.SimpleQueue()
        self._gate = threading.Event()

    def make(self, name: str, ask: Ask) -> Response:
        self.made.put(name)
        if name == "hang":
            threading.Event().wait()
        if name == "hold":
            sum(range(10**12))
        if name == "wait":
            self._gate.wait()
        if name == "open":
            self._gate.set()
        key = ask.visitor.key
        return Response(f"{name} {key and key.limits}".encode(), 201, {"x-made": ask.form.get("name", "")})


def connected(directory: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.connect(f"{directory}/console")
    return made


@contextmanager
def serving(
    listener: socket.socket, views: Scripted, longest: float = 60.0, parent: int = 0
) -> Iterator[tuple[BaseProcess, Flag]]:
    flag = Flag()
    fake: Any = views
    process = _fork.Process(target=Server(listener, flag, fake, parent or os.getpid(), longest).run, daemon=True)
    process.start()
    try:
        yield process, flag
    finally:
        process.kill()
        process.join()


def test_a_page_has_the_status_headers_and_body_of_its_view(tmp_path: Path) -> None:
    owner = Visitor("token", Key("k", limits=Limits(concurrent=7), models=frozenset({"m"}), labels={"a": "b"}))
    with listen(tmp_path) as listener, serving(listener, Scripted()):
        page, seconds = asyncio.run(Client(tmp_path).page("own", Ask(owner, form={"name": "n"})))
    assert (page.status_code, page.headers["x-made"], seconds > 0) == (201, "n", True)
    assert bytes(page.body).startswith(b"own Limits(")
    assert b"concurrent=7" in bytes(page.body)


def test_a_process_whose_parent_is_dead_before_it_begins_ends(tmp_path: Path) -> None:
    with listen(tmp_path) as listener, serving(listener, Scripted(), parent=1 << 30) as (process, _):
        process.join(30)
        assert process.exitcode == 0


def test_pages_that_have_begun_are_finished_before_the_process_ends(tmp_path: Path) -> None:
    views = Scripted()
    with listen(tmp_path) as listener, serving(listener, views) as (process, flag):

        async def both() -> list[int]:
            first = asyncio.create_task(Client(tmp_path).page("wait", FORM))
            await asyncio.to_thread(views.made.get)
            second = asyncio.create_task(Client(tmp_path).page("open", FORM))
            await asyncio.to_thread(views.made.get)
            flag.set()
            return [(await it)[0].status_code for it in (first, second)]

        assert asyncio.run(both()) == [201, 201]
        process.join()
        assert process.exitcode == 0


def test_a_form_whose_worker_gave_up_is_not_used(tmp_path: Path) -> None:
    views, form = Scripted(), FORM.dump()
    with listen(tmp_path) as listener:
        with closing(connected(tmp_path)) as worker:
            worker.sendall(struct.pack("<II", 8, len(form)) + b"given up" + form)
        with serving(listener, views):
            asyncio.run(Client(tmp_path).page("kept", FORM))
        assert views.made.get() == "kept"


@pytest.mark.parametrize("name", ["hang", "hold"])
def test_a_page_that_takes_too_long_ends_the_process(tmp_path: Path, name: str) -> None:
    """`hold` also keeps the interpreter from every other thread of the process."""
    with listen(tmp_path) as listener, serving(listener, Scripted(), 1.0) as (process, _):
        with pytest.raises(GatewayBusy, match=UNSURE):
            asyncio.run(Client(tmp_path).page(name, FORM))
        process.join()
        assert process.exitcode in ({1, -signal.SIGALRM} if name == "hang" else {-signal.SIGALRM})


def test_a_page_beyond_the_queue_is_refused_at_once(tmp_path: Path) -> None:
    with listen(tmp_path), ExitStack() as stack:
        for _ in range(QUEUE + 1):
            stack.enter_context(closing(connected(tmp_path)))
        with pytest.raises(GatewayBusy, match=BUSY):
            asyncio.run(Client(tmp_path).page("any", Ask(OPERATOR)))


@pytest.mark.parametrize("message", [b"", b"\1", struct.pack("<II", 1, LARGEST), struct.pack("<II", 1, 5) + b"x12"])
def test_a_malformed_message_harms_nobody(tmp_path: Path, message: bytes) -> None:
    with listen(tmp_path) as listener, serving(listener, Scripted()):
        with closing(connected(tmp_path)) as wrong:
            wrong.sendall(message)
            wrong.shutdown(socket.SHUT_WR)
            assert wrong.recv(1) == b""
        assert asyncio.run(Client(tmp_path).page("next", FORM))[0].status_code == 201
