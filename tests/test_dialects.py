"""Each engine's file answers every question at every endpoint, and each endpoint's row has all that belongs to it."""

import asyncio
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from inspect import signature
from typing import Any, get_args

import pytest

from gateway.api.field_names import KNOWN
from gateway.api.openapi import SCHEMAS
from gateway.dialects import ALL, DIALECTS
from gateway.dialects.asking import Prompt, Told, Window, uncounted
from gateway.dialects.dialect import Dialect, Meaning, PartUse, ReasoningUse, RoleUse, Use, Ways
from gateway.dialects.ollama import OLLAMA
from gateway.dialects.vllm import VLLM
from gateway.endpoints import BY_PATH, ENDPOINTS, ROWS, Endpoint
from gateway.errors import EngineError, StackError
from gateway.upstream import parameters
from gateway.upstream.engine_errors import refusal

RANKED = {"rerank": {"query": "x", "documents": ["x"]}}  # an endpoint that needs more than its content
LEAST = {"messages": [{"role": "user", "content": "x"}], "prompts": "x", "inputs": "x"}


class Mute:
    """An engine that answers 200 and nothing else."""

    async def ask(self, path: str, body: dict[str, Any] | None = None, *, patient: bool = False) -> Told:  # noqa: ARG002
        return Told(200, b"{}")

    def refusal(self, told: Told) -> StackError:
        return EngineError(told.content.decode())


def gaps(dialects: Iterable[Dialect] = ALL, endpoints: Mapping[str, Endpoint] = ENDPOINTS) -> list[str]:
    """What is missing or wrong, engine by engine, endpoint by endpoint, table by table."""
    dialects = tuple(dialects)
    of_engines = [
        f"{it.name}: {gap}" for it in dialects for gap in (*_of_engine(it, dialects), *_at(it, dialects, endpoints))
    ]
    return of_engines + [f"{it.kind}: {gap}" for it in endpoints.values() for gap in _of_endpoint(it)]


def _of_endpoint(endpoint: Endpoint) -> Iterator[str]:
    """An estimate counts what the row names: a text that every request has must be there."""
    request = signature(SCHEMAS[endpoint.schema].document).parameters["body"].annotation
    for name, field in request.model_fields.items():
        if field.is_required() and name not in (endpoint.content, *endpoint.rendered):
            yield f"no estimate counts '{name}', because its row has it neither as content nor as rendered"


def _of_engine(dialect: Dialect, dialects: tuple[Dialect, ...]) -> Iterator[str]:
    tables: dict[str, tuple[Mapping[str, Any], Any]] = {
        "roles": (dialect.roles, RoleUse),
        "parts": (dialect.parts, PartUse),
        "reasoning": (dialect.reasoning, ReasoningUse),
    }
    for name, (table, allowed) in tables.items():
        for missing in set().union(*(getattr(it, name) for it in dialects)) - table.keys():
            yield f"{name} lacks '{missing}'"
        if odd := set(table.values()) - set(get_args(allowed)):
            yield f"{name} has {odd}"
    if odd := set(dialect.sampling.values()) - set(get_args(Use)):
        yield f"sampling has {odd}"
    if not dialect.url.startswith("http") or not dialect.url.endswith("/v1") or not dialect.model:
        yield "its default URL must end in /v1, and it must have a default model"
    if not dialect.health.startswith("/"):
        yield "health must be a path"
    if dialect.counts.get("include_usage") is not True:
        yield "counts must ask for usage"
    if not dialect.words or not dialect.too_long:
        yield "it has no words for errors"
    for word in dialect.words:
        if word.means not in get_args(Meaning) or word.phrase != word.phrase.lower():
            yield f"the word '{word.phrase}' can't be found in an error"
    yield from (f"too_long has '{it}'" for it in dialect.too_long if it != it.lower())
    if not all(type(values) is tuple for values in dialect.control.values()):
        yield "control needs a tuple of harmless values for each field"


def _at(dialect: Dialect, dialects: tuple[Dialect, ...], endpoints: Mapping[str, Endpoint]) -> Iterator[str]:
    yield from (f"it knows no endpoint '{it}'" for it in endpoints.keys() - dialect.endpoints.keys())
    yield from (f"there is no endpoint '{it}'" for it in dialect.endpoints.keys() - endpoints.keys())
    for kind in endpoints.keys() & dialect.endpoints.keys():
        ways = dialect.endpoints[kind]
        if ways is None:
            continue
        known = set().union(*(its.parameters for it in dialects if (its := it.endpoints.get(kind))))
        yield from (f"{kind}: no use of '{it}'" for it in known - ways.parameters.keys())
        yield from (f"{kind}: no use of '{it}'" for it in {"model", endpoints[kind].content} - ways.parameters.keys())
        yield from (f"{kind}: '{it}' stands twice" for it in ways.parameters.keys() & ways.extras.keys())
        if odd := {*ways.parameters.values(), *ways.extras.values()} - set(get_args(Use)):
            yield f"{kind}: a use {odd}"
        yield from _asked(dialect, ways, endpoints[kind])


def _asked(dialect: Dialect, ways: Ways, endpoint: Endpoint) -> Iterator[str]:
    fields = {"model": "m", endpoint.content: LEAST[endpoint.counted]} | RANKED.get(endpoint.kind, {})
    prompt = Prompt(endpoint.kind, "m", fields, 10)
    if asyncio.run(ways.count(Mute(), prompt)) is not None:
        yield f"{endpoint.kind}: it counts what nobody told"
    if not isinstance(asyncio.run(dialect.window(Mute(), prompt)), Window):
        yield f"{endpoint.kind}: it has no window"
    if ways.fit is not None and not isinstance(ways.fit(dict(fields)), dict):
        yield f"{endpoint.kind}: fit returns no fields"


def test_no_engine_leaves_a_question_open() -> None:
    assert gaps() == []


WITHOUT = {
    "an endpoint": replace(OLLAMA, endpoints={kind: it for kind, it in OLLAMA.endpoints.items() if kind != "chat"}),
    "a parameter": replace(
        VLLM,
        endpoints={
            **VLLM.endpoints,
            "embedding": Ways(parameters={"model": "taken", "input": "taken"}, count=uncounted),
        },
    ),
    "a role": replace(OLLAMA, roles={"user": "taken"}),
    "a part": replace(OLLAMA, parts={"text": "taken"}),
    "a use that there is": replace(OLLAMA, sampling={"top_k": "tolerated"}),
    "words": replace(OLLAMA, words=()),
    "phrases for a long prompt": replace(OLLAMA, too_long=()),
    "usage in streams": replace(OLLAMA, counts={}),
    "a health path": replace(OLLAMA, health="health"),
    "a base URL": replace(OLLAMA, url="http://127.0.0.1:1"),
}


@pytest.mark.parametrize("what", WITHOUT)
def test_a_file_without_an_answer_is_a_gap(what: str) -> None:
    found = gaps((WITHOUT[what], *(it for it in ALL if it.name != WITHOUT[what].name)))
    assert [it for it in found if it.startswith(WITHOUT[what].name)]


def test_every_name_and_path_is_that_of_one_row() -> None:
    assert len(ALL) == len(DIALECTS)
    assert sum(1 + len(it.also) for it in ROWS) == len(BY_PATH)
    assert len([it for it in ROWS if not it.translated]) == len(ENDPOINTS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.path)
def test_a_row_is_whole(row: Endpoint) -> None:
    assert row.path.startswith("/v1/")
    assert not row.asks.startswith("/")
    assert row.schema in SCHEMAS
    assert row.content in KNOWN
    assert row.logged_as.startswith("n_")
    assert row.kind in ENDPOINTS
    # What streams or is continued is made of tokens; a prompt of the operator's stands before no inputs.
    assert row.generates or not (row.streams or row.resumes or row.prompts)
    assert (SCHEMAS[row.schema].chunk is not None) == row.streams


def test_every_table_of_the_gateway_has_a_column_for_each_engine() -> None:
    for kind in ENDPOINTS:
        for table in (parameters.TABLES[kind], parameters.EXTRAS[kind], parameters.SAMPLING):
            assert {len(uses) for uses in table.values()} <= {len(DIALECTS)}


@pytest.mark.parametrize("dialect", ALL, ids=lambda it: it.name)
def test_each_word_of_an_engine_is_found_in_its_errors(dialect: Dialect) -> None:
    """A word that stands behind a more general one would never be reached."""
    for word in dialect.words:
        meant = next(it for it in dialect.words if it.phrase in word.phrase)
        assert meant is word
        error = refusal(dialect, 500, b'{"error":{"message":"%b","type":"x"}}' % word.phrase.replace('"', "").encode())
        assert error.status != 500
        assert error.status == 400 or word.means not in ("caller", "unable", "unsupported")
