"""Schema validators: make validators of the JSON Schemas that callers write, in a bounded time and memory.

jsonschema_rs compiles a schema in one go that nothing can interrupt. A pattern such as `^.{1,5000}0$` takes 46 ms and
10 MB. What a reference leads to is compiled once, but below `unevaluatedProperties` as often as it can be reached, and
each part has its whole path as a text. All functions are pure.
"""

import re
from collections.abc import Iterator
from typing import Any

import orjson
from jsonschema_rs import RegexOptions, Validator, validator_for

from gateway.caller_schemas import in_place, is_based, references, target

# A schema's patterns take 0.1 s at most to compile. The compiled pattern of a date and time has 5 kB, and `^.{1,47}0$`
# has 64 kB.
_COMPILED = 4 << 20  # bytes of all patterns, compiled
_LARGEST = 64 << 10  # bytes of one of them; such a one takes up to 10 µs for each character that it is tried on
_WRITTEN = 32 << 10  # characters of all patterns
_NAMED = 200  # characters of which one class such as \p{L} takes the time
_FOLDED = 1600  # and almost any class if the case is ignored: (?i)\p{Any} takes 4 ms
_FOLDS = re.compile(r"\(\?[a-zA-Z-]*[ix]")  # may ignore the case; with x, there may be spaces in what says so
_PLAIN = re.compile(r"(?:[^\[\\]|\\[^pP]|\[\^?(?:[\w .:/@+]|\\[dws.+-]|-(?!-))+\])*", re.ASCII | re.DOTALL)  # is quick
# All schemas of a request take 0.1 s at most for everything else. A part's path is copied for each of its keywords.
_MOST = 40_000_000  # characters of paths
_ANEW = 1000  # characters that take the time of a part which is compiled once more
_EVALUATED = 8000  # and that of one whose members are told, and of counting it here
_SMALL = 1_000_000  # its values times the characters of the JSON: such a schema is not counted
_TARGETS = 1000  # of all references: the time grows with their square, and 10,000 take up to 2 s
_DEEPEST = 250  # parts within one another; 4000 overflow the stack
_UNEVALUATED = frozenset({"unevaluatedProperties", "unevaluatedItems"})
_LISTS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems", "items"})
_MAPS = frozenset({"properties", "patternProperties", "dependentSchemas", "dependencies"})
_SINGLES = _UNEVALUATED | {"if", "then", "else", "not", "items", "additionalItems", "contains"}
_SINGLES |= {"additionalProperties", "propertyNames"}


class Budget:
    """The characters of paths that are left for the schemas of a request."""

    def __init__(self) -> None:
        self.left = _MOST


def validator(schema: Any) -> Validator:
    """Return a validator of what orjson reads, by a caller's JSON Schema. It fetches nothing.

    Whole numbers beyond 64 bits, which the schema of a request has as orjson's Fragments, become floats: orjson rounds
    them in the same way where it reads what is validated. Raises ValidationError and ReferencingError of jsonschema_rs,
    and ValueError, also for patterns that are too large, and for a schema that takes too long to compile.
    """
    raw = _written(schema)
    read = orjson.loads(raw)
    _count(read, raw, Budget())
    most = _each_pattern(read) if b'"pattern' in raw else _LARGEST
    # Patterns are matched in linear time, because callers write them.
    return validator_for(read, pattern_options=RegexOptions(size_limit=most), offline=True)


def count(schema: Any, budget: Budget) -> None:
    """Take from the budget what it takes to compile a schema. Raises ValueError if it is not enough."""
    raw = _written(schema)
    _count(orjson.loads(raw), raw, budget)


def _written(schema: Any) -> bytes:
    try:
        return orjson.dumps(schema)
    except orjson.JSONEncodeError:
        raise ValueError("it is nested too deeply") from None


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


def _count(schema: Any, raw: bytes, budget: Budget) -> None:
    """Count a schema, whose JSON this is. Raises ValueError."""
    values = raw.count(b",") + raw.count(b":") + raw.count(b"{") + raw.count(b"[")
    if b'"unevaluated' in raw or values * len(raw) > _SMALL or raw.count(b'ef":') > _TARGETS:
        _Compilation(schema, budget).whole()


class _Compilation:
    """The compilation of the schema `root`, as jsonschema_rs does it. Methods raise ValueError if it is too much."""

    def __init__(self, root: Any, budget: Budget) -> None:
        self._root = root
        self._budget = budget
        self._targets: dict[str, Any] = {}
        self._pending: set[int] = set()
        self._based = False  # a part has an address of its own
        self._refers = False  # what is unevaluated depends on a reference

    def whole(self) -> None:
        """Compile the schema, and each target of a reference once."""
        self._part(self._root, 0, 0, 0)
        waiting = list(self._targets.items())
        while waiting:
            reference, found = waiting.pop()
            known = len(self._targets)
            self._part(found, len(reference), 0, 0)
            waiting += list(self._targets.items())[known:]
        if self._refers and (self._based or None in self._targets.values()):
            raise ValueError(
                "it has 'unevaluatedProperties' or 'unevaluatedItems', and references that are no pointers"
            )

    def _part(self, node: Any, path: int, depth: int, price: int) -> None:
        """Compile a part at a path of so many characters that no part had before."""
        self._take(node, path, depth, price)
        if not isinstance(node, dict):
            return
        if node is not self._root and is_based(self._root, node):
            self._based = True
        for reference in references(node):
            self._found(reference)
        for name, part in _parts(node):
            self._part(part, path + name, depth + 1, price)
        for _ in _UNEVALUATED & node.keys():
            self._evaluated(node, path, depth + 1)

    def _evaluated(self, node: dict[str, Any], path: int, depth: int, *, anew: bool = False) -> None:
        """Compile what tells which members of a value are evaluated. What a reference leads to is compiled `anew`, with
        the parts of the node. Otherwise they were compiled there before."""
        self._take(node, path, depth, _EVALUATED)
        shadowed = id(node) in self._pending
        self._pending.add(id(node))
        for name, part in _parts(node) if anew else ():
            self._part(part, path + name, depth + 1, _ANEW)
        for part in in_place(node):
            if isinstance(part, dict):
                self._evaluated(part, path, depth + 1)
        for reference in references(node):
            self._refers, found = True, self._found(reference)
            if isinstance(found, dict) and id(found) not in self._pending:
                self._evaluated(found, path, depth + 1, anew=True)
        if not shadowed:
            self._pending.discard(id(node))

    def _found(self, reference: str) -> Any:
        if reference not in self._targets:
            self._targets[reference] = target(self._root, reference)
            if len(self._targets) > _TARGETS:
                raise ValueError(f"it refers to more than {_TARGETS} parts of itself. Use fewer '$ref'")
        return self._targets[reference]

    def _take(self, node: Any, path: int, depth: int, price: int) -> None:
        self._budget.left -= price + path * (1 + (len(node) if isinstance(node, dict) else 0))
        if self._budget.left < 0 or depth > _DEEPEST:
            raise ValueError(
                "it takes too long to be compiled. Use fewer 'unevaluatedProperties' and 'unevaluatedItems' above"
                " references, shorter names, or fewer levels"
            )


def _parts(node: dict[str, Any]) -> Iterator[tuple[int, Any]]:
    """Yield the parts of a schema, without references, and how many characters they add to its path."""
    for name, value in node.items():
        if name in _LISTS and isinstance(value, list):
            for it in value:
                yield len(name) + 6, it
        elif name in _MAPS and isinstance(value, dict):
            for key, it in value.items():
                yield len(name) + 2 + 3 * len(key), it
        elif name in _SINGLES:
            yield len(name) + 1, value
