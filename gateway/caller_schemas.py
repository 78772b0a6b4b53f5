"""Caller schemas: follow the JSON Schemas that callers write, and count the steps of checking a value by one.

Schemas are tried in full by jsonschema_rs, in one go that nothing can interrupt. In 40 short definitions, each of which
applies the next one twice to the same value, there are 2^40 steps. All functions are pure.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

from jsonschema_rs import RegexOptions, ValidationError, validator_for

MOST = 20_000  # steps; counting them takes 0.25 s at most, and a list of a thousand objects with ten fields has 11,000

_TRIED = 4  # characters that one pattern is tried on in a step
_SMALL = 4 << 10  # bytes of a compiled pattern that takes 5 ns for a character, as a rule, and 0.6 µs at most
_TRIED_SMALL = 64  # characters that one of those is tried on in a step
_LONG = 4096  # characters of a text for which it matters
_LISTS = ("allOf", "anyOf", "oneOf")
_SINGLES = ("if", "then", "else", "not")
_MAPS = ("dependentSchemas", "dependencies")
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_OTHER_MEMBERS = ("additionalProperties", "unevaluatedProperties")
_OTHER_ITEMS = ("items", "additionalItems", "unevaluatedItems", "contains")
_UNEVALUATED = frozenset({"unevaluatedProperties", "unevaluatedItems"})
_WATCHED = frozenset({"prefixItems", "properties", "pattern", "patternProperties", "propertyNames", "$id", "id"}).union(
    _LISTS, _SINGLES, _MAPS, _REFERENCES, _OTHER_MEMBERS, _OTHER_ITEMS
)


class _UnknownError(Exception):
    """A part of the schema is meant that cannot be found here."""


class _Walk:
    """What is known of the schema `root`: the targets of its references so far, and whether a part of it is `based` on
    another address, to which references in that part are relative."""

    def __init__(self, root: Any) -> None:
        self.root = root
        self.targets: dict[str, Any] = {}
        self.based = False


def in_place(node: dict[str, Any]) -> Iterator[Any]:
    """Yield the parts of a schema, without references, that it applies to the same value as itself."""
    for name in _LISTS:
        if isinstance(those := node.get(name), list):
            yield from those
    yield from (node[name] for name in _SINGLES if name in node)
    for name in _MAPS:
        if isinstance(them := node.get(name), dict):
            yield from (it for it in them.values() if not isinstance(it, list))


def references(node: dict[str, Any]) -> Iterator[str]:
    """Yield the references by which a schema applies other parts to the same value as itself."""
    yield from (node[name] for name in _REFERENCES if isinstance(node.get(name), str))


def target(root: Any, reference: str) -> Any:
    """Return the part of a document to which a reference within it points (RFC 6901); None if there is none."""
    if reference == "#":
        return root
    if not reference.startswith("#/"):
        return None
    found = root
    for step in reference[2:].split("/"):
        name = unquote(step).replace("~1", "/").replace("~0", "~") if "%" in step or "~" in step else step
        if isinstance(found, list) and name.isdecimal() and int(name[:9]) < len(found):
            found = found[int(name[:9])]
        elif isinstance(found, dict) and name in found:
            found = found[name]
        else:
            return None
    return found


def is_based(root: Any, node: dict[str, Any]) -> bool:
    """Return whether a part of the schema `root` has an address of its own. Its name is `id` in draft 4 only: in other
    drafts, zod writes a name of its own there."""
    return isinstance(node.get("id" if "draft-04" in str(root.get("$schema")) else "$id"), str)


def bounded(schema: Any, value: Any) -> bool:
    """Return whether checking a value takes at most MOST steps, as far as can be told before. It also does not for a
    schema with a reference to a name or an address, because their number is not known then."""
    return Budget().allows(schema, value)


class Budget:
    """The steps that several checks may still take together, at first MOST."""

    def __init__(self) -> None:
        self._left = MOST

    def allows(self, schema: Any, value: Any) -> bool:
        """Return whether checking a value takes no more steps than are left, and take them away."""
        self._left -= _steps(schema, value, self._left)
        return self._left >= 0


def _steps(schema: Any, value: Any, most: int) -> int:
    """Return how many steps it takes to check a value; a number above `most` if there are more, or nobody can tell."""
    walk = _Walk(schema)
    steps, waiting = 1, [(schema, value)]
    try:
        while waiting and steps <= most:
            node, it = waiting.pop()
            if not isinstance(node, dict) or _WATCHED.isdisjoint(node):
                continue
            before = len(waiting)
            steps += _tries(node, it)
            if steps <= most:
                _add(waiting, walk, node, it)
            steps += len(waiting) - before
    except _UnknownError:
        return most + 1
    return steps


def _tries(node: dict[str, Any], value: Any) -> int:
    """Return how many steps it takes to try the schema's own patterns on a value."""
    if isinstance(value, str):
        if "pattern" not in node:
            return 0
        return len(value) // (_TRIED_SMALL if len(value) > _LONG and _is_small(str(node["pattern"])) else _TRIED)
    if isinstance(value, dict) and isinstance(patterns := node.get("patternProperties"), dict):
        return len(patterns) * (len(value) + sum(map(len, value)) // _TRIED)
    return 0


@lru_cache(256)
def _is_small(pattern: str) -> bool:
    """Return whether a pattern is compiled to SMALL bytes at most."""
    try:
        validator_for({"pattern": pattern}, pattern_options=RegexOptions(size_limit=_SMALL), offline=True)
    except (ValidationError, ValueError):
        return False
    return True


def _add(waiting: list[tuple[Any, Any]], walk: _Walk, node: dict[str, Any], value: Any) -> None:
    """Add what a schema applies to a value, and to the parts of it."""
    walk.based |= node is not walk.root and is_based(walk.root, node)
    same = list(in_place(node))
    for reference in references(node):
        if reference not in walk.targets:
            walk.targets[reference] = target(walk.root, reference)
        if walk.targets[reference] is None:
            raise _UnknownError
        same.append(walk.targets[reference])
    if walk.based and walk.targets:
        raise _UnknownError
    # What is unevaluated is found out by applying the others once more.
    for _ in range(1 if _UNEVALUATED.isdisjoint(node) else 2):
        waiting += [(it, value) for it in same]
    if isinstance(value, dict):
        _add_members(waiting, node, value)
    elif isinstance(value, list):
        if isinstance(heads := node.get("prefixItems"), list):
            waiting += zip(heads, value, strict=False)
        for name in _OTHER_ITEMS:
            if isinstance(part := node.get(name), list):  # as in older drafts
                waiting += zip(part, value, strict=False)
            elif isinstance(part, dict):
                waiting += [(part, it) for it in value]


def _add_members(waiting: list[tuple[Any, Any]], node: dict[str, Any], value: dict[str, Any]) -> None:
    if isinstance(known := node.get("properties"), dict):
        waiting += [(part, value[name]) for name, part in known.items() if name in value]
    others = [node.get(name) for name in _OTHER_MEMBERS]
    if isinstance(patterns := node.get("patternProperties"), dict):
        others += patterns.values()
    for part in others:
        if isinstance(part, dict):
            waiting += [(part, it) for it in value.values()]
    if isinstance(names := node.get("propertyNames"), dict):
        waiting += [(names, it) for it in value]
