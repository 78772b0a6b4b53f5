"""The seam alone: two engines' streams become one, with nothing twice and nothing lost."""

from typing import Any

import orjson
import pytest

from gateway.dialects import DIALECTS
from gateway.errors import EngineError
from gateway.exchange import Exchange
from gateway.relay.reader import Reader
from gateway.relay.resume.handover import hand_over
from gateway.relay.resume.part import Part
from gateway.relay.resume.seam import Seam
from gateway.relay.tap import Tap
from tests.support.relays import DONE, Shout, chunk, exchange

VLLM = DIALECTS["vllm"]


def usage(read: int, made: int) -> dict[str, int]:
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


def begun(*texts: str, told: dict[str, int] | None = None) -> Tap:
    """An answer that broke off after these tokens."""
    tap = Tap(hide_usage=True, cuts_usage=True)
    for text in texts:
        tap.feed(chunk(text, usage=told) if told else chunk(text))
    return tap


def seam(first: Reader, it: Exchange | None = None, **options: Any) -> Seam:
    part = part_of(first, it or exchange())
    return Seam(first, part, hand_over(part, VLLM, VLLM), 1, **options)


def part_of(first: Reader, it: Exchange) -> Part:
    told = first.usage.tokens_out if first.usage else first.content.tokens
    return Part(exchange=it, content=first.content, tokens=told)


def texts(sewn: bytes) -> str:
    """What the client reads of it."""
    events = [line.removeprefix(b"data: ") for line in sewn.split(b"\n") if line.startswith(b"data: {")]
    choices = [it for event in events for it in orjson.loads(event)["choices"]]
    return "".join(it["delta"].get("content", "") for it in choices)


OTHER = {"id": "c-2", "created": 2, "model": "m2", "system_fingerprint": "fp", "timings": {"n": 1}}


def test_the_rest_has_the_first_streams_head_and_no_second_role() -> None:
    it = seam(begun("Hello"))
    role = b'data: {"id":"c-2","choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
    sewn = it.feed(role + chunk(" there", **OTHER))
    assert sewn.startswith(b": resumed 1\ndata: {"), "the comment is a line alone"
    (event,) = [orjson.loads(line[6:]) for line in sewn.split(b"\n") if line.startswith(b"data: ")]
    assert {name: event[name] for name in event if name != "choices"} == {
        "id": "c-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
    }
    assert event["choices"][0]["delta"] == {"content": " there"}
    assert it.feed(chunk(reason="stop") + DONE).endswith(DONE)
    assert (it.done, it.content.tokens, it.content.finish_reason) == (True, 2, "stop")


def test_an_engine_that_says_nothing_gives_nothing_not_even_the_comment() -> None:
    it = seam(begun("Hello"))
    assert (it.feed(b": ping\n\n"), it.started) == (b"", False)


def test_white_space_that_was_taken_from_the_end_and_comes_again_is_not_sent_twice() -> None:
    first = begun("Hello", " ")
    assert hand_over(part_of(first, exchange()), VLLM, VLLM).again == " "
    assert texts(seam(first).feed(chunk(" there"))) == "there"
    assert texts(seam(first).feed(chunk("there"))) == "there", "the engine did not make it again"


@pytest.mark.parametrize(
    ("pieces", "rest", "finished"),
    [
        (["O", "P", " and more"], "", "stop"),
        (["OP and more"], "", "stop"),
        (["O", "N"], "ON", None),
        (["N"], "N", None),
    ],
)
def test_a_stop_sequence_that_spans_both_parts_ends_the_answer(
    pieces: list[str], rest: str, finished: str | None
) -> None:
    it = seam(begun("Hello ST"), exchange(stop="STOP"))
    sewn = b""
    for piece in pieces:
        if not it.done:
            sewn += it.feed(chunk(piece))
    assert (texts(sewn), it.done) == (rest, finished is not None)
    if finished:
        assert b'"finish_reason":"stop"' in sewn
        assert sewn.endswith(DONE)


def test_a_stop_sequence_that_belongs_to_the_answer_is_sent() -> None:
    it = seam(begun("Hello ST"), exchange(stop="STOP", include_stop_str_in_output=True))
    assert texts(it.feed(chunk("OP and more"))) == "OP"


def test_what_might_have_become_a_stop_sequence_is_sent_when_the_answer_ends() -> None:
    it = seam(begun("Hello ST"), exchange(stop="STOP"))
    assert texts(it.feed(chunk("O"))) == ""
    assert texts(it.feed(chunk(reason="length"))) == "O"


def test_the_usage_is_of_the_whole_where_the_first_engine_told_its_part() -> None:
    it = seam(begun("a", "b", told=usage(10, 2)))
    it.feed(chunk("c"))
    assert (it.usage.tokens_in, it.usage.tokens_out) == (10, 3), "counted, for as long as nobody tells it"
    it.feed(chunk(reason="stop") + b'data: {"choices":[],"usage":%b}\n\n' % orjson.dumps(usage(12, 5)))
    assert (it.usage.tokens_in, it.usage.tokens_out) == (10, 7), "the prompt that was longer by 2 had 2 of its tokens"


def test_the_usage_is_of_the_whole_where_the_first_engine_told_nothing() -> None:
    it = seam(begun("a", "b"))
    it.feed(chunk("c", reason="stop") + b'data: {"choices":[],"usage":%b}\n\n' % orjson.dumps(usage(12, 5)))
    assert (it.usage.tokens_in, it.usage.tokens_out) == (10, 7)


def test_an_answer_whose_limit_is_reached_is_closed_with_that_reason() -> None:
    it = seam(begun("a", "b"), exchange(max_tokens=2))
    assert not it.handover.left
    end = it.close("length")
    assert b'"finish_reason":"length"' in end
    assert end.endswith(DONE)


def test_sound_events_before_a_broken_one_are_held_for_the_client() -> None:
    it = seam(begun("Hello"))
    with pytest.raises(EngineError):
        it.feed(chunk(" there") + b"data: {broken\n\n")
    assert texts(it.held) == " there"


def test_an_answer_is_continued_twice_as_one_stream() -> None:
    second = seam(begun("a"))
    second.feed(chunk("b"))
    it = seam(second)
    assert it.handover.exchange.fields["messages"][-1] == {"role": "assistant", "content": "ab"}
    assert texts(it.feed(chunk("c"))) == "c"
    assert (it.content.text.getvalue(), it.content.tokens) == ("abc", 3)


def test_chunks_of_a_blocking_answer_are_added_up_and_not_sent() -> None:
    added: list[dict[str, Any]] = []
    it = seam(begun("a"), add=added.append)
    assert it.feed(chunk("b")) == b": resumed 1\n"
    assert [chunk["choices"][0]["delta"] for chunk in added] == [{"content": "b"}]


def test_a_writer_writes_the_rest_and_gets_the_usage_of_the_whole() -> None:
    it = seam(begun("a", "b"), writer=Shout())
    sewn = it.feed(chunk("c", reason="stop") + b'data: {"choices":[],"usage":%b}\n\n' % orjson.dumps(usage(12, 5)))
    assert sewn + it.feed(DONE) == b": resumed 1\nCUSAGE 17\n\nEND\n"
