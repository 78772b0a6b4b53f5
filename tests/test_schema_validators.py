"""The compilation of a caller's schema is bounded before it begins, because nothing can interrupt it."""

from typing import Any

import pytest

from gateway import schema_validators
from gateway.grammars.constraint import Constraint

UNEVALUATED = ["unevaluatedProperties", "unevaluatedItems"]


MOMENT = r"^\d{4}-(0[1-9]|1[0-2])-([0-2]\d|3[01])T([01]\d|2[0-3])(:[0-5]\d){2}(\.\d+)?(Z|[+-]\d\d:\d\d)$"
HOST = "^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?[.])+[a-z]{2,63}$"


@pytest.mark.parametrize(
    "schema",
    [
        {"pattern": "^.{1,5000}0$"},
        {"patternProperties": {"^.{1,5000}0$": {}}},
        {"patternProperties": {f"^.{{1,40}}{number}$": {} for number in range(200)}},
        {"$ref": "#/x", "x": {"propertyNames": {"pattern": "^.{1,5000}0$"}}},
        {"allOf": [{"pattern": "a" * 1000 + str(number)} for number in range(40)]},
        {"pattern": r"(?i)\p{Any}" * 50},
        {"pattern": "(?i)" + r"[\x{0}-\x{10ffff}]" * 50},
        {"pattern": r"(?x)( ?i)" + "[\0-\U0010ffff]" * 50},
    ],
)
def test_patterns_that_take_long_to_compile_are_refused(schema: Any) -> None:
    with pytest.raises(ValueError, match=r"regex|too long"):
        schema_validators.validator(schema)
    assert Constraint(schema).fault('"x"') is None, "nobody can tell"


@pytest.mark.parametrize("pattern", [MOMENT, HOST, r"^\S.{0,40}\S$", r"^\p{L}+$", "(?i)^[a-z]+(-[a-z]+)?$"])
def test_patterns_as_they_are_written_are_compiled(pattern: str) -> None:
    schema = {"items": {"anyOf": [{"pattern": f"{pattern}|{number}"} for number in range(30)]}}
    assert not schema_validators.validator(schema).is_valid(["_ "])


def chained(levels: int, times: int, name: str) -> dict[str, Any]:
    """Definitions that each apply the next one so many times, and have a keyword `name`."""
    parts = {f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}] * times, name: False} for n in range(levels)}
    return {"$defs": parts | {f"a{levels}": {"type": "object"}}, "$ref": "#/$defs/a0"}


def related(number: int) -> dict[str, Any]:
    """Definitions that each refer to all of them from the members of a value."""
    members = {f"x{n}": {"allOf": [{"$ref": f"#/$defs/a{n}"}], "unevaluatedProperties": False} for n in range(number)}
    parts = {f"a{n}": {"allOf": [{"properties": members}], "unevaluatedProperties": False} for n in range(number)}
    return {"$defs": parts, "$ref": "#/$defs/a0"}


def named(length: int, parts: int) -> dict[str, Any]:
    return {"properties": {"a" * length: {"allOf": [{}, True] * parts}}}


@pytest.mark.parametrize("name", UNEVALUATED)
@pytest.mark.parametrize(("levels", "times"), [(13, 2), (40, 2), (300, 1), (4000, 1)])
def test_a_schema_that_would_be_compiled_again_and_again_is_refused(name: str, levels: int, times: int) -> None:
    """13 levels took 19 s, and 4000 overflowed the stack."""
    with pytest.raises(ValueError, match=r"too long to be compiled|refers to more than"):
        schema_validators.validator(chained(levels, times, name))
    assert Constraint(chained(levels, times, name)).fault("1") is None, "nobody can tell"


@pytest.mark.parametrize(
    "schema",
    [
        related(9),
        chained(4000, 1, "note") | {"unevaluatedProperties": False},
        named(100_000, 1000),
        {"$defs": {"a" * 100_000: {"x": {"allOf": [{}] * 1000}}}, "$ref": f"#/$defs/{'a' * 100_000}/x"},
        {"anyOf": [{"$ref": f"#/$defs/a{n}"} for n in range(2000)], "$defs": {f"a{n}": {} for n in range(2000)}},
        {"$defs": {"a": {"$anchor": "b"}}, "$ref": "#b", "unevaluatedProperties": False},
        {"allOf": [{"$id": "b", "$ref": "#"}], "unevaluatedProperties": False},
    ],
)
def test_other_schemas_that_take_too_long_to_compile_are_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"too long to be compiled|refers to more than|are no pointers"):
        schema_validators.validator(schema)


NODE = {"properties": {"next": {"$ref": "#/$defs/node"}, "tags": {"items": {}}}, "unevaluatedProperties": False}
BASE = {"type": "object", "properties": {"kind": {"type": "string"}}}
SHAPE = {"allOf": [{"$ref": "#/$defs/base"}, {"properties": {"of": {"$ref": "#/$defs/shape"}}}]}


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"$defs": {"node": NODE}, "$ref": "#/$defs/node"}, {"next": {"next": {}}}, {"next": {"x": 1}}),
        (
            {"$defs": {"base": BASE, "shape": SHAPE | {"unevaluatedProperties": False}}, "$ref": "#/$defs/shape"},
            {"kind": "a", "of": {"kind": "b"}},
            {"kind": "a", "of": {"b": 1}},
        ),
        ({"prefixItems": [{"$ref": "#/$defs/a"}], "unevaluatedItems": False, "$defs": {"a": BASE}}, [{}], [{}, 1]),
        (chained(5, 2, "unevaluatedProperties"), {}, {"a": 1}),
        (chained(900, 1, "note"), {}, 1),
        (related(2), {"x0": {"x1": {}}}, {"x2": {}}),
        (named(1000, 100) | {"type": "object"}, {}, 1),
        ({"properties": {f"a{n}": BASE | NODE for n in range(300)}, "$defs": {"node": NODE}}, {}, {"a1": {"x": 1}}),
    ],
)
def test_schemas_as_they_are_written_are_compiled(schema: dict[str, Any], right: Any, wrong: Any) -> None:
    validator = schema_validators.validator(schema)
    assert (validator.is_valid(right), validator.is_valid(wrong)) == (True, False)


def test_the_schemas_of_a_request_share_a_budget() -> None:
    budget = schema_validators.Budget()
    count, schema = schema_validators.count, chained(7, 2, "unevaluatedProperties")
    count(schema, budget)
    with pytest.raises(ValueError, match="too long to be compiled"):
        [count(schema, budget) for _ in range(100)]
