"""Demand: read what a request demands of the tool calls in its answer."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, Literal

from jsonschema_rs import ReferencingError, ValidationError, Validator

from gateway import caller_schemas, schema_validators
from gateway.errors import BadRequest
from gateway.forced_tools import keywords

Mode = Literal["auto", "required", "named", "none"]

_CHOICES = "'tool_choice' must be none, auto, required, or an object that names a function."
_PATTERNS = frozenset({"pattern", "patternProperties"})


@dataclass(frozen=True)
class Tool:
    """One function that the answer may call. `where` is its field in the request."""

    name: str
    description: str
    parameters: dict[str, Any]  # the JSON Schema of its arguments, an object
    strict: bool
    entry: dict[str, Any]  # the tool as the request has it
    where: str

    def check(self, budget: schema_validators.Budget) -> None:
        """Raise BadRequest if the schema is malformed, takes more time to compile than is left to all tools, or has a
        reference by which the steps of a check cannot be counted. Patterns are not compiled, unless a reference points
        into them."""
        if (reference := self._unfollowed()) is not None:
            raise self._refused(
                f"refers to {reference[:64]!r}. Only JSON pointers to parts of it, such as '#/$defs/name', are"
                " followed, and none if a part has an '$id'."
            )
        try:
            schema_validators.count(self.parameters, budget)
        except ValueError as exc:
            raise self._refused(f"cannot be checked: {exc}.") from None
        self._validator(chain(self._bare(), self._patterned()))

    @cached_property
    def validator(self) -> Validator:
        """The validator of its arguments, which fetches nothing. It is made without patterns if one of them cannot be
        matched in linear time, or is too large."""
        return self._validator(self._patterned())

    def _patterned(self) -> Iterator[Any]:
        yield self.parameters
        yield keywords.without(self.parameters, lambda name, _: name in _PATTERNS)
        yield from self._bare()

    def _bare(self) -> Iterator[Any]:
        bare = keywords.without_patterns(self.parameters)
        yield bare
        if "$schema" in bare:
            yield {name: value for name, value in bare.items() if name != "$schema"}

    def _validator(self, schemas: Iterable[Any]) -> Validator:
        """Return a validator by the first of these schemas that has one. Raises BadRequest."""
        reason = ""
        for schema in schemas:
            try:
                return schema_validators.validator(schema)
            except (ValidationError, ReferencingError, ValueError) as exc:
                reason = str(getattr(exc, "message", exc))[:200]
        raise self._refused(f"is not a valid JSON Schema: {reason}")

    def _unfollowed(self) -> str | None:
        """Return a reference that does not point to a part of the schema by its place; None if there is none."""
        root = self.parameters
        parts = list(keywords.schemas(root))
        found = [it for part in parts for it in caller_schemas.references(part)]
        if found and any(part is not root and caller_schemas.is_based(root, part) for part in parts):
            return found[0]
        return next((it for it in found if caller_schemas.target(root, it) is None), None)

    def _refused(self, reason: str) -> BadRequest:
        param = f"{self.where}.parameters"
        return BadRequest(f"'{param}' {reason}", param=param)


@dataclass(frozen=True, slots=True)
class Demand:
    """The demand: `tools` are those that may be called, and `several` is whether more than one call is wanted.
    `narrowed`: the request has more tools than that."""

    mode: Mode
    tools: tuple[Tool, ...]
    several: bool
    narrowed: bool = False

    @property
    def must_call(self) -> bool:
        """Whether an answer without a call is wrong."""
        return self.mode in ("required", "named")

    @property
    def checked(self) -> tuple[Tool, ...]:
        """The tools whose arguments must be valid: all of them if a call is forced, otherwise the strict ones."""
        return self.tools if self.must_call else tuple(it for it in self.tools if it.strict)


def read(fields: dict[str, Any]) -> Demand | None:
    """Return what a chat request demands; None if it demands nothing. Raises BadRequest that names the field."""
    choice, entries = fields.get("tool_choice"), fields.get("tools")
    if not entries:
        if choice not in (None, "auto", "none"):
            raise BadRequest("'tool_choice' demands a call, but 'tools' is missing or empty.", param="tool_choice")
        return None
    if choice in (None, "auto") and fields.get("parallel_tool_calls") is not False and not _any_strict(entries):
        return None
    mode, names, where = _choice(choice)
    tools = tuple(_tools(entries, exact=mode in ("required", "named")))
    several = fields.get("parallel_tool_calls") is not False
    if names is not None:
        for name in names:
            if all(it.name != name for it in tools):
                raise BadRequest(f"'{where}' names a function that is not in 'tools': {name[:64]!r}.", param=where)
        tools = tuple(it for it in tools if it.name in names)
    if mode == "required" and not tools:
        raise BadRequest("'tool_choice' demands a call, but 'tools' has no function.", param="tool_choice")
    return Demand(mode, tools, several and mode != "named", narrowed=names is not None and mode != "named")


def check(fields: dict[str, Any]) -> None:
    """Refuse a demand that no engine could meet. Raises BadRequest that names the field."""
    if "tools" in fields or "tool_choice" in fields:
        demand, budget = read(fields), schema_validators.Budget()
        for tool in demand.checked if demand else ():
            tool.check(budget)


def _any_strict(entries: Any) -> bool:
    """Return whether a tool is strict. Agents send dozens of tools with each request, and usually none is strict."""
    return isinstance(entries, list) and any(
        type(it) is dict and type(function := it.get("function")) is dict and function.get("strict") is True
        for it in entries
    )


def _choice(choice: Any) -> tuple[Mode, tuple[str, ...] | None, str]:
    """Return the mode, the names that may be called (None: all), and the field that has them."""
    if choice is None or choice == "auto":
        return "auto", None, ""
    if choice == "required":
        return "required", None, ""
    if choice == "none":
        return "none", None, ""
    if not isinstance(choice, dict):
        raise BadRequest(_CHOICES, param="tool_choice")
    if choice.get("type") == "allowed_tools":
        return _allowed(choice.get("allowed_tools"))
    if choice.get("type", "function") != "function":
        raise BadRequest("'tool_choice.type' must be function or allowed_tools.", param="tool_choice.type")
    return "named", (_name(choice, "tool_choice"),), "tool_choice.function.name"


def _allowed(allowed: Any) -> tuple[Mode, tuple[str, ...], str]:
    where = "tool_choice.allowed_tools"
    if not isinstance(allowed, dict) or allowed.get("mode") not in ("auto", "required"):
        raise BadRequest(f"'{where}.mode' must be auto or required.", param=f"{where}.mode")
    tools = allowed.get("tools")
    if not isinstance(tools, list) or not tools:
        raise BadRequest(f"'{where}.tools' must be a list with at least one function.", param=f"{where}.tools")
    names = tuple(_name(it, f"{where}.tools[{index}]") for index, it in enumerate(tools))
    return ("auto" if allowed["mode"] == "auto" else "required"), names, f"{where}.tools"


def _name(holder: Any, where: str) -> str:
    function = holder.get("function") if isinstance(holder, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise BadRequest(f"'{where}.function.name' must be the name of a function.", param=f"{where}.function.name")
    return name


def _tools(entries: Any, *, exact: bool) -> Iterable[Tool]:
    """Return the functions of a request. If `exact`, raises BadRequest for a tool that cannot be called."""
    if not isinstance(entries, list):
        raise BadRequest("'tools' must be a list.", param="tools")
    for index, entry in enumerate(entries):
        where = f"tools[{index}].function"
        function = entry.get("function") if isinstance(entry, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(entry, dict) and isinstance(function, dict) and isinstance(name, str) and name:
            yield _tool(entry, function, where, exact=exact)
        elif exact and isinstance(entry, dict) and entry.get("type", "function") == "function":
            raise BadRequest(f"'{where}.name' must be the name of a function.", param=f"{where}.name")


def _tool(entry: dict[str, Any], function: dict[str, Any], where: str, *, exact: bool) -> Tool:
    parameters = function.get("parameters")
    if exact and not isinstance(parameters, dict | None):
        raise BadRequest(f"'{where}.parameters' must be a JSON Schema.", param=f"{where}.parameters")
    schema = {"type": "object"} | (parameters if isinstance(parameters, dict) else {})
    about = function.get("description")
    return Tool(
        name=function["name"],
        description=about if isinstance(about, str) else "",
        parameters=schema,
        strict=function.get("strict") is True,
        entry=entry,
        where=where,
    )
