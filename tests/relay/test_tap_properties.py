"""Properties of the tap and of all that reads its chunks: however a stream is written and cut, the same events pass and
the same is learned; and whatever an engine says, its answer is passed on soundly or is an engine's error."""

import json
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai._streaming import SSEDecoder

from gateway.dialects import DIALECTS
from gateway.errors import EngineError, EngineLost
from gateway.relay.answer import Answer
from gateway.relay.tap import Tap
from gateway.routing.routes import Target
from gateway.sse import PING
from tests.support.any_json import JSON, written
from tests.support.relays import DONE, Engine, exchange, route

NEWLINES = ("\n", "\r\n", "\r")
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
WORD = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\0"), max_size=8)


def chunk(index: int, text: str, reason: str | None) -> dict[str, Any]:
    return {"choices": [{"index": index, "delta": {"content": text}, "finish_reason": reason}]}


NOTHING = (": a comment", ":", "id: 7", "id", "retry: 10", "event: x", "x", "x: y")  # lines that add no data
EMPTY = ("", "data", "data:", "data: null", *NOTHING)  # events without anything to forward


@st.composite
def event(draw: st.DrawFn, value: Any, newline: str) -> str:
    """One event that carries `value`, in one of the many ways to write it."""
    text = json.dumps(value, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1])))
    lines = [f"data:{draw(st.sampled_from(['', ' ']))}{line}" for line in text.split("\n")]
    for extra in draw(st.lists(st.sampled_from(NOTHING), max_size=2)):
        lines.insert(draw(st.integers(0, len(lines))), extra)
    return newline.join(lines) + newline * 2


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[str], list[Any], int]:
    """A whole stream as its pieces, what its events carry, and how many of them hold content."""
    newline = draw(st.sampled_from(NEWLINES))
    texts = draw(st.lists(TEXT, max_size=5))
    values = [chunk(0, text, None) for text in texts] + [chunk(0, "", "stop")]
    values.append({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}})
    pieces = [draw(st.sampled_from(["", "\ufeff"]))]
    for value in values:
        pieces.append(draw(event(value, newline)))
        if draw(st.booleans()):
            pieces.append(draw(st.sampled_from(EMPTY)) + newline * 2)
        if draw(st.booleans()):
            pieces.append(f": {draw(WORD)}{newline * draw(st.integers(1, 2))}")
    pieces.append(f"data: [DONE]{newline * 2}")
    return pieces, values, sum(map(bool, texts))


def data_of(stream: bytes) -> list[Any]:
    """What the events of a stream carry, as the official client reads them."""
    found = [it.data for it in SSEDecoder().iter_bytes(iter([stream]))]
    return [it if it == "[DONE]" else json.loads(it) for it in found]


# Of what leaves: whole events of the usual form, and comment lines.
LEAVES = re.compile(rb"(: ping\n|data: [^\r\n]+\n\n)*")


def cuts(stream: bytes) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, len(stream)), max_size=12).map(sorted)


def feed(stream: bytes, at: list[int]) -> tuple[bytes, Tap]:
    tap = Tap(hide_usage=False)
    return b"".join(tap.feed(stream[a:b]) for a, b in pairwise([0, *at, len(stream)])), tap


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_sound_stream_passes_whole_however_it_is_written_and_cut(data: st.DataObject) -> None:
    pieces, values, made = data.draw(streams())
    stream = "".join(pieces).encode()
    for at in (data.draw(cuts(stream)), list(range(len(stream))), []):
        out, tap = feed(stream, at)
        assert data_of(out) == [*values, "[DONE]"]
        assert LEAVES.fullmatch(out)
        assert tap.done
        assert (tap.finish_reason, tap.tokens) == ("stop", made)
        assert tap.usage is not None
        assert (tap.usage.tokens_in, tap.usage.tokens_out) == (3, 4)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_whatever_comes_only_whole_sound_events_pass(data: st.DataObject) -> None:
    """A sound stream with something broken written into it: what passes can be read, and is the same whatever the
    cuts, but for comments."""
    pieces, _, _ = data.draw(streams())
    sound = "".join(pieces).encode()
    where = data.draw(st.integers(0, len(sound)))
    broken = sound[:where] + data.draw(st.binary(min_size=1, max_size=6)) + sound[where:]
    results = set()
    for at in (data.draw(cuts(broken)), list(range(len(broken)))):
        tap = Tap(hide_usage=False)
        out, error = b"", None
        try:
            for start, end in pairwise([0, *at, len(broken)]):
                out += tap.feed(broken[start:end])
        except EngineError as exc:
            out += tap.held
            error = type(exc).__name__
        assert LEAVES.fullmatch(out)
        assert all(it == "[DONE]" or type(it["choices"]) is list for it in data_of(out))
        results.add((out.replace(PING, b""), error, tap.done, tap.finish_reason, tap.tokens))
    assert len(results) == 1


# -- whatever an engine says -------------------------------------------------------------------------------------------

FUNCTION = {"name": "f", "parameters": {"type": "object", "required": ["q"]}}
ASKED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "a call of a strict function": {"tools": [{"type": "function", "function": FUNCTION | {"strict": True}}]},
    "a forced call": {"tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "required"},
    "two choices": {"n": 2},
}
LOGPROBS = {"content": [{"token": "h", "logprob": -1, "bytes": [104], "top_logprobs": []}]}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"q":'}}
DELTAS: list[dict[str, Any]] = [
    {"role": "assistant", "content": ""},
    {"reasoning": "Hm."},
    {"content": "Hi"},
    {"tool_calls": [{"index": 0} | CALL]},
    {"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}]},
]
CHAT = [{"choices": [{"index": 0, "delta": it, "logprobs": LOGPROBS, "finish_reason": None}]} for it in DELTAS]
CHAT += [{"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}], "usage": {"prompt_tokens": 3}}]
COMPLETION = [{"choices": [{"index": 0, "text": it, "logprobs": {"tokens": [it]}}]} for it in ("one", " two")]
MESSAGE = {"role": "assistant", "content": "Hi", "tool_calls": [CALL | {"function": {"name": "f", "arguments": "{}"}}]}
WHOLE = {"choices": [{"index": 0, "message": MESSAGE, "logprobs": LOGPROBS, "finish_reason": "stop"}]}


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every member of an object or a list within a value: what holds it, and its key there."""
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in members:
        yield value, key
        yield from places(member)


@st.composite
def spoilt(draw: st.DrawFn, sound: Any) -> Any:
    """A copy in which something else stands at one place, or at two."""
    made = deepcopy(sound)
    for _ in range(draw(st.integers(1, 2))):
        holder, key = draw(st.sampled_from(list(places(made))))
        holder[key] = draw(st.sampled_from([None, True, 1, "x", [], [1], {}, {"a": 1}, [{"index": 0}]]) | JSON)
    return made


def asked(dialect: str, what: dict[str, Any], *, stream: bool) -> tuple[Answer, Target]:
    engine = Engine([], dialect=DIALECTS[dialect])
    it = replace(exchange(stream=stream, **what), choices=what.get("n", 1))
    if "prompt" in what:
        it = replace(it, kind="completion")
    answer, target = Answer(it, route(engine)), Target(engine, "m")  # type: ignore[arg-type]
    answer.begins(target)
    return answer, target


def relayed(answer: Answer, target: Target, chunks: list[Any], at: int | None) -> bytes:
    """What the client gets of a stream. If `at` is a number, the answer breaks off behind so many chunks, and is
    continued by the same stream."""
    out = b""
    try:
        reader = answer.ask(target).reader
        for number, it in enumerate(chunks):
            out += reader.feed(b"data: %b\n\n" % written(it))
            if number == 0:
                answer.takes(target, reader)
            if number == at and answer.breaks(EngineLost("It broke."), sent=True) is not None:
                return out + relayed(answer, target, chunks, None)
        out += reader.feed(DONE)
        answer.learn()
        if answer.fold is not None:
            return b"data: %b\n\n" % written(answer.folded(answer.fold))
    except EngineError:
        pass
    return out


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("what", [*ASKED, "a completion"])
@given(st.data())
@settings(max_examples=40, deadline=None)
def test_whatever_an_engine_says_is_passed_on_soundly_or_its_error(
    dialect: str, what: str, data: st.DataObject
) -> None:
    sound = COMPLETION if what == "a completion" else CHAT
    fields = ASKED.get(what, {"prompt": "Once"})
    answer, target = asked(dialect, fields, stream=data.draw(st.booleans()))
    if answer.streams(target):
        at = data.draw(st.none() | st.integers(0, len(sound) - 1))
        out = data_of(relayed(answer, target, data.draw(spoilt(sound)), at))
    else:
        try:
            out = [answer.takes_whole(target, data.draw(spoilt(WHOLE)))[0]]
        except EngineError:
            out = []
    for choice in (it for chunk in out if chunk != "[DONE]" for it in chunk["choices"]):
        assert type(choice["index"]) is int
        for said in (choice.get("delta", {}), choice.get("message", {})):
            assert all(type(it) is dict for it in said.get("tool_calls") or ())
            assert type(said.get("content", "")) in (str, type(None))
