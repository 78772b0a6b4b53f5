"""Schema bounds: limit a JSON schema, as gateway.api.bounds limits other fields."""

from hashlib import blake2b
from typing import Any, NamedTuple

import orjson

from gateway.api import branching, optional
from gateway.api.text_bounds import BRANCHES, MAX_DEPTH
from gateway.errors import BadRequest

MAX_PROPERTIES = 500  # of one object of a schema: 2000 optional ones took more than 40 s
MAX_VALUES = 1000  # of all its enums: OpenAI's own limit; 5000 took more than 40 s
MAX_NODES = 20_000  # of a schema: values of every kind
MAX_NODES_IN_ALL = 100_000  # of all schemas: 500 objects of 30 properties took 5 s, and a forced call needs all tools
MOST_SOUND, MOST_KEPT = 4096, 256  # schemas that are remembered, and characters of all patterns and grammars of one

_PAIRS = (
    ("minLength", "maxLength"),
    ("minItems", "maxItems"),
    ("minimum", "maximum"),
    ("minProperties", "maxProperties"),
)
_NEEDED = ("minLength", "minItems")  # keywords that demand repetitions


class Found(NamedTuple):
    """What a sound schema has: values, the sum of `optional.square`, patterns, names that are patterns,
    and grammars."""

    nodes: int
    squares: int
    patterns: tuple[str, ...]
    names: tuple[str, ...]
    grammars: tuple[str, ...]


# The sound schemas that were checked last, by their digests: an agent sends the same tools with each request.
_sound: dict[tuple[int, bytes], Found] = {}


def check_schema(schema: Any, where: str, repeats: int) -> Found:
    """Check a schema without its patterns and grammars, if that was not done before."""
    try:
        known = repeats, blake2b(orjson.dumps(schema), digest_size=16).digest()
    except TypeError:  # too deep for orjson
        return _check(schema, where, repeats)
    if (found := _sound.get(known)) is None:
        found = _check(schema, where, repeats)
        if sum(map(len, found.patterns + found.names + found.grammars)) <= MOST_KEPT:
            if len(_sound) >= MOST_SOUND:
                _sound.clear()
            _sound[known] = found
    return found


def _check(schema: Any, where: str, repeats: int) -> Found:
    """Check a schema without its patterns and grammars."""
    pointed = branching.pointing(schema)
    patterns: dict[str, None] = {}
    names: dict[str, None] = {}
    grammars: dict[str, None] = {}
    nodes = values = squares = 0
    level: list[Any] = [schema]
    for _ in range(MAX_DEPTH * 2):  # a level of a schema is two of JSON: an object's properties, and one of them
        found: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                _check_object(node, where, repeats)
                squares += optional.square(node, pointed)
                if isinstance(it := node.get("pattern"), str):
                    patterns[it] = None
                if isinstance(them := node.get("patternProperties"), dict):
                    names |= dict.fromkeys(them)
                if node.get("type") == "grammar" and isinstance(it := node.get("grammar"), str):  # a structural tag's
                    grammars[it] = None
                values += len(node["enum"]) if isinstance(node.get("enum"), list) else 0
                found += node.values()
            elif isinstance(node, list):
                found += node
        nodes += len(found)
        if nodes > MAX_NODES:
            raise BadRequest(f"'{where}' is too large: it has more than {MAX_NODES} values.", param=where)
        if values > MAX_VALUES:
            raise BadRequest(f"'{where}' has more than {MAX_VALUES} values in its enums.", param=where)
        level = [it for it in found if isinstance(it, dict | list)]
        if not level:
            if branching.of_schema(schema) > branching.MOST:
                raise BadRequest(BRANCHES.format(where=where), param=where)
            return Found(nodes, squares, tuple(patterns), tuple(names), tuple(grammars))
    raise BadRequest(f"'{where}' is nested more than {MAX_DEPTH} levels deep.", param=where)


def _check_object(node: dict[str, Any], where: str, repeats: int) -> None:
    """Check one object of a schema: its own keywords."""
    properties = node.get("properties")
    if isinstance(properties, dict) and len(properties) > MAX_PROPERTIES:
        raise BadRequest(f"'{where}' has more than {MAX_PROPERTIES} properties in one object.", param=where)
    for least, most in _PAIRS:
        low, high = _number(node.get(least)), _number(node.get(most))
        if low is not None and high is not None and low > high:  # llama.cpp counts down from there, for gigabytes
            raise BadRequest(f"'{where}' has a {least} above its {most}, which no value can satisfy.", param=where)
    for name in _NEEDED:
        if (low := _number(node.get(name))) is not None and low > repeats:
            raise BadRequest(f"'{where}' has a {name} above {repeats}.", param=where)


def _number(value: Any) -> float | None:
    """Return a number; None for anything else. The body has a whole number beyond 64 bits as an orjson.Fragment."""
    if isinstance(value, orjson.Fragment):
        return float(orjson.dumps(value))
    return value if type(value) in (int, float) else None
