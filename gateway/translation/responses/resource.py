"""Resource: the response object, which echoes every setting of its request."""

from dataclasses import dataclass
from typing import Any

import orjson

from gateway.errors import BadRequest

# OpenAI's defaults, which the response shows for fields that the request leaves out.
_DEFAULTS: dict[str, Any] = {
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "prompt_cache_key": None,
    "safety_identifier": None,
    "temperature": 1.0,
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1.0,
    "truncation": "disabled",
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "user": None,
}
_LONG = ("instructions", "tools", "metadata", "text")  # written as JSON once, because three events hold them
_FUNCTION: dict[str, Any] = {"type": "function", "name": "", "description": None, "parameters": None, "strict": None}
_SCHEMA: dict[str, Any] = {"type": "json_schema", "name": "", "description": None, "schema": {}, "strict": None}


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one request, as its answer shows them."""

    response_id: str
    created_at: int  # seconds since 1970
    model: str
    echo: dict[str, Any]  # the request's settings
    short: dict[str, Any]  # the same settings, with long values already written as JSON
    summary: bool = False  # reasoning is sent as a summary
    sealed: bool = False  # reasoning is also sent in `encrypted_content`

    def response(
        self,
        status: str,
        output: list[dict[str, Any]],
        *,
        error: dict[str, str] | None = None,
        incomplete: str | None = None,
        usage: dict[str, Any] | None = None,
        completed_at: int | None = None,
        written: bool = False,
    ) -> dict[str, Any]:
        """Return the response object. `incomplete` is the reason why its answer was cut. `completed_at` is in seconds
        since 1970. `written`: the object is only for orjson, so long values may already be JSON."""
        return {
            "id": self.response_id,
            "object": "response",
            "created_at": self.created_at,
            "completed_at": completed_at,
            "status": status,
            "background": False,
            "error": error,
            "incomplete_details": None if incomplete is None else {"reason": incomplete},
            "model": self.model,
            "output": output,
            "usage": usage,
            **(self.short if written else self.echo),
        }


def settings(body: dict[str, Any], response_id: str, now: int, *, store: bool, summary: bool, sealed: bool) -> Settings:
    """Read the settings of a checked request. Raises BadRequest if one of them is nested too deeply to be written."""
    echo = {name: body[name] if body.get(name) is not None else value for name, value in _DEFAULTS.items()}
    echo["tools"] = [_tool(it) for it in echo["tools"]]
    echo["text"] = _text(body.get("text") or {})
    reasoning = body.get("reasoning") or {}
    echo["reasoning"] = {
        "effort": reasoning.get("effort"),
        "summary": reasoning.get("summary") or reasoning.get("generate_summary"),
    }
    echo |= {"store": store, "service_tier": "default"}
    short = echo | {name: orjson.Fragment(_written(echo[name], name)) for name in _LONG}
    _written(echo, "tool_choice")
    return Settings(response_id, now, body["model"], echo, short, summary, sealed)


def usage_of(usage: Any) -> dict[str, Any] | None:
    """Return chat's `usage` in this API's form; None if the engine counted nothing."""
    if not isinstance(usage, dict):
        return None
    read, made = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
    cached = _count(_inside(usage, "prompt_tokens_details").get("cached_tokens"))
    thought = _count(_inside(usage, "completion_tokens_details").get("reasoning_tokens"))
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": made,
        "output_tokens_details": {"reasoning_tokens": thought},
        "total_tokens": read + made,
    }


def input_tokens(count: int) -> dict[str, Any]:
    """Return the answer of POST /v1/responses/input_tokens. `count` is the number of the prompt's tokens."""
    return {"object": "response.input_tokens", "input_tokens": count}


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    return _FUNCTION | tool if tool["type"] == "function" else tool


def _text(text: dict[str, Any]) -> dict[str, Any]:
    form = text.get("format") or {"type": "text"}
    form = _SCHEMA | form if form["type"] == "json_schema" else form
    verbosity = text.get("verbosity")
    return {"format": form} if verbosity is None else {"format": form, "verbosity": verbosity}


def _written(value: Any, where: str) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError:
        raise BadRequest(f"'{where}' is nested too deeply.", param=where) from None


def _inside(usage: dict[str, Any], name: str) -> dict[str, Any]:
    value = usage.get(name)
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> int:
    return value if type(value) is int and value >= 0 else 0
