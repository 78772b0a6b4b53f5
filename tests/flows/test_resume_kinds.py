"""Answers of every kind outlive their engine: JSON, tool calls, several choices, log probabilities. The engine writes
one answer, and is cut at every event of it, in each dialect."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import httpx
import pytest

from tests.support import twins
from tests.support.broken_answers import Asked, ask, outcome, read, together
from tests.support.kinds import (
    DIALECTS,
    GREEDY,
    KINDS,
    PET,
    PET_PIECES,
    SAID,
    TOOLS,
    Kind,
    engine_events,
    pieces,
    schema,
)
from tests.support.long import some
from tests.support.processes import ROOT, FakeEngine, running_gateway

CONFIG = (
    "engines:\n"
    + twins.engines()
    + "models:\n"
    + twins.models()
    + twins.model("thinker", "vllm", "thinker")
    + "default_model: llamacpp\nbreaker: {{failures: 1000}}\nretries: {{budget: 1}}\n"
)
CASES = [(name, dialect) for name, kind in KINDS.items() for dialect in kind.dialects]


@pytest.fixture(scope="module")
def at(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    directory = tmp_path_factory.mktemp("kinds")
    (directory / "stack.yaml").write_text(CONFIG.format(a=engine.url))
    settings = {"STACK_CONFIG": str(directory / "stack.yaml"), "STACK_WORKERS": "1", "STACK_RESUME": "3"}
    with running_gateway(directory / "log", engine.url, **settings) as gateway, gateway.client() as client:
        yield Asked(gateway, client)


def cuts_of(name: str, dialect: str) -> list[Any]:
    kind = KINDS[name]
    length = engine_events(kind, dialect)
    cuts: list[Any] = some([[it] for it in range(1, length + 1)])
    # If an Ollama breaks off a request twice, and no other at the same moment, it is taken to die of it (suspects.py).
    if dialect != "ollama":
        cuts += some([[first, 3] for first in range(5, length, 4)])
    if "n" in kind.asks and dialect == "ollama":  # the second choice has a request of its own
        cuts += some([[None, it] for it in range(len(kind.choices[1]["pieces"]) + 1)])
    return cuts


@pytest.fixture(scope="module")
def made(at: Asked) -> dict[tuple[str, str], list[tuple[Any, httpx.Response]]]:
    """The answers of each case by where they were cut; the first one was not. All are asked for together, because the
    gateway looks for a quarter of a second after each cut whether the engine died."""
    asked = [(case, cut) for case in CASES for cut in [[], *cuts_of(*case)]]
    jobs = [partial(ask, at, KINDS[name], dialect, cuts=cut) for (name, dialect), cut in asked]
    found: dict[tuple[str, str], list[tuple[Any, httpx.Response]]] = {case: [] for case in CASES}
    for (case, cut), answer in zip(asked, together(jobs, most=32), strict=True):
        found[case].append((cut, answer))
    return found


@pytest.mark.parametrize(("name", "dialect"), CASES)
def test_an_answer_of_any_kind_cut_at_every_event_is_whole(
    at: Asked, made: dict[tuple[str, str], list[tuple[Any, httpx.Response]]], name: str, dialect: str
) -> None:
    """And in the ways that the table says."""
    (_, uncut), *answers = made[name, dialect]
    whole = read(uncut)
    seen: set[str] = set()
    for cut, answer in answers:
        assert outcome(answer, whole) == "whole", (cut, answer.text)
        lines = at.gateway.lines(answer.headers["x-request-id"])
        seen |= {it["way"] for it in lines if it["msg"] == "resume" and it["way"] != "again"}
    assert seen == table()[name, dialect]


def table() -> dict[tuple[str, str], set[str]]:
    """The ways of each kind of answer in each dialect, from docs/when-an-engine-dies.md."""
    page = (ROOT / "docs/when-an-engine-dies.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| ")
    ]
    return {
        (row[0], dialect): {it.strip(" `") for it in cell.split(",")}
        for row in rows
        if row[0] in KINDS
        for dialect, cell in zip(DIALECTS, row[1:], strict=True)
    }


def test_the_table_has_every_kind_in_every_dialect() -> None:
    assert table().keys() == {(name, dialect) for name in KINDS for dialect in DIALECTS}
    assert {it for it, ways in table().items() if ways == {"-"}} == {
        (name, dialect) for name, kind in KINDS.items() for dialect in DIALECTS if dialect not in kind.dialects
    }


ANOTHER = [{"pieces": ["No", ", ", "something", " else"]}]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", ["a tool call", "two tool calls"])
def test_a_call_that_does_not_come_again_is_completed_by_its_schema(at: Asked, name: str, dialect: str) -> None:
    """What has come of it stays, with its id and its name. A call that has not begun may be missing."""
    kind = replace(KINDS[name], asks={"tools": TOOLS, "temperature": 0})
    whole = read(ask(at, kind, dialect))[0]["calls"]
    cuts = some(range(1 + (dialect != "ollama"), engine_events(kind, dialect) + 1))
    answers = together([partial(ask, at, kind, dialect, cuts=[it], again=ANOTHER) for it in cuts])
    for cut, answer in zip(cuts, answers, strict=True):
        got = outcome(answer, {0: {}})
        assert got == "other", (cut, answer.text)
        calls = read(answer)[0]["calls"]
        assert calls == whole[: len(calls)], cut
        assert len(calls) >= 1
        assert read(answer)[0]["ends"] == ["tool_calls"]


ODD: dict[str, dict[str, Any]] = {
    "numbered from 1": {"from": 1},
    "numbered from 7, with a null": {"from": 7, "empty": {"function": None}},
    "a piece without a function": {"empty": {"id": "", "type": ""}},
    "a piece of nulls": {"empty": {"id": None, "type": None, "function": {"name": None, "arguments": None}}},
}


@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("odd", ODD)
def test_calls_with_odd_indices_or_empty_pieces_are_resumed(at: Asked, odd: str, dialect: str, *, again: bool) -> None:
    """`again`: the calls come again. Otherwise the last one is completed by its schema."""
    kind = KINDS["two tool calls"]
    kind = replace(kind, choices=[kind.choices[0] | ODD[odd]])
    whole = read(ask(at, kind, dialect))
    empty = 2 * (dialect != "ollama" and "empty" in ODD[odd])
    cuts = some(range(1 + (dialect != "ollama"), engine_events(kind, dialect) + empty + 1))
    script = {} if again else {"again": ANOTHER}
    answers = together([partial(ask, at, kind, dialect, cuts=[it], **script) for it in cuts])
    for cut, answer in zip(cuts, answers, strict=True):
        calls = read(answer)[0]["calls"]
        assert calls == whole[0]["calls"][: len(calls)], (cut, answer.text)
        assert outcome(answer, whole) == ("whole" if len(calls) == 2 else "other"), (cut, answer.text)
        assert len(calls) == 2 or not again, (cut, answer.text)


def test_forced_calls_that_the_engine_numbers_from_7_are_resumed(at: Asked) -> None:
    """Their client has them by other indices."""
    kind = KINDS["a call that vLLM forces"]
    kind = replace(kind, choices=[kind.choices[0] | ODD["numbered from 7, with a null"]])
    whole = read(ask(at, kind, "vllm"))
    assert [it["index"] for it in whole[0]["calls"]] == [0, 1]
    cuts = some(range(2, engine_events(kind, "vllm") + 3))
    answers = together([partial(ask, at, kind, "vllm", cuts=[it]) for it in cuts])
    assert {outcome(it, whole) for it in answers} == {"whole"}


def test_a_sampled_call_of_vllm_is_completed_by_its_schema(at: Asked) -> None:
    """It has no seed, so that it would not come the same again."""
    kind = replace(KINDS["a tool call"], asks={"tools": TOOLS})
    whole = read(ask(at, kind, "vllm"))
    cuts = some(range(2, engine_events(kind, "vllm") + 1))
    for answer in together([partial(ask, at, kind, "vllm", cuts=[it]) for it in cuts]):
        assert outcome(answer, whole) == "whole", answer.text


def test_json_that_comes_again_with_other_white_space_is_joined(at: Asked) -> None:
    """Ollama makes it once more, by a schema that has what was sent nailed down."""
    kind = KINDS["JSON by a schema"]
    text = "".join(PET_PIECES)
    whole = json.loads(text)
    again = [{"pieces": pieces(json.dumps(whole, ensure_ascii=False, indent=2))}]
    cuts = some(range(1, len(PET_PIECES) + 1))
    answers = together([partial(ask, at, kind, "ollama", cuts=[it], again=again) for it in cuts])
    for cut, answer in zip(cuts, answers, strict=True):
        assert outcome(answer, {0: {}}) == "other", cut
        assert json.loads(read(answer)[0]["text"]) == whole, cut
        assert read(answer)[0]["text"].startswith("".join(PET_PIECES[:cut])), cut


WRONG = {
    "a grammar that is not held to": [{"pieces": ["no JSON"]}],
    "another JSON": [{"pieces": pieces('{"name": "Al", "kind": "dog", "tags": ["a", "b"], "age": 1, "owner": null}')}],
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("case", WRONG)
def test_json_that_no_engine_goes_on_with_ends_with_an_error(at: Asked, case: str, dialect: str) -> None:
    """The engine ignores what it is asked to keep to."""
    kind = KINDS["JSON by a schema"]
    rest = [{"pieces": ["nonsense", "}"]}] if dialect != "ollama" and case in WRONG else WRONG[case]
    script = {"cuts": [9], "again": WRONG[case], "disobeys": rest}
    answer = ask(at, kind, dialect, **script)
    assert outcome(answer, {0: {}}) == "error", answer.text
    got = read(answer).get(0, {"ends": []})
    assert got["ends"] == []


@pytest.mark.parametrize("name", ["reasoning, then text", "reasoning, then JSON"])
def test_a_model_of_vllm_that_takes_up_its_reasoning_goes_on_with_it(at: Asked, name: str) -> None:
    """Its answer is sampled and has no seed. Whether a model does so is tried once."""
    kind = replace(
        KINDS[name],
        asks={"model": "thinker"} | {it: value for it, value in KINDS[name].asks.items() if it != "temperature"},
    )
    whole = read(ask(at, kind, "vllm"))
    cuts = [*some([[it] for it in range(2, engine_events(kind, "vllm") + 1)]), [2, 2], [4, 2], [6, 2]]
    answers = together([partial(ask, at, kind, "vllm", cuts=it) for it in cuts])
    for cut, answer in zip(cuts, answers, strict=True):
        assert outcome(answer, whole) == "whole", (cut, answer.text)


def test_a_choice_that_cannot_go_on_ends_the_answer_with_an_error(at: Asked) -> None:
    """The other one is whole by then."""
    choices = [{"pieces": ["Well", "."]}, {"thinks": ["Hm", " so"], "pieces": ["No"]}]
    answer = ask(at, Kind(choices, {"n": 2}), "vllm", cuts=[4])
    assert outcome(answer, {}) == "error"
    assert (read(answer)[0]["text"], read(answer)[0]["ends"], read(answer)[1]["ends"]) == ("Well.", ["stop"], [])


def test_a_blocking_answer_of_several_choices_is_whole(at: Asked) -> None:
    """llama.cpp is asked for a stream."""
    kind = replace(KINDS["two choices"], asks=KINDS["two choices"].asks | {"stream": False, "stream_options": None})
    whole = ask(at, kind, "llamacpp").json()
    cuts = some(range(3, engine_events(kind, "llamacpp") + 1))
    for cut, answer in zip(cuts, together([partial(ask, at, kind, "llamacpp", cuts=[it]) for it in cuts]), strict=True):
        assert answer.status_code == 200, (cut, answer.text)
        assert answer.json()["choices"] == whole["choices"], cut
        assert answer.headers["x-stack-resumes"] == "1"


BEYOND: dict[str, dict[str, Any]] = {
    "a schema with bounds": schema(
        PET | {"properties": PET["properties"] | {"age": {"type": "integer", "minimum": 0}}}
    ),
    "a regular expression": {"structured_outputs": {"regex": "[^x]*"}},
}


@pytest.mark.parametrize("case", BEYOND)
def test_a_schema_that_no_grammar_holds_to_is_made_anew(at: Asked, case: str) -> None:
    kind = replace(KINDS["JSON by a schema"], asks=GREEDY | BEYOND[case])
    whole = read(ask(at, kind, "vllm"))
    answer = ask(at, kind, "vllm", cuts=[9])
    assert outcome(answer, whole) == "whole", answer.text
    lines = at.gateway.lines(answer.headers["x-request-id"])
    assert [it["way"] for it in lines if it["msg"] == "resume"] == ["anew"]


def test_a_grammar_that_an_engine_refuses_is_no_reason_to_give_up(at: Asked) -> None:
    """The answer is made anew instead."""
    kind = replace(KINDS["JSON by a schema"], asks=KINDS["JSON by a schema"].asks | GREEDY)
    whole = read(ask(at, kind, "vllm"))
    answer = ask(at, kind, "vllm", cuts=[9], refuses=["structured_outputs"])
    assert outcome(answer, whole) == "whole", answer.text
    lines = at.gateway.lines(answer.headers["x-request-id"])
    assert [it["way"] for it in lines if it["msg"] == "resume"] == ["rest", "anew"]


@pytest.mark.parametrize("dialect", ["vllm", "llamacpp"])
def test_text_beside_a_malformed_choice_comes_again(at: Asked, dialect: str) -> None:
    """Its chunk was not forwarded, but the text was taken for sent."""
    kind = KINDS["two choices"]
    whole = read(ask(at, kind, dialect))
    good = {"index": 0, "delta": {"content": SAID[1]}, "finish_reason": None}
    for bad in ({"index": 1, "delta": {"content": 5}}, {"index": 1, "delta": {"tool_calls": {"a": 1}}}, 5):
        answer = ask(at, kind, dialect, cuts=[4], how=[["event", {"choices": [good, bad]}], ["end"]])
        assert outcome(answer, whole) == "whole", answer.text


@pytest.mark.parametrize("dialect", ["vllm", "llamacpp"])
def test_reasoning_beside_malformed_tool_calls_comes_again(at: Asked, dialect: str) -> None:
    kind = KINDS["reasoning, then text"]
    whole = read(ask(at, kind, dialect))
    name = "reasoning" if dialect == "vllm" else "reasoning_content"
    bad = {"index": 0, "delta": {name: ",", "tool_calls": {"a": 1}}, "finish_reason": None}
    answer = ask(at, kind, dialect, cuts=[2], how=[["event", {"choices": [bad]}], ["end"]])
    assert outcome(answer, whole) == "whole", answer.text
