"""Parameters: what each engine makes of OpenAI's, in one table per endpoint: which it takes, which under another name,
and which it drops in silence, so that somebody says so.

What isn't in a table (vLLM's and llama.cpp's own extras) passes. docs/parameters.md shows the tables to users, and a
test compares them; the official client's types say whether they are complete.
"""

from dataclasses import dataclass
from typing import Any, Literal

from gateway.exchange import Kind

Use = Literal[
    "taken",
    "as max_tokens",  # taken, once it has that name
    "ignored",
    "ignored if it names a tool",
    "refused",  # by the engine itself, with a 400
]
ENGINES = ("ollama", "vllm", "llamacpp")
HEADER = b"x-stack-ignored-params"

# Ollama (openai/openai.go, read: Go drops fields that a struct doesn't have), vLLM (its protocol.py for each endpoint,
# read: unknown fields are logged at most), llama.cpp b11549 (tried; tests/stack/test_parameters.py).
_ALL: tuple[Use, ...] = ("taken",) * 3
_NONE: tuple[Use, ...] = ("ignored",) * 3
TABLES: dict[Kind, dict[str, tuple[Use, ...]]] = {
    "chat": {
        "messages": _ALL,
        "model": _ALL,
        "stream": _ALL,
        "stream_options": _ALL,
        "max_tokens": _ALL,
        "max_completion_tokens": ("as max_tokens", "taken", "taken"),
        "temperature": _ALL,
        "top_p": _ALL,
        "n": ("ignored", "taken", "taken"),
        "stop": _ALL,
        "seed": _ALL,
        "frequency_penalty": _ALL,
        "presence_penalty": _ALL,
        "logit_bias": ("ignored", "taken", "taken"),
        "logprobs": _ALL,
        "top_logprobs": _ALL,
        "response_format": _ALL,
        "tools": _ALL,
        "tool_choice": ("ignored", "taken", "ignored if it names a tool"),
        "parallel_tool_calls": ("ignored", "taken", "taken"),
        "reasoning_effort": _ALL,
        "verbosity": _NONE,
        "modalities": _NONE,
        "audio": _NONE,
        "prediction": _NONE,
        "web_search_options": _NONE,
        "functions": _NONE,
        "function_call": _NONE,
        "user": _NONE,
        "safety_identifier": _NONE,
        "prompt_cache_key": _NONE,
        "prompt_cache_retention": _NONE,
        "prompt_cache_options": _NONE,
        "service_tier": _NONE,
        "store": _NONE,
        "metadata": _NONE,
        "moderation": _NONE,
    },
    "completion": {
        "prompt": _ALL,
        "model": _ALL,
        "stream": _ALL,
        "stream_options": _ALL,
        "max_tokens": _ALL,
        "temperature": _ALL,
        "top_p": _ALL,
        "n": ("ignored", "taken", "taken"),
        "stop": _ALL,
        "seed": _ALL,
        "frequency_penalty": _ALL,
        "presence_penalty": _ALL,
        "logit_bias": ("ignored", "taken", "taken"),
        "logprobs": _ALL,
        "suffix": ("taken", "refused", "ignored"),
        "echo": ("ignored", "taken", "ignored"),
        "best_of": _NONE,
        "user": _NONE,
    },
    "embedding": {
        "input": _ALL,
        "model": _ALL,
        "encoding_format": _ALL,
        "dimensions": ("taken", "taken", "ignored"),
        "user": _NONE,
    },
}

# What a parameter may say without asking for anything: it is as if it weren't there. So is null, for all of them.
_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "tool_choice": ("auto",),
    "parallel_tool_calls": (True,),
    "verbosity": ("medium",),
    "modalities": (["text"],),
    "functions": ([],),
    "function_call": ("auto", "none"),
    "prompt_cache_retention": ("in_memory",),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "metadata": ({},),
}


@dataclass(frozen=True, slots=True)
class Reading:
    """A request's fields as an engine should get them, and the names of those it will ignore, sorted."""

    fields: dict[str, Any]
    ignored: tuple[str, ...] = ()

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        return [(HEADER, ",".join(self.ignored).encode())] if self.ignored else []


def read(engine: str, kind: Kind, fields: dict[str, Any]) -> Reading:
    """What this engine makes of a request's fields."""
    watched = _WATCHED[engine, kind]
    if watched.keys().isdisjoint(fields):
        return Reading(fields)
    ignored = []
    for name in sorted(watched.keys() & fields.keys()):
        value = fields[name]
        if value is None or value in _DEFAULTS.get(name, ()):
            continue
        if watched[name] == "as max_tokens":
            fields = fields | {"max_tokens": value}
            del fields[name]
        elif watched[name] == "ignored" or isinstance(value, dict):
            ignored.append(name)
    return Reading(fields, tuple(ignored))


def _watched(column: int, table: dict[str, tuple[Use, ...]]) -> dict[str, Use]:
    """The parameters whose value matters here, with their use."""
    uses = {name: row[column] for name, row in table.items()}
    return {name: use for name, use in uses.items() if use not in ("taken", "refused")}


_WATCHED: dict[tuple[str, Kind], dict[str, Use]] = {
    (engine, kind): _watched(column, table) for column, engine in enumerate(ENGINES) for kind, table in TABLES.items()
}
