"""Values: how many values a request may have, and how much memory parsed JSON takes."""

from sys import getsizeof
from typing import Any, NamedTuple

MAX_VALUES = 1 << 20  # commas and colons: 2,048 inputs of 512 tokens for an embedding
MAX_CONTAINERS = 100_000  # lists and objects


class Weight(NamedTuple):
    """What a parsed value consists of. `size` is in bytes of memory."""

    size: int = 0
    containers: int = 0  # lists and objects
    names: int = 0  # of members of objects
    elements: int = 0  # of lists

    def plus(self, other: "Weight") -> "Weight":
        """Return the sum of both."""
        return Weight(*map(sum, zip(self, other, strict=True)))

    @property
    def is_too_much(self) -> bool:
        """Whether no request may have so many values."""
        return self.containers > MAX_CONTAINERS or 2 * self.names + self.elements > MAX_VALUES


def weigh(parsed: Any) -> Weight:
    """Return the weight of a parsed value."""
    size = containers = names = elements = 0
    left: list[Any] = [parsed]
    while left:
        value = left.pop()
        size += getsizeof(value)
        if type(value) is dict:
            containers += 1
            names += len(value)
            size += sum(map(getsizeof, value))
            left.extend(value.values())
        elif type(value) is list:
            containers += 1
            elements += len(value)
            left.extend(value)
    return Weight(size, containers, names, elements)
