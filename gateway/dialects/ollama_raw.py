"""Ollama's raw way: send the prompt as its chat template writes it, followed by the answer's text so far.

It works with each of the three kinds of template that were seen, because no template touches the text: 72 of 72 cut
answers continued exactly, on 0.32.15 (tests/recordings/ollama). Of answers with reasoning it was 301 of 308. Only
Ollama's own API offers it, and the answer comes as lines of JSON, in which reasoning is not told from text.
"""

from collections.abc import Callable
from typing import Any

import orjson

from gateway.dialects.asking import Engine, Prompt, as_object
from gateway.dialects.dialect import Made, Raw, Way
from gateway.dialects.thoughts import Thoughts

MAX_LINE = 8 * 1024 * 1024  # bytes; a longer line is an error of the engine
PATH = "/api/generate"
# An option's name in its own API, and what OpenAI's endpoints set if a request says nothing.
_OPTIONS = {"temperature": 1.0, "top_p": 1.0, "seed": None, "frequency_penalty": None, "presence_penalty": None}
RESUMES: dict[Made, tuple[Way, ...]] = {
    "text": ("raw", "message", "anew"),
    "reasoning": ("thought", "anew"),
    "json": ("nailed", "anew"),
    "calls": ("anew", "arguments"),
}
_REASONS = ("stop", "length")
_EFFORTS: dict[str, str | bool] = {"none": False, "minimal": "low", "xhigh": "max", "ultra": "max"}
UNREADABLE = (LookupError, TypeError, ValueError, AttributeError)  # what a Native raises of messages of another form

# Raises one of UNREADABLE.
Native = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


def raw_way(native: Native) -> Raw:
    """Return the way, with the function that makes Ollama's own messages of OpenAI's."""

    def fits(fields: dict[str, Any]) -> bool:
        # A tool call comes as text in a raw answer, and an image stands in the prompt by its number only.
        if fields.get("tools"):
            return False
        if "messages" not in fields:
            return True
        try:
            messages = native(fields["messages"])
        except UNREADABLE:
            return False
        return messages[-1]["role"] != "assistant" and not any(it.get("images") for it in messages)

    async def render(engine: Engine, prompt: Prompt) -> str | None:
        # A version that does not know the field answers instead. Any option but num_predict would load the model anew.
        asked = {"model": prompt.model, "stream": False, "_debug_render_only": True, "options": {"num_predict": 1}}
        if "messages" not in prompt.fields:
            told = await engine.ask(PATH, asked | {"prompt": prompt.fields["prompt"]}, patient=True)
        else:
            thinks = thinks_of(effort_of(prompt.fields))
            body = asked | thinks | {"messages": native(prompt.fields["messages"])}
            told = await engine.ask("/api/chat", body, patient=True)
        debug = as_object(told).get("_debug_info")
        text = debug.get("rendered_template") if isinstance(debug, dict) else None
        return text if isinstance(text, str) and text else None

    return Raw(path=PATH, fits=fits, render=render, body=_body, reads=lines)


def effort_of(fields: dict[str, Any]) -> Any:
    """Return how much a request lets the model think; None if it does not say. As in Ollama's source, `reasoning` goes
    before `reasoning_effort`."""
    reasoning = fields.get("reasoning")
    return (reasoning.get("effort") if isinstance(reasoning, dict) else fields.get("reasoning_effort")) or None


def thinks_of(effort: Any) -> dict[str, Any]:
    """Return what says the same in Ollama's own API, which knows fewer efforts."""
    if effort is None:
        return {}
    return {"think": _EFFORTS.get(effort, effort) if isinstance(effort, str) else effort}


def _body(prompt: Prompt, text: str) -> dict[str, Any]:
    fields = prompt.fields
    options = {name: fields.get(name) if fields.get(name) is not None else it for name, it in _OPTIONS.items()}
    limit = fields.get("max_tokens")
    options["num_predict"] = limit if type(limit) is int and limit > 0 else None
    options["stop"] = [fields["stop"]] if isinstance(fields.get("stop"), str) else fields.get("stop")
    said = {name: value for name, value in options.items() if value is not None}
    # Without `truncate` it would cut a text that has outgrown the context, in silence.
    whole: dict[str, Any] = {"raw": True, "think": False, "truncate": False}
    if "messages" in fields and fields.get("logprobs"):  # its endpoint for completions ignores the field
        whole |= {"logprobs": True, "top_logprobs": fields.get("top_logprobs") or 0}
    return {"model": prompt.model, "prompt": text, "options": said} | whole


def lines(*, chats: bool, closes: str = "") -> Callable[[bytes], bytes]:
    """Return a function that takes the bytes of a raw answer as they come, and returns the events that OpenAI's
    endpoint would have sent: of a chat, or of a completion. The answer begins with reasoning if `closes` ends that."""
    rest, thoughts = b"", Thoughts(closes)

    def read(data: bytes) -> bytes:
        nonlocal rest
        *whole, rest = (rest + data).split(b"\n")
        if len(rest) > MAX_LINE:
            return b"data: {\n\n"  # which is no JSON, and ends the answer
        return b"".join(_event(line, thoughts, chats=chats) for line in whole if line.strip())

    return read


def _event(line: bytes, thoughts: Thoughts, *, chats: bool) -> bytes:
    try:
        told = orjson.loads(line)
    except orjson.JSONDecodeError:
        told = None
    if not isinstance(told, dict) or not isinstance(told.get("response", ""), str):
        return b"data: {\n\n"
    if told.get("error"):
        return b"data: %b\n\n" % orjson.dumps({"error": told["error"]})
    done = told.get("done") is True
    thought, text = thoughts.take(told.get("response", ""), last=done)
    reason = told.get("done_reason") if told.get("done_reason") in _REASONS else "stop"
    delta = {name: it for name, it in (("reasoning", thought), ("content", text)) if it}
    said = {"delta": delta} if chats else {"text": text}
    logprobs = told.get("logprobs")  # in the form in which OpenAI's endpoint has the list
    more = {"logprobs": {"content": logprobs}} if isinstance(logprobs, list) and logprobs else {}
    event = _data({"choices": [{"index": 0, **said, **more, "finish_reason": reason if done else None}]})
    if not done:
        return event
    usage = {"prompt_tokens": told.get("prompt_eval_count", 0), "completion_tokens": told.get("eval_count", 0)}
    return event + _data({"choices": [], "usage": usage}) + b"data: [DONE]\n\n"


def _data(chunk: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % orjson.dumps(chunk)
