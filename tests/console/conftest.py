"""One gateway with a console for each file of tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.console import Visit, console_gateway, visiting
from tests.support.processes import FakeEngine, GatewayProcess


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The gateway's data directory."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def console(engine: FakeEngine, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    log = tmp_path_factory.mktemp("console") / "log"
    with console_gateway(log, engine.url, STACK_DATA_DIR=str(data)) as gateway:
        yield gateway


@pytest.fixture
def operator(console: GatewayProcess) -> Iterator[Visit]:
    with visiting(console) as visit:
        yield visit


@pytest.fixture
def stranger(console: GatewayProcess) -> Iterator[Visit]:
    with visiting(console, None) as visit:
        yield visit
