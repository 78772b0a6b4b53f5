"""Optional properties: count what an engine must write for the properties that the objects of a JSON schema may omit.

llama.cpp, and Ollama with it, makes a rule for each such property with all that may follow it. The work for one object
therefore grows with the square of their number: 500 took 2 s, 35 objects of 490 each 43 s, and 1,960 in one object
40 s. That work goes on when the client has left. All functions are pure.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

MOST = 500**2  # the sum of the squares, for all schemas of a request
_HOPS = 64  # references that are followed from one to the next; a longer chain is taken for too much


def square(node: dict[str, Any], pointed: Callable[[str], Any]) -> int:
    """Return the square of the number of optional properties of the object that this part of a schema describes.
    `pointed` finds the schema to which a reference points, or None."""
    return _own(node) ** 2 + (_merged(node, pointed) ** 2 if "allOf" in node else 0)


def _own(node: dict[str, Any]) -> int:
    properties, required = node.get("properties"), node.get("required")
    if not isinstance(properties, dict):
        return 0
    needed = {it for it in required if isinstance(it, str)} if isinstance(required, list) else set()
    return len(properties.keys() - needed)


def _merged(node: dict[str, Any], pointed: Callable[[str], Any]) -> int:
    """Return the optional properties of the one object that llama.cpp makes of an `allOf`: all those of the choices of
    each `anyOf` in it, as often as they are referred to."""
    choices = [choice for part in _listed(node, "allOf") for choice in _listed(part, "anyOf")]
    references = Counter(it for choice in choices if (it := _reference(choice)) is not None)
    return sum(map(_size, choices)) + sum(times * _pointed_size(it, pointed) for it, times in references.items())


def _pointed_size(reference: str, pointed: Callable[[str], Any]) -> int:
    for _ in range(_HOPS):
        found = pointed(reference)
        if (further := _reference(found)) is None:
            return _size(found)
        reference = further
    return MOST


def _reference(schema: Any) -> str | None:
    found = schema.get("$ref") if isinstance(schema, dict) else None
    return found if isinstance(found, str) else None


def _size(schema: Any) -> int:
    properties = schema.get("properties") if _reference(schema) is None and isinstance(schema, dict) else None
    return len(properties) if isinstance(properties, dict) else 0


def _listed(node: Any, name: str) -> list[Any]:
    value = node.get(name) if isinstance(node, dict) else None
    return value if isinstance(value, list) else []
