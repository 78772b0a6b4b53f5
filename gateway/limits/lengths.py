"""Lengths: find how many tokens an answer may have. This is one limit, whatever its name in the request.

Engines read the limit under different names, and rank the names differently: llama.cpp prefers `n_predict`, vLLM
prefers `max_completion_tokens`, and Ollama reads only `max_tokens`. A request with two names could be charged by one
and answered by the other. All names are therefore read here, and an engine gets one name with one number.
"""

from typing import Any

from gateway.endpoints import ENDPOINTS, Kind

_NEWER = "max_completion_tokens"  # the name that OpenAI uses in chats today
NAMES = frozenset({"max_tokens", _NEWER, "n_predict"})
_LARGEST = 2**31 - 1  # llama.cpp counts in 32 bits


def unify(kind: Kind, body: dict[str, Any]) -> dict[str, Any]:
    """Return the body with at most one limit, the smallest that it has: each is a promise of "at most so many".

    The limits are whole numbers or null: guard.refuse_control has seen them.
    """
    names = NAMES & body.keys()
    if not names or not (known := ENDPOINTS[kind].limits):
        return body
    limits = {name: body[name] for name in names if body[name] is not None}
    rest = {name: value for name, value in body.items() if name not in names}
    if not limits:
        return rest
    name = known[0] if known[0] in limits else known[-1]
    return rest | {name: min(_LARGEST, *limits.values())}


def limit(body: dict[str, Any]) -> int | None:
    """Read the limit of a body that went through `unify`: tokens of each answer; None if there is no limit."""
    for name in (_NEWER, "max_tokens"):
        if type(found := body.get(name)) is int:
            return found
    return None
