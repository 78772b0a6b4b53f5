"""Prompts: put the operator's text before every request of a key or to a model.

A prompt is a template (gateway.prompts.templates). A caller's text is never a template. It cannot come before
the prompt or replace it. The prompt is the first and only system message.
"""

import datetime as dt
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.endpoints import ENDPOINTS, Kind
from gateway.errors import BadRequest, PromptFailed
from gateway.keys.known import Key
from gateway.prompts import templates
from gateway.prompts.control_tokens import find_control_token
from gateway.upstream.parameters import SAMPLING, TABLES, asks_for_nothing

# The variables of a template. `date` is today's date in UTC, such as 2026-11-24. A label that a key does not have is
# empty.
VARIABLES = ("key_name", "owner", "labels", "model", "date")


# The roles of OpenAI's API. Chat templates would write any other role as it is, with the control tokens in it.
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_OURS = frozenset({"system", "developer"})

# The efforts that a caller may name. Some templates write the effort into the system message.
_EFFORTS = frozenset({"none", "minimal", "low", "medium", "high", "xhigh", "ultra", "max"})


class TemplateRefusedError(ValueError):
    """Say where and why a template cannot be used."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One version of a named template."""

    name: str
    version: int
    template: str | None  # None: it is missing in the store

    @property
    def label(self) -> str:
        return f"{self.name}@{self.version}"


class _Labels(dict[str, str]):
    def __missing__(self, _: str) -> str:
        return ""


class Prompts:
    """Find which prompt applies, by key id and by the model's name in the gateway."""

    def __init__(
        self, by_key: Mapping[str, Prompt] | None = None, by_model: Mapping[str, Prompt] | None = None
    ) -> None:
        self.take(by_key or {}, by_model or {})

    def take(self, by_key: Mapping[str, Prompt], by_model: Mapping[str, Prompt]) -> None:
        """Replace the prompts that apply. Any thread may call this."""
        for template in {it.template for it in (*by_key.values(), *by_model.values())}:
            if template is not None:
                templates.prepare(template)
        self._held = by_key, by_model

    def of(self, key: Key, called: Sequence[str]) -> list[Prompt]:
        """Return the prompts that apply, in the order in which they are written: the model's, by any of its names, then
        the key's."""
        by_key, by_model = self._held
        found = (*(by_model.get(name) for name in called), by_key.get(key.id))
        return list(dict.fromkeys(prompt for prompt in found if prompt is not None))

    def apply(
        self, key: Key, model: str, kind: Kind, body: dict[str, Any], called: Sequence[str] = ()
    ) -> tuple[dict[str, Any], str | None]:
        """Return the body as the engine gets it, and the names of its prompts for the log (None: no prompt applies).
        `called` are all names of the model, and of a split that chose it.

        Raises BadRequest for a field or text that could undo a prompt, and PromptFailed if a prompt cannot be rendered.
        """
        endpoint = ENDPOINTS[kind]
        prompts = self.of(key, called or (model,)) if endpoint.prompts else []
        if not prompts:
            return body, None
        text = "\n\n".join(render(prompt, key, model) for prompt in prompts)
        _refuse_escapes(kind, body)
        changed = _before_messages(text, body) if endpoint.chats else _before_texts(text, body, endpoint.content)
        return changed, ",".join(prompt.label for prompt in prompts)


def check(template: str) -> None:
    """Check that a text can be a prompt's template. Raises TemplateRefusedError."""
    try:
        templates.check(template, VARIABLES)
        render(Prompt("new", 1, template), Key("id", name="name", owner="owner"), "model")
    except templates.RefusedError as exc:
        raise TemplateRefusedError(str(exc)) from None
    except PromptFailed as exc:
        raise TemplateRefusedError(f"The template cannot be rendered: {exc.__cause__ or exc}") from None


def render(prompt: Prompt, key: Key, model: str) -> str:
    """Return the text of a prompt for a key. Raises PromptFailed."""
    if prompt.template is None:
        raise PromptFailed(
            f"The prompt '{prompt.label}' is missing in this gateway's store. Ask the gateway's operator."
        )
    today = dt.datetime.now(dt.UTC).date().isoformat()
    found = _rendered(prompt.template, key.name, key.owner, tuple(key.labels.items()), model, today)
    if isinstance(found, templates.FailedError):
        raise PromptFailed(
            f"This gateway's prompt '{prompt.label}' cannot be rendered for this key. Ask the gateway's operator."
        ) from found
    return found


@functools.lru_cache(maxsize=256)
def _rendered(
    template: str, name: str, owner: str, labels: tuple[tuple[str, str], ...], model: str, date: str
) -> str | templates.FailedError:
    """Render a template. A failure is cached too, so that a caller cannot make the gateway repeat the steps with each
    request."""
    values = {"key_name": name, "owner": owner, "labels": _Labels(labels), "model": model, "date": date}
    try:
        return templates.render(template, values)
    except templates.FailedError as exc:
        return exc.with_traceback(None)


def _refuse_escapes(kind: Kind, body: dict[str, Any]) -> None:
    """Refuse fields and texts that could cut a prompt, reveal it, or replace it.

    Only the role says who speaks, and only OpenAI's roles pass. Only fields pass that are known to do none of the
    above.
    """
    for name in body.keys() - _HARMLESS[kind]:
        if not asks_for_nothing(name, body[name]):
            raise _cant_be_set(name)
    for name in ("suffix", "echo"):
        if name in body and not asks_for_nothing(name, body[name]):
            raise _cant_be_set(name)
    if (effort := body.get("reasoning_effort")) is not None and not (isinstance(effort, str) and effort in _EFFORTS):
        raise BadRequest(f"'reasoning_effort' must be one of {', '.join(sorted(_EFFORTS))}.", param="reasoning_effort")
    for index, message in enumerate(body.get("messages") or ()):
        if message["role"] not in _ROLES:
            where = f"messages[{index}].role"
            raise BadRequest(f"'{where}' must be one of {', '.join(sorted(_ROLES))}.", param=where)
    if found := find_control_token(body):
        raise _speaks_for_another(*found)


_HARMLESS = {kind: frozenset(table) | SAMPLING.keys() for kind, table in TABLES.items()}


def _cant_be_set(name: str) -> BadRequest:
    return BadRequest(
        f"'{name[:64]}' cannot be set here. This key or model has a server-side prompt, and only fields that cannot "
        "cut, reveal or replace that prompt are accepted.",
        param=name[:64],
    )


def _speaks_for_another(field: str, token: str) -> BadRequest:
    """Return the error for a text that contains a control token."""
    return BadRequest(
        f"'{field}' contains '{token}', which an engine would read as the start of another speaker's message. "
        "Remove it: it is refused because this key or model has a server-side prompt.",
        param=field,
    )


def _before_messages(text: str, body: dict[str, Any]) -> dict[str, Any]:
    """Make the prompt the only system message. The caller's system messages become user messages, in their places."""
    theirs = [it | {"role": "user"} if it["role"] in _OURS else it for it in body["messages"]]
    return body | {"messages": [{"role": "system", "content": text}, *theirs]}


def _before_texts(text: str, body: dict[str, Any], field: str) -> dict[str, Any]:
    prompt = body[field]
    if isinstance(prompt, str):
        return body | {field: f"{text}\n\n{prompt}"}
    if not _all_text(prompt):
        raise BadRequest(f"'{field}' must be text, because this key or model has a server-side prompt.", param=field)
    return body | {field: [f"{text}\n\n{it}" for it in prompt]}


def _all_text(prompts: Sequence[Any]) -> bool:
    return all(isinstance(it, str) for it in prompts)
