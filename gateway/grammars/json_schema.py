"""JSON Schema: the grammar of the JSON texts that fit a schema, as engines compile it.

Engines agree in this: the properties come in a fixed order, further ones only if the schema names them, and white space
may stand between tokens. They differ in the order and in the white space, which their dialects say.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from gateway.caller_schemas import target
from gateway.dialects.dialect import JsonStyle
from gateway.grammars.grammar import ROOT, Grammar, Ref, Repeat, Sequence, Symbol, UnsupportedError, literal, read

MOST_DEPTH = 64  # levels of a schema within itself
# Keywords that say nothing about the text, or are dealt with below.
_KNOWN = frozenset(
    [
        "$schema",
        "$id",
        "$defs",
        "$ref",
        "definitions",
        "$comment",
        "title",
        "description",
        "default",
        "examples",
        "deprecated",
        "readOnly",
        "writeOnly",
        "type",
        "properties",
        "required",
        "additionalProperties",
        "enum",
        "const",
        "items",
        "prefixItems",
        "minItems",
        "maxItems",
        "minLength",
        "maxLength",
        "anyOf",
        "oneOf",
        "allOf",
        "nullable",
    ]
)
_BASE = r"""
char ::= [^"\\\x7F\x00-\x1F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4})
string ::= "\"" char* "\""
integer ::= "-"? ("0" | [1-9] [0-9]{0,15})
number ::= "-"? ("0" | [1-9] [0-9]{0,15}) ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,16})?
boolean ::= "true" | "false"
null ::= "null"
value ::= object | array | string | number | boolean | null
pair ::= string gap ":" space value
object ::= "{" space (pair (gap "," space pair)*)? space "}"
array ::= "[" space (value (gap "," space value)*)? space "]"
"""
_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")


@dataclass(frozen=True)
class Compiled:
    """A schema's grammar. `exact`: every text that it allows fits the schema."""

    grammar: Grammar
    exact: bool


def compiled(schema: Any, style: JsonStyle) -> Compiled:
    """Return the grammar of a schema, as an engine of that style compiles it; of any object if the schema is None.

    Raises UnsupportedError for a schema that is too deep, or refers to something else than itself."""
    making = _Making(schema, style)
    return Compiled(making.grammar, making.exact)


class _Making:
    """One schema on its way to a grammar."""

    def __init__(self, schema: Any, style: JsonStyle) -> None:
        gap = "space" if style.space_before_comma else '""'
        base = read(f"root ::= value\nspace ::= {style.space}\ngap ::= {gap}\n{_BASE}")
        self.grammar = base
        self.exact = True
        self._whole = schema
        self._required_first = style.required_first
        self._refs: dict[str, Ref] = {}
        self._space, self._comma = Ref("space"), (Ref("gap"), *literal(","), Ref("space"))
        self._depth = 0
        top: Symbol = Ref("object") if schema is None else self._value(schema)
        base.rules[ROOT] = [(top,)]

    def _value(self, schema: Any) -> Symbol:
        if schema is True or schema == {}:
            return Ref("value")
        if not isinstance(schema, dict):
            raise UnsupportedError("the schema is not a JSON object")
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise UnsupportedError("the schema is nested too deeply")
        try:
            return self._of(schema)
        finally:
            self._depth -= 1

    def _of(self, schema: Mapping[str, Any]) -> Symbol:
        self.exact = self.exact and schema.keys() <= _KNOWN
        if "$ref" in schema:
            return self._referred(schema["$ref"])
        if "const" in schema or "enum" in schema:
            values = [schema["const"]] if "const" in schema else schema["enum"]
            return self.grammar.add("one", [literal(orjson.dumps(it).decode()) for it in values])
        for name in ("anyOf", "oneOf"):
            if name in schema:
                self.exact = self.exact and name == "anyOf" and not (schema.keys() & {"properties", "type"})
                return self.grammar.add("any", [(self._value(it),) for it in schema[name]])
        if "allOf" in schema:
            return self._value(self._merged(schema))
        types = schema.get("type")
        if isinstance(types, list):
            return self.grammar.add("any", [(self._value({**schema, "type": it}),) for it in types])
        if types is None:
            types = (
                "object" if "properties" in schema else "array" if {"items", "prefixItems"} & schema.keys() else None
            )
            self.exact = False  # anything of another type fits, too
        if types is None and {"minLength", "maxLength"} & schema.keys():
            types = "string"
        return Ref("value") if types is None else self._typed(types, schema)

    def _typed(self, kind: Any, schema: Mapping[str, Any]) -> Symbol:
        if kind not in _TYPES:
            raise UnsupportedError("the schema has an unknown type")
        if kind == "object" and (schema.get("properties") or isinstance(schema.get("additionalProperties"), dict)):
            return self._object(schema)
        if kind == "object":
            self.exact = self.exact and not schema.get("required")
            if schema.get("additionalProperties") is False:
                return self.grammar.add("empty", [(*literal("{"), self._space, *literal("}"))])
        if kind == "array" and {"items", "prefixItems", "minItems", "maxItems"} & schema.keys():
            return self._array(schema)
        if kind == "string" and {"minLength", "maxLength"} & schema.keys():
            chars = Repeat(Ref("char"), int(schema.get("minLength", 0)), _most(schema, "maxLength"))
            return self.grammar.add("text", [(*literal('"'), chars, *literal('"'))])
        return Ref(kind)

    def _referred(self, where: Any) -> Ref:
        if not isinstance(where, str) or not where.startswith("#"):
            raise UnsupportedError("the schema refers to another document")
        if where not in self._refs:
            self._refs[where] = name = self.grammar.add("ref", [])
            self.grammar.rules[name.name] = [(self._value(pointed(self._whole, where)),)]
        return self._refs[where]

    def _merged(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        """Return one schema of all that have to hold: their properties together. Only such are understood."""
        parts = [{name: it for name, it in schema.items() if name != "allOf"}, *schema["allOf"]]
        made: dict[str, Any] = {}
        for part in parts:
            seen: set[str] = set()
            while isinstance(part, dict) and isinstance(part.get("$ref"), str) and len(parts) > 2:
                if part["$ref"] in seen:
                    raise UnsupportedError("the schema refers to itself without an end")
                seen.add(part["$ref"])
                part = pointed(self._whole, part["$ref"])  # noqa: PLW2901
            if not isinstance(part, dict):
                raise UnsupportedError("the schema is not a JSON object")
            self.exact = self.exact and not (made.keys() & part.keys() - {"properties", "required", "type", "title"})
            properties = {**made.get("properties", {}), **part.get("properties", {})}
            required = [*made.get("required", []), *part.get("required", [])]
            made |= part
            made |= ({"properties": properties} if properties else {}) | ({"required": required} if required else {})
        return made

    def _object(self, schema: Mapping[str, Any]) -> Symbol:
        properties, required = schema.get("properties") or {}, set(schema.get("required") or ())
        names = list(properties)
        if self._required_first:
            names.sort(key=lambda name: name not in required)
        self.exact = self.exact and required <= properties.keys()
        more, extra = schema.get("additionalProperties"), None
        if more is True or isinstance(more, dict):
            kind = self._value(more)
            extra = (Ref("string"), self._space, *literal(":"), self._space, kind)
        behind, first = self._further(extra)
        for name in reversed(names):
            key = literal(orjson.dumps(name).decode())
            pair = (*key, self._space, *literal(":"), self._space, self._value(properties[name]))
            takes, skips = (*self._comma, *pair, behind), [] if name in required else [(behind,)]
            begins, none = (*pair, behind), [] if name in required else [(first,)]
            behind, first = self.grammar.add("more", [takes, *skips]), self.grammar.add("first", [begins, *none])
        return self.grammar.add("props", [(*literal("{"), self._space, first, self._space, *literal("}"))])

    def _further(self, extra: Sequence | None) -> tuple[Ref, Ref]:
        """What follows the named properties, and what may stand in their place."""
        if extra is None:
            return self.grammar.add("end", [()]), self.grammar.add("end", [()])
        self.exact = False  # a name may come again
        again = Repeat(self.grammar.add("extra", [(*self._comma, *extra)]), 0, None)
        return self.grammar.add("end", [(again,)]), self.grammar.add("end", [(), (*extra, again)])

    def _array(self, schema: Mapping[str, Any]) -> Symbol:
        heads = schema.get("prefixItems") or []
        items, least = schema.get("items", True), max(int(schema.get("minItems", 0)), 0)
        most = len(heads) if items is False else _most(schema, "maxItems")
        if items is not False and "items" not in schema and heads:
            most = len(heads)  # as engines have it
        inside: list[Sequence] = [()]
        if most is None or most > len(heads):
            item = self._value(items)
            comma = self.grammar.add("next", [(*self._comma, item)])
            left = None if most is None else most - len(heads)
            needs = max(0, least - len(heads))
            if heads:
                inside = [(Repeat(comma, needs, left),)]
            else:
                rest = Repeat(comma, max(0, needs - 1), None if left is None else left - 1)
                inside = [(item, rest), *([()] if needs == 0 else [])]
        for number, head in reversed(list(enumerate(heads))):
            before = self._comma if number else ()
            inside = [(*before, self._value(head), self.grammar.add("tail", inside))]
        self.exact = self.exact and (not heads or least >= len(heads))
        return self.grammar.add(
            "items", [(*literal("["), self._space, self.grammar.add("tail", inside), self._space, *literal("]"))]
        )


def pointed(schema: Any, where: str) -> Any:
    """Return the part of a schema to which a JSON pointer in it refers. Raises UnsupportedError if there is none."""
    found = target(schema, where)
    if found is None:
        raise UnsupportedError("the schema has a reference to nothing")
    return found


def _most(schema: Mapping[str, Any], name: str) -> int | None:
    return int(schema[name]) if name in schema else None
