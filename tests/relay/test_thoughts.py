"""Reasoning that is handed over, on what Ollama 0.32.15 and llama.cpp b11549 were seen to take and to send
(tests/recordings, reasoning.json): answers with reasoning, cut within it, at its end, and in the text behind it."""

import json
from typing import Any

import orjson
import pytest

from gateway.dialects import DIALECTS
from gateway.dialects.ollama_raw import lines
from gateway.dialects.thoughts import Tags, Thoughts
from gateway.relay.resume.handover import hand_over
from gateway.relay.resume.part import Part
from gateway.relay.resume.seam import Seam
from gateway.relay.tap import Tap
from tests.support.processes import ROOT, events
from tests.support.relays import exchange

OLLAMA, LLAMACPP = DIALECTS["ollama"], DIALECTS["llamacpp"]


def recorded(engine: str) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = json.loads((ROOT / "tests/recordings" / engine / "reasoning.json").read_text())
    return told


# In the text of the model with the GGUF's own template, the recorded prompt has other white space than it writes.
OLLAMAS = {
    f"{it['model']}, {cut['where']}": (it, cut)
    for it in recorded("ollama")
    for cut in it["cuts"]
    if (it["model"], cut["where"]) != ("rnatthink", "text")
}
LLAMACPPS = {f"{it['template']}, {cut['cut']}": (it, cut) for it in recorded("llamacpp") for cut in it["cuts"]}


def said(chunks: list[Any]) -> tuple[str, str]:
    """The reasoning and the text of a chat's chunks."""
    deltas = [choice["delta"] for it in chunks if it != "[DONE]" for choice in it["choices"]]
    thought = "".join(it.get("reasoning") or it.get("reasoning_content") or "" for it in deltas)
    return thought, "".join(it.get("content") or "" for it in deltas)


@pytest.mark.parametrize("size", [1, 100_000])
@pytest.mark.parametrize("case", OLLAMAS)
def test_an_ollama_is_handed_reasoning_as_it_was_seen_to_take_it(case: str, size: int) -> None:
    """And what it then sends is told apart. The tags are those that the trial finds."""
    told, cut = OLLAMAS[case]
    first = Tap(hide_usage=True)
    for name, text in (("reasoning", cut["has"]["reasoning"]), ("content", cut["has"]["content"])):
        if text:
            first.feed(b"data: %b\n\n" % orjson.dumps({"choices": [{"index": 0, "delta": {name: text}}]}))
    part = Part(exchange=exchange(), content=first.content, tokens=first.content.tokens)
    opens = "" if told["rendered_ends"].rstrip().endswith("<think>") else told["opening"]
    handover = hand_over(part, OLLAMA, OLLAMA, "thought", Tags(opens, told["closing"]))
    assert told["rendered_ends"] + (handover.raw or "") == cut["turn"]
    it, sent = Seam(first, part, handover, 1, reads=lines(chats=True, closes=handover.closes)), b""
    data = orjson.dumps(cut["answer"] | {"done": False, "response": cut["answer"]["response"]}) + b"\n"
    data += orjson.dumps(cut["answer"] | {"response": ""}) + b"\n"
    for at in range(0, len(data), size):
        sent += it.feed(data[at : at + size])
    assert it.done
    thought, text = said(events(sent.decode()))
    # One of Ollama's own parsers drops the white space at the end of the reasoning.
    assert (cut["has"]["reasoning"] + thought).rstrip() == told["whole"]["reasoning"].rstrip()
    assert cut["has"]["content"] + text == told["whole"]["content"]


@pytest.mark.parametrize("case", LLAMACPPS)
def test_a_llamacpp_is_handed_reasoning_as_it_was_seen_to_take_it(case: str) -> None:
    told, cut = LLAMACPPS[case]
    pieces = [f"{it}\n\n".encode() for it in told["whole"].split("\n\n") if it.strip()]
    first = Tap(hide_usage=True)
    for piece in pieces[: cut["cut"]]:
        first.feed(piece)
    part = Part(exchange=exchange(), content=first.content, tokens=first.content.tokens)
    handover = hand_over(part, LLAMACPP, LLAMACPP, "thought")
    assert handover.exchange.fields["messages"][-1] == cut["message"]
    it = Seam(first, part, handover, 1)
    rest = said(events(it.feed(cut["body"].encode()).decode()))
    whole = said(events(told["whole"]))
    assert (cut["message"]["reasoning_content"] + rest[0], cut["message"]["content"] + rest[1]) == whole


@pytest.mark.parametrize("told", recorded("llamacpp"), ids=lambda told: told["template"])
def test_what_the_trial_looks_at_is_what_llamacpp_was_seen_to_send(told: dict[str, Any]) -> None:
    """The prompt ends with the reasoning, and a blocking answer repeats it."""
    marker = "Tangerine lanterns drift slowly over the old"
    assert told["trial"]["prompt_ends"].endswith(marker)
    assert told["trial"]["message"]["reasoning_content"].startswith(f"{marker} ")
    assert not told["trial"]["message"]["content"]


@pytest.mark.parametrize(
    ("pieces", "apart"),
    [
        (["so", " </", "thin", "k", ">", "\n", "\n", "Yes", "\n"], ("so ", "Yes\n")),
        (["</think>"], ("", "")),
        (["a </thin", "g"], ("a </thing", "")),
        (["a <", "</think>b"], ("a <", "b")),
        (["a </thi"], ("a </thi", "")),
    ],
)
def test_reasoning_and_text_are_told_apart_wherever_the_tag_is_cut(pieces: list[str], apart: tuple[str, str]) -> None:
    thoughts = Thoughts("</think>")
    found = [thoughts.take(it, last=False) for it in pieces]
    found.append(thoughts.take("", last=True))
    assert ("".join(it for it, _ in found), "".join(it for _, it in found)) == apart
