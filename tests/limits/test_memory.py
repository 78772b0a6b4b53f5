"""Accounts over several processes: exact while they contend, and whole after any of them was killed at any moment."""

import asyncio
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess

import pytest

from gateway.errors import GatewayBusy, RateLimited
from gateway.keys.known import Key
from gateway.keys.limit_fields import Limits
from gateway.limits.estimates import Estimate
from gateway.limits.memory import Accounts, SharedBook
from tests.support.books import admit

WORKERS = 4
ESTIMATE = Estimate(size=10, prompt=3, answer=7)
_fork = multiprocessing.get_context("fork")


async def none(_key: str, _since: int, _until: int) -> int:
    return 0


@pytest.fixture
def accounts() -> Accounts:
    accounts = Accounts()
    for seat in range(WORKERS + 1):
        accounts.occupy(seat)
    return accounts


def start(accounts: Accounts, seat: int, work: Callable[[SharedBook], object]) -> BaseProcess:
    process = _fork.Process(target=lambda: work(SharedBook(accounts, seat, none)), daemon=True)
    process.start()
    return process


async def attempt(book: SharedBook, key: Key) -> bool:
    try:
        await admit(book, key, ESTIMATE)
    except (RateLimited, GatewayBusy):
        return False
    return True


def test_a_thousand_requests_in_four_processes_get_a_limit_of_a_hundred(accounts: Accounts) -> None:
    key = Key("k", limits=Limits(requests_per_minute=100))
    admitted = _fork.SimpleQueue()

    def work(book: SharedBook) -> None:
        async def loop() -> int:
            return sum([await attempt(book, key) for _ in range(250)])

        admitted.put(asyncio.run(loop()))

    began = time.monotonic()
    processes = [start(accounts, seat, work) for seat in range(WORKERS)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    passed = time.monotonic() - began
    assert 100 <= sum(admitted.get() for _ in processes) <= 100 + passed * 100 / 60 + 0.01


def test_requests_at_a_time_are_never_more_than_allowed(accounts: Accounts) -> None:
    key = Key("k", limits=Limits(concurrent=3))
    held = _fork.Value("i", 0)

    def work(book: SharedBook) -> None:
        async def loop() -> None:
            got = 0
            while got < 300:
                try:
                    lease = await admit(book, key, ESTIMATE)
                except (RateLimited, GatewayBusy):
                    continue
                got += 1
                with held.get_lock():
                    held.value += 1
                    assert held.value <= 3
                with held.get_lock():
                    held.value -= 1
                lease.settle(10)

        asyncio.run(loop())

    for process in [start(accounts, seat, work) for seat in range(WORKERS)]:
        process.join(120)
        assert process.exitcode == 0


def test_the_death_of_a_worker_at_any_moment_gives_back_what_it_held(accounts: Accounts) -> None:
    keys = [Key(f"k{number}", limits=Limits(10**9, 10**9, 100, 10**15, 10**15)) for number in range(3)]
    rng = random.Random(1)

    def work(book: SharedBook) -> None:
        async def loop() -> None:
            while True:
                with suppress(GatewayBusy):  # with nothing else to do, four processes may starve one
                    leases = [await admit(book, key, ESTIMATE) for key in keys for _ in range(3)]
                    for lease in leases:
                        lease.settle(5)

        asyncio.run(loop())

    book = SharedBook(accounts, WORKERS, none)
    processes = {seat: start(accounts, seat, work) for seat in range(WORKERS)}
    for _ in range(40):
        time.sleep(rng.uniform(0.001, 0.02))
        seat = rng.randrange(WORKERS)
        pid = processes[seat].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        processes[seat].join()
        accounts.vacate(seat)
        processes[seat] = start(accounts, seat, work)
    for seat, process in processes.items():
        process.kill()
        process.join()
        accounts.vacate(seat)

    async def look() -> None:
        for key in keys:
            lease = await admit(book, key, ESTIMATE)
            lease.settle(5)
            told = dict(lease.headers())
            for name in (b"requests", b"tokens"):
                assert 0 <= int(told[b"x-ratelimit-remaining-" + name]) <= 10**9

    asyncio.run(look())
    assert not any(accounts.active)
