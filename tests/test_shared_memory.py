"""The lock over what workers share: taken by one at a time, and open again when its holder is killed."""

import multiprocessing
import os
import signal
from contextlib import suppress
from multiprocessing.synchronize import Event

import pytest

from gateway.shared_memory import BusyError, Region

_fork = multiprocessing.get_context("fork")


def hold(region: Region, taken: Event) -> None:
    with region.lock:
        taken.set()
        signal.pause()  # until it is killed


def test_a_killed_holder_leaves_the_lock_open() -> None:
    region, taken = Region(8), _fork.Event()
    for _ in range(3):
        holder = _fork.Process(target=hold, args=(region, taken), daemon=True)
        holder.start()
        assert taken.wait(10)
        with pytest.raises(BusyError), region.lock:
            pass
        holder.kill()
        holder.join()
        taken.clear()
        with region.lock, pytest.raises(BusyError), region.lock:
            pass


def count(region: Region, times: int) -> None:
    while times:
        with suppress(BusyError), region.lock:  # on a busy machine, a wait may reach its bound
            value = int.from_bytes(region.memory[:8], "little")
            os.sched_yield()
            region.memory[:8] = (value + 1).to_bytes(8, "little")
            times -= 1


def test_only_one_process_holds_the_lock() -> None:
    region = Region(8)
    workers = [_fork.Process(target=count, args=(region, 5000), daemon=True) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert int.from_bytes(region.memory[:8], "little") == 20_000


def test_a_stopped_holder_keeps_the_lock() -> None:
    region, taken = Region(8), _fork.Event()
    holder = _fork.Process(target=hold, args=(region, taken), daemon=True)
    holder.start()
    assert holder.pid
    assert taken.wait(10)
    os.kill(holder.pid, signal.SIGSTOP)
    with pytest.raises(BusyError), region.lock:
        pass
    holder.kill()
    holder.join()
    with region.lock:
        pass
