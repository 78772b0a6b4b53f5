"""Fields: the request fields of the Responses API that the gateway treats specially, and the checks of a field's type.

Each check returns the value or raises BadRequest that names the field by the caller's own path.
"""

import re
from collections.abc import Iterable
from typing import Any

from gateway.errors import BadRequest

# Accepted without effect on the answer. A local engine has nothing that these fields could steer.
BOOKKEEPING: dict[str, str] = {
    "metadata": "is only echoed in the response object",
    "user": "identifies the caller's own user",
    "safety_identifier": "identifies the caller's own user",
    "client_metadata": "identifies Codex's session and turn",
    "prompt_cache_key": "engines find a cached prefix by its content",
    "prompt_cache_retention": "engines keep a cached prefix as long as it fits",
    "prompt_cache_options": "engines find a cached prefix by its content",
    "service_tier": "the gateway has one tier",
    "max_tool_calls": "limits hosted tools only, and the gateway has none",
    "stream_options": "asks for or against padding, which the gateway never adds",
    "access_programs": "names OpenAI's own programs",
    "background_options": "has no meaning without `background`, which is refused",
}
# These would change the answer and cannot be honoured. The answer's header names them as ignored.
IGNORED: dict[str, str] = {
    "context_management": "the gateway does not compact a conversation",
    "moderation": "the gateway moderates nothing",
    "image": "no engine compresses images",
}
# These would change the answer so much that the request is refused. The text says what to do.
REFUSED: dict[str, str] = {
    "conversation": "Conversations are not kept here. Use 'previous_response_id', or send all items in 'input'.",
    "background": "Answers are not made in the background here. Leave it out, and set 'stream' for a long answer.",
    "generate": "Nothing is prepared here without an answer. Leave it out.",
    "prompt": "Prompt templates of OpenAI's platform do not exist here. Send their text in 'instructions'.",
    "messages": "It belongs to /v1/chat/completions. Use 'input'.",
    "max_tokens": "It belongs to /v1/chat/completions. Use 'max_output_tokens'.",
    "max_completion_tokens": "It belongs to /v1/chat/completions. Use 'max_output_tokens'.",
    "n_predict": "It is another name for 'max_output_tokens'. Use that.",
    "response_format": "It belongs to /v1/chat/completions. Use 'text.format'.",
    "reasoning_effort": "It belongs to /v1/chat/completions. Use 'reasoning.effort'.",
    "verbosity": "It belongs to /v1/chat/completions. Use 'text.verbosity'.",
    "logprobs": "It belongs to /v1/chat/completions. Use 'include: [\"message.output_text.logprobs\"]'.",
    "functions": "It belongs to /v1/chat/completions. Use 'tools'.",
    "function_call": "It belongs to /v1/chat/completions. Use 'tool_choice'.",
    "n": "This API makes one answer per request.",
}
# What the value of a refused field may be because it then asks for nothing. Null may stand for all.
HARMLESS: dict[str, Any] = {"background": False, "generate": True, "n": 1}
READ = frozenset(
    {"model", "input", "instructions", "stream", "max_output_tokens", "temperature", "top_p", "top_logprobs", "include"}
    | {
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "text",
        "reasoning",
        "store",
        "previous_response_id",
        "truncation",
    }
)
KNOWN = READ | BOOKKEEPING.keys() | IGNORED.keys() | REFUSED.keys()

# This API's name of each field that its requests may set in a chat completion.
NAMES: dict[str, str] = {
    "messages": "input",
    "tools": "tools",
    "tools.function.parameters.pattern": "tools.parameters.pattern",
    "tool_choice": "tool_choice",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "verbosity": "text.verbosity",
    "reasoning_effort": "reasoning.effort",
    "logprobs": "include",
    "stream_options": "stream",
}

_STRANGE = re.compile(r"[^A-Za-z0-9_.\[\]-]")
_MOST_IGNORED = 32  # names; a header has to hold them


class Ignored:
    """Collect the names of what a request asks for and does not get, each once, in the order of their appearance."""

    def __init__(self) -> None:
        self._names: dict[str, None] = {}

    def add(self, name: str) -> None:
        """Note a name. Characters that a header cannot carry become question marks."""
        if len(self._names) < _MOST_IGNORED:
            self._names[_STRANGE.sub("?", name[:64])] = None

    def unknown(self, value: dict[str, Any], known: frozenset[str], where: str) -> None:
        """Note the names in `value` that are not `known`. A null asks for nothing."""
        if not known.issuperset(value):
            for name, it in value.items():
                if name not in known and it is not None:
                    self.add(f"{where}.{name}")

    def names(self) -> tuple[str, ...]:
        """Return all names so far."""
        return tuple(self._names)


def string(value: Any, where: str) -> str:
    """Return a text, which may be empty."""
    if type(value) is str:
        return value
    raise BadRequest(f"'{where}' must be a string.", param=where)


def name(value: Any, where: str) -> str:
    """Return a text that is not empty."""
    if type(value) is str and value:
        return value
    raise BadRequest(f"'{where}' must be a string that is not empty.", param=where)


def mapping(value: Any, where: str) -> dict[str, Any]:
    """Return an object."""
    if type(value) is dict:
        return value
    raise BadRequest(f"'{where}' must be an object.", param=where)


def sequence(value: Any, where: str) -> list[Any]:
    """Return a list."""
    if type(value) is list:
        return value
    raise BadRequest(f"'{where}' must be a list.", param=where)


def boolean(value: Any, where: str) -> bool:
    """Return true or false."""
    if type(value) is bool:
        return value
    raise BadRequest(f"'{where}' must be true or false.", param=where)


def number(value: Any, where: str) -> float:
    """Return a number, whole or not."""
    if type(value) is int or type(value) is float:
        return value
    raise BadRequest(f"'{where}' must be a number.", param=where)


def whole(value: Any, where: str, least: int, most: int = 2**53) -> int:
    """Return a whole number from `least` to `most`. It may be written as 8.0."""
    if type(value) is float and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    if type(value) is int and least <= value <= most:
        return value
    limits = f"of at least {least}" if most == 2**53 else f"from {least} to {most}"
    raise BadRequest(f"'{where}' must be a whole number {limits}.", param=where)


def one_of(value: Any, where: str, words: Iterable[str]) -> str:
    """Return one of these words."""
    words = tuple(words)
    if type(value) is str and value in words:
        return value
    raise BadRequest(f"'{where}' must be one of {', '.join(words)}.", param=where)
