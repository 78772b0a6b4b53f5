"""An answer that a request's last message asks for, as the engine's own dialect writes it, blocking or streamed.

`["says", {...}]` in a script of tests/support/fakes/engine.py, all optional:
    thinks   the pieces of the reasoning
    pieces   the pieces of the text
    calls    [[name, [pieces of the arguments]], ...]; Ollama sends a call in one piece
    good     [[name, arguments], ...]: calls in whatever form the request asks for
    finish   the finish_reason
    bare     write `data:` without a space behind it
"""

import json
from typing import Any

from tests.support.fakes.frames import Frame
from tests.support.fakes.unruly import good

Json = dict[str, Any]
PROMPT_TOKENS = 7


def asks(body: Json) -> bool:
    """Whether the last message of a request has such a script."""
    messages = body.get("messages") or [{}]
    content = messages[-1].get("content")
    return isinstance(content, str) and content.startswith('script:[["says"')


def says(what: Json, dialect: str, request: Json, *, unique: int) -> list[list[Any]]:
    """The steps of one request."""
    if "good" in what:
        told = good(what["good"], request)
        calls = [[name, [json.dumps(arguments)]] for name, arguments in told.get("calls", ())]
        what = what | {"pieces": told.get("say", []), "calls": calls}
    frame = Frame(dialect, True, request["model"], unique)
    thinks, pieces, calls = what.get("thinks", []), what.get("pieces", []), what.get("calls", [])
    finish = what.get("finish", "tool_calls" if calls else "stop")
    made = len(thinks) + len(pieces) + sum(len(it) for _, it in calls)
    usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": made, "total_tokens": PROMPT_TOKENS + made}
    if not request.get("stream"):
        whole = frame.whole(["".join(pieces)], finish, usage)
        _fill(whole["choices"][0]["message"], dialect, "".join(thinks), calls, unique)
        return [["json", [200, whole]]]
    events = frame.opening()
    events += [frame.thought(text, first=number == 0) for number, text in enumerate(thinks)]
    events += [frame.text(text, first=number == 0 and not thinks) for number, text in enumerate(pieces)]
    for number, (name, parts) in enumerate(calls):
        if dialect == "ollama":
            events.append(frame.call(number, name, "".join(parts)))
            continue
        events.append(frame.call(number, name, ""))
        events += [frame.call(number, None, it) for it in parts]
    events += [frame.finish(finish), frame.usage(usage)]
    gap = "" if what.get("bare") else " "
    return [*(["text", f"data:{gap}{json.dumps(it)}\n\n"] for it in events), ["text", f"data:{gap}[DONE]\n\n"], ["end"]]


def _fill(message: Json, dialect: str, thought: str, calls: list[Any], unique: int) -> None:
    if thought:
        message["reasoning_content" if dialect == "llamacpp" else "reasoning"] = thought
    if calls:
        message["tool_calls"] = [
            {"id": f"call_{unique}_{index}", "type": "function", "function": {"name": name, "arguments": "".join(it)}}
            for index, (name, it) in enumerate(calls)
        ]
