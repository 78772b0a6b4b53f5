"""A gateway in front of two scripted engines, for the tests of the translated APIs."""

from pathlib import Path
from typing import Any

import httpx

from tests.support.faces import Api
from tests.support.processes import FakeEngine, GatewayProcess, post

CONFIG = """
engines:
  one: {{dialect: vllm, base_url: "{one}"}}
  two: {{dialect: vllm, base_url: "{two}"}}
  dead: {{dialect: vllm, base_url: "{dead}"}}
models:
  fake-model: {{targets: [{{engine: one, model: fake-model}}]}}
  pair: {{targets: [{{engine: one, model: fake-model}}], fallbacks: [{{engine: two, model: fake-model}}]}}
  dead: {{targets: [{{engine: dead, model: fake-model}}]}}
default_model: fake-model
breaker: {{failures: 1000}}
retries: {{budget: 1}}
"""


class Setting:
    """A gateway with one worker in front of two engines that follow a script."""

    def __init__(self, gateway: GatewayProcess, one: FakeEngine, two: FakeEngine, metrics: int, data: Path) -> None:
        self.gateway, self.one, self.two, self.metrics, self.data = gateway, one, two, metrics, data
        self.client = gateway.client()

    def ask(self, api: Api, text: str = "Hello", /, **more: Any) -> httpx.Response:
        return self.client.post(api.path, json=api.body(text, **more))

    def stream(self, api: Api, text: str = "Hello", /, **more: Any) -> httpx.Response:
        return post(self.client, api.path, json=api.body(text, stream=True, **more))
