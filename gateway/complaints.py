"""Complaints: what pydantic finds wrong with what somebody asked for, in words that say what is possible."""

from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

NO_CONTROLS = r"^[^\x00-\x1f\x7f-\x9f]*$"
WORD = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"

_PATTERNS = {
    NO_CONTROLS: "line breaks, tabs and other control characters are not possible",
    WORD: "1 to 64 letters, digits, '.', '_' and '-', the first of them a letter or digit",
}
_SENTENCES = {
    "missing": "it is missing",
    "string_type": "it must be text",
    "string_unicode": "it must be text in UTF-8",
    "string_too_short": "it must not be empty",
    "string_too_long": "at most {max_length} characters are possible",
    "greater_than_equal": "it must be at least {ge}",
    "less_than_equal": "it must be at most {le}",
    "bool_type": "it must be true or false",
    "list_type": "it must be a list",
    "dict_type": "it must be an object",
    "model_type": "it must be an object",
    "too_short": "at least {min_length} must be there",
    "too_long": "at most {max_length} are possible, not {actual_length}",
    "literal_error": "it must be {expected}",
}


def first(exc: ValidationError, model: type[BaseModel]) -> tuple[str, str]:
    """The field that is wrong, '' where it is the whole, and what is wrong with it: half a sentence."""
    error = exc.errors(include_url=False, include_input=False)[0]
    return ".".join(map(str, error["loc"])), _sentence(error, model)


def _sentence(error: ErrorDetails, model: type[BaseModel]) -> str:
    kind, said = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return f"there is no such field; there are {', '.join(_fields(model, error['loc'][:-1]))}"
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
