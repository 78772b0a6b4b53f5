"""A call is judged by the whole of its arguments, however the engine cuts them."""

from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from gateway.forced_tools.demand import Tool
from gateway.forced_tools.guard import Guard, Terms

SCHEMA = {"type": "object", "required": ["q"]}
STRICT = Tool("strict", "", SCHEMA, strict=True, entry={}, where="tools[0].function")
TERMS = Terms(reads=False, only=None, names=None, most=None, must=False, checked={"strict": STRICT})
ENDINGS = ("", " \n", "}", '{"q":1}', "\u00a0", ",")
ARGUMENTS = st.text('{}[]":,q1\\ ', max_size=8) | st.sampled_from([f'{{"q":1}}{it}' for it in ENDINGS])


def chunk(reason: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}


def passes(pieces: list[str], name: str = "strict") -> bool:
    """Whether a call whose arguments come in these pieces passes."""
    guard = Guard(TERMS)
    guard.edit(chunk(tool_calls=[{"index": 0, "id": "a", "function": {"name": name, "arguments": ""}}]))
    for it in pieces:
        guard.edit(chunk(tool_calls=[{"index": 0, "function": {"arguments": it}}]))
    guard.edit(chunk("tool_calls"))
    return not guard.failure


@given(ARGUMENTS)
@example('{"q":1} ')
@example('{"q":1}}')
def test_the_verdict_is_the_same_in_one_piece_and_in_many(text: str) -> None:
    assert passes(list(text)) is passes([text])


def test_what_follows_a_call_that_is_not_checked_passes_in_one_piece_and_in_many() -> None:
    assert passes(['{"q":1}', "}"], "free")
    assert passes(['{"q":1}}'], "free")
