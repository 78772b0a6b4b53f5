"""Model names: decide which spellings mean the same model, for downloads, readiness, routing and prompts.

To Ollama `qwen3`, `Qwen3`, `qwen3:latest` and `registry.ollama.ai/library/qwen3` are one model. vLLM and llama.cpp
compare names letter by letter.
"""

import ssl
from collections.abc import Iterable

import httpx

from gateway.config import Config, Engine
from gateway.dialects import DIALECTS
from gateway.errors import EngineError, ModelNotFound


def canonical(dialect: str, name: str) -> str:
    """Return the one spelling for all names that mean this model to an engine of this dialect."""
    spelling = DIALECTS[dialect].spelling
    return name if spelling is None else spelling(name)


_SPELLING = tuple(name for name, it in DIALECTS.items() if it.spelling is not None)


class ModelNames:
    """Find the configured name that a caller means. Without stack.yaml, the names in the one engine's own list count
    too (`listed`)."""

    def __init__(self, config: Config) -> None:
        self.models = {used: name for name, model in config.models.items() for used in (name, *model.aliases)}
        self._dialect = config.engines["engine"].dialect if "engine" in config.engines else None
        # The configured names of targets on engines whose names have several spellings, by dialect and canonical
        # spelling.
        self._spelled: dict[tuple[str, str], str] = {}
        for used, name in self.models.items():
            for target in config.models[name].targets:
                dialect = config.engines[target.engine].dialect
                spelling = canonical(dialect, used)
                if dialect in _SPELLING and spelling == canonical(dialect, target.model):
                    self._spelled.setdefault((dialect, spelling), used)

    def find(self, name: str, listed: Iterable[str] = ()) -> str | None:
        """Return the configured name of the model that `name` means; None if there is none."""
        if name in self.models:
            return name
        for dialect in _SPELLING:
            if found := self._spelled.get((dialect, canonical(dialect, name))):
                return found
        if self._dialect is None:
            return next((it for it in listed if it == name), None)
        wanted = canonical(self._dialect, name)
        return next((it for it in listed if canonical(self._dialect, it) == wanted), None)

    def merged(self, listed: Iterable[str]) -> dict[str, str]:
        """Return the names of an engine's list by the configured name that means the same model, or by themselves."""
        return {self.find(name) or name: name for name in listed}


def look_up(config: Config, name: str, *, listed: bool) -> str:
    """Return the name of the model or split that a request for `name` gets. `listed`: the name may be any that the one
    engine lists, so the engine is asked.

    Raises ModelNotFound, or EngineError if the engine cannot be asked.
    """
    names = ModelNames(config)
    found = names.find(name)
    if found is None and listed:
        found = names.find(name, _list(config.engines["engine"]))
    if found is None:
        there = ", ".join(names.models)
        raise ModelNotFound(f"The model '{name[:200]}' does not exist here. Available: {there}.", param="model")
    return names.models.get(found, found)


def _list(engine: Engine) -> list[str]:
    headers = {"authorization": f"Bearer {engine.api_key.get_secret_value()}"} if engine.api_key else {}
    try:
        answer = httpx.get(
            f"{engine.base_url}/models",
            headers=headers,
            timeout=5,
            trust_env=False,
            verify=ssl.create_default_context(),
        )
        return [it["id"] for it in answer.json()["data"]]
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as exc:
        raise EngineError("The engine does not list its models. Try again when it runs.") from exc
