"""Parameters: rewrite a request's fields for an engine. An engine takes a field, takes it under another name, or
silently drops it; the caller is told which fields are dropped.

Each engine's file in gateway.dialects says what it does with each field. A field that no file names is passed on.
docs/parameters.md shows the tables to users, and a test compares them. The types of OpenAI's Python client are the test
that the tables are complete.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gateway import headers
from gateway.dialects import DIALECTS
from gateway.dialects.dialect import Dialect, Use, Ways
from gateway.endpoints import ENDPOINTS, Endpoint, Kind
from gateway.errors import EndpointMissing
from gateway.upstream import messages

ENGINES = tuple(DIALECTS)


_Table = Mapping[str, Use] | None  # None: the engine does not have the endpoint


def _columns(tables: list[_Table]) -> dict[str, tuple[Use, ...]]:
    """Return how each engine uses each name. An engine ignores a name that only another engine has."""
    names = dict.fromkeys(name for table in tables for name in table or ())
    return {name: tuple(_use(table, name) for table in tables) for name in names}


def _use(table: _Table, name: str) -> Use:
    return "refused" if table is None else table.get(name, "ignored")


def _parameters(kind: Kind) -> list[_Table]:
    return [ways.parameters if (ways := it.endpoints.get(kind)) else None for it in DIALECTS.values()]


def _extras(endpoint: Endpoint) -> list[_Table]:
    return [_own(it, ways, endpoint) if (ways := it.endpoints.get(endpoint.kind)) else None for it in DIALECTS.values()]


def _own(dialect: Dialect, ways: Ways, endpoint: Endpoint) -> Mapping[str, Use]:
    return {**dialect.sampling, **ways.extras} if endpoint.generates else ways.extras


# By endpoint: OpenAI's parameters, and other fields that people send. SAMPLING are those that only steer how tokens are
# drawn. Each row has a column for each engine, in the order of ENGINES.
TABLES = {kind: _columns(_parameters(kind)) for kind in ENDPOINTS}
EXTRAS = {kind: _columns(_extras(endpoint)) for kind, endpoint in ENDPOINTS.items()}
SAMPLING = _columns([it.sampling for it in DIALECTS.values()])

# The values of a parameter that ask for nothing, as if the parameter were not there. Null asks for nothing in every
# case.
_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
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
    "ignore_eos": (False,),
    "use_beam_search": (False,),
    "include_reasoning": (True,),
    "echo": (False,),
    "documents": ([],),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "skip_special_tokens": (True,),
    "return_token_ids": (False,),
    "return_prompt_text": (False,),
    "timings_per_token": (False,),
    "raw": (False,),
    "format": ("",),
    "reasoning": ({},),
    "user": ("",),
}


@dataclass(frozen=True, slots=True)
class Reading:
    """A request's fields as an engine should get them, and the sorted names of those that it will ignore. `roles` are
    the roles of messages that became others, such as `developer=system`."""

    fields: dict[str, Any]
    ignored: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        ignored = [(headers.IGNORED_PARAMS, ",".join(self.ignored).encode())] if self.ignored else []
        return [*ignored, *told_roles(self.roles)]


def told_roles(roles: Iterable[str]) -> list[tuple[bytes, bytes]]:
    """Return the header that says which roles became others, each change once."""
    changes = ",".join(dict.fromkeys(roles))
    return [(headers.CHANGED_ROLES, changes.encode())] if changes else []


def read(engine: str, kind: Kind, fields: dict[str, Any]) -> Reading:
    """Return a request's fields in the form of this engine. Raises BadRequest if they have none, and EndpointMissing if
    the engine lacks the endpoint."""
    plan = _PLANS.get((engine, kind))
    if plan is None:
        raise EndpointMissing(f"The engine behind this model has no {ENDPOINTS[kind].path}.")
    ignored: list[str] = []
    if not plan.watched.keys().isdisjoint(fields):
        fields = dict(fields)
        for name in sorted(plan.watched.keys() & fields.keys()):
            _read(name, plan.watched[name], fields, ignored)
    roles = messages.renamed(engine, fields["messages"]) if plan.chats else ()
    return Reading(_fitted(engine, plan, fields), tuple(ignored), roles)


def asks_for_nothing(name: str, value: Any) -> bool:
    """Return whether a field with this value has the same meaning as a missing field."""
    return value is None or value in _DEFAULTS.get(name, ())


def _read(name: str, use: Use, fields: dict[str, Any], ignored: list[str]) -> None:
    value = fields[name]
    if asks_for_nothing(name, value):
        return
    if use == "as max_tokens":
        fields["max_tokens"] = value
        del fields[name]
    elif use == "ignored":
        ignored.append(name)
    elif value == "none":  # the engine does not obey this tool_choice, so it gets no tools
        fields.pop("tools", None)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What to change in requests of one kind for one engine. Made once, at import."""

    watched: dict[str, Use]  # the parameters whose value matters
    chats: bool
    refuses_nothing: bool
    fit: Callable[[dict[str, Any]], dict[str, Any]] | None


def _plan(dialect: Dialect, ways: Ways, endpoint: Endpoint) -> _Plan:
    column, rows = ENGINES.index(dialect.name), TABLES[endpoint.kind] | EXTRAS[endpoint.kind]
    watched = {name: row[column] for name, row in rows.items() if row[column] not in ("taken", "refused")}
    return _Plan(watched, endpoint.chats, dialect.refuses_nothing, ways.fit)


_PLANS: dict[tuple[str, Kind], _Plan] = {
    (name, kind): _plan(dialect, ways, ENDPOINTS[kind])
    for name, dialect in DIALECTS.items()
    for kind, ways in dialect.endpoints.items()
    if ways is not None
}


def _fitted(engine: str, plan: _Plan, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with values that this engine takes and that mean the same. Raises BadRequest if there
    are none."""
    if not _MAY_BE_EMPTY.isdisjoint(fields):
        fields = _without_empty(plan, fields)
    if plan.chats:
        told = messages.read(engine, fields["messages"])
        fields = fields if told is fields["messages"] else fields | {"messages": told}
    return fields if plan.fit is None else plan.fit(fields)


_MAY_BE_EMPTY = frozenset({"stop", "suffix", "tools", "tool_choice", "stream_options"})


def _without_empty(plan: _Plan, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields without those that ask for nothing but change the answer or are refused.

    An empty stop sequence ends Ollama's answer before it begins, and vLLM refuses it. vLLM also refuses an empty
    suffix, an empty list of tools, a tool_choice without tools, and stream_options without a stream.
    """
    gone = {name for name, nothing in (("stop", ""), ("suffix", "")) if fields.get(name) == nothing}
    stops = fields.get("stop")
    if isinstance(stops, list) and "" in stops:
        stops = [it for it in stops if it != ""]
        gone.add("stop")
    if plan.refuses_nothing:
        if fields.get("tools") == []:
            gone.add("tools")
        if not fields.get("tools") and fields.get("tool_choice") in ("auto", "none"):
            gone.add("tool_choice")
        if "stream_options" in fields and not fields.get("stream"):
            gone.add("stream_options")
    if not gone:
        return fields
    kept = {name: value for name, value in fields.items() if name not in gone}
    return kept | {"stop": stops} if stops and "stop" in gone else kept
