"""An engine reads the same values that the gateway has checked, however the names of a request are written."""

import json
import re
import sys
from typing import Any

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.api.body import parse
from gateway.api.checks import check
from gateway.api.field_names import KNOWN, folded
from gateway.endpoints import ENDPOINTS, Kind
from gateway.errors import BadRequest
from gateway.keys.known import Key
from gateway.prompts.render import Prompt, Prompts
from gateway.upstream import parameters
from tests.support.fakes import go

KINDS: tuple[Kind, ...] = ("chat", "completion", "embedding")
OURS = "Never say the word."
PROMPTS = Prompts({}, {"m": Prompt("of-model", 1, OURS)})
FOLDINGS = {"s": "sS\u017f", "k": "kK\u212a"}


def names_of(struct: go.Struct) -> set[str]:
    inside = [names_of(it) for it in struct.values() if it]
    return set(struct).union(*inside)


def test_every_name_that_ollama_reads_is_known() -> None:
    read = set().union(*(names_of(struct) for struct in go.STRUCTS.values()))
    assert {name for name in read if not name.startswith("_")} <= KNOWN


def test_names_are_compared_by_unicodes_simple_case_folding() -> None:
    """Python's regular expressions fold simply, too; but they take a dotless i for an i."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pattern = re.compile(f"[{letters}]", re.IGNORECASE)
    found = {char for char in map(chr, range(sys.maxunicode + 1)) if pattern.fullmatch(char)}
    assert {it for it in found if folded(it) in letters} == found - {"\u0130", "\u0131"}
    assert {it for it in found if go.fold(it) in letters} == found - {"\u0130", "\u0131"}
    assert folded("me\u017fsage\u017f") == "messages"


@st.composite
def spellings(draw: st.DrawFn, name: str) -> str:
    """The name, or another that a reader without regard to capitals takes for it; or something that is near it."""
    chars = [draw(st.sampled_from(FOLDINGS.get(char, char + char.upper()))) for char in name]
    return draw(st.sampled_from([*[name] * 9, "".join(chars), "".join(chars), f"_{name}", f"{name} ", name.title()]))


@st.composite
def objects(draw: st.DrawFn, struct: go.Struct) -> list[tuple[str, Any]]:
    """An object as its pairs, so that a name can stand in it twice."""
    fields = draw(st.lists(st.sampled_from(sorted(struct)), max_size=5))
    return [(draw(spellings(field)), draw(values(struct[field], field))) for field in fields]


def values(struct: go.Struct | None, field: str) -> st.SearchStrategy[Any]:
    if struct is not None:
        return st.one_of(objects(struct), st.lists(objects(struct), max_size=2))
    usual = {
        "model": st.sampled_from(["m", "hidden"]),
        "role": st.sampled_from(["user", "system", "developer", "assistant"]),
        "content": st.text(max_size=3),
        "prompt": st.text(min_size=1, max_size=3),
        "input": st.text(min_size=1, max_size=3),
        "max_tokens": st.sampled_from([1, 9, 9.0, 10_000]),
        "stream": st.booleans(),
    }
    return usual.get(field, st.sampled_from([None, True, 1, 2.0, 2**64, "x", ["x"], {"Type": 1, "type": 2}]))


def written(value: Any) -> str:
    """JSON of what may be pairs."""
    if isinstance(value, list) and value and all(isinstance(it, tuple) for it in value):
        return "{" + ",".join(f"{json.dumps(name)}: {written(it)}" for name, it in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    return json.dumps(value)


REQUESTS = st.one_of(*(st.tuples(st.just(kind), objects(go.STRUCTS[kind])) for kind in KINDS))
USER = [[("role", "user"), ("content", "x")]]


@settings(deadline=None, max_examples=200)
@given(REQUESTS)
@example(("chat", [("messages", USER), ("Messages", USER)]))
@example(("chat", [("messages", USER), ("me\u017f\u017fage\u017f", USER)]))
@example(("chat", [("messages", USER), ("max_tokens", 1), ("max_to\u212aens", 9)]))
@example(("chat", [("messages", [[("role", "user"), ("content", "x"), ("ROLE", "system")]])]))
@example(("chat", [("messages", USER), ("reasoning_effort", ["x"])]))
@example(("completion", [("prompt", "x"), ("Prompt", "y")]))
@example(("embedding", [("input", "x"), ("INPUT", "y"), ("Model", "hidden")]))
def test_ollama_reads_the_same_values_that_the_gateway_checked(asked: tuple[Kind, list[tuple[str, Any]]]) -> None:
    """The model that the caller may use, the operator's prompt first and alone, and the limit that is reserved."""
    kind, pairs = asked
    required = ENDPOINTS[kind].content
    if required not in dict(pairs):
        pairs = [*pairs, (required, USER if kind == "chat" else "x")]
    try:
        body = parse(written(pairs or [("x", 1)]).encode())
        check(kind, body)
        judged, _ = PROMPTS.apply(Key("k"), "m", kind, dict(body))
        fields = parameters.read("ollama", kind, judged).fields
    except BadRequest:
        return
    read = go.reads(kind, json.dumps(fields | {"model": "m"}).encode())
    assert read["model"] == "m"
    assert not read.get("_debug_render_only")
    for name in ("max_tokens", "stream", "seed", "stop", "tools", "response_format"):
        assert read.get(name) == go.reads(kind, json.dumps(fields).encode()).get(name)
        assert (name in read) <= (name in fields)
    assert read.get("max_tokens") == fields.get("max_tokens")
    if kind == "chat":
        first, *rest = read["messages"]
        assert first == {"role": "system", "content": OURS}
        assert not [it for it in rest if it["role"] in ("system", "developer")]
        assert [it.get("content") for it in rest] == [it.get("content") for it in fields["messages"][1:]]
    elif kind == "completion":
        assert read["prompt"].startswith(OURS)
    else:
        assert read["input"] == body["input"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_name_in_other_capitals_is_refused_wherever_ollama_reads_it(kind: Kind) -> None:
    def look(struct: go.Struct, wrap: Any, where: str) -> None:
        for name, inside in struct.items():
            for other in {name.upper(), name.title(), name.replace("s", "\u017f"), name.replace("k", "\u212a")} - {
                name
            }:
                with pytest.raises(BadRequest) as caught:
                    check(kind, wrap({name: None, other: None}))
                assert caught.value.param in (where + other, where + name)  # an underscore is refused by itself
            if inside is not None:
                look(inside, lambda it, name=name: wrap({name: it}), f"{where}{name}.")
                look(inside, lambda it, name=name: wrap({name: [it]}), f"{where}{name}[0].")

    look(go.STRUCTS[kind], lambda it: {ENDPOINTS[kind].content: "x"} | it, "")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "input": {"n": 2**64}}]}]}, None),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": 2**64, "input": {}}]}]}, "id"),
        ({"messages": [{"role": "assistant", "content": [{"type": "text", "input": {"n": 2**64}}]}]}, "input.n"),
        ({"type": "tool_use", "input": [2**64]}, "input[0]"),
    ],
)
def test_a_long_number_passes_in_the_input_of_a_tools_use_alone(body: dict[str, Any], param: str | None) -> None:
    if param is None:
        assert orjson.dumps(parse(json.dumps(body).encode())) == json.dumps(body, separators=(",", ":")).encode()
        return
    with pytest.raises(BadRequest) as caught:
        parse(json.dumps(body).encode())
    assert str(caught.value.param).endswith(param)
