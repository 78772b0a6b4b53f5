"""Which engines are asked to load models, and what Ollama says about its memory."""

import datetime as dt
import json
from typing import Any

import pytest

from gateway.admission.loading import several
from gateway.config import Config
from gateway.dialects.asking import Told
from gateway.dialects.ollama import OLLAMA
from gateway.errors import StackError

pytestmark = pytest.mark.anyio


def config(**models: list[tuple[str, str]]) -> Config:
    """Return a configuration with these models, whose targets are pairs of an engine and a model."""
    engines = {engine for them in models.values() for engine, _ in them}
    return Config.model_validate(
        {
            "engines": {it: {"dialect": "ollama", "base_url": "http://127.0.0.1:1/v1"} for it in engines},
            "models": {
                name: {"targets": [{"engine": engine, "model": model} for engine, model in them]}
                for name, them in models.items()
            },
            "default_model": next(iter(models)),
        }
    )


def test_only_an_engine_of_several_models_may_have_to_swap() -> None:
    assert several(config(one=[("x", "a")], two=[("y", "b")]), any_model=False) == set()
    assert several(config(one=[("x", "a")], two=[("x", "A:latest")]), any_model=False) == set(), "it is one model"
    assert several(config(one=[("x", "a")], two=[("x", "b"), ("y", "b")]), any_model=False) == {"x"}
    assert several(config(one=[("engine", "a")]), any_model=True) == {"engine"}


class Engine:
    """An Ollama that says this at /api/ps."""

    def __init__(self, expires_at: str) -> None:
        self._said = {"models": [{"name": "smol:latest", "model": "smol:latest", "expires_at": expires_at}]}

    async def ask(self, path: str, body: dict[str, Any] | None = None, *, patient: bool = False) -> Told:
        assert (path, body, patient) == ("/api/ps", None, False)
        return Told(200, json.dumps(self._said).encode())

    def refusal(self, told: Told) -> StackError:
        raise NotImplementedError(told)


@pytest.mark.parametrize("ending", ["789Z", "Z"])
async def test_ollama_tells_for_how_long_it_keeps_a_model(ending: str) -> None:
    moment = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=1000)
    assert OLLAMA.loader
    (found,) = (await OLLAMA.loader.loaded(Engine(f"{moment:%Y-%m-%dT%H:%M:%S.%f}{ending}"))).items()
    assert found[0] == "registry.ollama.ai/library/smol:latest"
    assert 900 < found[1] <= 1000


async def test_a_moment_that_cannot_be_read_is_over() -> None:
    assert OLLAMA.loader
    assert list((await OLLAMA.loader.loaded(Engine("never"))).values()) == [0.0]
