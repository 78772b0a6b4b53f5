"""Caller schemas: check values by the JSON Schemas that callers write, in a bounded number of steps.

Schemas are tried in full by jsonschema_rs, in one go that nothing can interrupt. In 40 short definitions, each of which
applies the next one twice to the same value, there are 2^40 steps. Patterns are compiled in one go, too: `^.{1,5000}0$`
takes 46 ms and 10 MB. All functions are pure.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

import orjson
from jsonschema_rs import RegexOptions, ValidationError, Validator, validator_for

MOST = 20_000  # steps; counting them takes 0.25 s at most, and a list of a thousand objects with ten fields has 11,000

# A schema's patterns take 0.1 s at most to compile. The compiled pattern of a date and time has 5 kB, and `^.{1,47}0$`
# has 64 kB.
_COMPILED = 4 << 20  # bytes of all patterns, compiled
_LARGEST = 64 << 10  # bytes of one of them; such a one takes up to 10 µs for each character that it is tried on
_WRITTEN = 32 << 10  # characters of all patterns
_NAMED = 200  # characters of which one class such as \p{L} takes the time
_FOLDED = 1600  # and almost any class if the case is ignored: (?i)\p{Any} takes 4 ms
_FOLDS = re.compile(r"\(\?[a-zA-Z-]*[ix]")  # may ignore the case; with x, there may be spaces in what says so
_PLAIN = re.compile(r"(?:[^\[\\]|\\[^pP]|\[\^?(?:[\w .:/@+]|\\[dws.+-]|-(?!-))+\])*", re.ASCII | re.DOTALL)  # is quick
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


def validator(schema: Any) -> Validator:
    """Return a validator of what orjson reads, by a caller's JSON Schema. It fetches nothing.

    Whole numbers beyond 64 bits, which the schema of a request has as orjson's Fragments, become floats: orjson rounds
    them in the same way where it reads what is validated. Raises ValidationError and ReferencingError of jsonschema_rs,
    and ValueError, also for patterns that are too large.
    """
    try:
        raw = orjson.dumps(schema)
    except orjson.JSONEncodeError:
        raise ValueError("it is nested too deeply") from None
    read = orjson.loads(raw)
    most = _each_pattern(read) if b'"pattern' in raw else _LARGEST
    # Patterns are matched in linear time, because callers write them.
    return validator_for(read, pattern_options=RegexOptions(size_limit=most), offline=True)


def _each_pattern(schema: Any) -> int:
    """Return how many bytes each pattern of the schema may have when it is compiled. Raises ValueError if the patterns
    are too long."""
    number = written = 0
    waiting = [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            waiting += node.values()
            names = node.get("patternProperties")
            for it in (node.get("pattern"), *(names if isinstance(names, dict) else ())):
                if isinstance(it, str):
                    number += 1
                    written += _length(it)
        elif isinstance(node, list):
            waiting += node
    if written > _WRITTEN:
        raise ValueError("its patterns are too long")
    return min(_LARGEST, _COMPILED // max(1, number))


def _length(pattern: str) -> int:
    """Return the number of characters, of which classes that take long count as many."""
    named = pattern.count("\\p") + pattern.count("\\P")
    if _FOLDS.search(pattern) and not _PLAIN.fullmatch(pattern):
        return len(pattern) + _FOLDED * (named + pattern.count("["))
    return len(pattern) + _NAMED * named


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
