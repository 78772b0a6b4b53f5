"""Nailed: a JSON schema that allows only the texts that begin with a given one, for engines that take no grammar.

A value that is whole becomes a `const`, and an array that is whole `prefixItems`. Of a text that is not whole a pattern
says how it begins; it gets no further escapes, because those were not tried on an engine. A number at the end stays as
the schema has it, because it may go on: whoever compares the new answer with the old one finds out. White space between
tokens cannot be nailed down.
"""

import re
from collections.abc import Mapping
from typing import Any

import orjson

from gateway.grammars.grammar import UnsupportedError
from gateway.grammars.json_schema import MOST_DEPTH, pointed

MOST_ITEMS = 24  # that may still come in an array
_SPACE = re.compile(r"[ \t\r\n]*")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_SCALAR = re.compile(r"[^\s,\]}]+")


class _Open(Exception):
    """The text ended. `schema` is what the value that was being read still has to fit."""

    def __init__(self, schema: Any) -> None:
        super().__init__()
        self.schema = schema


def nailed(schema: Any, text: str) -> dict[str, Any]:
    """Return the schema of the answers that begin with `text`, the beginning of one by `schema`.

    Raises UnsupportedError if the text does not fit, if it is whole, or if one of its texts has an escape."""
    reader = _Reader(schema, text)
    try:
        reader.value(schema, 0, 0)
    except _Open as found:
        shared = {name: it for name, it in schema.items() if name in ("$defs", "definitions")}
        return {**shared, **found.schema}
    except RecursionError:
        pass
    raise UnsupportedError("the answer is complete already, or is nested too deeply")


class _Reader:
    """Reads one text by its schema. Each method returns what was read, nailed down, and where it ends."""

    def __init__(self, whole: Any, text: str) -> None:
        self._whole = whole
        self._text = text

    def value(self, schema: Any, at: int, depth: int) -> tuple[Any, int]:
        if depth > MOST_DEPTH:
            raise UnsupportedError("the schema is nested too deeply")
        while isinstance(schema, dict) and "$ref" in schema:
            schema = pointed(self._whole, str(schema["$ref"]))
            depth += 1
            if depth > MOST_DEPTH:
                raise UnsupportedError("the schema refers to itself")
        if not isinstance(schema, dict):
            raise UnsupportedError("the schema is not a JSON object")
        at = self._space(at, schema)
        for name in ("anyOf", "oneOf"):
            if name in schema:
                return self._any(schema[name], at, depth)
        char, text = self._text[at], self._text
        if char == "{" and schema.get("properties"):
            return self._object(schema, at + 1, depth)
        if char == "[" and isinstance(schema.get("items"), dict) and "prefixItems" not in schema:
            return self._array(schema, at + 1, depth)
        if char == '"':
            return self._string(schema, at)
        found = _SCALAR.match(text, at)
        if found is None or char in "{[":
            raise UnsupportedError("the schema does not describe a value of the answer")
        if found.end() == len(text):
            raise _Open(self._cut_down(schema, found[0]))
        return {"const": _json(found[0])}, found.end()

    def _any(self, schemas: list[Any], at: int, depth: int) -> tuple[Any, int]:
        """Return the first alternative's reading that is whole. If the text ends, every one that fits remains."""
        left = []
        for it in schemas:
            try:
                return self.value(it, at, depth + 1)
            except _Open as found:
                left.append(found.schema)
            except UnsupportedError:
                continue
        if not left:
            raise UnsupportedError("a value of the answer fits none of its schemas")
        raise _Open(left[0] if len(left) == 1 else {"anyOf": left})

    def _string(self, schema: Mapping[str, Any], at: int) -> tuple[Any, int]:
        found = _STRING.match(self._text, at)
        if found is not None:
            return {"const": _json(found[0])}, found.end()
        begun = self._text[at + 1 :]
        if "enum" in schema or "const" in schema:
            raise _Open(self._cut_down(schema, self._text[at:]))
        if "\\" in begun or "pattern" in schema or "format" in schema or schema.get("type") != "string":
            raise UnsupportedError("a text of the answer has an escape, or a pattern")
        most = schema.get("maxLength")
        least = max(0, int(schema.get("minLength", 0)) - len(begun))
        left = "" if most is None else max(0, int(most) - len(begun))
        bounds = "*" if most is None and not least else f"{{{least},{left}}}"
        escaped = re.sub(r"([][\\^$.|?*+(){}/-])", r"\\\1", begun)
        raise _Open({"type": "string", "pattern": f'^{escaped}[^"\\\\]{bounds}$'})

    @staticmethod
    def _cut_down(schema: Mapping[str, Any], begun: str) -> dict[str, Any]:
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        if values is None:
            return dict(schema)
        left = [it for it in values if orjson.dumps(it).decode().startswith(begun)]
        if not left:
            raise UnsupportedError("a value of the answer is not one of the allowed ones")
        return {"enum": left}

    def _array(self, schema: Mapping[str, Any], at: int, depth: int) -> tuple[Any, int]:
        done: list[Any] = []
        item, text = schema["items"], self._text
        while True:
            at = self._space(at, self._still(schema, done, item))
            if text[at] == "]" and not done:
                return {"type": "array", "maxItems": 0}, at + 1
            if text[at] == "]":
                return {"type": "array", "prefixItems": done, "minItems": len(done), "maxItems": len(done)}, at + 1
            if text[at] == ",":
                at = self._space(at + 1, self._still(schema, [*done, item], item))
            try:
                value, at = self.value(item, at, depth + 1)
            except _Open as found:
                raise _Open(self._still(schema, [*done, found.schema], item)) from None
            done.append(value)

    @staticmethod
    def _still(schema: Mapping[str, Any], done: list[Any], item: Any) -> dict[str, Any]:
        """What an array that begins so may become: one of its lengths."""
        if not done:
            return dict(schema)
        least = max(len(done), int(schema.get("minItems", 0)))
        most = min(int(schema.get("maxItems", len(done) + MOST_ITEMS)), len(done) + MOST_ITEMS)
        if least > len(done) + MOST_ITEMS:
            raise UnsupportedError("an array of the answer is too long")
        lengths = [done + [item] * (length - len(done)) for length in range(least, max(least, most) + 1)]
        return {"anyOf": [{"type": "array", "prefixItems": it} for it in lengths]}

    def _object(self, schema: Mapping[str, Any], at: int, depth: int) -> tuple[Any, int]:
        properties, required = schema["properties"], set(schema.get("required") or ())
        left = sorted(properties, key=lambda name: name not in required)  # the order in which llama.cpp has them
        done: dict[str, Any] = {}
        text = self._text

        def still(more: Mapping[str, Any]) -> dict[str, Any]:
            kept = {**done, **more, **{name: properties[name] for name in left if name not in more}}
            needed = [name for name in kept if name in required or name in done or name in more]
            return {"type": "object", "properties": kept, "required": needed, "additionalProperties": False}

        while True:
            at = self._space(at, still({}))
            if text[at] == "}":
                return still({}) | {"properties": done, "required": list(done)}, at + 1
            if text[at] == ",":
                at = self._space(at + 1, still({}))
            found = _STRING.match(text, at)
            names = self._named(left, required, text[at:] if found is None else found[0])
            if found is None:
                before, ways = left, []
                for name in names:
                    left = before[before.index(name) + 1 :]
                    ways.append(still({name: properties[name]}))
                raise _Open(ways[0] if len(ways) == 1 else {"anyOf": ways})
            name = names[0]
            left = left[left.index(name) + 1 :]
            at = self._space(found.end(), still({name: properties[name]}))
            try:
                value, at = self.value(properties[name], at + 1, depth + 1)
            except _Open as found_open:
                raise _Open(still({name: found_open.schema})) from None
            done[name] = value

    @staticmethod
    def _named(left: list[str], required: set[str], begun: str) -> list[str]:
        """The properties whose names begin so, and that may come now."""
        found = []
        for name in left:
            if orjson.dumps(name).decode().startswith(begun):
                found.append(name)
            if name in required:
                break
        if not found:
            raise UnsupportedError("a property of the answer is not at its expected place")
        return found

    def _space(self, at: int, schema: Any) -> int:
        """Return where the next token begins. If the text ends before it, `schema` is what is still to come."""
        found = _SPACE.match(self._text, at)
        at = found.end() if found else at
        if at == len(self._text):
            raise _Open(schema)
        return at


def _json(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        raise UnsupportedError("the text is not JSON") from None
