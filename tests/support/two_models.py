"""An Ollama with two models behind a gateway: what the tests of swaps share."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.support.processes import AUTH, MESSAGES, FakeEngine, GatewayProcess, fake_engine, running_gateway

CHAT = "/v1/chat/completions"
A, B = "small", "own-system"
HELD = [["role"], ["token", "x"], ["gate", "go"], ["finish", "stop"], ["usage"], ["done"], ["end"]]
LOADING = re.compile(r": loading the model, about (\d+) s\n")


@contextmanager
def small_engine() -> Iterator[FakeEngine]:
    """Run an engine that has room for one model."""
    with fake_engine(dialect="ollama") as engine:
        engine.set(room=1, seconds=0.2)
        yield engine


@contextmanager
def before(engine: FakeEngine, directory: Path, name: str = "log", **settings: str) -> Iterator[GatewayProcess]:
    """A gateway of two models, whose log has that name."""
    lines = "".join(f'  - {{ model: "{it}", engine: "engine" }}\n' for it in (A, B))
    (directory / "models.yaml").write_text(f"models:\n{lines}")
    settings = {
        "LLM_BACKEND": "ollama",
        "LLM_SLOTS": "2",
        "STACK_HOLD": "0.1",
        "STACK_CONFIG": str(directory / "stack.yaml"),
    } | settings
    with running_gateway(directory / name, engine.url, **settings) as gateway:
        yield gateway


def memory(engine: FakeEngine) -> dict[str, Any]:
    """Return the models that are loaded, all loads so far, those that failed, and how many were given up."""
    told = httpx.get(f"{engine.url}/api/ps", timeout=30).json()
    return told | {"models": [it["model"] for it in told["models"]]}


async def ask(http: httpx.AsyncClient, model: str, mark: str, script: list[Any] | None = None, **fields: Any) -> str:
    """Send a request, and return its answer's text."""
    body = {"model": model, "messages": MESSAGES, "user": mark, **fields} | ({"script": script} if script else {})
    async with http.stream("POST", CHAT, json=body) as answer:
        assert answer.status_code == 200
        return "".join([it async for it in answer.aiter_text()])


def client(gateway: GatewayProcess) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=gateway.url, headers=AUTH, timeout=60, limits=httpx.Limits(max_connections=200))


def learn(gateway: GatewayProcess) -> None:
    """Ask for both models once. The gateway then knows that they do not fit together."""
    with gateway.client() as http:
        for model in (A, B):
            assert http.post(CHAT, json={"model": model, "messages": MESSAGES}).status_code == 200
