"""Schema: make the JSON Schema by which an engine constrains its answer to tool calls.

Engines compile such a schema to a grammar, and refuse the whole request if they cannot compile one keyword. Only the
keywords that all engines know are therefore kept. The arguments are checked by the caller's own schema afterwards.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from gateway.forced_tools.demand import Demand, Tool

MOST_CALLS = 8  # calls in one answer; a small model without a limit may never stop

_KEPT = frozenset(
    {"type", "required", "minItems", "maxItems", "minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum"}
    | {"exclusiveMaximum", "enum", "const", "format"}
)
_SCHEMA = frozenset({"items", "additionalProperties"})
_LISTS = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
_MAPS = frozenset({"properties", "$defs", "definitions"})
# llama.cpp takes only anchored patterns without character classes such as \d.
_PATTERN = re.compile(r"\^(?:(?!\(\?)[^\\])*\$")
_REPEAT = re.compile(r"\{(\d{1,9})(?:,(\d{0,9}))?\}")
_BOUNDS = ("minItems", "maxItems", "minLength", "maxLength")


def answer_schema(demand: Demand, most_repeats: int | None) -> dict[str, Any]:
    """Return the schema of an answer that meets the demand: the arguments of the named function, a call `{"name",
    "arguments"}`, or a list of calls. `most_repeats` is the engine's limit of repetitions, None for none."""
    if demand.mode == "named":
        named: dict[str, Any] = fitted(demand.tools[0].parameters, "#", most_repeats)
        return named
    shared: dict[str, Any] = {}
    calls = [_call(tool, f"tool{index}", shared, most_repeats) for index, tool in enumerate(demand.tools)]
    schema = calls[0] if len(calls) == 1 else {"anyOf": calls}
    if demand.several:
        schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": MOST_CALLS}
    return schema | {"$defs": shared} if shared else schema


def _call(tool: Tool, key: str, shared: dict[str, Any], most: int | None) -> dict[str, Any]:
    """Return the schema of a call. Arguments that refer to themselves are put into `shared` under this key, because
    llama.cpp does not follow a reference through a list."""
    arguments: dict[str, Any] = fitted(tool.parameters, f"#/$defs/{key}", most)
    if _refers(arguments):
        shared[key], arguments = arguments, {"$ref": f"#/$defs/{key}"}
    return {
        "type": "object",
        "properties": {"name": {"type": "string", "enum": [tool.name]}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _refers(schema: Any) -> bool:
    if isinstance(schema, dict):
        return "$ref" in schema or any(map(_refers, schema.values()))
    return isinstance(schema, list) and any(map(_refers, schema))


def fitted(schema: Any, at: str, most: int | None) -> Any:
    """Return a schema in the form that engines compile, for the place `at` (a JSON pointer) of another schema. Its
    references to itself are changed to point there."""
    if not isinstance(schema, dict):
        return {} if schema is True else schema
    made: dict[str, Any] = {}
    for name, value in schema.items():
        if name in _KEPT:
            if not (name in _BOUNDS and most is not None and isinstance(value, int | float) and value > most):
                made[name] = value
        elif name in _SCHEMA:
            made[name] = value if isinstance(value, bool) else fitted(value, at, most)
        elif name in _LISTS and isinstance(value, list):
            made[name] = [fitted(it, at, most) for it in value]
        elif name in _MAPS and isinstance(value, dict):
            made[name] = {key: fitted(it, at, most) for key, it in value.items()}
        elif name == "pattern" and isinstance(value, str) and compiles(value, most):
            made[name] = value
        elif name == "$ref" and isinstance(value, str) and value.startswith("#"):
            made[name] = at + value[1:]
    return made


def compiles(pattern: str, most: int | None) -> bool:
    """Return whether every engine can compile a pattern. `most` is the engine's limit of repetitions, None for none."""
    counts: Iterable[tuple[str, str]] = _REPEAT.findall(pattern)
    return bool(_PATTERN.fullmatch(pattern)) and all(int(it or 0) <= (most or 1 << 30) for two in counts for it in two)


def response_format(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the field of a chat request that makes an engine write JSON by this schema."""
    return {"type": "json_schema", "json_schema": {"name": "tool_calls", "strict": True, "schema": schema}}
