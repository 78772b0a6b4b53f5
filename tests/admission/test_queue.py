"""Admission in one process: a database with the queues that is lost, and a worker of an old configuration."""

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gateway.admission import queue
from gateway.admission.memory import Places
from gateway.admission.queue import Admission
from gateway.admission.visit import Visit
from gateway.config import Config
from gateway.settings import Settings
from gateway.store.postgres import LostError
from gateway.upstream.breaker import Breaker
from gateway.upstream.client import Upstream
from tests.support.relays import Books, exchange

pytestmark = pytest.mark.anyio
CONFIG = Config.model_validate(
    {
        "engines": {"engine": {"dialect": "vllm", "base_url": "http://127.0.0.1:1/v1"}},
        "models": {"model": {"targets": [{"engine": "engine", "model": "m"}]}},
        "default_model": "model",
    }
)
BEFORE, LOST = 6.0, 1.0  # seconds that it has waited elsewhere, and in the database until that is lost


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Lost(Admission):
    """Queues in a database that is lost while a request waits there. `waits` are the times for which requests may then
    wait in the host's memory."""

    def __init__(self, directory: Path, upstream: Upstream) -> None:
        books: Any = Books()
        super().__init__(Settings(), CONFIG, {"engine": upstream}, Places(), 0, directory, books)
        here: Any = self
        self._engines, self._far, self.waits = {"engine": 0}, here, list[float]()
        self._bell.close()  # nobody is woken

    async def _enter_far(self, far: Any, name: str, visit: Visit, wait: float, *, ahead: bool) -> None:
        del far, wait, ahead
        visit.has_waited("queue", name, time.monotonic() - LOST)
        raise LostError

    async def _enter_here(self, name: str, visit: Visit, wait: float, *, ahead: bool) -> None:
        del name, visit, ahead
        self.waits.append(wait)


@pytest.mark.parametrize("resumes", [False, True])
async def test_a_wait_in_a_database_that_is_lost_counts_once(tmp_path: Path, *, resumes: bool) -> None:
    upstream = Upstream("engine", CONFIG.engines["engine"], Breaker(3, 1.0, lambda *_: None))
    admission = Lost(tmp_path, upstream)
    visit = admission.visit(exchange())
    visit.waited = BEFORE
    await visit.enter(upstream, "m", resumes=resumes)
    most = visit.exchange.queue_timeout - (0 if resumes else BEFORE)
    assert admission.waits == [pytest.approx(most - (visit.waited - BEFORE))]
    assert visit.waited >= BEFORE + LOST


async def test_a_worker_that_takes_no_more_requests_says_no_more_how_many_slots_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its configuration may be an old one, and its successors say what is in force."""
    monkeypatch.setattr(queue, "ASK_AGAIN", 0)
    upstream = Upstream("engine", CONFIG.engines["engine"], Breaker(3, 1.0, lambda *_: None))
    asked = asyncio.Semaphore(0)

    async def ask(_: object) -> int:
        asked.release()
        return 4

    monkeypatch.setattr(upstream, "dialect", replace(upstream.dialect, ask_slots=ask))
    places, books = Places(), Books()
    fake: Any = books
    async with Admission(Settings(), CONFIG, {"engine": upstream}, places, 0, tmp_path, fake) as admission:
        for _ in range(3):
            await asked.acquire()
        engine = places.engine(upstream.known_as)
        assert places.slots[engine] == 4
        admission.retire()
        places.slots[engine] = 9  # so says a worker of the new configuration
        await asyncio.wait(admission._asking)
        assert places.slots[engine] == 9
