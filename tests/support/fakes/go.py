"""How Ollama reads JSON: Go's encoding/json, into the structs of its OpenAI endpoints.

A field of a struct takes the value of any name that is equal to its own by Unicode's simple folding, the last one of
several. Written after encoding/json's documentation and Ollama's openai/openai.go, apart from the gateway's own names.
"""

import json
from typing import Any

Struct = dict[str, Any]  # a field's name in JSON: the struct of its value, or None for what is taken as it is

_FUNCTION: Struct = {"name": None, "arguments": None}
_MESSAGE: Struct = {
    "role": None,
    "content": None,  # of any type: its parts are maps, whose names have their capitals
    "reasoning": None,
    "tool_calls": {"id": None, "index": None, "type": None, "function": _FUNCTION},
    "name": None,
    "tool_call_id": None,
}
_LIMITS = "model stream max_tokens seed stop temperature frequency_penalty presence_penalty top_p logprobs"
_COMMON: Struct = dict.fromkeys([*_LIMITS.split(), "_debug_render_only"]) | {"stream_options": {"include_usage": None}}
STRUCTS: dict[str, Struct] = {
    "chat": _COMMON
    | {
        "messages": _MESSAGE,
        "response_format": {"type": None, "json_schema": {"schema": None}},
        "tools": {"type": None, "function": {"name": None, "description": None, "parameters": None}},
        "reasoning": {"effort": None},
        "reasoning_effort": None,
        "top_logprobs": None,
    },
    "completion": _COMMON | {"prompt": None, "suffix": None},
    "embedding": dict.fromkeys(["input", "model", "dimensions", "encoding_format"]),
}
_ORBITS = {"\u017f": "s", "\u212a": "k"}  # all that folds to a letter of ASCII, besides the letter itself


def fold(name: str) -> str:
    return "".join(_ORBITS.get(char, char.lower() if char.isascii() else char) for char in name)


def reads(kind: str, raw: bytes) -> Any:
    """What a request's struct holds."""
    return _into(STRUCTS[kind], json.loads(raw, object_pairs_hook=lambda pairs: pairs))


def _into(struct: Struct | None, value: Any) -> Any:
    if struct is None:
        return _plain(value)
    if _is_object(value):
        found = {}
        for name, item in value:
            if (field := fold(name)) in struct:
                found[field] = _into(struct[field], item)
        return found
    return [_into(struct, it) for it in value] if isinstance(value, list) else value


def _is_object(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(it, tuple) for it in value)


def _plain(value: Any) -> Any:
    if _is_object(value) and value:
        return {name: _plain(item) for name, item in value}
    return [_plain(it) for it in value] if isinstance(value, list) else value
