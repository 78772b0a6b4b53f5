"""The three engines, as far as they differ: a fake of each dialect, and one gateway before all of them."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.processes import FakeEngine, GatewayProcess, fake_engine, free_port, running_gateway

ENGINES = ("ollama", "vllm", "llamacpp")

CONFIG = """
engines:
  ollama: {{dialect: ollama, slots: 256, base_url: "{ollama}"}}
  vllm: {{dialect: vllm, base_url: "{vllm}"}}
  llamacpp: {{dialect: llamacpp, slots: 256, base_url: "{llamacpp}"}}
  dead-ollama: {{dialect: ollama, slots: 256, base_url: "{dead}"}}
  dead-vllm: {{dialect: vllm, base_url: "{dead}"}}
models:
  ollama: {{targets: [{{engine: ollama, model: fake-model}}]}}
  small: {{targets: [{{engine: ollama, model: small}}]}}
  own-system: {{targets: [{{engine: ollama, model: own-system}}]}}
  unloaded: {{targets: [{{engine: ollama, model: unloaded}}]}}
  vllm: {{targets: [{{engine: vllm, model: fake-model}}]}}
  llamacpp: {{targets: [{{engine: llamacpp, model: fake-model}}]}}
  ollama-then-vllm:
    targets: [{{engine: ollama, model: fake-model}}]
    fallbacks: [{{engine: vllm, model: fake-model}}]
  dead-ollama-then-vllm:
    targets: [{{engine: dead-ollama, model: fake-model}}]
    fallbacks: [{{engine: vllm, model: fake-model}}]
  dead-vllm-then-ollama:
    targets: [{{engine: dead-vllm, model: fake-model}}]
    fallbacks: [{{engine: ollama, model: fake-model}}]
default_model: vllm
"""


@pytest.fixture(scope="session")
def fakes() -> Iterator[dict[str, FakeEngine]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(fake_engine(dialect=name)) for name in ENGINES}


@pytest.fixture(scope="session")
def before_all(fakes: dict[str, FakeEngine], tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """A gateway whose models are named for the engine behind them. One worker: it remembers what it was told."""
    directory = tmp_path_factory.mktemp("before-all")
    file = directory / "stack.yaml"
    urls = {name: engine.url for name, engine in fakes.items()}
    file.write_text(CONFIG.format(**urls, dead=f"http://127.0.0.1:{free_port()}"))
    settings = {"STACK_CONFIG": str(file), "STACK_WORKERS": "1", "STACK_CORS_ORIGINS": "https://app.example"}
    with running_gateway(directory / "log", fakes["vllm"].url, **settings) as gateway:
        yield gateway
