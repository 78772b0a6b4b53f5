"""Telling: write the text by which a model learns of the tools, because its engine does not get them.

The text stands at the end of the system message. It depends only on the tools and the choice, so that a growing
conversation keeps its prefix, and the engine can use its prefix cache.
"""

from typing import Any

import orjson

from gateway.forced_tools.demand import Demand

_SYSTEM = frozenset({"system", "developer"})
MAX_REASON = 300  # characters of a reason that is told to the model


def told(messages: list[dict[str, Any]], demand: Demand, reason: str = "") -> list[dict[str, Any]]:
    """Return the messages, with the functions and the form of the answer in the system message. With a `reason`, the
    last message says why an answer was rejected."""
    words = _words(demand)
    if messages and messages[0]["role"] in _SYSTEM:
        made = [_extended(messages[0], words), *messages[1:]]
    else:
        made = [{"role": "system", "content": words}, *messages]
    if not reason:
        return made
    again = f"Your last answer was not accepted: {reason[:MAX_REASON]} Answer again, in the form that is asked for."
    # Many chat templates refuse two user messages in a row.
    if made[-1]["role"] == "user":
        return [*made[:-1], _extended(made[-1], again)]
    return [*made, {"role": "user", "content": again}]


def _words(demand: Demand) -> str:
    lines = [
        orjson.dumps(
            {"name": it.name, "description": it.description, "parameters": it.parameters},
        ).decode()
        for it in demand.tools
    ]
    if demand.mode == "named":
        task = "Call this function. Answer with its arguments alone, as one JSON object."
    elif demand.several:
        task = (
            "Call one or more of these functions. Answer with the calls alone, as a JSON list of objects of the form"
            ' {"name": the name of the function, "arguments": {its arguments}}.'
        )
    else:
        task = (
            "Call one of these functions. Answer with the call alone, as one JSON object of the form"
            ' {"name": the name of the function, "arguments": {its arguments}}.'
        )
    return "\n".join(["Functions, with the JSON Schema of their arguments:", *lines, "", task])


def _extended(message: dict[str, Any], words: str) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list):
        return message | {"content": [*content, {"type": "text", "text": words}]}
    return message | {"content": f"{content}\n\n{words}" if content else words}
