"""Kinds of answers: what a scripted engine writes (support/fakes/writes.py), and what it is asked for."""

import json
from dataclasses import dataclass, field
from typing import Any

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
DIALECTS = ("ollama", "vllm", "llamacpp")
PET = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "kind": {"enum": ["cat", "dog"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 10}, "minItems": 2, "maxItems": 3},
        "age": {"type": "integer"},
        "owner": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/owner"}]},
    },
    "required": ["name", "kind", "tags", "age", "owner"],
    "$defs": {"owner": {"type": "object", "properties": {"at": {"type": "number"}}, "required": ["at"]}},
}
PET_PIECES = [
    '{"',
    "name",
    '":',
    ' "',
    "Zoë",
    " x",
    '",\n',
    ' "kind',
    '": "',
    "ca",
    't", "tags": [',
    '"a b',
    '", "',
    "c",
]
PET_PIECES += ['"], "', 'age":', " 1", "2", ', "owner": {"', 'at": ', "-1", ".5}", "}"]
CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": name, "parameters": CITY}}
    for name in ("sun", "rain")
]
NAMED = {"type": "function", "function": {"name": "sun"}}
ARGUMENTS = ['{"ci', 'ty": "', "Par", 'is",', ' "days": ', "3", "}"]
MORE = ['{"city"', ': "Os', 'lo"}']
CALL = [{"index": 0, "function": {"name": "sun", "arguments": "".join(ARGUMENTS)}}]
CALLS = [*CALL, {"index": 1, "function": {"name": "rain", "arguments": "".join(MORE)}}]
LISTED = json.dumps(
    [{"name": it["function"]["name"], "arguments": json.loads(it["function"]["arguments"])} for it in CALLS]
)
SAID = ["Well", ",", " it", " is", "\n", "so", "."]
OTHER = ["On", " the", " other", " hand", "!"]


def schema(of: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": of}}}


def pieces(text: str, size: int = 6) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


@dataclass(frozen=True)
class Kind:
    """A kind of answer: what its engine writes, and what is asked for."""

    choices: list[dict[str, Any]]
    asks: dict[str, Any] = field(default_factory=dict)
    script: dict[str, Any] = field(default_factory=dict)
    dialects: tuple[str, ...] = DIALECTS
    path: str = CHAT


GREEDY = {"temperature": 0}
KINDS = {
    "JSON by a schema": Kind([{"pieces": PET_PIECES}], schema(PET)),
    "any JSON": Kind([{"pieces": PET_PIECES}], GREEDY | {"response_format": {"type": "json_object"}}),
    "a grammar": Kind(
        [{"pieces": ["ab", "ab", "c"]}], {"grammar": 'root ::= ("a" "b")+ [c-d]'}, dialects=("llamacpp",)
    ),
    "vLLM's grammar": Kind(
        [{"pieces": ["ab", "ab", "c"]}], {"structured_outputs": {"grammar": 'root ::= "ab"* [cd]'}}, dialects=("vllm",)
    ),
    "a choice": Kind(
        [{"pieces": ["ye", "llow"]}], {"structured_outputs": {"choice": ["yes", "yellow", "no"]}}, dialects=("vllm",)
    ),
    "reasoning, then text": Kind([{"thinks": ["Hm", ",", " so"], "pieces": SAID}], GREEDY),
    "reasoning, then JSON": Kind([{"thinks": ["Hm", ",", " so"], "pieces": PET_PIECES}], GREEDY | schema(PET)),
    "a tool call": Kind([{"calls": [["sun", ARGUMENTS]]}], GREEDY | {"tools": TOOLS}),
    "text and a tool call": Kind([{"pieces": SAID, "calls": [["sun", ARGUMENTS]]}], GREEDY | {"tools": TOOLS}),
    "two tool calls": Kind([{"calls": [["sun", ARGUMENTS], ["rain", MORE]]}], GREEDY | {"tools": TOOLS}),
    "a forced call": Kind(
        [{"pieces": pieces("".join(ARGUMENTS))}],
        {"tools": TOOLS, "tool_choice": NAMED},
        dialects=("ollama", "llamacpp"),
    ),
    "forced calls": Kind(
        [{"pieces": pieces(LISTED)}], {"tools": TOOLS, "tool_choice": "required"}, dialects=("ollama", "llamacpp")
    ),
    "a call that vLLM forces": Kind(
        [{"calls": [["sun", ARGUMENTS], ["rain", MORE]]}],
        GREEDY | {"tools": TOOLS, "tool_choice": "required"},
        dialects=("vllm",),
    ),
    "two choices": Kind([{"pieces": SAID}, {"pieces": OTHER}], {"n": 2, "seed": 5}, {"seed": 5}),
    "two choices of JSON": Kind(
        [
            {"pieces": PET_PIECES},
            {"pieces": ['{"name": "B', 'o", "kind": "dog", "tags": ["a", "b"], "age": 1, ', '"owner": null}']},
        ],
        schema(PET) | {"n": 2, "seed": 5},
        {"seed": 5},
    ),
    "two choices of a forced call": Kind(
        [{"pieces": pieces("".join(ARGUMENTS))}, {"pieces": pieces("".join(MORE))}],
        {"tools": TOOLS, "tool_choice": NAMED, "n": 2, "seed": 5},
        {"seed": 5},
        dialects=("ollama", "llamacpp"),
    ),
    "two choices of a call that vLLM forces": Kind(
        [{"calls": [["sun", ARGUMENTS]]}, {"calls": [["sun", MORE]]}],
        {"tools": TOOLS, "tool_choice": NAMED, "n": 2, "seed": 5},
        {"seed": 5},
        dialects=("vllm",),
    ),
    "log probabilities": Kind([{"pieces": SAID}], {"logprobs": True, "top_logprobs": 0}),
    "two prompts": Kind(
        [{"pieces": SAID}, {"pieces": OTHER}],
        {"prompt": ["Say: ", "Tell: "]},
        {"prompts": ["Say: ", "Tell: "]},
        dialects=("vllm", "llamacpp"),
        path=COMPLETIONS,
    ),
    "a completion's log probabilities": Kind(
        [{"pieces": SAID}],
        {"prompt": "Say: ", "logprobs": 1},
        {"prompts": ["Say: "]},
        dialects=("vllm", "llamacpp"),
        path=COMPLETIONS,
    ),
}


def engine_events(kind: Kind, dialect: str) -> int:
    """How many events the engine sends before it says that a choice is whole."""
    choices = kind.choices[:1] if dialect == "ollama" else kind.choices
    opening = len(choices) * (kind.path == CHAT and dialect != "ollama")
    calls = [len(pieces) + 1 if dialect != "ollama" else 1 for it in choices for _, pieces in it.get("calls", ())]
    return opening + sum(len(it.get(name, ())) for it in choices for name in ("thinks", "pieces")) + sum(calls)
