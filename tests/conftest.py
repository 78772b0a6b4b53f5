"""Fixtures. A gateway and an engine are real processes, shared by the tests that leave them as they are."""

from collections.abc import Iterator
from uuid import uuid4

import pytest

from tests.processes import FakeEngine, GatewayProcess, fake_engine, running_gateway


@pytest.fixture(scope="session")
def engine() -> Iterator[FakeEngine]:
    with fake_engine() as engine:
        yield engine


@pytest.fixture(scope="session")
def gateway(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """Two workers, an alias, and patience short enough to be tried."""
    log = tmp_path_factory.mktemp("gateway") / "log"
    settings = {
        "STACK_MODEL_ALIASES": "llama3.1:8b=fake-model,org/name:tag=fake-model",
        "LLM_FIRST_TOKEN_TIMEOUT": "3",
        "LLM_IDLE_TIMEOUT": "2",
        "LLM_TIMEOUT": "20",
        "STACK_HOLD": "1",
        "STACK_MAX_BODY_BYTES": "1000000",
    }
    with running_gateway(log, engine.url, **settings) as gateway:
        yield gateway


@pytest.fixture
def mark() -> str:
    """A name for this test's own requests, to find them again at the engine."""
    return uuid4().hex
