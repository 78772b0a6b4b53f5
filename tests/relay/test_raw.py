"""Ollama's raw way alone, on what Ollama 0.32.15 was seen to send (tests/recordings/ollama/continuations.json).

There are answers of models with each of the three kinds of template, broken off by a kill, and a raw answer."""

import json
from itertools import groupby
from typing import Any

import orjson
import pytest

from gateway.dialects import DIALECTS
from gateway.dialects.asking import Prompt
from gateway.dialects.ollama_raw import lines
from gateway.errors import EngineError
from gateway.relay.resume.handover import hand_over
from gateway.relay.resume.part import Part
from gateway.relay.resume.seam import Seam
from gateway.relay.tap import Tap
from tests.support.processes import ROOT, events, text_of
from tests.support.relays import exchange

RECORDED = json.loads((ROOT / "tests/recordings/ollama/continuations.json").read_text())
KINDS = ["library", "detected", "own"]
OLLAMA = DIALECTS["ollama"]


def recorded_events(kind: str) -> list[bytes]:
    return [f"{it}\n\n".encode() for it in RECORDED[kind]["body"].split("\n\n") if it.strip()]


def raw_lines(rest: list[str], *, read: int, made: int) -> bytes:
    """The lines of a raw answer with these tokens, after those that were recorded."""
    first, *_, last = [json.loads(it) for it in RECORDED["raw"]["body"].splitlines()]
    first.pop("logprobs")
    told = [first | {"response": text} for text in rest]
    told.append(last | {"done_reason": "stop", "prompt_eval_count": read, "eval_count": made})
    return b"".join(orjson.dumps(it) + b"\n" for it in told)


def broken(pieces: list[bytes]) -> Tap:
    tap = Tap(hide_usage=True)
    for piece in pieces:
        tap.feed(piece)
    with pytest.raises(EngineError):
        tap.end()
    return tap


def raw_seam(first: Tap, **fields: Any) -> Seam:
    it = exchange(stream_options={"include_usage": True}, **fields)
    part = Part(exchange=it, content=first.content, tokens=first.content.tokens)
    handover = hand_over(part, OLLAMA, OLLAMA, "raw")
    assert handover.raw == first.content.text.getvalue()
    return Seam(first, part, handover, 1, reads=lines(chats=True))


def test_only_a_chat_has_log_probabilities() -> None:
    """Ollama's endpoint for completions ignores the field, and a chat's form would be wrong there."""
    for kind, asked, expected in (("chat", {"messages": []}, True), ("completion", {"prompt": "Hi"}, False)):
        prompt = Prompt(kind, "m", asked | {"logprobs": 1}, 0)  # type: ignore[arg-type]
        assert ("logprobs" in OLLAMA.raw.body(prompt, "Hi")) is expected


@pytest.mark.parametrize("size", [1, 7, 100_000])
@pytest.mark.parametrize("kind", KINDS)
def test_a_recorded_answer_cut_at_every_event_is_whole_again(kind: str, size: int) -> None:
    recorded = recorded_events(kind)
    texts = [text_of(events(it.decode())) for it in recorded]
    texts = [it for it in texts if it]  # the last event of one whose model's process was killed has none
    for cut in range(1, len(recorded) + 1):
        first = broken(recorded[:cut])
        rest, has = texts[min(cut, len(texts)) :], min(cut, len(texts))
        it, sent = raw_seam(first), b""
        data = raw_lines(rest, read=17 + has, made=len(rest))
        for at in range(0, len(data), size):
            sent += it.feed(data[at : at + size])
        assert it.done
        *chunks, done = events(sent.decode())
        assert done == "[DONE]"
        assert "".join(texts[:has]) + text_of(chunks) == "".join(texts)
        assert {chunk["id"] for chunk in chunks} == {json.loads(recorded[0][6:])["id"]}
        assert {chunk["model"] for chunk in chunks} == {RECORDED[kind]["model"]}
        assert it.usage is not None
        assert (it.usage.tokens_in, it.usage.tokens_out) == (17, len(texts))


@pytest.mark.parametrize("kind", KINDS)
def test_what_raw_answers_read_leaves_the_length_of_the_prompt(kind: str) -> None:
    """At each cut that was made, of two answers, the tokens read are the prompt's and those of the text."""
    cuts = RECORDED[kind]["raw_cuts"]
    lengths = []
    for cut, read in cuts:
        first = Tap(hide_usage=True)
        for number in range(cut):
            first.feed(b'data: {"choices":[{"index":0,"delta":{"content":"t%d "}}]}\n\n' % number)
        it = raw_seam(first)
        it.feed(raw_lines([" x"], read=read, made=1))
        assert it.usage is not None
        assert it.usage.tokens_out == cut + 1
        lengths.append(it.usage.tokens_in)
    assert len(cuts) == 24
    assert len(list(groupby(lengths))) == 2, "each question has one length"


def test_a_recorded_raw_answer_becomes_the_events_of_a_chat() -> None:
    read = lines(chats=True)
    *chunks, usage, done = events(read(RECORDED["raw"]["body"].encode()).decode())
    assert text_of(chunks) == " whale, a majestic and"
    assert [it["choices"][0]["finish_reason"] for it in chunks] == [None] * 5 + ["length"]
    assert usage["usage"] == {"prompt_tokens": 42, "completion_tokens": 5}
    assert done == "[DONE]"


@pytest.mark.parametrize("line", [b"data: {}\n", b'{"response": 1}\n', b"[]\n", b'{"response":"x"\n', b"{\n"])
def test_a_line_that_is_no_raw_answers_breaks_it_off(line: bytes) -> None:
    it = raw_seam(broken(recorded_events("own")[:3]))
    with pytest.raises(EngineError):
        it.feed(line)


def test_an_error_in_a_raw_answer_is_an_error_of_the_engine() -> None:
    it = raw_seam(broken(recorded_events("own")[:3]))
    with pytest.raises(EngineError):
        it.feed(b'{"error":"an error was encountered while running the model"}\n')


def test_a_raw_request_asks_what_was_recorded() -> None:
    recorded = RECORDED["raw"]["request"]
    fields = {"messages": [], "temperature": 0, "max_tokens": 5}
    assert OLLAMA.raw is not None
    body = OLLAMA.raw.body(Prompt("chat", recorded["model"], fields, 0), recorded["prompt"])
    assert body["options"] == recorded["options"]
    assert {name: body[name] for name in ("model", "prompt", "raw")} == {
        name: recorded[name] for name in ("model", "prompt", "raw")
    }


USER = {"role": "user", "content": "x"}
IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]}


@pytest.mark.parametrize(
    ("fields", "fits"),
    [
        ({"messages": [USER]}, True),
        ({"prompt": "x"}, True),
        ({"messages": [USER], "tools": [{"type": "function", "function": {"name": "f"}}]}, False),
        ({"messages": [IMAGE]}, False),
        ({"messages": [USER, {"role": "assistant", "content": "Oh."}]}, False),
        ({"messages": [{"role": "user", "content": [{"type": "odd"}]}]}, False),
    ],
)
def test_only_text_fits_the_raw_way(fields: dict[str, Any], *, fits: bool) -> None:
    assert OLLAMA.raw is not None
    assert OLLAMA.raw.fits(fields) is fits
