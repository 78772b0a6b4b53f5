"""The real engine is killed under ten greedy streams, and each that had begun becomes one whole answer all the same."""

from typing import Any

from tests.processes import events, text_of, wait_for
from tests.stack.conftest import Stack
from tests.stack.test_restarts import Stream

CLIENTS = 10
TOKENS = 120


def whole(stream: Stream) -> list[Any]:
    """Its events: one id, one role, one end."""
    chunks = stream.chunks()
    assert chunks[-1] == "[DONE]"
    assert len({chunk["id"] for chunk in chunks[:-1]}) == 1
    choices = [chunk["choices"][0] for chunk in chunks[:-1]]
    assert sum("role" in choice["delta"] for choice in choices) == 1
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["length"]
    return chunks


def test_ten_answers_outlive_their_engine(stack: Stack) -> None:
    """Each has all that its client had seen, once, and goes on from there to its own end. Word for word the same as an
    uninterrupted one it need not be: cut inside a word, the text so far is tokenised otherwise."""
    streams = [Stream(stack, TOKENS, begun=False, resume=True) for _ in range(CLIENTS)]
    wait_for(lambda: any(len(stream.text) > 2000 for stream in streams), deadline=100)
    engine = stack.container("engine")
    engine.kill()
    seen = [text_of_whole_events(stream) for stream in streams]
    engine.start()
    for stream, before in zip(streams, seen, strict=True):
        if not before and stream.wait().startswith('{"error"'):
            continue  # the engine had not come to it: an error with a status of its own
        answer = text_of(whole(stream))
        assert answer.startswith(before)
        assert len(answer) > len(before)
    assert any(": resumed" in stream.text for stream in streams)
    stack.wait_until_ready()


def text_of_whole_events(stream: Stream) -> str:
    """What its client has by now."""
    return text_of(events(stream.text.rpartition("\n\n")[0]))
