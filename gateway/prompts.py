"""Prompts: text of the operator's that stands before whatever a key asks, or before whatever a model is asked.

A prompt is a template in Jinja2's sandbox. What a caller sends is never a template, and can't put anything before the
prompt or in its place: one system message stands first, ours, and nobody else's words have that role.
"""

import datetime as dt
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, meta
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gateway.errors import BadRequest, PromptFailed
from gateway.exchange import Kind
from gateway.keys import Key

MAX_LENGTH = 64 * 1024  # characters of a template, and of what it comes to
# What a template may use. `date` is today's in UTC, as 2026-11-24; a label that a key hasn't is empty.
VARIABLES = ("key_name", "owner", "labels", "model", "date")


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja2's, in which nothing can be multiplied: '"x" * 10**9' would take a gigabyte."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        del context, left, right
        raise SecurityError(f"'{operator}' can't be used here")


_ENGINE = _Sandbox(undefined=StrictUndefined)

# The roles that OpenAI's API knows. Chat templates write any other one down as it is, control tokens and all.
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_OURS = frozenset({"system", "developer"})

# How models' own chat templates mark who speaks: in a text, engines read these as control tokens and not as letters.
# ChatML and Llama 3 <|…|>, DeepSeek the same with wide bars, Llama 2, Mistral [INST], <<SYS>>, Gemma <start_of_turn>.
_CONTROL = re.compile(
    r"<[|\uff5c][^|\uff5c<>]{1,40}[|\uff5c]>|<</?SYS>>|\[/?(?:INST|SYSTEM_PROMPT)\]|<(?:start|end)_of_turn>"
)

# What would change the chat template's own text.
_FIELDS = ("chat_template_kwargs", "documents", "add_generation_prompt", "continue_final_message", "add_special_tokens")


class TemplateRefusedError(ValueError):
    """A template can't be used. The message says where and why."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One version of a named template."""

    name: str
    version: int
    template: str

    @property
    def label(self) -> str:
        return f"{self.name}@{self.version}"


class _Labels(dict[str, str]):
    def __missing__(self, _: str) -> str:
        return ""


class Prompts:
    """Which prompts hold for whom: by key id, and by a model's name here."""

    def __init__(
        self, by_key: Mapping[str, Prompt] | None = None, by_model: Mapping[str, Prompt] | None = None
    ) -> None:
        self.take(by_key or {}, by_model or {})

    def take(self, by_key: Mapping[str, Prompt], by_model: Mapping[str, Prompt]) -> None:
        """These hold from now on. Any thread may say so."""
        self._held = by_key, by_model

    def of(self, key: Key, model: str) -> list[Prompt]:
        """Those that hold, in the order they are written: the model's, then the key's."""
        by_key, by_model = self._held
        found = (by_model.get(model), by_key.get(key.id))
        return [prompt for prompt in found if prompt is not None]

    def apply(self, key: Key, model: str, kind: Kind, body: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
        """The body as the engine shall see it, and the names of the prompts in it for the log (None: it is as it was).

        Raises BadRequest for what could undo a prompt, and PromptFailed where one can't be rendered.
        """
        prompts = self.of(key, model) if kind != "embedding" else []
        if not prompts:
            return body, None
        text = "\n\n".join(render(prompt, key, model) for prompt in prompts)
        _refuse_escapes(body)
        changed = _before_texts(text, body) if kind == "completion" else _before_messages(text, body)
        return changed, ",".join(prompt.label for prompt in prompts)


def check(template: str) -> None:
    """Raises TemplateRefusedError unless this can be a prompt's template."""
    if not template.strip():
        raise TemplateRefusedError("The template is empty.")
    if len(template) > MAX_LENGTH:
        raise TemplateRefusedError(f"The template is longer than {MAX_LENGTH} characters.")
    try:
        unknown = meta.find_undeclared_variables(_ENGINE.parse(template)) - set(VARIABLES)
    except TemplateSyntaxError as exc:
        raise TemplateRefusedError(f"Line {exc.lineno}: {exc.message}") from None
    if unknown:
        raise TemplateRefusedError(f"There is no variable '{min(unknown)}'. There is: {', '.join(VARIABLES)}.")
    try:
        render(Prompt("new", 1, template), Key("id", name="name", owner="owner"), "model")
    except PromptFailed as exc:
        raise TemplateRefusedError(f"It can't be rendered: {exc.__cause__ or exc}") from None


def render(prompt: Prompt, key: Key, model: str) -> str:
    """What a template comes to for a key. Raises PromptFailed."""
    today = dt.datetime.now(dt.UTC).date().isoformat()
    labels = _Labels(key.labels)
    values = {"key_name": key.name, "owner": key.owner, "labels": labels, "model": model, "date": today}
    try:
        text: str = _compiled(prompt.template).render(values)
    except (TemplateError, SecurityError, ArithmeticError, LookupError, TypeError, ValueError) as exc:
        raise PromptFailed(f"The prompt '{prompt.label}' of this gateway can't be rendered for this key.") from exc
    if len(text) > MAX_LENGTH:
        raise PromptFailed(f"The prompt '{prompt.label}' of this gateway comes to more than {MAX_LENGTH} characters.")
    return text


@functools.lru_cache(maxsize=256)
def _compiled(template: str) -> Any:
    return _ENGINE.from_string(template)


def _refuse_escapes(body: dict[str, Any]) -> None:
    """What is said by whom is decided by roles alone, and those are of a closed set."""
    for name in _FIELDS:
        if name in body:
            raise BadRequest(f"'{name}' can't be set here: this key or model has a prompt of its own.", param=name)
    for index, message in enumerate(body.get("messages") or ()):
        if message["role"] not in _ROLES:
            where = f"messages[{index}].role"
            raise BadRequest(f"'{where}' must be one of {', '.join(sorted(_ROLES))}.", param=where)
    for name in ("messages", "prompt", "tools", "functions", "response_format"):
        if name in body and (found := _CONTROL.search(_dumped(body[name]))):
            raise BadRequest(
                f"'{name}' holds '{found[0]}', which engines take for the mark of another speaker. "
                "It can't be said here: this key or model has a prompt of its own.",
                param=name,
            )


def _dumped(value: Any) -> str:
    try:
        return orjson.dumps(value).decode()
    except TypeError:
        raise BadRequest("The body is nested too deeply.") from None


def _before_messages(text: str, body: dict[str, Any]) -> dict[str, Any]:
    """Ours is the one system message. What the caller gave that role is said by the user, in its place."""
    theirs = [it | {"role": "user"} if it["role"] in _OURS else it for it in body["messages"]]
    return body | {"messages": [{"role": "system", "content": text}, *theirs]}


def _before_texts(text: str, body: dict[str, Any]) -> dict[str, Any]:
    prompt = body["prompt"]
    if isinstance(prompt, str):
        return body | {"prompt": f"{text}\n\n{prompt}"}
    if not _all_text(prompt):
        raise BadRequest("'prompt' must be text: this key or model has a prompt of its own.", param="prompt")
    return body | {"prompt": [f"{text}\n\n{it}" for it in prompt]}


def _all_text(prompts: Sequence[Any]) -> bool:
    return all(isinstance(it, str) for it in prompts)
