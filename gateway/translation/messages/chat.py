"""Chat: read the parts of a chat answer with checks, and translate its end: the reason, the usage, the arguments.

Engines may send wrong types. A part that cannot be read is an EngineError, and the client gets an error.
"""

import re
from typing import Any

import orjson

from gateway.errors import EngineError
from gateway.exchange import Usage

UNREADABLE = "The engine's answer cannot be read."
# The form in which Claude Code 2.1.332 itself writes arguments that are not JSON, and reads them in its history.
UNPARSED = "__unparsedToolInput"

_LONG_NUMBER = re.compile(r"\d{19}")  # a number that may have more than 64 bits


def choice_of(choices: Any) -> dict[str, Any]:
    """Return the one choice that was asked for. Raises EngineError if there is none."""
    if type(choices) is not list or not choices or type(choice := choices[0]) is not dict:
        raise EngineError(UNREADABLE)
    return choice


def text_of(value: Any) -> str:
    """Return a text, empty for null. Raises EngineError for anything else."""
    if value is None or type(value) is str:
        return value or ""
    raise EngineError(UNREADABLE)


def calls_of(value: Any) -> list[dict[str, Any]]:
    """Return a list of calls, or of pieces of calls, empty for null. Raises EngineError for anything else."""
    if value is None:
        return []
    if type(value) is not list or any(type(it) is not dict for it in value):
        raise EngineError(UNREADABLE)
    return value


def function_of(call: dict[str, Any]) -> dict[str, Any]:
    """Return the `function` of a call. Raises EngineError if it is not an object."""
    function = call.get("function")
    if function is None or type(function) is dict:
        return function or {}
    raise EngineError(UNREADABLE)


def arguments_of(told: str) -> dict[str, Any] | orjson.Fragment:
    """Return the arguments of a call. They stay as the engine wrote them if they have a number that orjson would round.

    A text that is not an object becomes `{UNPARSED: …}`. Usually it belongs to an answer that its limit cut.
    """
    try:
        read = orjson.loads(told or "{}")
    except orjson.JSONDecodeError:
        read = None
    if type(read) is not dict:
        return {UNPARSED: {"raw": told, "len": len(told)}}
    return orjson.Fragment(told) if _LONG_NUMBER.search(told) else read


def reason_of(
    choice: dict[str, Any],
    usage: Usage | None,
    *,
    called: bool,
    refused: bool,
    max_tokens: int | None,
    stops: tuple[str, ...],
) -> tuple[str, str | None]:
    """Return the stop_reason, and the stop sequence if the engine names it (vLLM does).

    If an answer ends by its length before its limit `max_tokens`, it has reached the end of the context. Only a call
    makes a "tool_use": with a `tool_choice` that names a function, OpenAI's own finish_reason is "stop", and vLLM says
    "tool_calls" of some answers without a call.
    """
    finish = choice.get("finish_reason")
    if finish == "length":
        short = usage is not None and max_tokens is not None and 0 < usage.tokens_out < max_tokens
        return ("model_context_window_exceeded" if short else "max_tokens"), None
    if refused:
        return "refusal", None
    if called:
        return "tool_use", None
    sequence = choice.get("stop_reason")
    if finish == "stop" and type(sequence) is str and sequence in stops:
        return "stop_sequence", sequence
    return ("refusal" if finish == "content_filter" else "end_turn"), None


def usage_of(usage: Usage | None, told: Any) -> dict[str, Any]:
    """Return Anthropic's usage for chat's usage `told`. `input_tokens` are those that did not come from the cache. All
    are 0 if the engine reported none."""
    found = {"input_tokens": 0, "output_tokens": 0, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
    if usage is None:
        return found
    cached = min(usage.cached, usage.tokens_in)
    found |= {"input_tokens": usage.tokens_in - cached, "output_tokens": usage.tokens_out}
    found["cache_read_input_tokens"] = cached
    details = told.get("completion_tokens_details")
    thought = details.get("reasoning_tokens") if type(details) is dict else None
    return (
        found | {"output_tokens_details": {"thinking_tokens": thought}}
        if type(thought) is int and thought > 0
        else found
    )
