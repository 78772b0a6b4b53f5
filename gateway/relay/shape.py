"""Shape: the types of what an engine says in a choice. Whoever reads the choice afterwards relies on them."""

from typing import Any, Literal

from gateway.errors import EngineError


def settle_all(answer: dict[str, Any]) -> None:
    """Settle the choices of a blocking answer. Raises EngineError if there are none, or one is malformed."""
    choices = answer.get("choices")
    if type(choices) is not list:
        raise EngineError("The engine's answer has no choices.", code="engine_broken_stream")
    for choice in choices:
        settle(choice, "message")


def settle(choice: Any, name: Literal["delta", "message"] = "delta") -> bool:
    """Check a choice of a chunk, or of a blocking answer (`message`). Null is as good as a missing field, but an index
    becomes 0 and a delta becomes empty. Returns whether that changed the choice. Raises EngineError if a field has
    another type than the API's."""
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
    for it in calls or ():
        if type(it) is not dict:
            raise _malformed()
    changed = False
    if index is None:
        choice["index"], changed = 0, True
    if said is None and name in choice:
        choice[name], changed = {}, True
    return changed


def _malformed() -> EngineError:
    return EngineError("The engine's answer has a malformed choice.", code="engine_broken_stream")
