"""Broken answers: how the tests ask for an answer of some kind (kinds.py) that breaks off, and read what came of it."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from uuid import uuid4

import httpx

from tests.support.kinds import CHAT, Kind
from tests.support.processes import GatewayProcess, events, post, was_cut


class Asked(NamedTuple):
    """A gateway, and a client of it."""

    gateway: GatewayProcess
    client: httpx.Client


def ask(at: Asked, kind: Kind, dialect: str, **script: Any) -> httpx.Response:
    """Ask for an answer of this kind, which an engine of this dialect writes and breaks off as `script` says."""
    known = {
        "user": uuid4().hex,
        "script": [["write", {"dialect": dialect, "choices": kind.choices} | kind.script | script]],
    }
    # A raw request to Ollama has no field for a script, so the message holds it, too.
    messages = [{"role": "user", "content": f"Say it. #{json.dumps(known)}"}]
    said = {"messages": messages} if kind.path == CHAT else {}
    body = {"model": dialect, "stream": True, "stream_options": {"include_usage": True}} | said | known | kind.asks
    return post(at.client, kind.path, json=body)


def together(jobs: list[Callable[[], httpx.Response]], *, most: int = 16) -> list[httpx.Response]:
    """Return the answers to all these requests, `most` at a time."""
    with ThreadPoolExecutor(most) as pool:
        return [job.result() for job in [pool.submit(job) for job in jobs]]


def read(answer: httpx.Response) -> dict[int, dict[str, Any]]:
    """The choices as a client puts them together. A stream that is whole has one id, and each choice one role and one
    end."""
    chunks = [it for it in events(answer.text) if it != "[DONE]" and "error" not in it]
    assert len({it["id"] for it in chunks}) <= 1, answer.text
    choices: dict[int, dict[str, Any]] = {}
    for choice in (it for chunk in chunks for it in chunk["choices"]):
        made = choices.setdefault(choice["index"], {"text": "", "thoughts": "", "calls": [], "tokens": [], "ends": []})
        delta = choice.get("delta", {})
        made["text"] += (delta.get("content") if "delta" in choice else choice["text"]) or ""
        made["thoughts"] += delta.get("reasoning") or delta.get("reasoning_content") or ""
        for piece in delta.get("tool_calls") or ():
            function = piece.get("function") or {}
            if piece["index"] not in [it["index"] for it in made["calls"]]:
                assert piece["id"], answer.text
                made["calls"].append({"index": piece["index"], "function": {"name": function["name"], "arguments": ""}})
            (call,) = (it for it in made["calls"] if it["index"] == piece["index"])
            call["function"]["arguments"] += function.get("arguments") or ""
        told = choice.get("logprobs") or {}
        made["tokens"] += [it["token"] for it in told.get("content") or ()] + (told.get("tokens") or [])
        made["ends"] += [choice["finish_reason"]] if choice["finish_reason"] else []
    return choices


def outcome(answer: httpx.Response, whole: dict[int, dict[str, Any]]) -> str:
    """`whole`, `other` if it is another one that is whole, or `error`."""
    if "error" in events(answer.text)[-1]:
        assert was_cut(answer)
        return "error"
    assert not was_cut(answer)
    assert events(answer.text)[-1] == "[DONE]"
    got = read(answer)
    assert got.keys() == whole.keys(), answer.text
    assert all(len(it["ends"]) == 1 for it in got.values()), answer.text
    return "whole" if got == whole else "other"
