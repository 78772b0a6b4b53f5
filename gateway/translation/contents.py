"""Contents: join the contents of messages. The time is linear in their size, because a caller chooses how many there
are."""

from collections.abc import Iterable
from itertools import chain, groupby
from typing import Any

_SEPARATOR = "\n\n"
Content = str | list[Any]  # a text, or a list of chat's parts


def merged(parts: Iterable[Any], separator: str) -> list[Any]:
    """Return the parts with each run of neighbouring texts as one text part."""
    made: list[Any] = []
    for are_texts, run in groupby(parts, _is_text):
        found = list(run)
        if are_texts and len(found) > 1:
            found = [{"type": "text", "text": separator.join(it["text"] for it in found)}]
        made += found
    return made


def joined(contents: Iterable[Content | None]) -> Content:
    """Return several contents of one message as one: a text, or a list of parts if one of them has parts. Texts beside
    each other become one."""
    told: list[Any] = [it for it in contents if it]
    if all(isinstance(it, str) for it in told):
        return _SEPARATOR.join(told)
    made: list[Any] = []
    for are_texts, run in groupby(told, lambda it: isinstance(it, str)):
        found = list(run)
        made += [{"type": "text", "text": _SEPARATOR.join(found)}] if are_texts else chain.from_iterable(found)
    return made


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
