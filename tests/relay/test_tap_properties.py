"""Properties of the tap: however a stream is written and cut, the same events pass and the same is learned."""

import json
import re
from itertools import pairwise
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from openai._streaming import SSEDecoder

from gateway.errors import EngineError
from gateway.relay.tap import Tap
from gateway.sse import PING

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
