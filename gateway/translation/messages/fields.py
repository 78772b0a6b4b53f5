"""Fields: decide what happens to each field of a Messages request, and check types for every part of the reader.

A field is translated, passed to the engine, accepted without effect (bookkeeping), named as ignored, or refused. No
field is silently dropped: the names of ignored fields are collected in Notes, for a header of the answer.
"""

import re
from typing import Any

from gateway.errors import BadRequest

MOST_MESSAGES = 100_000  # the limit that Anthropic documents for one request
MOST_IGNORED = 32  # distinct names; a header has to hold them
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)

_TRANSLATED = """model messages system max_tokens stream stop_sequences temperature top_p top_k tools tool_choice
    thinking output_config output_format context_management speed"""
TRANSLATED = frozenset(_TRANSLATED.split())
# Accepted without effect, and not named as ignored, because no answer of a local engine depends on them.
BOOKKEEPING: dict[str, str] = {
    "metadata": "it names the end user to Anthropic; here the key does",
    "cache_control": "engines cache prefixes by themselves, and this field must not change the prompt",
    "service_tier": "there is one tier",
    "inference_geo": "inference happens where the gateway runs",
    "diagnostics": "it asks Anthropic's cache why it missed",
    "user_profile_id": "it names an account at Anthropic",
    "workspace_id": "it names an account at Anthropic",
    "billing_policy": "it names an account at Anthropic",
    "fallback_credit_token": "it names an account at Anthropic",
    "betas": "features are known by their fields, not by their names",
}
# A request that sets one of these is refused, because the answer would be different without it.
REFUSED: dict[str, str] = {
    "container": "This gateway runs no code. Leave it out.",
    "mcp_servers": "This gateway calls no MCP servers. Let the client call them, and pass their tools in 'tools'.",
    "thread": "This gateway keeps no conversations. Send the whole conversation in 'messages'.",
}
# Chat's names of fields that have another name in this API, or that have no form in its answer.
OF_CHAT: dict[str, str] = {
    "stop": "Use 'stop_sequences'.",
    "max_completion_tokens": "Use 'max_tokens'.",
    "n_predict": "Use 'max_tokens'.",
    "response_format": "Use 'output_config.format'.",
    "reasoning_effort": "Use 'output_config.effort'.",
    "parallel_tool_calls": "Use 'tool_choice.disable_parallel_tool_use'.",
    "functions": "Use 'tools'.",
    "function_call": "Use 'tool_choice'.",
    "n": "This API makes one answer per request.",
    "best_of": "This API makes one answer per request.",
    "logprobs": "This API cannot return log probabilities.",
    "top_logprobs": "This API cannot return log probabilities.",
    "modalities": "This API returns only text.",
    "audio": "This API returns only text.",
}
# The engines' own fields that steer or constrain sampling. They are passed on as in a chat completion.
_KEPT = """seed frequency_penalty presence_penalty logit_bias min_p min_tokens ignore_eos repetition_penalty
    length_penalty repeat_penalty repeat_last_n typical_p top_n_sigma xtc_probability xtc_threshold dynatemp_range
    dynatemp_exponent mirostat mirostat_tau mirostat_eta dry_multiplier dry_base dry_allowed_length dry_penalty_last_n
    dry_sequence_breakers samplers structured_outputs grammar json_schema stop_token_ids bad_words allowed_token_ids
    skip_special_tokens thinking_token_budget chat_template_kwargs"""
KEPT = frozenset(_KEPT.split())
# This API's name of each field that its requests may set in a chat completion.
NAMES: dict[str, str] = {
    "messages": "messages",
    "tools": "tools",
    "tools.function.parameters.pattern": "tools.input_schema.pattern",
    "tool_choice": "tool_choice",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    "max_completion_tokens": "max_tokens",
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "stream_options": "stream",
}
# Fields of a block, a message or a tool that have no effect.
_UNMARKED = frozenset({"type", "cache_control"})


class Notes:
    """Collect the names of fields that have no effect, each once, in the order found."""

    def __init__(self) -> None:
        self._ignored: dict[str, None] = {}

    @property
    def ignored(self) -> tuple[str, ...]:
        return tuple(self._ignored)

    def ignore(self, name: str, param: str) -> None:
        """Note a name, a path without indexes. `param` is the caller's path to it. Raises BadRequest for the first
        name beyond MOST_IGNORED."""
        if name not in self._ignored and len(self._ignored) == MOST_IGNORED:
            raise BadRequest(f"'{param}' is one of more than {MOST_IGNORED} unknown fields. Remove them.", param=param)
        self._ignored[name] = None

    def unknown(self, value: dict[str, Any], known: frozenset[str], name: str, where: str) -> None:
        """Note the fields of an object that are neither `known` nor bookkeeping. A null field asks for nothing and is
        not noted. Raises BadRequest for a name that no header can carry."""
        if known.issuperset(value):
            return
        for field in sorted(value.keys() - known - _UNMARKED):
            if value[field] is None:
                continue
            param = f"{where}.{field[:64]}" if where else field[:64]
            if not _NAME.fullmatch(field):
                raise BadRequest(f"'{param}' is not a field of this API.", param=param)
            self.ignore(f"{name}.{field}" if name else field, param)


def text(value: Any, where: str) -> str:
    """Check that a value is text. Raises BadRequest that names it."""
    if type(value) is not str:
        raise BadRequest(f"'{where}' must be text.", param=where)
    return value


def name(value: Any, where: str) -> str:
    """Check that a value is text that is not empty. Raises BadRequest that names it."""
    if not text(value, where):
        raise BadRequest(f"'{where}' is empty.", param=where)
    return str(value)


def an_object(value: Any, where: str) -> dict[str, Any]:
    """Check that a value is a JSON object. Raises BadRequest that names it."""
    if type(value) is not dict:
        raise BadRequest(f"'{where}' must be an object.", param=where)
    return value


def a_list(value: Any, where: str) -> list[Any]:
    """Check that a value is a list. Raises BadRequest that names it."""
    if type(value) is not list:
        raise BadRequest(f"'{where}' must be a list.", param=where)
    return value


def a_flag(value: Any, where: str) -> bool:
    """Check that a value is true, false or null, which is false. Raises BadRequest that names it."""
    if value is not None and type(value) is not bool:
        raise BadRequest(f"'{where}' must be true or false.", param=where)
    return value is True


def one_of(value: Any, choices: tuple[str, ...], where: str) -> str:
    """Check that a value is one of these words. Raises BadRequest that names it and them."""
    if type(value) is not str or value not in choices:
        raise BadRequest(f"'{where}' must be one of {', '.join(choices)}.", param=where)
    return value
