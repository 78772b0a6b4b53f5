"""The three engines, as far as they differ: a fake of each dialect, and one gateway before all of them.

Each file has its own, because its tests change what the engines can, and a gateway remembers what they said.
"""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.support.face_setting import CONFIG as FACES
from tests.support.face_setting import Setting
from tests.support.fakes.dialects import ENGINES
from tests.support.processes import FakeEngine, GatewayProcess, fake_engine, free_port, running_gateway

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
  vllm: {{targets: [{{engine: vllm, model: fake-model}}], aliases: [claude-local]}}
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


@pytest.fixture(scope="module")
def fakes() -> Iterator[dict[str, FakeEngine]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(fake_engine(dialect=name)) for name in ENGINES}


@pytest.fixture(scope="module")
def before_all(fakes: dict[str, FakeEngine], tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """A gateway whose models are named for the engine behind them. One worker: it remembers what it was told."""
    directory = tmp_path_factory.mktemp("before-all")
    file = directory / "stack.yaml"
    urls = {name: engine.url for name, engine in fakes.items()}
    file.write_text(CONFIG.format(**urls, dead=f"http://127.0.0.1:{free_port()}"))
    settings = {"STACK_CONFIG": str(file), "STACK_WORKERS": "1", "STACK_CORS_ORIGINS": "https://app.example"}
    with running_gateway(directory / "log", fakes["vllm"].url, **settings) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def faced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    directory = tmp_path_factory.mktemp("faces")
    with ExitStack() as stack:
        one, two = (stack.enter_context(fake_engine()) for _ in range(2))
        metrics, file = free_port(), directory / "stack.yaml"
        dead = f"http://127.0.0.1:{free_port()}"
        file.write_text(FACES.format(one=one.url, two=two.url, dead=dead))
        settings = {"STACK_CONFIG": str(file), "STACK_WORKERS": "1", "STACK_METRICS_BIND": f"127.0.0.1:{metrics}"}
        settings |= {"STACK_RESUME": "3", "STACK_DATA_DIR": str(directory / "data"), "STACK_MAX_BODY_BYTES": "100000"}
        settings |= {"STACK_CORS_ORIGINS": "https://app.example"}
        gateway = stack.enter_context(running_gateway(directory / "log", one.url, **settings))
        setting = Setting(gateway, one, two, metrics, directory / "data")
        yield setting
        setting.client.close()
