"""Shape: the types of what an engine says in a choice. Whoever reads the choice afterwards relies on them."""

from typing import Any, Literal

import orjson

from gateway.errors import EngineError


def settle_all(answer: dict[str, Any]) -> bool:
    """Settle the choices of a blocking answer. Returns whether that changed one. Raises EngineError if there are none,
    or one is malformed."""
    choices = answer.get("choices")
    if type(choices) is not list:
        raise EngineError("The engine's answer has no choices.", code="engine_broken_stream")
    changed = False
    for choice in choices:
        changed = settle(choice, "message") or changed
    return changed


def settle(choice: Any, name: Literal["delta", "message"] = "delta") -> bool:
    """Check a choice of a chunk, or of a blocking answer (`message`). Null is as good as a missing field, but an index
    becomes 0 and a delta becomes empty. Arguments of a call that are an object become its JSON text. Returns whether
    that changed the choice. Raises EngineError if a field has another type than the API's."""
    if type(choice) is not dict:
        raise _malformed()
    get, content, calls = choice.get, None, None
    index, said, text, logprobs = get("index"), get(name), get("text"), get("logprobs")
    if type(said) is dict:
        content, calls = said.get("content"), said.get("tool_calls")
    elif said is not None:
        raise _malformed()
    if (
        (content is not None and type(content) is not str)
        or (text is not None and type(text) is not str)
        or (logprobs is not None and type(logprobs) is not dict)
        or (calls is not None and type(calls) is not list)
        or (index is not None and type(index) is not int)
    ):
        raise _malformed()
    changed = False
    for it in calls or ():
        changed = _settle_call(it) or changed
    if index is None:
        choice["index"], changed = 0, True
    if said is None and name in choice:
        choice[name], changed = {}, True
    return changed


def _settle_call(call: Any) -> bool:
    """Settle a tool call, or a piece of one. Returns whether its arguments became a text."""
    if type(call) is not dict:
        raise _malformed()
    function = call.get("function")
    if type(function) is not dict:
        return False
    arguments = function.get("arguments")
    if arguments is None or type(arguments) is str:
        return False
    if type(arguments) is not dict:
        raise _malformed()
    try:
        function["arguments"] = orjson.dumps(arguments).decode()
    except orjson.JSONEncodeError:  # they are nested too deeply
        raise _malformed() from None
    return True


def _malformed() -> EngineError:
    return EngineError("The engine's answer has a malformed choice.", code="engine_broken_stream")
