"""Validation: turn pydantic's errors into sentences that say what is possible, and read days."""

import datetime as dt
import re
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

NO_CONTROLS = r"^[^\x00-\x1f\x7f-\x9f]*$"
WORD = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"

_PATTERNS = {
    NO_CONTROLS: "it must not have line breaks, tabs or other control characters",
    WORD: "it must be 1 to 64 letters, digits, '.', '_' and '-', and begin with a letter or digit",
}
_SENTENCES = {
    "missing": "it is missing",
    "string_type": "it must be text",
    "string_unicode": "it must be text in UTF-8",
    "string_too_short": "it must not be empty",
    "string_too_long": "it must have at most {max_length} characters",
    "greater_than_equal": "it must be at least {ge}",
    "less_than_equal": "it must be at most {le}",
    "bool_type": "it must be true or false",
    "list_type": "it must be a list",
    "dict_type": "it must be an object",
    "model_type": "it must be an object",
    "too_short": "it must have at least {min_length} entries",
    "too_long": "it must have at most {max_length} entries, not {actual_length}",
    "literal_error": "it must be {expected}",
}


def day(words: str) -> int | None:
    """Return when the day '2027-01-31' begins in UTC, in seconds since 1970; None if the words are not of that form.

    Raises ValueError for a day that does not exist.
    """
    match = re.fullmatch(r"([0-9]{4})-([0-9]{1,2})-([0-9]{1,2})", words)
    if match is None:
        return None
    year, month, number = map(int, match.groups())
    return int(dt.datetime(year, month, number, tzinfo=dt.UTC).timestamp())


def first(exc: ValidationError, model: type[BaseModel]) -> tuple[str, str]:
    """Return the first wrong field ('' for the whole value), and what is wrong with it, as half a sentence."""
    error = exc.errors(include_url=False, include_input=False)[0]
    return ".".join(map(str, error["loc"])), _sentence(error, model)


def _sentence(error: ErrorDetails, model: type[BaseModel]) -> str:
    kind, said = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return f"there is no such field; possible fields: {', '.join(_fields(model, error['loc'][:-1]))}"
    if kind.startswith("int_"):
        return "it must be a whole number"
    if kind == "string_pattern_mismatch" and said["pattern"] in _PATTERNS:
        return _PATTERNS[said["pattern"]]
    if kind in _SENTENCES:
        return _SENTENCES[kind].format(**{name: _number(value) for name, value in said.items()})
    return error["msg"].removeprefix("Value error, ")


def _fields(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    for name in path:
        within: Any = model.model_fields[str(name)].annotation
        model = within
    return list(model.model_fields)


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
