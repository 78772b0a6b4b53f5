"""What a request demands of its tool calls, and the validators of their arguments."""

import time
from typing import Any

import orjson
import pytest

from gateway.errors import BadRequest
from gateway.forced_tools.demand import Tool, check, read

TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
OTHER: dict[str, Any] = {"type": "function", "function": {"name": "g"}}
NAMED = {"type": "function", "function": {"name": "g"}}


def tool(schema: dict[str, Any]) -> Tool:
    return Tool("f", "", schema, strict=False, entry={}, where="tools[0].function")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tool_choice": "none"},
        {"tools": [], "tool_choice": "auto"},
        {"tools": [TOOL]},
        {"tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": True},
        {"tools": [TOOL], "tool_choice": None, "parallel_tool_calls": None},
        {"tools": [{"type": "custom", "custom": {"name": "c"}}]},
    ],
)
def test_a_request_that_demands_nothing_is_left_alone(fields: dict[str, Any]) -> None:
    assert read(fields) is None


@pytest.mark.parametrize(
    ("said", "mode", "names", "several"),
    [
        ({"tool_choice": "required"}, "required", ["f", "g"], True),
        ({"tool_choice": "required", "parallel_tool_calls": False}, "required", ["f", "g"], False),
        ({"tool_choice": NAMED}, "named", ["g"], False),
        ({"tool_choice": "none"}, "none", ["f", "g"], True),
        ({"parallel_tool_calls": False}, "auto", ["f", "g"], False),
    ],
)
def test_each_demand_is_read(said: dict[str, Any], mode: str, names: list[str], several: bool) -> None:
    demand = read({"tools": [TOOL, OTHER]} | said)
    assert demand is not None
    assert (demand.mode, [it.name for it in demand.tools], demand.several) == (mode, names, several)


def test_a_pattern_of_any_kind_is_tried_in_linear_time() -> None:
    validator = tool({"properties": {"a": {"pattern": "^(a+)+$"}}}).validator
    began = time.process_time()
    assert not validator.is_valid({"a": "a" * 100_000 + "b"})
    assert time.process_time() - began < 1, "in exponential time it would not end"


def test_a_pattern_that_needs_more_than_linear_time_is_left_out() -> None:
    schema = {"properties": {"a": {"type": "string", "pattern": "^(?=x)x$"}}, "required": ["a"]}
    validator = tool(schema).validator
    assert validator.is_valid({"a": "y"})
    assert not validator.is_valid({})


LARGE = "^.{1,5000}0$"


@pytest.mark.parametrize(
    "pattern",
    [
        {"pattern": LARGE},
        {"patternProperties": {LARGE: {}}},
        {"$ref": "#/x-parts/a", "x-parts": {"a": {"pattern": LARGE}}},
        {"$ref": "#/x/0", "x": [{"patternProperties": {LARGE: {}}}]},
        {
            "$schema": "http://json-schema.org/draft-04/schema#",
            "minimum": 0,
            "exclusiveMinimum": True,
            "pattern": LARGE,
        },
        {"$schema": "urn:mine", "pattern": LARGE},
    ],
)
def test_a_pattern_that_is_too_large_is_left_out_and_never_compiled_before_a_call(pattern: dict[str, Any]) -> None:
    schema = pattern | {"properties": {"a": {"type": "integer"}}}
    function = {"name": "f", "parameters": schema}
    check({"tools": [{"type": "function", "function": function}], "tool_choice": "required"})
    validator = tool(schema).validator
    assert validator.is_valid({"a": 1})
    assert not validator.is_valid({"a": "x"})


def test_a_parameter_that_is_called_pattern_is_checked_where_patterns_are_not() -> None:
    inner = {"type": "object", "properties": {"pattern": {"type": "integer"}}}
    schema = inner | {"properties": inner["properties"] | {"a": {"pattern": "^(?=x)x$"}, "all": {"items": inner}}}
    validator = tool(schema).validator
    assert validator.is_valid({"pattern": 1, "a": "y", "all": [{"pattern": 1}]})
    assert not validator.is_valid({"pattern": "x"})
    assert not validator.is_valid({"all": [{"pattern": "x"}]})


@pytest.mark.parametrize(
    "more",
    [
        {"patternProperties": {"x": {"type": "string"}}, "properties": {"a": {"$ref": "#/patternProperties/x"}}},
        {"properties": {"pattern": True, "a": {"$ref": "#/properties/pattern"}}},
    ],
)
def test_a_reference_may_point_to_what_has_the_name_of_a_pattern(more: dict[str, Any]) -> None:
    function = {"name": "f", "strict": True, "parameters": {"type": "object"} | more}
    check({"tools": [{"type": "function", "function": function}]})


def test_a_bound_of_more_than_64_bits_is_checked_and_goes_on_as_it_was_written() -> None:
    most = orjson.Fragment(b"340282366920938463463374607431768211455")  # as a request's body is read
    schema = {"properties": {"a": {"type": "integer", "maximum": most}}}
    validator = tool(schema).validator
    assert validator.is_valid(orjson.loads(b'{"a":340282366920938463463374607431768211455}'))
    assert not validator.is_valid(orjson.loads(b'{"a":440282366920938463463374607431768211455}'))
    assert schema["properties"]["a"]["maximum"] is most


@pytest.mark.parametrize("schema", [{"$ref": "http://127.0.0.1:9/x"}, {"$ref": "file:///etc/hostname"}, {"type": "x"}])
def test_an_invalid_schema_is_refused_and_nothing_is_fetched(schema: dict[str, Any]) -> None:
    function = {"name": "f", "parameters": schema}
    with pytest.raises(BadRequest) as refused:
        check({"tools": [{"type": "function", "function": function}], "tool_choice": "required"})
    assert refused.value.param == "tools[0].function.parameters"
    check({"tools": [{"type": "function", "function": function}]})  # then it is the engine's matter
