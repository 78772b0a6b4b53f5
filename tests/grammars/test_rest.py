"""What may still come of a text: for every cut of it, its rest and nothing that would break it."""

import json
import re
from typing import Any

import jsonschema_rs
import orjson
import pytest
from hypothesis import assume, given

from gateway.dialects import DIALECTS
from gateway.grammars.constraint import Constraint, constraint
from gateway.grammars.grammar import UnsupportedError, read, write
from gateway.grammars.json_schema import compiled
from gateway.grammars.nailed import nailed
from gateway.grammars.rest import Walk
from tests.support.any_json import JSON

STYLES = {name: style for name, it in DIALECTS.items() if (style := it.json_style) is not None}
POINT = {"type": "object", "properties": {"x": {"type": "number"}, "y": {"type": "number"}}, "required": ["x", "y"]}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "below": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
            "required": ["name"],
        }
    },
    "$ref": "#/$defs/node",
}
CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "numbers": (POINT, {"x": -1.5e3, "y": 0}),
    "a tree": (TREE, {"name": 'a "quoted" \\ Ä👩', "below": [{"name": ""}, {"name": "c", "below": []}]}),
    "optional properties": (
        {"type": "object", "properties": {it: {"type": "boolean"} for it in "abcd"}, "required": ["a"]},
        {"a": True, "c": False},
    ),
    "bounds": (
        {
            "type": "object",
            "properties": {
                "t": {"type": "string", "minLength": 2, "maxLength": 3},
                "l": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2},
            },
            "required": ["t", "l"],
        },
        {"t": "abc", "l": [10, -2]},
    ),
    "alternatives": (
        {
            "type": "object",
            "properties": {"v": {"anyOf": [POINT, {"enum": ["one", "once", 1]}, {"type": ["null", "boolean"]}]}},
            "required": ["v"],
        },
        {"v": "once"},
    ),
    "further properties": (
        {
            "type": "object",
            "properties": {"a": {"const": 1}},
            "required": ["a"],
            "additionalProperties": {"type": "null"},
        },
        {"a": 1, "b": None, "c": None},
    ),
    "a tuple": (
        {"type": "array", "prefixItems": [{"type": "string"}, POINT], "items": False, "minItems": 2},
        ["s", {"x": 1, "y": 2}],
    ),
    "all of them": (
        {"allOf": [POINT, {"properties": {"z": {"type": "null"}}, "required": ["z"]}]},
        {"x": 1, "y": 2, "z": None},
    ),
}


def follows(grammar: str, text: str) -> bool:
    walk = Walk(read(grammar))
    return walk.follow(text) and walk.may_end


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("indent", [None, 2])
def test_at_every_cut_the_rest_may_come_and_a_wrong_one_may_not(case: str, style: str, indent: int | None) -> None:
    schema, value = CASES[case]
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    asked = Constraint(schema=schema)
    for cut in range(1, len(text)):
        fields = asked.rest(text[:cut], "", STYLES[style])
        grammar = fields["grammar"] if "grammar" in fields else fields["structured_outputs"]["grammar"]
        assert follows(grammar, text[cut:]), (cut, grammar)
        assert not follows(grammar, text), "the whole would begin anew"
        assert not follows(grammar, text[cut:] + "}")
    assert asked.is_whole(text)


@given(JSON)
def test_any_json_object_has_a_rest_at_every_cut(value: Any) -> None:
    text = json.dumps({"it": value}, ensure_ascii=False)
    assume(not re.search(r"\d{16}|NaN|Infinity|\x7f", text))  # engines' grammars have no such numbers
    walk = Walk(compiled(None, STYLES["vllm"]).grammar)
    assert walk.follow(text[: len(text) // 2])
    assert follows(write(walk.rest()), text[len(text) // 2 :])


@pytest.mark.parametrize("case", [it for it in CASES if it not in ("further properties", "a tuple", "all of them")])
def test_at_every_cut_the_schema_allows_the_whole_answer_and_no_other_beginning(case: str) -> None:
    schema, value = CASES[case]
    text = json.dumps(value, ensure_ascii=False).replace('\\"', "'").replace("\\", "")  # no text has an escape
    value = json.loads(text)
    for cut in range(1, len(text)):
        allowed = nailed(schema, text[:cut])
        assert jsonschema_rs.is_valid(allowed, value), (text[:cut], allowed)
    if case == "numbers":
        assert not jsonschema_rs.is_valid(nailed(schema, '{"x": -1.5e3, "'), {"x": 7, "y": 0})


GRAMMARS = {
    'root ::= "a" | "b" root2 # a comment\nroot2 ::= [^x-z\\n\\]]{2,3} ("c" | "-")* .?': [
        "a",
        "bpq",
        "bpqrc-c",
        "bpq-é",
    ],
    'root ::= ("ab" | "c")+ "\\"" [\\x41-\\u0043]': ['abcab"B', 'c"C'],
}


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_a_grammar_is_read_and_written_as_it_is(grammar: str) -> None:
    for text in GRAMMARS[grammar]:
        assert follows(grammar, text), text
        for cut in range(len(text)):
            walk = Walk(read(grammar))
            assert walk.follow(text[:cut])
            assert follows(write(walk.rest()), text[cut:]), (text, cut)
    assert not follows(grammar, "bx")


def _deep(levels: int) -> dict[str, Any]:
    """A schema that is small, and whose grammar is not."""
    if not levels:
        return {"type": "null"}
    return {"type": ["object"] * 9, "properties": {"a": _deep(levels - 1)}, "required": ["a"]}


BEYOND: dict[str, dict[str, Any]] = {
    "a regular expression": {"structured_outputs": {"regex": "a+"}},
    "a lark grammar": {"structured_outputs": {"grammar": 'start: "a"\n'}},
    "a rule that begins with itself": {
        "grammar": 'root ::= root2 "a"\nroot2 ::= root2 "b" | "c" root3\nroot3 ::= root2 root3'
    },
    "a reference to elsewhere": {"json_schema": {"$ref": "http://example.com/x"}},
    "a reference to nothing": {"json_schema": {"$ref": "#/$defs/x"}},
    "a schema with values that none has": {
        "json_schema": {"type": "object", "properties": {"a": {"type": "string", "maxLength": "x"}}}
    },
    "very many rules": {"json_schema": _deep(8)},
    "two constraints": {"grammar": 'root ::= "a"', "json_schema": {"type": "object"}},
    "another text": {"grammar": 'root ::= "b"'},
    "an older form": {"guided_json": {"type": "object"}},
}


@pytest.mark.parametrize("case", BEYOND)
def test_what_is_not_understood_is_said_so(case: str) -> None:
    with pytest.raises(UnsupportedError):
        (constraint(BEYOND[case]) or Constraint()).rest("a", "", STYLES["llamacpp"])


@pytest.mark.parametrize(
    "before", ["#" * 100_000 + "\n", "# " * 50_000 + "\n", " " * 100_000, 'root ::= "a"{1,' + " " * 100_000]
)
def test_what_stands_before_an_unknown_character_is_read_in_linear_time(before: str) -> None:
    """Otherwise a line of 60 number signs would take months."""
    with pytest.raises(UnsupportedError):
        read(f"{before}!")


def test_white_space_that_is_not_handed_over_has_to_come_again() -> None:
    asked = Constraint(choices=("new york", "new orleans"))
    grammar = asked.rest("new ", " ", STYLES["llamacpp"])["grammar"]
    assert follows(grammar, " york")
    assert not follows(grammar, "york")


@pytest.mark.parametrize(
    ("keyword", "exact"),
    [({}, True), ({"minimum": 1}, False), ({"multipleOf": 2}, False), ({"description": "x", "title": "y"}, True)],
)
def test_which_schemas_a_grammar_holds_to(keyword: dict[str, Any], exact: bool) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"} | keyword}, "required": ["a"]}
    assert all(Constraint(schema=schema).exact(style) is exact for style in STYLES.values())


@pytest.mark.parametrize(("text", "right"), [('{"x": 1, "y": 2}', True), ('{"x": 1}', False), ('{"x": 1, ', False)])
def test_a_whole_text_is_checked(text: str, right: bool) -> None:
    assert (Constraint(schema=POINT).fault(text) is None) is right


@pytest.mark.parametrize(("text", "right"), [(f"{2**128 - 1}", True), (f"{2**129}", False)])
def test_a_whole_text_is_judged_by_a_bound_of_more_than_64_bits(text: str, right: bool) -> None:
    most = orjson.Fragment(f"{2**128 - 1}".encode())  # as a request's body is read
    assert (Constraint(schema={"type": "integer", "maximum": most}).fault(text) is None) is right
