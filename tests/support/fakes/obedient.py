"""An engine that does as it is asked, in the frames of its dialect: it thinks, says a text, and calls tools that it is
offered, until the last message is a tool's result. It makes a call that is demanded, and a text by a schema.

tests/support/fakes/dialects.py has it answer so while its attribute `obeys` is set.
"""

import json
from typing import Any

from tests.support.fakes.frames import Frame, Json
from tests.support.fakes.model import PROMPT_TOKENS, Steps
from tests.support.fakes.writes import events_of, obeys

THOUGHTS = ["Let me ", "see."]
TEXT = ["one", " two", " three"]


def obey(dialect: str, request: Json, unique: int) -> Steps:
    """Return the steps that answer a request for a chat or a completion."""
    said = said_to(request) if "messages" in request else {"pieces": TEXT}
    obeys(said, request)
    prompts = request.get("prompt")
    count = len(prompts) if isinstance(prompts, list) and not isinstance(prompts[0], int) else 1
    made = [(index, said) for index in range(count * (1 if dialect == "ollama" else request.get("n") or 1))]
    frame = Frame(dialect, "messages" in request, request["model"], unique)
    if not request.get("stream"):
        return [["json", [200, _whole(frame, made)]]]
    asked = bool((request.get("stream_options") or {}).get("include_usage"))
    events = events_of(frame, made, request)[: None if asked else -1]
    return [*(["event", it] for it in frame.sealed(events, usage=asked)), ["done"], ["end"]]


def said_to(request: Json) -> Json:
    """Return what it says to a request for a chat: `thinks`, `pieces` and perhaps `calls`, as in writes.py."""
    form = request.get("response_format") or {"type": "text"}
    if form["type"] != "text":
        value = fitting(form["json_schema"]["schema"]) if form["type"] == "json_schema" else {"a": 1}
        return {"thinks": THOUGHTS, "pieces": _pieces(value)}
    tools = {it["function"]["name"]: it["function"].get("parameters") for it in request.get("tools", ())}
    choice = request.get("tool_choice") or "auto"
    if not tools or choice == "none" or (choice == "auto" and request["messages"][-1]["role"] == "tool"):
        return {"thinks": THOUGHTS, "pieces": TEXT}
    names = (
        [choice["function"]["name"]]
        if isinstance(choice, dict)
        else list(dict.fromkeys([next(iter(tools)), [*tools][-1]]))
    )
    if request.get("parallel_tool_calls") is False:
        names = names[:1]
    calls = [[name, _pieces(fitting(tools[name]))] for name in names]
    return {"thinks": THOUGHTS, "pieces": TEXT if choice == "auto" else [], "calls": calls}


def fitting(schema: Any, root: Any = None) -> Any:
    """Make a small value that fits a schema. Patterns and formats are not heeded."""
    if not isinstance(schema, dict):
        return {}
    root = schema if root is None else root
    if "$ref" in schema:
        return fitting(_referred(schema["$ref"], root), root)
    for name in ("anyOf", "oneOf"):
        if name in schema:
            return fitting({key: it for key, it in schema.items() if key != name} | schema[name][0], root)
    if "allOf" in schema:
        rest = {key: it for key, it in schema.items() if key != "allOf"}
        return fitting({key: it for part in (*schema["allOf"], rest) for key, it in part.items()}, root)
    if "const" in schema or "enum" in schema:
        return schema["const"] if "const" in schema else schema["enum"][0]
    return _typed(schema, root)


def _typed(schema: Json, root: Any) -> Any:
    kind = schema.get("type", "object")
    match kind if isinstance(kind, str) else kind[0]:
        case "object":
            properties = schema.get("properties", {})
            return {name: fitting(properties.get(name, {}), root) for name in schema.get("required", ())}
        case "array":
            return [fitting(schema.get("items", {}), root)] * schema.get("minItems", 0)
        case "string":
            return "x" * max(1, schema.get("minLength", 1))
        case "integer" | "number":
            least = schema.get("minimum", schema.get("exclusiveMinimum", 0) + 1)
            return max(least, min(1, schema.get("maximum", 1)))
        case "boolean":
            return True
    return None


def _referred(reference: str, root: Any) -> Any:
    found = root
    for name in reference.removeprefix("#").split("/")[1:]:
        found = found[name.replace("~1", "/").replace("~0", "~")]
    return found


def _pieces(value: Any) -> list[str]:
    text = json.dumps(value)
    return [text[at : at + 7] for at in range(0, len(text), 7)]


def _whole(frame: Frame, made: list[tuple[int, Json]]) -> Json:
    texts = ["".join(said["pieces"]) for _, said in made]
    tokens = sum(len(said["pieces"]) for _, said in made)
    usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": tokens, "total_tokens": PROMPT_TOKENS + tokens}
    answer = frame.whole(texts, "tool_calls" if made[0][1].get("calls") else "stop", usage)
    for choice, (_, said) in zip(answer["choices"], made, strict=True):
        if "thinks" in said:
            field = "reasoning_content" if frame.dialect == "llamacpp" else "reasoning"
            choice["message"][field] = "".join(said["thinks"])
        if calls := said.get("calls"):
            choice["message"]["content"] = choice["message"]["content"] or None
            choice["message"]["tool_calls"] = [
                {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": "".join(pieces)}}
                for number, (name, pieces) in enumerate(calls)
            ]
    return answer
