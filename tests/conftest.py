"""Fixtures. A gateway and an engine are real processes, shared by the tests that do not change them."""

import functools
import ssl
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

pytest.register_assert_rewrite("tests.support")  # a failed assertion there shows as much as one in a test

from tests.support.processes import FakeEngine, GatewayProcess, fake_engine, running_gateway  # noqa: E402

STACK = "tests/stack/"
BUNDLE = "tests/bundle/"
LONG = ("test_vllm.py", "test_tls.py", "test_chat.py", "test_models.py", "test_ollama.py", "test_monitoring_up.py")
# On a busy machine, an example takes as long as it takes. Whether chance makes large examples is not what is tested.
settings.register_profile(
    "stack", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("stack")
# Every client of httpx reads the file of all authorities, which takes 25 ms. Here, the same files are read once.
ssl.create_default_context = functools.cache(ssl.create_default_context)  # type: ignore[assignment]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the slowest tests first. Images are built (tests/bundle) after the real engine of tests/stack no longer needs
    CPU, because it was silent for minutes beside a build. Of these, the files that take minutes come first, so that the
    last ones to end are short."""
    items.sort(key=lambda item: (not item.nodeid.startswith(STACK), *_in_bundle(item.nodeid.partition("::")[0])))


def _in_bundle(file: str) -> tuple[bool, bool]:
    return file.startswith(BUNDLE), file.startswith(BUNDLE) and file.removeprefix(BUNDLE) not in LONG


class Scheduling(LoadScopeScheduling):
    """Decide which tests run in one process: the tests of a file, which share fixtures; and all of tests/stack, with
    its containers.

    xdist_group marks would be shorter, but xdist 3.8 loses them with pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        return STACK if nodeid.startswith(STACK) else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    return Scheduling(config, log)


@pytest.fixture(scope="session")
def engine() -> Iterator[FakeEngine]:
    with fake_engine() as engine:
        yield engine


CONFIG = """
engines:
  engine: {{dialect: vllm, base_url: "{url}"}}
models:
  fake-model:
    targets: [{{engine: engine, model: fake-model}}]
    aliases: ["llama3.1:8b", "org/name:tag"]
  other/model:1b:
    targets: [{{engine: engine, model: "other/model:1b"}}]
default_model: fake-model
breaker: {{failures: 1000}}
"""


@pytest.fixture(scope="session")
def gateway(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """A gateway with two workers, an alias, and timeouts that are short enough to be tested."""
    log = tmp_path_factory.mktemp("gateway") / "log"
    # No breaker, because tests break this engine on purpose, and it would be closed to the next test.
    file = tmp_path_factory.mktemp("config") / "stack.yaml"
    file.write_text(CONFIG.format(url=engine.url))
    settings = {
        "STACK_CONFIG": str(file),
        "LLM_FIRST_TOKEN_TIMEOUT": "3",
        "LLM_IDLE_TIMEOUT": "2",
        "LLM_TIMEOUT": "20",
        "STACK_HOLD": "1",
        "STACK_WRITE_TIMEOUT": "8",
        "STACK_MAX_BODY_BYTES": "1000000",
    }
    with running_gateway(log, engine.url, **settings) as gateway:
        yield gateway


@pytest.fixture
def mark() -> str:
    """A name for this test's own requests, to find them at the engine."""
    return uuid4().hex
