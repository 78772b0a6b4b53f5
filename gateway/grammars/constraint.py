"""Constraint: the form that a request prescribes for its answer's text, and what is left of it after a beginning."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import orjson
from jsonschema_rs import ReferencingError, ValidationError, Validator

from gateway import caller_schemas, schema_validators
from gateway.dialects.dialect import JsonStyle
from gateway.grammars.grammar import Grammar, UnsupportedError, literal, read, write
from gateway.grammars.json_schema import compiled
from gateway.grammars.nailed import nailed
from gateway.grammars.rest import Walk

# The fields of a request that constrain its answer, whichever engine's they are.
FIELDS = frozenset(
    [
        "grammar",
        "guided_choice",
        "guided_grammar",
        "guided_json",
        "guided_regex",
        "json_schema",
        "response_format",
        "structural_tag",
        "structured_outputs",
    ]
)


@dataclass(frozen=True)
class Constraint:
    """What the text has to be: JSON by a `schema` (any object if that is None), a text by a grammar, or a choice."""

    schema: Any = None
    grammar: str | None = None
    choices: tuple[str, ...] = ()

    @property
    def is_json(self) -> bool:
        """Whether the text is JSON."""
        return self.grammar is None and not self.choices

    @cached_property
    def _validator(self) -> Validator | None:
        try:
            return schema_validators.validator(self.schema) if self.schema is not None else None
        except (ValidationError, ReferencingError, ValueError):
            return None

    def fault(self, text: str) -> str | None:
        """Return what is wrong with a whole text; None if it is as it has to be, or nobody can tell."""
        if not self.is_json:
            return None
        try:
            value = orjson.loads(text)
        except orjson.JSONDecodeError:
            return "It is not valid JSON."
        if self._validator is None or not caller_schemas.bounded(self.schema, value) or self._validator.is_valid(value):
            return None
        return "It does not fit the schema."

    def is_whole(self, text: str) -> bool:
        """Return whether nothing but white space may follow this text. Raises UnsupportedError."""
        if self.choices:
            return text in self.choices and not any(it.startswith(text) for it in self.choices if it != text)
        if self.grammar is not None:
            walk = Walk(read(self.grammar))
            return walk.follow(text) and walk.must_end
        return text.rstrip().endswith(("}", "]")) and self.fault(text) is None

    def exact(self, style: JsonStyle) -> bool:
        """Return whether the grammar that is made here allows only texts that fit. Raises UnsupportedError."""
        with _understood():
            return not self.is_json or compiled(self.schema, style).exact

    def rest(self, text: str, before: str, style: JsonStyle) -> dict[str, Any]:
        """Return the fields that allow an engine only what may come after `text`. It has to begin with `before`.

        Raises UnsupportedError if the text does not begin as it has to, or the constraint cannot be understood here."""
        with _understood():
            walk = Walk(self._compiled(style))
            if not walk.follow(text) or walk.must_end:
                raise UnsupportedError("the text does not fit the grammar, or is complete already")
            return style.asks(write(walk.rest(before)))

    def nailed(self, text: str) -> dict[str, Any]:
        """Return the fields that allow an engine only texts that begin with `text`. Raises UnsupportedError."""
        if not self.is_json or not isinstance(self.schema, dict):
            raise UnsupportedError("the constraint is not a JSON Schema")
        with _understood():
            schema = nailed(self.schema, text)
        named = {"name": "answer", "strict": True, "schema": schema}
        return {"response_format": {"type": "json_schema", "json_schema": named}}

    def _compiled(self, style: JsonStyle) -> Grammar:
        if self.choices:
            return Grammar({"root": [literal(it) for it in self.choices]})
        return read(self.grammar) if self.grammar is not None else compiled(self.schema, style).grammar


@contextmanager
def _understood() -> Iterator[None]:
    """Raise UnsupportedError for a schema with values that no schema has. They are the caller's, and an engine may have
    taken them."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, LookupError, RecursionError) as exc:
        if isinstance(exc, UnsupportedError):
            raise
        raise UnsupportedError("the schema is malformed") from exc


def constraint(fields: Mapping[str, Any]) -> Constraint | None:
    """Return the constraint of a request; None if it has none. Raises UnsupportedError if it has one that cannot be
    understood here, or several."""
    asked = [name for name in sorted(FIELDS & fields.keys()) if fields[name] is not None and fields[name] is not False]
    found = [it for it in (_read(name, fields[name]) for name in asked) if it is not None]
    if len(found) > 1:
        raise UnsupportedError("the request has several constraints")
    return found[0] if found else None


def _read(name: str, value: Any) -> Constraint | None:
    if name == "response_format" and isinstance(value, dict):
        kind, told = value.get("type"), value.get("json_schema")
        if kind in (None, "text"):
            return None
        if kind == "json_schema" and isinstance(told, dict):
            return _by_schema(told.get("schema"))
        if kind == "json_object":
            return _by_schema(value["schema"]) if value.get("schema") else Constraint()
    if name == "json_schema":
        return _by_schema(value)
    if name == "grammar" and isinstance(value, str):
        return Constraint(grammar=value) if value else None
    if name == "structured_outputs" and isinstance(value, dict):
        said = {key: it for key, it in value.items() if it is not None and it is not False}
        if said.keys() == {"json"}:
            return _by_schema(said["json"])
        if said.keys() == {"grammar"} and isinstance(said["grammar"], str):
            return Constraint(grammar=said["grammar"])
        if said.keys() == {"json_object"}:
            return Constraint()
        if said.keys() == {"choice"} and all(isinstance(it, str) and it for it in said["choice"]):
            return Constraint(choices=tuple(said["choice"]))
    raise UnsupportedError(f"the constraint '{name}' is not supported")


def _by_schema(schema: Any) -> Constraint:
    if isinstance(schema, str):
        try:
            schema = orjson.loads(schema)
        except orjson.JSONDecodeError:
            schema = None
    if not isinstance(schema, dict):
        raise UnsupportedError("the schema is not a JSON object")
    return Constraint(schema=schema)
