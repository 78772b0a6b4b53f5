"""JSON is read as the calls that it stands for, however it is cut into pieces."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.forced_tools.reading import CallReader, MalformedError
from tests.support.long import LONG

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda it: st.lists(it) | st.dictionaries(st.text(), it),
    max_leaves=10,
)
CALLS = st.lists(st.tuples(st.text(), st.dictionaries(st.text(), VALUES)), min_size=1, max_size=4)


def read(pieces: list[str], only: str | None = None) -> list[tuple[str, str]]:
    """The names and arguments of the calls that have ended."""
    reader, calls = CallReader(only), []
    name, text = "", ""
    for what, told in (it for piece in pieces for it in reader.feed(piece)):
        if what == "begin":
            name, text = told, ""
        elif what == "more":
            text += told
        else:
            calls.append((name, text))
    assert reader.whole
    assert reader.calls == len(calls)
    return calls


def cut(text: str, sizes: list[int]) -> list[str]:
    pieces = []
    for size in sizes:
        pieces.append(text[:size])
        text = text[size:]
    return [*pieces, text]


@given(CALLS, st.lists(st.integers(0, 9)), st.sampled_from([None, 1]), st.booleans())
@settings(max_examples=100 if LONG else 40)
def test_a_list_of_calls_is_read_whatever_the_cuts(
    calls: list[tuple[str, dict[str, Any]]], sizes: list[int], indent: int | None, early: bool
) -> None:
    told = [{"name": name, "arguments": it} for name, it in calls]
    told = [dict(reversed(it.items())) for it in told] if early else told
    text = json.dumps(told, indent=indent)
    assert [(name, json.loads(it)) for name, it in read(cut(text, sizes))] == calls


@given(st.dictionaries(st.text(), VALUES), st.lists(st.integers(0, 9)))
def test_the_arguments_of_a_named_function_are_passed_on_as_they_are(
    arguments: dict[str, Any], sizes: list[int]
) -> None:
    text = json.dumps(arguments)
    assert read(cut(text, sizes), only="f") == [("f", text)]


def test_the_name_is_told_before_the_arguments_have_come() -> None:
    reader = CallReader()
    assert list(reader.feed('{"name": "f"')) == [("begin", "f")]
    assert list(reader.feed(', "arguments": {"a"')) == [("more", '{"a"')]
    assert not reader.whole
    assert list(reader.feed(": 1}")) == [("more", ": 1}")]
    assert list(reader.feed("}")) == [("end", "")]
    assert reader.whole


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('Here: {"name": "f", "arguments": {}} Done.', [("f", "{}")]),
        ('```json\n[{"name": "f", "arguments": {}}]\n```', [("f", "{}")]),
        ('{"name": "f"}', [("f", "{}")]),
        ('{"why": [{"}": 1}], "name": "f", "arguments": {"a": 1}, "n": 1}', [("f", '{"a": 1}')]),
        ('{"name": "f", "arguments" : {"a": "}"} }', [("f", '{"a": "}"}')]),
    ],
)
def test_what_stands_around_a_call_is_passed_over(text: str, calls: list[tuple[str, str]]) -> None:
    assert read(list(text)) == calls
    assert read([text]) == calls


@pytest.mark.parametrize(
    "text",
    [
        "[1]",
        '{name: "f"}',
        '{"name": 1}',
        '{"arguments": {}}',
        '{"name": "f", "arguments": "{}"}',
        '{"name" "f"}',
        "[[]]",
    ],
)
def test_what_is_no_call_is_malformed(text: str) -> None:
    with pytest.raises(MalformedError):
        list(CallReader().feed(text))


def test_prose_with_a_bracket_is_not_taken_for_arguments() -> None:
    with pytest.raises(MalformedError):
        list(CallReader("f").feed("I can't {do} it"))
