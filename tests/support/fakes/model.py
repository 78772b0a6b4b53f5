"""A fake model: it knows one answer and says it as an engine of some dialect would, from its beginning or, handed a
part of it in that engine's own way, from there on. Handed it in another way it begins anew, or refuses, as that does.

`["answer", {...}]` in a script of tests/support/fakes/engine.py:
    dialect   ollama, vllm or llamacpp
    pieces    the answer's tokens
    thinks    the tokens of its reasoning, before those
    again     its tokens when it is made once more; the same, if it is left out
    prefix    what the caller's own last message or prompt holds already, for the answer to go on from
    cuts      after how many events this user's first, second, … request breaks off; null: it doesn't
    how       the steps it breaks off with
    at        the process ids of the engines that break off; all, if it is left out
"""

import json
import os
import re
from typing import Any

from tests.support.fakes.frames import Frame
from tests.support.fakes.thinker import rendered, shown

Steps = list[list[Any]]
PROMPT_TOKENS = 7


# Ollama's models by their kinds of template, as recorded; any other is of the library's kind. The last two close a last
# message, too. `old`: its Ollama does not show a prompt. `control`: raw, it leaves something out.
TEMPLATES = {"smollib": "library", "smol": "detected", "smolnat": "own", "smolold": "old", "smolgpt": "control"}
_SCRIPT = re.compile(r"#(\{.*\})<\|im_end\|>")  # in a message, for what is asked in another way than by OpenAI's fields
TURN = "<|im_start|>assistant\n"


def template_of(model: str) -> str:
    return TEMPLATES.get(model.partition(":")[0], "library")


def render(request: dict[str, Any]) -> dict[str, Any]:
    """What Ollama says to `_debug_render_only`. Of the three kinds of template only the detected one closes a last
    message of the assistant's."""
    messages = request["messages"] if "messages" in request else [{"role": "user", "content": request["prompt"]}]
    texts = [f"<|im_start|>{it['role']}\n{it['content']}<|im_end|>\n" for it in messages]
    kind = template_of(request["model"])
    if messages[-1]["role"] == "assistant" and kind in ("library", "own"):
        texts[-1] = texts[-1].removesuffix("<|im_end|>\n")
    else:
        texts.append(TURN + rendered(request["model"]))
    told = {"rendered_template": "".join(texts)}
    if kind == "old":
        return {"model": request["model"], "message": {"role": "assistant", "content": "one"}, "done": True}
    return {"model": request["model"], "message": {"role": "", "content": ""}, "done": False, "_debug_info": told}


def raw_script(request: dict[str, Any]) -> dict[str, Any]:
    """What a raw request to Ollama's own API is to be answered with, and whose it is: as the message says from which
    its prompt was made."""
    found = _SCRIPT.search(request["prompt"])
    return json.loads(found[1]) if found else {}


def raw(what: dict[str, Any], request: dict[str, Any], *, number: int) -> Steps:
    """The steps of a raw request: lines of JSON."""
    assert request["think"] is False
    given = request["prompt"].rpartition(TURN)[2]
    pieces = what["pieces"]
    assert "".join(pieces).startswith(given), f"no beginning of the answer: {given!r}"
    options = request.get("options", {})
    made, reason = _generate(pieces, given, {"stop": options.get("stop"), "max_tokens": options.get("num_predict")}, "")
    if template_of(request["model"]) == "control":
        made = made[1:]
    usage = usage_of(pieces, given, made)
    made = shown(request["model"], made)
    asked = request.get("logprobs")
    end = {"done_reason": reason, "prompt_eval_count": usage["prompt_tokens"], "eval_count": usage["completion_tokens"]}
    if not request["stream"]:
        return [["json", [200, {"response": "".join(made), "done": True} | end]]]
    said = [{"response": text, "done": False} | ({"logprobs": [token(text)]} if asked else {}) for text in made]
    lines = [*said, {"response": "", "done": True} | end]
    steps: Steps = [["text", json.dumps(it) + "\n"] for it in lines]
    cut, how = cut_of(what, number)
    return [*steps, ["end"]] if cut is None else [*steps[:cut], *how]


def token(text: str) -> dict[str, Any]:
    """What is told of a token whose log probability was asked for."""
    return {"token": text, "logprob": -0.25, "bytes": list(text.encode()), "top_logprobs": []}


def cut_of(what: dict[str, Any], number: int) -> tuple[int | None, Steps]:
    cuts = what.get("cuts", [])
    cut = cuts[number] if number < len(cuts) and os.getpid() in what.get("at", [os.getpid()]) else None
    return cut, what.get("how", [["close"]])


def answer(what: dict[str, Any], request: dict[str, Any], *, number: int, unique: int) -> Steps:
    """The steps of one request: its user's `number`th, `unique` among all."""
    if number and "again" in what:
        what = what | {"pieces": what["again"]}
    if wrong := wrong_in(what["dialect"], request):
        return [["json", [400, {"error": {"message": wrong, "type": "BadRequestError", "code": 400}}]]]
    given = given_in(what["dialect"], request).removeprefix(what.get("prefix", ""))
    assert "".join(what["pieces"]).startswith(given), f"no beginning of the answer: {given!r}"
    cut, how = cut_of(what, number)
    if not request.get("stream"):
        return [["json", [200, _whole(what, request, given, unique)]]] if cut is None else [["text", "{"], *how]
    steps = _events(what, request, given, unique)
    return [*steps, ["end"]] if cut is None else [*steps[:cut], *how]


def stream(dialect: str, pieces: list[str], request: dict[str, Any], unique: int) -> Steps:
    """The steps of a stream of these pieces, whatever was handed over."""
    return [*_events({"dialect": dialect, "pieces": pieces}, request, "", unique), ["end"]]


def wrong_in(dialect: str, request: dict[str, Any]) -> str | None:
    """Why an engine of that dialect refuses what it is handed."""
    roles = [message["role"] for message in request.get("messages", ())]
    if dialect == "llamacpp" and roles[-2:] == ["assistant", "assistant"]:
        return "Cannot have 2 or more assistant messages at the end of the list."
    if dialect == "vllm" and request.get("continue_final_message"):
        if request.get("add_generation_prompt", True):
            return "Cannot set both `continue_final_message` and `add_generation_prompt` to True."
        if roles[-1] != "assistant":
            return "continue_final_message is set but the final message is not from the assistant."
    return None


def given_in(dialect: str, request: dict[str, Any]) -> str:
    """What it goes on from."""
    if "prompt" in request:
        return request["prompt"] if isinstance(request["prompt"], str) else ""
    last = request["messages"][-1]
    if last["role"] != "assistant" or (dialect == "vllm" and not request.get("continue_final_message")):
        return ""
    if dialect == "ollama" and template_of(request["model"]) != "library":
        return ""  # it says it again, or begins another answer
    # vLLM renders it by the model's chat template: Llama 3's, for one, strips it.
    return str(last["content"].strip() if dialect == "vllm" else last["content"])


def _whole(what: dict[str, Any], request: dict[str, Any], given: str, unique: int) -> dict[str, Any]:
    made, reason = _generate(what["pieces"], given, request, what["dialect"])
    return _frame(what, request, unique).whole(["".join(made)], reason, usage_of(what["pieces"], given, made))


def _frame(what: dict[str, Any], request: dict[str, Any], unique: int) -> Frame:
    return Frame(what["dialect"], "messages" in request, request["model"], unique)


def _events(what: dict[str, Any], request: dict[str, Any], given: str, unique: int) -> Steps:
    dialect, frame, pieces = what["dialect"], _frame(what, request, unique), what["pieces"]
    made, reason = _generate(pieces, given, request, dialect)
    options = request.get("stream_options") or {}
    asked = bool(options.get("include_usage"))
    events = frame.opening()
    before = len(events)
    thoughts = [] if given else what.get("thinks", [])
    events += [frame.thought(text, first=number == 0) for number, text in enumerate(thoughts)]
    before += len(thoughts)
    events += [frame.text(text, first=number == 0 and not thoughts) for number, text in enumerate(made)]
    events.append(frame.finish(reason))
    if dialect == "vllm" and options.get("continuous_usage_stats"):
        for number, event in enumerate(events):
            so_far = usage_of(pieces, given, made[: max(0, number + 1 - before)])
            event["usage"] = so_far | {"completion_tokens_details": None}
    if asked:
        usage = usage_of(pieces, given, made)
        if dialect == "llamacpp":
            timings = {"prompt_n": usage["prompt_tokens"], "predicted_n": usage["completion_tokens"]}
            told = {"usage": usage | {"prompt_tokens_details": {"cached_tokens": 1}}, "timings": timings}
            if frame.chat:
                events.append(frame.usage(None) | told)
            else:  # in the last chunk
                events[-1] |= told
        else:
            events.append(frame.usage(usage))
    return [*(["event", event] for event in frame.sealed(events, usage=asked)), ["done"]]


def usage_of(pieces: list[str], given: str, made: list[str]) -> dict[str, int]:
    prompt = PROMPT_TOKENS + len(pieces) - len(rest_of(pieces, len(given)))
    return {"prompt_tokens": prompt, "completion_tokens": len(made), "total_tokens": prompt + len(made)}


def _generate(pieces: list[str], given: str, request: dict[str, Any], dialect: str) -> tuple[list[str], str]:
    """What it makes, piece by piece, and why it ends. It looks for stop sequences in what it makes itself, and holds
    nothing back for them."""
    limits = [request.get("max_tokens"), None if dialect == "ollama" else request.get("max_completion_tokens")]
    limit = min((it for it in limits if it), default=None)
    stop = request.get("stop") or []
    made: list[str] = []
    for piece in rest_of(pieces, len(given)):
        if len(made) == limit:
            return made, "length"
        made.append(piece)
        text = "".join(made)
        found = [text.index(it) for it in ([stop] if isinstance(stop, str) else stop) if it in text]
        if found:
            before = "".join(made[:-1])
            made[-1] = text[len(before) : max(min(found), len(before))]
            return [it for it in made if it], "stop"
    return made, "length" if len(made) == limit else "stop"


def rest_of(pieces: list[str], start: int) -> list[str]:
    """The pieces from a character on. A piece that it cuts is made of what is left of it."""
    rest, position = [], 0
    for piece in pieces:
        position += len(piece)
        if position > start:
            rest.append(piece[-(position - start) :])
    return rest
