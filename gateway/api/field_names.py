"""Names: check how the fields of a request are written, so that every engine reads what the gateway has checked.

Ollama is written in Go. Go's JSON reader ignores capitals and takes the last match, so "Messages" replaces "messages",
and the operator's prompt with them. A name that differs from a known one only in capitals is therefore refused, at
every depth at which an engine reads names. Inside the caller's own content (a JSON Schema, a tool's arguments,
metadata) any name passes.
"""

from types import NoneType
from typing import Any

import orjson

from gateway.dialects import DIALECTS
from gateway.endpoints import ENDPOINTS
from gateway.errors import BadRequest
from gateway.upstream.parameters import EXTRAS, TABLES

Inside = dict[str, "Inside"]

_PART: Inside = {name: {} for name in ("image_url", "video_url", "audio_url", "file_url", "input_audio", "file")}
_CALL: Inside = {"function": {}, "custom": {}}
_MESSAGE: Inside = {"content": _PART, "tool_calls": _CALL, "function_call": {}, "audio": {}}
# Where in a request an engine reads names: objects, or lists of objects, by the fields that hold them.
_REQUEST: Inside = {
    **{it.content: _MESSAGE for it in ENDPOINTS.values() if it.counted != "prompts"},
    "tools": {"function": {}, "custom": {"format": {"grammar": {}}}},
    "functions": {},
    "tool_choice": {"function": {}, "custom": {}, "allowed_tools": {"tools": {"function": {}}}},
    "function_call": {},
    "response_format": {"json_schema": {}},
    "stream_options": {},
    "reasoning": {},
    "audio": {},
    "prediction": {"content": _PART},
    "web_search_options": {"user_location": {"approximate": {}}},
    "structured_outputs": {},
}
# The caller's own content: no engine reads a name inside as a field of the request.
_OWN = frozenset(
    {
        "parameters",
        "input_schema",
        "schema",
        "arguments",
        "metadata",
        "logit_bias",
        "chat_template_kwargs",
        "json",
        "json_schema",
        "guided_json",
    }
)
_NESTED = """role content name tool_calls tool_call_id function_call refusal reasoning reasoning_content thinking images
    audio type text url detail data format file_data file_id filename id index function custom arguments input
    description parameters strict json_schema schema include_usage continuous_usage_stats include_obfuscation effort
    tools mode json regex choice grammar structural_tag json_object"""
KNOWN = frozenset().union(
    *TABLES.values(), *EXTRAS.values(), _NESTED.split(), *(it.native for it in DIALECTS.values()), _REQUEST, _PART
)
_PLAIN = frozenset({str, int, float, bool, NoneType})
_LONG_S_AND_KELVIN = {0x17F: "s", 0x212A: "k"}  # the only others that Unicode's simple folding makes a letter of ASCII


def folded(name: str) -> str:
    """Return the name as a reader that ignores capitals compares it, by Unicode's simple folding."""
    return name.translate(_LONG_S_AND_KELVIN).lower()


def refuse_other_spellings(body: dict[str, Any]) -> None:
    """Refuse names that differ from a known one only in capitals, and names with a leading underscore, which belong to
    engines. Raises BadRequest that names the first."""
    _look(body, _REQUEST, "")


def _look(value: dict[str, Any], inside: Inside, where: str) -> None:
    if not KNOWN.issuperset(value):
        _judge(value, where)
    for name, item in value.items():
        kind = type(item)
        if (kind is list or kind is dict) and name in inside:
            if kind is dict:
                _look(item, inside[name], f"{where}{name}.")
                continue
            for index, it in enumerate(item):
                if type(it) is dict and not (len(it) == 2 and "role" in it and type(it.get("content")) is str):
                    _look(it, inside[name], f"{where}{name}[{index}].")


def _judge(value: dict[str, Any], where: str) -> None:
    for name in value.keys() - KNOWN:
        param = where + name[:64]
        if name.startswith("_"):
            raise BadRequest(
                f"'{param}' cannot be set by a request. Names that begin with an underscore belong to the engine.",
                param=param,
            )
        if (known := folded(name)) in KNOWN:
            raise BadRequest(
                f"'{param}' must be written '{known}'. Some engines do not distinguish capital and small letters, so "
                "only the documented spelling is accepted.",
                param=param,
            )


def refuse_long_numbers(body: dict[str, Any]) -> None:
    """Refuse whole numbers beyond 64 bits (parse keeps them as orjson's Fragments), except in the caller's own content.
    That includes the input of a tool_use block, which may come from an answer of ours. Raises BadRequest that names the
    first."""
    if (where := _long_number(body, top=True)) is not None:
        where = where.removeprefix(".")
        raise BadRequest(f"'{where}' has a whole number of more than 64 bits. Use a smaller one.", param=where)


def _long_number(value: Any, *, top: bool = False) -> str | None:
    """Return where in a value the first such number is, as in `.tools[0].id`; None if there is none. The path is made
    on the way back, because a body may have 300,000 values."""
    if type(value) is orjson.Fragment:
        return ""
    if type(value) is dict:
        used = not top and value.get("type") == "tool_use"  # `input` has another meaning in the request itself
        for name, item in value.items():
            if type(item) in _PLAIN or name in _OWN or (used and name == "input"):
                continue
            if (found := _long_number(item)) is not None:
                return f".{name[:64]}{found}"
    elif type(value) is list:
        for index, item in enumerate(value):
            if type(item) not in _PLAIN and (found := _long_number(item)) is not None:
                return f"[{index}]{found}"
    return None
