"""Bounds on fields by whose number or text an engine allocates, recurses or searches.

This file is long because it has a row for each bound, and for each ordinary request beside it.
"""

import json
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any

import httpx
import pytest

from tests.support.processes import MESSAGES, FakeEngine, GatewayProcess

PATHS = {"chat": "/v1/chat/completions", "completion": "/v1/completions"}
ALL = ("ollama", "vllm", "llamacpp")


def schema(**keywords: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": keywords}}}


def text(**keywords: Any) -> dict[str, Any]:
    return schema(type="object", properties={"a": {"type": "string"} | keywords})


def nested(depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        found = {"type": "array", "items": found}
    return found


def properties(count: int, **keywords: Any) -> dict[str, Any]:
    each = {"type": "string"} | keywords
    return {"type": "object", "properties": {f"p{number}": each for number in range(count)}}


def tool(parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


def parentheses(count: int) -> str:
    return "(" * count + "a" + ")" * count


def branching(rules: int, *, sign: str = " | ", item: str = "{}") -> str:
    """Rules of which each refers to the next one three times: so many ways to begin, to the power of three."""
    lines = [f"r{number} ::= {sign.join([item.format(f'r{number + 1}')] * 3)}" for number in range(rules)]
    return "\n".join(["root ::= r0", *lines, f'r{rules} ::= "x" | ""'])


def conditions(count: int) -> dict[str, Any]:
    """Definitions of which each applies the next one twice to the same value."""
    found = {f"a{n}": {"if": to(n + 1), "then": to(n + 1)} for n in range(count)}
    return {"$defs": found | {f"a{count}": {"type": "object"}}, "type": "object", **to(0)}


def to(number: int) -> dict[str, Any]:
    return {"$ref": f"#/$defs/a{number}"}


def to_b() -> dict[str, Any]:
    return {"$ref": "#/$defs/b"}


def endless(count: int) -> dict[str, Any]:
    """The same, with a last one that applies itself."""
    found = {f"a{n}": {"allOf": [to(n + 1)] * 2} for n in range(count)}
    return {"$defs": found | {f"a{count}": {"anyOf": [{"type": "object"}, to(count)]}}, **to(0)}


def definitions(count: int, choice: str, name: str = "$defs") -> dict[str, Any]:
    found = {f"d{number}": {choice: [{"$ref": f"#/{name}/d{number + 1}"}] * 3} for number in range(count)}
    return {name: found | {f"d{count}": {"type": "string"}}, "$ref": f"#/{name}/d0"}


def tagged(number: int, size: int) -> dict[str, Any]:
    """A grammar in a structural tag: of so many characters, and sound."""
    return {"type": "grammar", "grammar": f"root ::= r{number} " + '"a" ' * (size // 4)}


TOO_MUCH: dict[str, tuple[dict[str, Any], str]] = {
    "a grammar of nested parentheses": ({"grammar": f"root ::= {parentheses(60_000)}"}, "grammar"),
    "a short one": ({"grammar": f"root ::= {parentheses(65)}"}, "grammar"),
    "a grammar that is long": ({"grammar": 'root ::= "' + "a" * 70_000 + '"'}, "grammar"),
    "optional parts in a row": ({"grammar": "root ::= " + '"a"? ' * 65}, "grammar"),
    "a count that runs backwards": ({"grammar": 'root ::= "a"{5,2}'}, "grammar"),
    "with spaces": ({"grammar": 'root ::= "a" { 5 , 2 }'}, "grammar"),
    "with zeros": ({"grammar": 'root ::= "a"{0005,02}'}, "grammar"),
    "a count of thousands of digits": ({"grammar": 'root ::= "a"{' + "9" * 5000 + "}"}, "grammar"),
    "thousands of alternatives": ({"grammar": "root ::= " + "|".join('"a"' for _ in range(1500))}, "grammar"),
    "rules that are each three times the next": ({"grammar": branching(20)}, "grammar"),
    "in groups": ({"grammar": branching(20, item='("y"? {})')}, "grammar"),
    "one after the other, each maybe empty": ({"grammar": branching(20, sign=" ")}, "grammar"),
    "definitions that are each three times the next": (schema(**definitions(20, "anyOf")), "response_format"),
    "by the older name, all at once": (schema(**definitions(20, "allOf", "definitions")), "response_format"),
    "in a tool": ({"tools": [tool(definitions(20, "oneOf"))]}, "tools[0]"),
    "conditions that are each twice the next": ({"tools": [tool(conditions(20))]}, "tools[0]"),
    "denials": ({"tools": [tool({"not": conditions(20), "$defs": conditions(20)["$defs"]})]}, "tools[0]"),
    "a definition that applies itself": ({"tools": [tool(endless(20))]}, "tools[0]"),
    "at the end of none": (schema(**endless(0)), "response_format"),
    "parentheses behind a quote in a comment": ({"grammar": 'root ::= # "\n' + parentheses(60_000)}, "grammar"),
    "optional parts behind a bracket in a comment": ({"grammar": "root ::= # [\n" + "[a-z]? " * 200}, "grammar"),
    "optional parts that begin alike": ({"grammar": "root ::= " + "[a-z]? " * 20}, "grammar"),
    "in several rules": (
        {"grammar": "root ::= r0 r1\n" + "".join(f"r{n} ::= {'[a-z]? ' * 9}\n" for n in (0, 1))},
        "grammar",
    ),
    "in a rule with a number for its name": ({"grammar": f"root ::= 0\n0 ::= {'[a-z]? ' * 20}"}, "grammar"),
    "behind a token": ({"grammar": "root ::= <think> " + "[a-z]? " * 20}, "grammar"),
    "behind words": ({"grammar": 'root ::= "The answer is: " ' + "[a-z]? " * 20}, "grammar"),
    "that count": ({"grammar": "root ::= " + "[a-z]{0,1999} " * 20}, "grammar"),
    "repetitions of what is repeated": ({"grammar": "root ::= ([a-df-z]+)+"}, "grammar"),
    "alternatives that are the same": ({"grammar": f"root ::= ({'|'.join(['[a-df-z]'] * 20)})*"}, "grammar"),
    "a pattern of parts that begin alike": (text(pattern="^" + "[a-z]?" * 20 + "$"), "response_format"),
    "behind an empty class": (text(pattern="^[]" + "b?" * 60 + "$"), "response_format"),
    "a pattern that repeats what is repeated": (
        {"tools": [tool({"properties": {"a": {"pattern": "^(a+)+$"}}})]},
        "tools[0]",
    ),
    "in the second of two tools, and the shorter one": (
        {"tools": [tool({"properties": {"a": {"pattern": it}}}) for it in ("^[a-z]{1,40}-[0-9]+$", "^(a+)+$")]},
        "tools[1]",
    ),
    "vLLM's grammar": ({"structured_outputs": {"grammar": parentheses(65)}}, "structured_outputs.grammar"),
    "vLLM's regex": ({"structured_outputs": {"regex": "a{5,2}"}}, "structured_outputs.regex"),
    "vLLM's schema": ({"structured_outputs": {"json": nested(200)}}, "structured_outputs.json"),
    "vLLM's choice": ({"structured_outputs": {"choice": ["a"] * 1001}}, "structured_outputs.choice"),
    "its white space": (
        {"structured_outputs": {"json": {}, "whitespace_pattern": parentheses(65)}},
        "structured_outputs.whitespace_pattern",
    ),
    "its schema as text": ({"structured_outputs": {"json": json.dumps(nested(200))}}, "structured_outputs.json"),
    "as text that is deeper than any": ({"json_schema": '{"not":' * 5000 + "{}" + "}" * 5000}, "json_schema"),
    "as text of too many values": ({"guided_json": '{"x":[' + "[]," * 200_000 + "1]}"}, "guided_json"),
    "as text that is no JSON": ({"structured_outputs": {"json": "{'a': 1}"}}, "structured_outputs.json"),
    "as text with a name twice": ({"guided_json": '{"minLength":1,"minLength":1000000}'}, "guided_json"),
    "a structural tag as text": (
        {"structured_outputs": {"structural_tag": json.dumps({"format": {"pattern": "a{5,2}"}})}},
        "structured_outputs.structural_tag",
    ),
    "with a grammar": ({"structural_tag": {"format": {"type": "grammar", "grammar": branching(20)}}}, "structural_tag"),
    "grammars that are long in all": (
        {"structural_tag": {"a": [tagged(n, 30_000) for n in range(3)]}},
        "structural_tag",
    ),
    "in a tool and beside it": (
        {"tools": [tool({"x": tagged(1, 40_000)})], "guided_grammar": tagged(2, 40_000)["grammar"]},
        "tools[0]",
    ),
    "patterns that are long in all": (
        {"tools": [tool({"properties": {"a": {"pattern": f"^{n}{'a' * 20_000}$"}}}) for n in range(5)]},
        "tools[3]",
    ),
    "vLLM's older names": ({"guided_regex": parentheses(65)}, "guided_regex"),
    "older grammar": ({"guided_grammar": parentheses(65)}, "guided_grammar"),
    "older schema": ({"guided_json": nested(200)}, "guided_json"),
    "older choice": ({"guided_choice": ["a"] * 1001}, "guided_choice"),
    "llama.cpp's schema": ({"json_schema": nested(200)}, "json_schema"),
    "a schema that is deep": (schema(**nested(200)), "response_format"),
    "with thousands of properties": (schema(**properties(501)), "response_format"),
    "with thousands of values": (schema(enum=[str(number) for number in range(1001)]), "response_format"),
    "in several enums": (schema(anyOf=[{"enum": ["x"] * 400}] * 3), "response_format"),
    "that is large": (schema(allOf=[properties(400)] * 30), "response_format"),
    "of optional properties in several objects": (
        schema(properties={f"o{number}": properties(300) for number in range(4)}),
        "response_format",
    ),
    "that are merged to one object": (
        schema(**{"$defs": {"a": properties(100)}}, allOf=[{"anyOf": [{"$ref": "#/$defs/a"}] * 6}]),
        "response_format",
    ),
    "by way of another reference": (
        schema(**{"$defs": {"a": properties(300), "b": {"$ref": "#/$defs/a"}}}, allOf=[{"anyOf": [to_b()] * 2}]),
        "response_format",
    ),
    "at the end of a long chain": (
        schema(
            **{"$defs": {f"a{n}": to(n + 1) for n in range(65)} | {"a65": properties(1)}},
            allOf=[{"anyOf": [to(0)]}],
        ),
        "response_format",
    ),
    "in several tools": ({"tools": [tool(properties(300)) for _ in range(4)]}, "tools[2]"),
    "of many values in all": (
        {"tools": [tool(properties(490, description="x") | {"required": list(properties(490)["properties"])})] * 60},
        "tools[50]",
    ),
    "a length from above to below": (text(minLength=5, maxLength=1), "response_format"),
    "items from above to below": (schema(type="array", minItems=5, maxItems=1), "response_format"),
    "numbers from above to below": (schema(type="integer", minimum=5, maximum=1), "response_format"),
    "a least length of a million": (text(minLength=1_000_000), "response_format"),
    "a least length of more than 64 bits": (text(minLength=2**70), "response_format"),
    "a length from there to below": (text(minLength=2**70, maxLength=1), "response_format"),
    "a pattern of parentheses": (text(pattern=f"^{parentheses(65)}$"), "response_format"),
    "a pattern of optional parts": (text(pattern="^" + "a?" * 65 + "$"), "response_format"),
    "a pattern that counts backwards": (text(pattern="^a{5,2}$"), "response_format"),
    "a pattern of names": ({"tools": [tool({"patternProperties": {"^a{5,2}$": {}}})]}, "tools[0]"),
    "a tool's schema": ({"tools": [tool(nested(200))]}, "tools[0]"),
    "thousands of tools": ({"tools": [tool({})] * 1025}, "tools"),
    "a sampling window of gigabytes": ({"dry_multiplier": 1, "dry_penalty_last_n": 500_000_000}, "dry_penalty_last_n"),
    "as a fraction": ({"dry_multiplier": 1, "dry_penalty_last_n": 5e8}, "dry_penalty_last_n"),
    "of repetitions": ({"repeat_penalty": 1.1, "repeat_last_n": 500_000_000}, "repeat_last_n"),
    "probabilities of everything": ({"n_probs": 1_000_000}, "n_probs"),
    "by OpenAI's name": ({"logprobs": True, "top_logprobs": 1_000_000}, "top_logprobs"),
    "of the prompt": ({"prompt_logprobs": 1_000_000}, "prompt_logprobs"),
    "thousands of stops": ({"stop": ["a"] * 65}, "stop"),
    "a long stop": ({"stop": "a" * 5000}, "stop"),
    "thousands of breakers": ({"dry_sequence_breakers": ["a"] * 65}, "dry_sequence_breakers"),
    "thousands of samplers": ({"samplers": "k" * 1_000}, "samplers"),
    "a list of samplers": ({"samplers": ["top_k"] * 65}, "samplers"),
    "a large bias": ({"logit_bias": {str(number): 1 for number in range(4097)}}, "logit_bias"),
    "a bias of long texts": ({"logit_bias": [["word " * 1000, 1]]}, "logit_bias"),
    "preserved tokens": ({"preserved_tokens": ["a"] * 1025}, "preserved_tokens"),
    "triggers": ({"grammar_triggers": [{"type": 2, "value": "(" * 5000}]}, "grammar_triggers"),
}
FOR_ALL = ("a grammar of nested parentheses", "grammars that are long in all", "patterns that are long in all")
LANGUAGE = r"""
root ::= function+
function ::= "fn" s name "(" (name (", " name)*)? ")" s block n
block ::= "{" n (statement n)* "}"
statement ::= "let" s name s "=" s sum ";" | name s "=" s sum ";" | name "(" arguments? ")" ";" | "return" s sum ";"
    | "while" s "(" test ")" s block | "for" s "(" name s "in" s sum ")" s block | note
    | "if" s "(" test ")" s block (s "else" s block)?
test ::= sum (" == " | " != " | " <= " | " < " | " >= " | " > ") sum
sum ::= product ((" + " | " - ") product)*
product ::= value ((" * " | " / ") value)*
value ::= name | number | text | "-" value | name "(" arguments? ")" | "(" s sum s ")"
arguments ::= sum ("," s sum)*
name ::= [a-zA-Z_] [a-zA-Z_0-9]*
number ::= [0-9]+ ("." [0-9]+)?
text ::= "\"" ([^"\\] | "\\" .)* "\""
note ::= "//" [^\n]* | "/*" ([^*] | "*" [^/])* "*/"
s ::= [ \t\n]*
n ::= [ \t\n]+
"""
ENOUGH: dict[str, dict[str, Any]] = {
    "a grammar of a language": {"grammar": LANGUAGE},
    "a grammar as they are written": {
        "grammar": 'root ::= object\nobject ::= "{" ws (pair ("," ws pair)*)? "}"\npair ::= string ":" ws value\n'
        'value ::= object | string | number\nstring ::= "\\"" [^"]* "\\""\nnumber ::= "-"? [0-9]{1,15}\nws ::= [ \t\n]*'
    },
    "a grammar with all that there is": {
        "grammar": 'root ::= <think>? 1-a{2,3} # a comment\'s [\n1-a ::= . ( [^a-z\\]] | [a-y] )* "\\x41\\u00e9\n\\"" |'
    },
    "words in a row": {"grammar": 'root ::= line+\nline ::= [a-z]+ (" " [a-z]+)* [.!?]? "\\n"'},
    "patterns as they are written": text(
        anyOf=[
            {"pattern": r"^[a-zA-Z0-9._%+-]+@[a-zA-Z0-9.-]+\.[a-zA-Z]{2,}$"},
            {"pattern": r"^(?:(?:25[0-5]|2[0-4]\d|[01]?\d\d?)\.){3}(?:25[0-5]|2[0-4]\d|[01]?\d\d?)$"},
            {"pattern": r"^\d{4}-\d{2}-\d{2}(T\d{2}:\d{2}(:\d{2}(\.\d+)?)?(Z|[+-]\d{2}:?\d{2})?)?$"},
        ]
    ),
    "a grammar of many rules": {"grammar": branching(7)},
    "a schema that refers to itself": schema(
        **{"$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}}},
        anyOf=[{"$ref": "#/$defs/node"}, {"type": "null"}],
    ),
    "definitions that are each three times the next, some of them": schema(**definitions(7, "anyOf")),
    "conditions as they are written": {"tools": [tool(conditions(10))]},
    "a reference into a list by a superscript digit": schema(anyOf=[{"$ref": "#/anyOf/\u00b2"}, {"type": "null"}]),
    "parentheses in quotes": {"grammar": 'root ::= "' + "(" * 5000 + '" [({]'},
    "a schema as they are written": schema(
        type="object",
        properties={
            "name": {"type": "string", "minLength": 1, "maxLength": 1000, "pattern": "^[A-Z][a-z]{0,40}$"},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 0, "maxItems": 50},
            "minLength": {"type": "integer", "minimum": 0, "maximum": 10},
        },
        required=["name"],
    ),
    "many tools of many properties": {"tools": [tool(properties(40)) for _ in range(128)]},
    "a large object, and others whose properties are required": schema(
        properties={f"o{n}": properties(400) | {"required": list(properties(400)["properties"])} for n in range(9)},
        allOf=[properties(400)],
    ),
    "a text of any length": text(maxLength=100_000),
    "a schema as text with a large number": {"guided_json": '{"type":"integer","maximum":18446744073709551616}'},
    "a schema as text": {"json_schema": json.dumps(properties(20, pattern="^[a-z]+$")), "structural_tag": ""},
    "a schema of some depth": schema(**nested(30)),
    "windows as long as a context": {"dry_penalty_last_n": 131_072, "repeat_last_n": -1},
    "what OpenAI allows": {
        "logprobs": True,
        "top_logprobs": 20,
        "stop": ["a", "b", "c", "d"],
        "tools": [tool({})] * 128,
    },
    "nulls": {"grammar": None, "stop": None, "tools": None, "response_format": None, "structured_outputs": None},
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_a_field_that_would_block_the_engine_for_others_is_refused(before_all: GatewayProcess, name: str) -> None:
    fields, param = TOO_MUCH[name]
    with before_all.client() as client:
        for model in ALL if name in FOR_ALL else ("llamacpp",):
            for kind, content in (("chat", {"messages": MESSAGES}), ("completion", {"prompt": "x"})):
                answer = client.post(PATHS[kind], json={"model": model} | content | fields)
                assert answer.status_code == 400, (kind, answer.text)
                assert answer.json()["error"]["param"] == param, answer.text


@pytest.mark.parametrize("name", ENOUGH)
def test_ordinary_grammars_schemas_and_lists_pass(
    before_all: GatewayProcess, fakes: dict[str, FakeEngine], name: str
) -> None:
    del fakes
    with before_all.client() as client:
        answer = client.post(PATHS["chat"], json={"model": "llamacpp", "messages": MESSAGES} | ENOUGH[name])
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("keywords", [{"pattern": "^a{5000}$"}, {"minLength": 5000}])
def test_repetitions_are_counted_as_the_engine_does(before_all: GatewayProcess, keywords: dict[str, Any]) -> None:
    """llama.cpp and Ollama refuse such a grammar, and vLLM takes it, whichever was asked for it first."""
    fields = {"messages": MESSAGES} | text(**keywords)
    with before_all.client() as client:
        for _ in range(2 * 2):  # so that each worker gets some of them
            statuses = {model: client.post(PATHS["chat"], json={"model": model} | fields).status_code for model in ALL}
            assert statuses == {"ollama": 400, "vllm": 200, "llamacpp": 400}


@pytest.mark.parametrize("sign", ["[", '"', "\\", "(", "{", "{1,", "a?", "|"])
def test_a_hostile_grammar_is_checked_in_linear_time(before_all: GatewayProcess, sign: str) -> None:
    with before_all.client() as client:
        began = time.monotonic()
        client.post(
            PATHS["chat"], json={"model": "llamacpp", "messages": MESSAGES, "grammar": sign * (65_000 // len(sign))}
        )
        assert time.monotonic() - began < 5


def takes_long(number: int) -> dict[str, Any]:
    """A pattern that llama.cpp could follow in so many ways that the search for them is given up."""
    return {"tools": [tool({"properties": {"a": {"pattern": f"^\\w{{1,{1000 + number}}}a$"}}})]}


def test_others_are_served_while_bodies_are_checked(before_all: GatewayProcess) -> None:
    bodies = [{"model": "llamacpp", "messages": MESSAGES} | takes_long(number) for number in range(3)]
    with before_all.client() as client, ThreadPoolExecutor(len(bodies)) as pool:
        answers = [pool.submit(client.post, PATHS["chat"], json=it) for it in bodies]
        wait(answers, return_when=FIRST_COMPLETED)
        assert client.get("/livez").status_code == 200
        assert not all(it.done() for it in answers), "the loop stood still for each of them"
        assert {it.result().status_code for it in answers} <= {200, 400}


def searched(number: int) -> dict[str, Any]:
    return {"model": "llamacpp", "messages": MESSAGES} | takes_long(number)


def test_a_key_waits_for_one_search_of_another_key(before_all: GatewayProcess) -> None:
    with before_all.client() as client, ThreadPoolExecutor(6) as pool:
        answers = [
            pool.submit(client.post, PATHS["chat"], json=searched(number), timeout=120) for number in range(100, 106)
        ]
        wait(answers, return_when=FIRST_COMPLETED)
        other = {"authorization": "Bearer sk-second-0123456789abcdef"}
        short = {"model": "llamacpp", "messages": MESSAGES} | text(pattern="^[a-z]{4}-other$")
        assert client.post(PATHS["chat"], json=short, headers=other, timeout=120).status_code == 200
        assert sum(it.done() for it in answers) <= 3, "it waited for all of them"
        assert {it.result().status_code for it in answers} == {400}


def test_a_search_is_dropped_if_its_client_leaves_before_it_begins(before_all: GatewayProcess) -> None:
    def leave(name: str) -> None:
        with pytest.raises(httpx.ReadTimeout):
            client.post(PATHS["chat"], json=searched(int(name[5:])), headers={"x-request-id": name}, timeout=0.3)

    with before_all.client() as client, ThreadPoolExecutor(8) as pool:
        answers = [
            pool.submit(client.post, PATHS["chat"], json=searched(number), timeout=120) for number in range(200, 206)
        ]
        wait(answers, return_when=FIRST_COMPLETED)
        list(pool.map(leave, ("left-210", "left-211")))
        assert [before_all.lines(name)[-1]["status"] for name in ("left-210", "left-211")] == [499, 499]
        assert not all(it.done() for it in answers), "they had their turn"
