"""One gateway with a console for each file of tests."""

from collections.abc import Iterator

import pytest

from tests.support.console import Visit, console_gateway, visiting
from tests.support.processes import FakeEngine, GatewayProcess


@pytest.fixture(scope="module")
def console(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with console_gateway(tmp_path_factory.mktemp("console") / "log", engine.url) as gateway:
        yield gateway


@pytest.fixture
def operator(console: GatewayProcess) -> Iterator[Visit]:
    with visiting(console) as visit:
        yield visit


@pytest.fixture
def stranger(console: GatewayProcess) -> Iterator[Visit]:
    with visiting(console, None) as visit:
        yield visit
