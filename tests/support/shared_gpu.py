"""Two vLLM engines on one GPU behind a gateway: what the tests of their turns share. Their models are A and B."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.support.processes import FakeEngine, GatewayProcess, fake_engine, running_gateway
from tests.support.two_models import A, B

SLOW = [["role"], ["pause", 0.03], ["token", "x"], ["finish", "stop"], ["usage"], ["done"], ["end"]]


@contextmanager
def engines(directory: Path) -> Iterator[list[FakeEngine]]:
    """Run both. One after another starts, because each needs the GPU for that. The second one is awake."""
    gpu = str(directory / "gpu")
    with fake_engine(dialect="vllm", gpu=gpu) as one:
        assert httpx.post(f"{one.url}/sleep?level=1&mode=wait", timeout=30).status_code == 200
        with fake_engine(dialect="vllm", gpu=gpu) as two:
            yield [one, two]


@contextmanager
def before(
    engines: list[FakeEngine], directory: Path, slots: tuple[int, int] = (2, 2), name: str = "log", **settings: str
) -> Iterator[GatewayProcess]:
    """A gateway of both, whose log has that name."""
    (directory / "stack.yaml").write_text(
        yaml.safe_dump(
            {
                "engines": {
                    model: {"dialect": "vllm", "base_url": f"{it.url}/v1", "slots": most, "gpu": "one"}
                    for model, it, most in zip((A, B), engines, slots, strict=True)
                },
                "models": {it: {"targets": [{"engine": it, "model": "fake-model"}]} for it in (A, B)},
                "default_model": A,
            }
        )
    )
    settings = {"STACK_HOLD": "0.1", "STACK_CONFIG": str(directory / "stack.yaml")} | settings
    with running_gateway(directory / name, engines[0].url, **settings) as gateway:
        yield gateway


def gpu(engine: FakeEngine) -> dict[str, Any]:
    """Return what the engine was told to do, whether it is awake, and how many requests reached it while it slept."""
    told: dict[str, Any] = httpx.get(f"{engine.url}/_gpu", timeout=30).json()
    return told


def wakes(*engines: FakeEngine) -> int:
    return sum(path == "/wake_up" for engine in engines for path, _ in gpu(engine)["did"])


def check(*engines: FakeEngine) -> None:
    """No request reached an engine that slept, and none was running when its engine was told to sleep."""
    for engine in engines:
        found = gpu(engine)
        assert found["early"] == 0
        assert all(running == 0 for _, running in found["did"])
