"""A fake model: it knows one answer and says it as an engine of some dialect would, from its beginning or, handed a
part of it in that engine's own way, from there on. Handed it in another way it begins anew, or refuses, as that does.

`["answer", {...}]` in a script of tests/fakes/engine.py:
    dialect   ollama, vllm or llamacpp
    pieces    the answer's tokens
    prefix    what the caller's own last message or prompt holds already, for the answer to go on from
    cuts      after how many events this user's first, second, … request breaks off; null: it doesn't
    how       the steps it breaks off with
    at        the process ids of the engines that break off; all, if it is left out
"""

import os
from typing import Any

Steps = list[list[Any]]
PROMPT_TOKENS = 7


def answer(what: dict[str, Any], request: dict[str, Any], *, number: int, unique: int) -> Steps:
    """The steps of one request: its user's `number`th, `unique` among all."""
    if wrong := _wrong(what["dialect"], request):
        return [["json", [400, {"error": {"message": wrong, "type": "BadRequestError", "code": 400}}]]]
    given = _given(what["dialect"], request).removeprefix(what.get("prefix", ""))
    assert "".join(what["pieces"]).startswith(given), f"no beginning of the answer: {given!r}"
    cuts = what.get("cuts", [])
    cut = cuts[number] if number < len(cuts) and os.getpid() in what.get("at", [os.getpid()]) else None
    how = what.get("how", [["close"]])
    if not request.get("stream"):
        return [["json", [200, _whole(what, request, given, unique)]]] if cut is None else [["text", "{"], *how]
    steps = _events(what, request, given, unique)
    return [*steps, ["end"]] if cut is None else [*steps[:cut], *how]


def _wrong(dialect: str, request: dict[str, Any]) -> str | None:
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


def _given(dialect: str, request: dict[str, Any]) -> str:
    """What it goes on from."""
    if "prompt" in request:
        return request["prompt"] if isinstance(request["prompt"], str) else ""
    last = request["messages"][-1]
    if last["role"] != "assistant" or (dialect == "vllm" and not request.get("continue_final_message")):
        return ""
    # vLLM renders it by the model's chat template: Llama 3's, for one, strips it.
    return str(last["content"].strip() if dialect == "vllm" else last["content"])


def _whole(what: dict[str, Any], request: dict[str, Any], given: str, unique: int) -> dict[str, Any]:
    made, reason = _generate(what["pieces"], given, request, what["dialect"])
    message = {"role": "assistant", "content": "".join(made)}
    return {
        "id": f"{what['dialect']}-{unique}",
        "object": "chat.completion",
        "created": unique,
        "model": request["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": reason}],
        "usage": _usage(what["pieces"], given, made),
    }


def _events(what: dict[str, Any], request: dict[str, Any], given: str, unique: int) -> Steps:
    dialect, chat = what["dialect"], "messages" in request
    made, reason = _generate(what["pieces"], given, request, dialect)
    head = {
        "id": f"{dialect}-{unique}",
        "object": "chat.completion.chunk" if chat else "text_completion",
        "created": unique,
        "model": request["model"],
        "system_fingerprint": f"fp-{unique}",
    }

    def event(text: str | None, finish_reason: str | None = None, **delta: Any) -> list[Any]:
        said = {"delta": delta | ({"content": text} if text is not None or delta else {})} if chat else {"text": text}
        return ["event", head | {"choices": [{"index": 0, **said, "finish_reason": finish_reason}]}]

    role = {"role": "assistant"}
    each = role if chat and dialect == "ollama" else {}  # it says so in every event
    steps = [event(None if dialect == "llamacpp" else "", **role)] if chat and not each else []
    steps += [event(text, **each) for text in made]
    if dialect == "vllm" and (request.get("stream_options") or {}).get("continuous_usage_stats"):
        for number, step in enumerate(steps):
            step[1]["usage"] = _usage(what["pieces"], given, made[: number + 1 - chat])
    steps.append(event(None if chat and dialect == "llamacpp" else "", reason, **each))
    if (request.get("stream_options") or {}).get("include_usage"):
        steps.append(["event", head | {"choices": [], "usage": _usage(what["pieces"], given, made)}])
    return [*steps, ["done"]]


def _usage(pieces: list[str], given: str, made: list[str]) -> dict[str, int]:
    prompt = PROMPT_TOKENS + len(pieces) - len(_rest(pieces, len(given)))
    return {"prompt_tokens": prompt, "completion_tokens": len(made), "total_tokens": prompt + len(made)}


def _generate(pieces: list[str], given: str, request: dict[str, Any], dialect: str) -> tuple[list[str], str]:
    """What it makes, piece by piece, and why it ends. It looks for stop sequences in what it makes itself, and holds
    nothing back for them."""
    limits = [request.get("max_tokens"), None if dialect == "ollama" else request.get("max_completion_tokens")]
    limit = min((it for it in limits if it), default=None)
    stop = request.get("stop") or []
    made: list[str] = []
    for piece in _rest(pieces, len(given)):
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


def _rest(pieces: list[str], start: int) -> list[str]:
    """The pieces from a character on. A piece that it cuts is made of what is left of it."""
    rest, position = [], 0
    for piece in pieces:
        position += len(piece)
        if position > start:
            rest.append(piece[-(position - start) :])
    return rest
