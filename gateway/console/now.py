"""Now: a picture of this moment: the engines, who is answered, who waits, and what ended in the last minutes.

A worker tells how it sees the engines. The console's process tells the rest, from memory that the workers share, from
the small files in which they tell what they are at, and from one look at the names of the keys concerned. Each part is
bounded in size, and made at most once a second, however many pages ask for it.
"""

import time
from dataclasses import asdict
from typing import Any

import orjson
from starlette.responses import Response

from gateway.config import Config
from gateway.console.ask import Ask
from gateway.console.pages import Pages, answer
from gateway.errors import ModelLoading, StackError, StoreUnavailable
from gateway.exchange import Running
from gateway.keys.authenticate import Keys
from gateway.keys.book import Keybook
from gateway.recent.recent import Memory
from gateway.routing.health import Health
from gateway.settings import Settings
from gateway.upstream.client import Upstream
from gateway.upstream.load import GpuState
from gateway.upstream.progress import Progress
from gateway.usage import running
from gateway.usage.rows import LISTED

FRESH = 1.0  # seconds for which a picture is told again
ROWS = 100  # requests that are told one by one
ENGINES = 64  # engines that are told
MODELS = 20  # models of an engine that are told by name
TEXT = 200  # characters of a name
_STATES = {"open": "away", "half-open": "on trial"}  # of its breaker, in words
_GPU: dict[GpuState, str] = {
    "waking": "It gets the GPU now.",
    "asleep": "Another engine has the GPU.",
    "barred": "It did not wake, and its requests are rejected for some minutes.",
}
# What a request waits for, in words.
WAITS = {
    "queue": "for a slot",
    "load": "for its model",
    "outage": "for an engine that is down",
    "pause": "to be queued again",
}
MINUTE, FIVE = 60, 300  # seconds


class Engines:
    """Tell the state of the engines, and the trouble with the store, as this worker sees them."""

    def __init__(
        self,
        config: Config,
        keys: Keys,
        health: Health,
        upstreams: dict[str, Upstream],
        progress: Progress,
    ) -> None:
        self._config = config
        self._keys = keys
        self._health = health
        self._upstreams = upstreams
        self._progress = progress
        self._models = _models(config)
        self._made_at = float("-inf")
        self._told: dict[str, Any] = {}

    def told(self) -> dict[str, Any]:
        """Return what is true now, or was at most a second ago."""
        if time.monotonic() > self._made_at + FRESH:
            seen = list(self._health.seen().items())[:ENGINES]
            self._told = {
                "engines": [self._engine(name, *it) for name, it in seen],
                "store": None if self._keys.trouble is None else self._keys.trouble.message,
            }
            self._made_at = time.monotonic()
        return self._told

    def _engine(self, name: str, state: str, trouble: StackError | None) -> dict[str, Any]:
        upstream, models, message = self._upstreams[name], self._models.get(name, []), ""
        if trouble is not None:
            trouble = self._progress.explain(trouble, *models)
            state = str(trouble.code) if state not in _STATES or isinstance(trouble, ModelLoading) else state
            message = trouble.message
        elif (gpu_state := upstream.gpu_state()) in _GPU:
            state, message = gpu_state, _GPU[gpu_state]
        return {
            "name": name,
            "dialect": self._config.engines[name].dialect,
            "state": _STATES.get(state, state),
            "message": message,
            "models": [it[:TEXT] for it in models[:MODELS]],
            **upstream.load()._asdict(),
        }


class NowPages:
    """Show the picture. Runs in the console's process. What is `live` in an Ask is from Engines."""

    def __init__(self, settings: Settings, book: Keybook, recent: Memory, listed: frozenset[str], pages: Pages) -> None:
        self._home = settings.journals
        self._book = book
        self._recent = recent
        self._listed = listed
        self._pages = pages
        self._made_at = float("-inf")
        self._made: dict[str, Any] = {}

    def show(self, ask: Ask) -> Response:
        """Return the page."""
        return self._pages.page("now", ask.visitor, picture=self._picture(ask))

    def json(self, ask: Ask) -> Response:
        """Return the picture for the page's script."""
        return answer(orjson.dumps(self._picture(ask)), "application/json")

    def _picture(self, ask: Ask) -> dict[str, Any]:
        """Durations are in seconds."""
        if time.monotonic() > self._made_at + FRESH:
            self._made = self._make()
            self._made_at = time.monotonic()
        return {**self._made, **ask.live}

    def _make(self) -> dict[str, Any]:
        found = running.look(self._home)
        waiting = sorted((it for it in found if it.waits), key=lambda it: it.position or 0)
        answered = [it for it in found if not it.waits]
        shown = [*answered[:ROWS], *waiting[: max(ROWS // 2, ROWS - len(answered))]][:ROWS]
        called = self._called({it.key_id for it in shown})
        return {
            "at": time.time_ns() // 1_000_000,
            "answered": len(answered),
            "waiting": len(waiting),
            "speed": round(sum(_speed(it) for it in answered), 1),
            "running": [_row(it, called) for it in shown],
            "minute": asdict(self._recent.pace.told(MINUTE)),
            "five": asdict(self._recent.pace.told(FIVE)),
        }

    def _called(self, ids: set[str]) -> dict[str, tuple[str, str]]:
        """The names and owners of those keys. Without the store, those pages are still of use that need no names."""
        found = dict.fromkeys(ids & self._listed, (LISTED, ""))
        try:
            return found | self._book.called(ids - self._listed)
        except StoreUnavailable:
            return found


def _models(config: Config) -> dict[str, list[str]]:
    """By engine, the models that it may be asked for, by its own names for them."""
    found: dict[str, list[str]] = {}
    for model in config.models.values():
        for target in (*model.targets, *model.fallbacks):
            names = found.setdefault(target.engine, [])
            if target.model not in names:
                names.append(target.model)
    return found


def _speed(it: Running) -> float:
    return it.tokens / it.generating if it.generating else 0.0


def _row(it: Running, called: dict[str, tuple[str, str]]) -> dict[str, Any]:
    name, owner = called.get(it.key_id, ("", ""))
    return {
        "id": it.request_id,
        "key": it.key_id,
        "name": name,
        "owner": owner,
        "model": it.model[:TEXT],
        "engine": it.engine,
        "kind": it.kind,
        "stream": it.stream,
        "seconds": round(it.seconds, 1),
        "tokens": it.tokens,
        "speed": round(_speed(it), 1),
        "position": it.position,
        "waits": WAITS.get(it.waits or "", ""),
    }
