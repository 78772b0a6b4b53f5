"""For how long a request may still wait in the host's memory when the database with the queues is lost."""

import time
from pathlib import Path
from typing import Any

import pytest

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
