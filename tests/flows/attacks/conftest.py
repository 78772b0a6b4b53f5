"""One gateway for all attacks: it has to be unharmed after each of them."""

from collections.abc import Iterator

import pytest

from tests.support.attacks import Attacked
from tests.support.attacks import attacked as attacked_gateway
from tests.support.processes import FakeEngine, GatewayProcess


@pytest.fixture(scope="session")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    with attacked_gateway(tmp_path_factory.mktemp("attacked") / "log") as it:
        yield it


@pytest.fixture(scope="session")
def gateway(attacked: Attacked) -> GatewayProcess:
    return attacked.gateway


@pytest.fixture(scope="session")
def engine(attacked: Attacked) -> FakeEngine:
    return attacked.engine


@pytest.fixture(autouse=True)
def _unharmed(attacked: Attacked, request: pytest.FixtureRequest) -> Iterator[None]:
    """The engine sees nothing of a test, unless a request reaches it on purpose: `reaches_the_engine`."""
    with attacked.unharmed(reached=bool(request.node.get_closest_marker("usefixtures"))):
        yield
