"""Asking: the questions to an engine about itself, and the reading of its answers. The engines' files build on this."""

from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol

import orjson

from gateway.endpoints import ENDPOINTS, Endpoint, Kind
from gateway.errors import StackError

ANY = "*"  # in place of a model's name, for an engine whose one model answers to every name
CAPABILITIES = ("chat", "embeddings", "tools", "vision", "audio", "thinking")
MAX_CONTAINERS = 100_000  # lists and objects in the answer to a control call


@dataclass(frozen=True, slots=True)
class Told:
    """The answer to a control call."""

    status: int
    content: bytes

    def json(self) -> Any:
        """Return the content's value. Raises ValueError if it is not JSON, or has too many lists and objects."""
        if self.content.count(b"[") + self.content.count(b"{") > MAX_CONTAINERS:
            raise ValueError("too many lists and objects")
        return orjson.loads(self.content)


class Engine(Protocol):
    """An engine that can be asked: an Upstream, or a test's own."""

    async def ask(self, path: str, body: dict[str, Any] | None = None, *, patient: bool = False) -> Told:
        """GET `path`, or POST `body` to it. Raises EngineError if there is no answer that can be used."""

    def refusal(self, told: Told) -> StackError:
        """Return what an answer with any status but 200 means."""


@dataclass(frozen=True, slots=True)
class Window:
    """The context window of a model on an engine: `limit` tokens, None if it is not known. The model's configuration
    puts at most `own` bytes before every prompt. `unloaded`: the window is not known because the engine does not keep
    the model in memory, so each prompt has to be counted."""

    limit: int | None
    own: int = 0
    unloaded: bool = False
    asked_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Facts:
    """What an engine reports about one of its models. None: it does not report it."""

    context: int | None = None  # tokens of the window in force
    trained: int | None = None  # tokens of the largest window that the model was made for
    capabilities: frozenset[str] | None = None  # some of CAPABILITIES
    loaded: bool | None = None  # whether it is in the engine's memory


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request on its way to an engine: its fields, and its size in bytes of JSON."""

    kind: Kind
    model: str
    fields: dict[str, Any]
    size: int

    @property
    def endpoint(self) -> Endpoint:
        return ENDPOINTS[self.kind]

    @property
    def content(self) -> Any:
        """The messages, prompts or inputs."""
        return self.fields[self.endpoint.content]


# Return what a model can read. Raises EngineError.
AskWindow = Callable[[Engine, Prompt], Awaitable[Window]]
# Return what is known about each model, by the engine's own name for it. Under ANY are the facts of every other name.
# Raises EngineError.
AskModels = Callable[[Engine], Awaitable[Mapping[str, Facts]]]
# Return a prompt's tokens; None if the engine does not count them. Raises ContextExceeded if the engine says so,
# EngineError if it cannot count them now, and BadRequest if they have no form in which it could.
AskCount = Callable[[Engine, Prompt], Awaitable[int | None]]
# Return how many requests an engine works on at a time; None if it does not report that. Raises EngineError.
AskSlots = Callable[[Engine], Awaitable[int | None]]


async def uncounted(_engine: Engine, _prompt: Prompt) -> int | None:
    """Return None: no engine of this dialect counts such a prompt."""
    return None


async def listed(engine: Engine) -> Mapping[str, Facts]:
    """Return the facts in OpenAI's list of models: the windows, if the engine adds them. An engine that lists a model
    this way has loaded it."""
    entries = as_list(await engine.ask("models"), "data")
    return {str(it.get("id")): Facts(context=as_count(it.get("max_model_len")), loaded=True) for it in entries}


def as_object(told: Told) -> dict[str, Any]:
    """Return an answer's JSON object; an empty one if there is none."""
    with suppress(ValueError):
        if told.status == HTTPStatus.OK and isinstance(value := told.json(), dict):
            return value
    return {}


def as_list(told: Told, name: str) -> list[dict[str, Any]]:
    """Return the objects in a list of an answer's JSON object; an empty list if there is none."""
    entries = as_object(told).get(name)
    return [it for it in entries if isinstance(it, dict)] if isinstance(entries, list) else []


def as_count(value: object) -> int | None:
    """Return a positive whole number as it is, and None for everything else."""
    return value if type(value) is int and value > 0 else None
