"""The tap alone: which events pass, and in which form, however their bytes were cut on the way."""

import json
from itertools import pairwise
from typing import Any

import pytest

from gateway.errors import EngineError
from gateway.relay.tap import MAX_EVENT, EngineFault, Tap
from gateway.sse import DONE, PING


def chunk(reason: str = "null") -> str:
    return f'{{"choices":[{{"index":0,"delta":{{"content":"é🙂"}},"finish_reason":{reason}}}]}}'


def usual(data: str) -> bytes:
    """The one form in which an event leaves."""
    return f"data: {data}\n\n".encode()


USAGE = '{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}'
ROLE = '{"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}'
LAST = chunk('"stop"')
STREAM = (
    ": comment before anything\n\n"
    f"data: {ROLE}\n\n"
    f"data: {chunk()}\n\n"
    ": ping\r\n\r\n"
    f"id: 7\r\ndata: {chunk()}\r\n\r\n"
    f"data:{LAST}\n\n"
    f"data: {USAGE}\n\n"
    "data: [DONE]\n\n"
).encode()


def run(stream: bytes, cuts: list[int] | None = None, *, hide_usage: bool = False) -> tuple[bytes, Tap]:
    tap = Tap(hide_usage=hide_usage)
    edges = [0, *(cuts or []), len(stream)]
    out = b"".join(tap.feed(stream[start:end]) for start, end in pairwise(edges))
    return out, tap


@pytest.mark.parametrize("hide_usage", [False, True])
def test_any_cut_forwards_the_same_events_and_learns_the_same(hide_usage: bool) -> None:
    begin, end = usual(ROLE) + usual(chunk()), usual(chunk()) + usual(LAST)
    expected = begin + PING + end + (b"" if hide_usage else usual(USAGE)) + DONE
    for cuts in ([first] for first in range(len(STREAM) + 1)):
        out, tap = run(STREAM, cuts, hide_usage=hide_usage)
        assert out == expected, cuts
        assert (tap.done, tap.finish_reason, tap.tokens, tap.usage and tap.usage.tokens_out) == (True, "stop", 3, 2)
    assert run(STREAM, list(range(1, len(STREAM))), hide_usage=hide_usage)[0] == expected


A = usual(chunk()).decode()
# What stands between two events, and what is forwarded of it.
BETWEEN = {
    "an empty data line": ("data:\n\n", b""),
    "data without a colon": ("data\n\n", b""),
    "two empty data lines": ("data:\ndata:\n\n", b""),
    "white space as data": ("data:   \n\n", b""),
    "null": ("data: null\n\n", b""),
    "an id alone": ("id: 7\n\n", b""),
    "a retry alone": ("retry: 3000\n\n", b""),
    "an event's type alone": ("event: ping\n\n", b""),
    "a type with empty data": ("event: ping\ndata:\n\n", b""),
    "an unknown field": ("foo: bar\n\n", b""),
    "a field named data with a space": ("data : x\n\n", b""),
    "blank lines": ("\n\n\n", b""),
    "a chunk without choices": ("data: {}\n\n", b""),
    "a chunk whose choices are null": ('data: {"choices":null}\n\n', b""),
    "a comment with a blank line": (": hi\n\n", PING),
    "an empty comment": (":\n\n", PING),
    "a comment without a blank line": (": hi\n", PING),
    "a comment that is not UTF-8": (": \udcff\n\n", PING),
    "a comment and an id": (": hi\nid: 7\n\n", PING),
    "an id of an event with data": (f"id: 7\n{A}", A.encode()),
    "a retry of an event with data": (f"retry: 1\n{A}", A.encode()),
    "a type of an event with data": (f"event: message\n{A}", A.encode()),
    "no space behind the colon": (f"data:{chunk()}\n\n", A.encode()),
    "data on two lines": (f"data: {chunk()[:11]}\ndata: {chunk()[11:]}\n\n", usual(chunk()[:11] + " " + chunk()[11:])),
    "a comment between two data lines": (
        f"data: {chunk()[:11]}\n: hi\ndata: {chunk()[11:]}\n\n",
        usual(chunk()[:11] + " " + chunk()[11:]),
    ),
    "CRLF": (f"data: {chunk()}\r\n\r\n", A.encode()),
    "CR": (f"data: {chunk()}\r\r", A.encode()),
    "CR, then LF": (f"data: {chunk()}\r\n\r", A.encode()),
    "usage without choices": (
        'data: {"usage":{"prompt_tokens":1}}\n\n',
        usual('{"usage":{"prompt_tokens":1},"choices":[]}'),
    ),
}


@pytest.mark.parametrize("what", BETWEEN)
def test_an_event_leaves_in_the_usual_form_or_not_at_all(what: str) -> None:
    between, expected = BETWEEN[what]
    stream = f"{A}{between}{A}data: {LAST}\n\ndata: [DONE]\n\n".encode(errors="surrogateescape")
    whole = A.encode() + expected + A.encode() + usual(LAST) + DONE
    for cuts in ([], *([cut] for cut in range(len(A), len(A) + len(between) + 2))):
        out, tap = run(stream, cuts)
        # A comment that arrives apart from its event is forwarded at once.
        assert out == whole or (":" in between and out.replace(PING, b"") == whole.replace(PING, b"")), cuts
        assert tap.done


@pytest.mark.parametrize("cut", range(5))
def test_a_byte_order_mark_at_the_beginning_is_no_part_of_the_first_event(cut: int) -> None:
    out, _ = run(b"\xef\xbb\xbf" + A.encode(), [cut])
    assert out == A.encode()


def test_a_comment_is_forwarded_before_the_event_that_follows_it() -> None:
    tap = Tap(hide_usage=True)
    assert tap.feed(b": hi\n") == b""  # the head isn't out yet, so nothing is kept alive
    assert tap.feed(A.encode()) == A.encode()
    assert tap.feed(b": h") == b""
    assert tap.feed(b"i\n") == PING
    assert tap.feed(A.encode()) == A.encode()


def call(**piece: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"tool_calls": [piece]}, "finish_reason": None}]}


def begins(name: str, identity: str | None = None, **more: Any) -> dict[str, Any]:
    return call(**({"id": identity} if identity else {}), function={"name": name, "arguments": ""}, **more)


def goes_on(arguments: str = "{}", **more: Any) -> dict[str, Any]:
    return call(function={"arguments": arguments}, **more)


def said(name: str, identity: str, arguments: str) -> dict[str, Any]:
    return call(index=0, id=identity, function={"name": name, "arguments": arguments})


NUMBERED = {
    "indices are kept": ([begins("f", "1", index=3), goes_on(index=3), begins("g", "2", index=1)], [3, 3, 1]),
    "pieces of one call": ([begins("f", "1"), goes_on("{"), goes_on("}")], [0, 0, 0]),
    "two calls by id": ([begins("f", "1"), goes_on(), begins("f", "2"), goes_on()], [0, 0, 1, 1]),
    "the id in every piece": ([begins("f", "1"), goes_on(id="1"), begins("g", "2"), goes_on(id="1")], [0, 0, 1, 0]),
    "two calls by name": ([begins("f"), goes_on(), begins("g"), goes_on()], [0, 0, 1, 1]),
    "the name after the id": ([call(id="1", type="function"), begins("f"), goes_on()], [0, 0, 0]),
    "an index that is null": ([begins("f", "1", index=None), goes_on(index=None)], [0, 0]),
    "the index 0 for each call": (
        [begins("f", "1", index=0), goes_on(index=0), begins("g", "2", index=0), goes_on(index=0)],
        [0, 0, 1, 1],
    ),
    "the index 0, and the id and the name in every piece": (
        [said("f", "1", "{"), said("f", "1", "}"), said("f", "2", "{"), said("f", "2", "}"), said("f", "1", " ")],
        [0, 0, 1, 1, 0],
    ),
    "a new id and the name in every piece of a call": (
        [said("f", "1", ""), said("f", "2", '{"a":'), said("f", "3", "1}")],
        [0, 0, 0],
    ),
    "the index 0 again": (
        [begins("f", "1", index=0), begins("g", "2", index=0), begins("h", "3", index=1), goes_on(index=1)],
        [0, 1, 2, 2],
    ),
    "one id for several calls": ([begins("f", "1", index=0), begins("g", "1", index=1), goes_on(index=1)], [0, 1, 1]),
    "the id after the name": ([begins("f", index=0), begins("f", "1", index=0), goes_on(index=0)], [0, 0, 0]),
    "an index at the first piece only": ([begins("f", "1", index=0), goes_on()], [0, 0]),
}


@pytest.mark.parametrize("what", NUMBERED)
def test_every_piece_of_a_tool_call_has_its_calls_index(what: str) -> None:
    pieces, expected = NUMBERED[what]
    learned: list[dict[str, Any]] = []
    tap = Tap(hide_usage=True, edit=learned.append)
    out = b"".join(tap.feed(usual(json.dumps(piece))) for piece in pieces)
    left = [json.loads(event.removeprefix(b"data: ")) for event in out.split(b"\n\n")[:-1]]
    for chunks in (left, learned):
        assert [it["choices"][0]["delta"]["tool_calls"][0]["index"] for it in chunks] == expected


def test_a_choice_without_an_index_is_the_first() -> None:
    out, tap = run(usual('{"choices":[{"delta":{"content":"x"},"finish_reason":"stop"}]}') + DONE)
    assert out == usual('{"choices":[{"delta":{"content":"x"},"finish_reason":"stop","index":0}]}') + DONE
    assert tap.done


def test_sound_events_before_a_broken_one_are_kept_for_the_client() -> None:
    tap = Tap(hide_usage=True)
    good = f"data: {chunk()}\n\n".encode()
    with pytest.raises(EngineError, match="not valid JSON"):
        tap.feed(good + b"data: {\n\n" + good)
    assert tap.held == good


@pytest.mark.parametrize(
    ("event", "error"),
    [
        ('data: {"error": {"message": "x", "code": 503}}', {"message": "x", "code": 503}),
        ('event: error\ndata: {"error": {"message": "x", "code": 503}}', {"message": "x", "code": 503}),
        ('event: error\ndata: {"message": "x", "code": 503}', {"message": "x", "code": 503}),
        ('data: {"message": "x"}\nevent: error', {"message": "x"}),
        ("event: error\ndata: out of memory", None),
    ],
)
def test_an_error_event_carries_the_engines_error(event: str, error: object) -> None:
    with pytest.raises(EngineFault) as fault:
        Tap(hide_usage=True).feed(f"{event}\n\n".encode())
    assert fault.value.error == error


@pytest.mark.parametrize("frame", [b"data: 1\n\n", b"data: [1]\n\n", b'data: "\xff"\n\n', b'data: {"\xff": 1}\n\n'])
def test_frames_that_clients_cannot_read_are_refused(frame: bytes) -> None:
    with pytest.raises(EngineError):
        Tap(hide_usage=True).feed(frame)


@pytest.mark.parametrize("reason", ['""', "1", "true", "{}"])
def test_only_a_word_finishes_a_choice(reason: str) -> None:
    tap = Tap(hide_usage=True)
    tap.feed(usual(chunk(reason)))
    with pytest.raises(EngineError, match="before it was complete"):
        tap.feed(DONE)


def test_memory_is_bounded() -> None:
    tap = Tap(hide_usage=True)
    for _ in range(MAX_EVENT // 65536):
        tap.feed(b"x" * 65536)
    with pytest.raises(EngineError, match="more than"):
        tap.feed(b"x")
