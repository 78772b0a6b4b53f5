"""The tap alone: how bytes are cut on their way must never matter."""

from itertools import pairwise

import pytest

from gateway.errors import EngineError
from gateway.sse import MAX_EVENT, EngineFault, Tap


def chunk(reason: str = "null") -> str:
    return f'{{"choices":[{{"index":0,"delta":{{"content":"é🙂"}},"finish_reason":{reason}}}]}}'


COMMENT = b": comment before anything\n\n"
STREAM = (
    COMMENT.decode()
    + 'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
    + f"data: {chunk()}\n\n"
    + ": ping\r\n\r\n"
    + f"id: 7\r\ndata: {chunk()}\r\n\r\n"
    + f"data:{chunk(chr(34) + 'stop' + chr(34))}\n\n"
    + 'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}\n\n'
    + "data: [DONE]\n\n"
).encode()


def run(stream: bytes, cuts: list[int], *, hide_usage: bool) -> tuple[bytes, Tap]:
    tap = Tap(hide_usage=hide_usage)
    edges = [0, *cuts, len(stream)]
    out = b"".join(tap.feed(stream[start:end]) for start, end in pairwise(edges))
    return out, tap


@pytest.mark.parametrize("hide_usage", [False, True])
def test_any_cut_forwards_the_same_bytes_and_learns_the_same(hide_usage: bool) -> None:
    rest = STREAM.removeprefix(COMMENT)
    usage = rest.index(b'data: {"choices":[],"usage"')
    expected = rest if not hide_usage else rest[:usage] + b"data: [DONE]\n\n"
    for first in range(len(STREAM) + 1):
        out, tap = run(STREAM, [first], hide_usage=hide_usage)
        assert out == expected, first
        assert COMMENT not in out  # nothing is kept alive before the head is out
        assert (tap.done, tap.finish_reason, tap.tokens, tap.usage and tap.usage.tokens_out) == (True, "stop", 3, 2)
    every = list(range(1, len(STREAM)))
    assert run(STREAM, every, hide_usage=hide_usage)[0] == expected


def test_sound_events_before_a_broken_one_are_kept_for_the_client() -> None:
    tap = Tap(hide_usage=True)
    good = f"data: {chunk()}\n\n".encode()
    with pytest.raises(EngineError, match="not valid JSON"):
        tap.feed(good + b"data: {\n\n" + good)
    assert tap.held == good


def test_an_error_event_carries_the_engines_error() -> None:
    with pytest.raises(EngineFault) as fault:
        Tap(hide_usage=True).feed(b'data: {"error": {"message": "x", "code": 503}}\n\n')
    assert fault.value.error == {"message": "x", "code": 503}


@pytest.mark.parametrize(
    "frame", [b"data: 1\n\n", b"data: \n\n", b"data: null\n\n", b": \xff\n\n", b'data: "\xff"\n\n']
)
def test_frames_that_clients_cannot_read_are_refused(frame: bytes) -> None:
    with pytest.raises(EngineError):
        Tap(hide_usage=True).feed(frame)


def test_memory_is_bounded() -> None:
    tap = Tap(hide_usage=True)
    for _ in range(MAX_EVENT // 65536):
        tap.feed(b"x" * 65536)
    with pytest.raises(EngineError, match="more than"):
        tap.feed(b"x")
