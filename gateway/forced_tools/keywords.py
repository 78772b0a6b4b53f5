"""Keywords: find and leave out keywords of a JSON Schema.

Only keywords count. A property may have the name of a keyword: Claude Code's Grep has a parameter `pattern`.
"""

from collections.abc import Callable, Iterator
from typing import Any

_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies"})
_INNER = frozenset(
    {"items", "prefixItems", "additionalItems", "unevaluatedItems", "contains", "anyOf", "oneOf", "allOf", "not"}
    | {"if", "then", "else", "additionalProperties", "unevaluatedProperties", "propertyNames"}
)


def schemas(schema: Any) -> Iterator[dict[str, Any]]:
    """Return a schema and all schemas inside it."""
    if isinstance(schema, list):
        for it in schema:
            yield from schemas(it)
    elif isinstance(schema, dict):
        yield schema
        for name, value in schema.items():
            if name in _MAPS and isinstance(value, dict):
                yield from schemas(list(value.values()))
            elif name in _INNER:
                yield from schemas(value)


def patterns(schema: Any) -> Iterator[str]:
    """Return every `pattern` of a schema and of the schemas inside it."""
    return (it["pattern"] for it in schemas(schema) if isinstance(it.get("pattern"), str))


def without(schema: Any, drops: Callable[[str, Any], bool]) -> Any:
    """Return a schema without the keywords for which `drops` is true. It gets a keyword and its value."""
    if isinstance(schema, list):
        return [without(it, drops) for it in schema]
    if not isinstance(schema, dict):
        return schema
    made: dict[str, Any] = {}
    for name, value in schema.items():
        if drops(name, value):
            continue
        if name in _MAPS and isinstance(value, dict):
            made[name] = {key: without(it, drops) for key, it in value.items()}
        else:
            made[name] = without(value, drops) if name in _INNER else value
    return made


def without_patterns(value: Any) -> Any:
    """Return a schema without what may be a pattern, wherever it is: a reference may point to any place."""
    if isinstance(value, list):
        return [without_patterns(it) for it in value]
    if not isinstance(value, dict):
        return value
    return {name: without_patterns(it) for name, it in value.items() if not _may_be_pattern(name, it)}


def _may_be_pattern(name: str, value: Any) -> bool:
    return name == "patternProperties" or (name == "pattern" and not isinstance(value, dict))
