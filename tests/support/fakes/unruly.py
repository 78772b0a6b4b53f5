"""An engine that is asked for tool calls and answers as a test wrote: well, or wrong in one of many ways.

An answer is {"say": [texts], "calls": [[name, arguments]], "think": text, "finish": reason, "cut": events
of a stream after which the connection closes}, all optional;
{"text": text}, a completion;
{"refuse": message}, a 400; or {"good": [[name, arguments]]}, calls in whatever form the request asks for.
"""

import json
from typing import Any

USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}


def tried(request: dict[str, Any], number: int) -> list[list[Any]]:
    """The script for a request that comes for this time, counted from 1; the last answer is the one for all others."""
    answers = request["tries"]
    answer = answers[min(number, len(answers)) - 1]
    if "refuse" in answer:
        error = {"message": answer["refuse"], "type": "BadRequestError", "param": None, "code": 400}
        return [["json", [400, {"error": error}]]]
    if "script" in answer:
        return list(answer["script"])
    if "good" in answer:
        answer = good(answer["good"], request)
    if "text" in answer:
        return _completed(answer["text"], request)
    return _streamed(answer) if request.get("stream") else _whole(answer, request)


def good(calls: list[list[Any]], request: dict[str, Any]) -> dict[str, Any]:
    """The answer with these calls, in the form that the request asks for."""
    form = request.get("response_format")
    if form is None:
        return {"calls": calls, "finish": "tool_calls"}
    schema = form["json_schema"]["schema"]
    told: Any = [{"name": name, "arguments": arguments} for name, arguments in calls]
    if schema.get("type") != "array":
        told = told[0]
        if "name" not in schema.get("properties", {}) and "anyOf" not in schema:
            told = told["arguments"]
    text = json.dumps(told)
    return {"say": [text[at : at + 5] for at in range(0, len(text), 5)]}


def _completed(text: str, request: dict[str, Any]) -> list[list[Any]]:
    """Of a completion. In a stream there is a usage of zeros in each chunk, as Ollama has it."""
    zeros = dict.fromkeys(USAGE, 0)
    choice = {"index": 0, "text": text, "finish_reason": "stop"}
    head = {"id": "cmpl-fake", "object": "text_completion", "created": 1, "model": request["model"]}
    if not request.get("stream"):
        return [["json", [200, head | {"choices": [choice], "usage": USAGE}]]]
    return [["event", head | {"choices": [choice], "usage": zeros}], ["usage"], ["done"], ["end"]]


def _calls(answer: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "index": index,
            "id": f"call_{index}",
            "type": "function",
            "function": {"name": name, "arguments": it if isinstance(it, str) else json.dumps(it)},
        }
        for index, (name, it) in enumerate(answer.get("calls", ()))
    ]


def _whole(answer: dict[str, Any], request: dict[str, Any]) -> list[list[Any]]:
    message: dict[str, Any] = {"role": "assistant", "content": "".join(answer.get("say", ())) or None}
    if "think" in answer:
        message["reasoning_content"] = answer["think"]
    if calls := _calls(answer):
        message["tool_calls"] = [{name: it for name, it in call.items() if name != "index"} for call in calls]
    choice = {"index": 0, "message": message, "finish_reason": answer.get("finish", "stop")}
    head = {"id": "chatcmpl-fake", "object": "chat.completion", "created": 1, "model": request["model"]}
    return [["json", [200, head | {"choices": [choice], "usage": USAGE}]]]


def _streamed(answer: dict[str, Any]) -> list[list[Any]]:
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    if "think" in answer:
        deltas.append({"reasoning_content": answer["think"]})
    deltas += [{"content": text} for text in answer.get("say", ())]
    for call in _calls(answer):
        text = call["function"]["arguments"]
        deltas.append({"tool_calls": [call | {"function": call["function"] | {"arguments": ""}}]})
        pieces = [text[at : at + 7] for at in range(0, len(text), 7)]
        deltas += [{"tool_calls": [{"index": call["index"], "function": {"arguments": it}}]} for it in pieces]
    head = {"id": "chatcmpl-fake", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    told = [{"index": 0, "delta": it, "finish_reason": None} for it in deltas]
    told.append({"index": 0, "delta": {}, "finish_reason": answer.get("finish", "stop")})
    script = [*(["event", head | {"choices": [it]}] for it in told), ["usage"], ["done"], ["end"]]
    return [*script[: answer["cut"]], ["close"]] if "cut" in answer else script
