"""Attributes: the groups of attributes that spans have in common, each written once and kept."""

from functools import lru_cache
from typing import NamedTuple
from urllib.parse import urlsplit

from gateway.exchange import Exchange
from gateway.traces import names
from gateway.traces.otlp import attribute


class Reached(NamedTuple):
    """Where an engine is."""

    dialect: str
    base_url: str


@lru_cache(maxsize=1024)
def of_request(method: str, route: str) -> bytes:
    """Return what is the same for all requests of a method to a route."""
    return b"".join(
        (
            attribute(names.METHOD, method),
            attribute(names.SCHEME, "http"),
            attribute(names.ROUTE, route) if route else b"",
        )
    )


@lru_cache(maxsize=1024)
def of_exchange(kind: str, api: str, model: str, arm: str, key_id: str, stream: bool, end: str) -> bytes:
    """Return what the span of a request says of its exchange. `end` is the finish_reason, or empty."""
    return b"".join(
        (
            attribute(names.OPERATION, names.OPERATIONS.get(kind, kind)),
            attribute(names.REQUEST_MODEL, model),
            attribute(names.STREAM, stream),
            attribute(names.API, api),
            attribute(names.KEY, key_id),
            attribute(names.ARM, arm) if arm else b"",
            attribute(names.FINISH_REASONS, end.split(",")) if end else b"",
        )
    )


@lru_cache(maxsize=1024)
def named(kind: str, model: str) -> str:
    """Return the name of an attempt's span."""
    return f"{names.OPERATIONS.get(kind, kind)} {model}"


def of_engine(name: str, it: Reached) -> bytes:
    """Return what an attempt's span says of the engine."""
    url = urlsplit(it.base_url)
    port = url.port or (443 if url.scheme == "https" else 80)
    return b"".join(
        (
            attribute(names.ENGINE, name),
            attribute(names.PROVIDER, it.dialect),
            attribute(names.ADDRESS, url.hostname or ""),
            attribute(names.PORT, port),
        )
    )


def of_attempt(model: str, it: Exchange) -> bytes:
    """Return what an attempt asks for, by the engine's name for the model."""
    fields = it.fields
    limit = _number(fields.get("max_tokens")) or _number(fields.get("max_completion_tokens"))
    temperature, top_p, seed = (_number(fields.get(name)) for name in ("temperature", "top_p", "seed"))
    choices = it.choices if it.endpoint.generates else 1
    return _attempt(it.kind, model, it.stream, limit, temperature, top_p, seed, choices)


def _number(value: object) -> float | None:
    return value if type(value) is int or type(value) is float else None


@lru_cache(maxsize=1024)
def _attempt(
    kind: str,
    model: str,
    stream: bool,
    limit: float | None,
    temperature: float | None,
    top_p: float | None,
    seed: float | None,
    choices: int,
) -> bytes:
    return b"".join(
        (
            attribute(names.OPERATION, names.OPERATIONS.get(kind, kind)),
            attribute(names.REQUEST_MODEL, model),
            attribute(names.STREAM, stream),
            b"" if limit is None else attribute(names.MAX_TOKENS, int(limit)),
            b"" if temperature is None else attribute(names.TEMPERATURE, float(temperature)),
            b"" if top_p is None else attribute(names.TOP_P, float(top_p)),
            b"" if seed is None else attribute(names.SEED, int(seed)),
            b"" if choices == 1 else attribute(names.CHOICES, choices),
        )
    )
