"""The schema of an answer holds what engines compile, and refers to itself rightly."""

from typing import Any

import jsonschema_rs
import pytest

from gateway.forced_tools.demand import Demand, read
from gateway.forced_tools.schema import MOST_CALLS, answer_schema, fitted


def demand(choice: Any, *schemas: Any, **said: Any) -> Demand:
    tools = [{"function": {"name": f"f{index}", "parameters": it}} for index, it in enumerate(schemas)]
    found = read({"tools": tools, "tool_choice": choice} | said)
    assert found is not None
    return found


TREE = {
    "type": "object",
    "properties": {"left": {"$ref": "#"}, "leaf": {"$ref": "#/$defs/leaf"}},
    "required": ["leaf"],
    "$defs": {"leaf": {"type": "integer"}},
}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
NAMED = {"type": "function", "function": {"name": "f0"}}


def test_a_named_function_is_asked_for_its_arguments_alone() -> None:
    assert answer_schema(demand(NAMED, CITY), None) == CITY


def test_several_calls_are_a_list_with_an_end() -> None:
    schema = answer_schema(demand("required", CITY, TREE), None)
    assert (schema["type"], schema["minItems"], schema["maxItems"]) == ("array", 1, MOST_CALLS)


@pytest.mark.parametrize("parallel", [True, False])
def test_a_schema_that_refers_to_itself_still_does(parallel: bool) -> None:
    schema = answer_schema(demand("required", CITY, TREE, parallel_tool_calls=parallel), None)
    right: Any = {"name": "f1", "arguments": {"leaf": 1, "left": {"leaf": 2}}}
    wrong: Any = {"name": "f1", "arguments": {"leaf": 1, "left": {"leaf": "2"}}}
    swapped: Any = {"name": "f0", "arguments": {"leaf": 1}}
    for call, fits in ((right, True), (wrong, False), (swapped, False)):
        assert jsonschema_rs.is_valid(schema, [call] if parallel else call) is fits


@pytest.mark.parametrize(
    ("schema", "becomes"),
    [
        ({"$schema": "x", "title": "t", "type": "string", "format": "date"}, {"type": "string", "format": "date"}),
        ({"pattern": "^wf_[a-z]{6,}$"}, {"pattern": "^wf_[a-z]{6,}$"}),
        ({"pattern": "wf"}, {}),
        ({"pattern": "^\\d$"}, {}),
        ({"pattern": "^(?=a)a$"}, {}),
        ({"pattern": "^a{3000}$"}, {}),
        ({"maxLength": 5000, "minLength": 1}, {"minLength": 1}),
        ({"$ref": "http://elsewhere/x"}, {}),
        ({"not": {}, "if": {}, "propertyNames": {}}, {}),
        ({"properties": {"pattern": True, "title": {"title": "x"}}}, {"properties": {"pattern": {}, "title": {}}}),
        ({"enum": [{"title": "kept"}]}, {"enum": [{"title": "kept"}]}),
        ({"items": {"title": "x"}, "additionalProperties": False}, {"items": {}, "additionalProperties": False}),
        ({"anyOf": [{"title": "x", "const": 1}]}, {"anyOf": [{"const": 1}]}),
    ],
)
def test_only_what_engines_compile_is_kept(schema: dict[str, Any], becomes: dict[str, Any]) -> None:
    assert fitted(schema, "#", 1999) == becomes
