"""Concessions: give a translated request another form after an engine has refused it.

Clients of the translated APIs send roles and schemas that some models and engines cannot take, and their users cannot
change them. Codex sends several developer messages, and Claude Code sends system messages among the others. Many chat
templates take one system message, at the front. Some refuse two messages in a row of the user or the assistant, which
both APIs allow. An engine that cannot compile a tool's `pattern` refuses the whole request: llama.cpp until
August 2026 took none without anchors (ggml-org/llama.cpp issue 26930).
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from gateway.errors import EngineRefused, EngineUnsupported, StackError
from gateway.forced_tools import keywords
from gateway.forced_tools.schema import compiles
from gateway.translation.contents import joined
from gateway.upstream.messages import REASONING
from gateway.upstream.wishes import Unwelcome

PATTERN = "tools.function.parameters.pattern"  # the name of a dropped pattern, in terms of a chat completion
_ROLE = "messages.role"
_TURNS = "messages.turns"
_INSTRUCTIONS = frozenset({"system", "developer"})
_ABOUT_TURNS = re.compile(r"roles must alternate", re.IGNORECASE)  # in the templates of Gemma, Llama 2, Mistral
_ABOUT_SCHEMA = re.compile(r"grammar|pattern|schema|regex", re.IGNORECASE)


class Concession(NamedTuple):
    """A request in another form. `ignored` are the names of what was left out, and `roles` the roles that became
    others, such as `developer=user`. `refused` are the names and values that an engine refused, for Unwelcome."""

    fields: dict[str, Any]
    refused: tuple[tuple[str, str], ...]
    ignored: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()

    def learn(self, model: str, unwelcome: Unwelcome) -> None:
        """Remember the refusal, because the engine took this form."""
        for name, value in self.refused:
            unwelcome.learn(model, name, value)


def after(error: StackError, fields: dict[str, Any], most_repeats: int | None) -> Concession | None:
    """Return a refused request in another form; None if the refusal is about something else, or if there is no other
    form. `most_repeats` is the engine's limit of repetitions in a grammar."""
    if not isinstance(error, EngineRefused) or isinstance(error, EngineUnsupported):
        return None
    if _ABOUT_SCHEMA.search(error.message):
        there = _patterns(fields)
        return _dropped(fields, {it for it in there if not compiles(it, most_repeats)} or there)
    if error.param not in (None, "messages"):
        return None
    joined = _alternating(fields) if _ABOUT_TURNS.search(error.message) else None
    return joined or _one_system(fields)


def beforehand(model: str, fields: dict[str, Any], unwelcome: Unwelcome) -> list[Concession]:
    """Return what the engine is known to need, each step with the fields of the one before."""
    made: list[Concession] = []
    if unwelcome.has(model, _ROLE, "") and (found := _one_system(fields)):
        made.append(found)
        fields = found.fields
    if unwelcome.has(model, _TURNS, "") and (found := _alternating(fields)):
        made.append(found)
        fields = found.fields
    if unwelcome.has(model, PATTERN, ""):
        known = {it for it in _patterns(fields) if unwelcome.has(model, PATTERN, it)}
        if known and (found := _dropped(fields, known)):
            made.append(found)
    return made


def _patterns(fields: dict[str, Any]) -> set[str]:
    return {it for function in _functions(fields) for it in keywords.patterns(function.get("parameters"))}


def _functions(fields: dict[str, Any]) -> Iterable[dict[str, Any]]:
    return (tool["function"] for tool in fields.get("tools") or ())


def _dropped(fields: dict[str, Any], patterns: set[str]) -> Concession | None:
    """Return the request with these patterns left out of its tools."""
    if not patterns:
        return None
    tools = [
        tool | {"function": it | {"parameters": keywords.without(it["parameters"], _among(patterns))}}
        if "parameters" in (it := tool["function"])
        else tool
        for tool in fields["tools"]
    ]
    refused = ((PATTERN, ""), *((PATTERN, it) for it in sorted(patterns)))
    return Concession(fields | {"tools": tools}, refused, ignored=(PATTERN,))


def _among(patterns: set[str]) -> Any:
    return lambda name, value: name == "pattern" and isinstance(value, str) and value in patterns


def _one_system(fields: dict[str, Any]) -> Concession | None:
    """Return the request with at most one system message, at the front, and no developer message.

    The instructions at the front become one. Each later one becomes the user's, in its place, because a prefix of the
    conversation must stay a prefix. It is joined to a user's message beside it, because many templates refuse two of
    them in a row. None: the messages have that form already.
    """
    front: list[dict[str, Any]] = []
    made: list[list[dict[str, Any]]] = []  # the messages of which each one is made
    changes: dict[str, None] = {}
    joins = False  # the last one holds an instruction
    for message in fields["messages"]:
        role = message["role"]
        instructs = role in _INSTRUCTIONS
        if instructs and not made:
            front.append(message)
            if role != "system":
                changes[f"{role}=system"] = None
            continue
        if instructs:
            changes[f"{role}=user"] = None
            message = message | {"role": "user"}  # noqa: PLW2901
        if message["role"] == "user" and made and made[-1][0]["role"] == "user" and (instructs or joins):
            made[-1].append(message)
            joins = True
        else:
            made.append([message])
            joins = instructs
    if not changes and len(front) < 2:
        return None
    first = [_joined(front, "system")] if front else []
    others = [it[0] if len(it) == 1 else _joined(it, "user") for it in made]
    return Concession(fields | {"messages": [*first, *others]}, ((_ROLE, ""),), roles=tuple(changes))


def _alternating(fields: dict[str, Any]) -> Concession | None:
    """Return the request with neighbours of the user's, or of the assistant's, joined. A call stays before its output.
    None: there are no such neighbours."""
    made: list[list[dict[str, Any]]] = []  # the messages of which each one is made
    for message in fields["messages"]:
        last = made[-1][-1] if made else {}
        if (
            message["role"] in ("user", "assistant")
            and message["role"] == last.get("role")
            and "tool_calls" not in last
        ):
            made[-1].append(message)
        else:
            made.append([message])
    if len(made) == len(fields["messages"]):
        return None
    messages = [it[0] if len(it) == 1 else _turn(it) for it in made]
    return Concession(fields | {"messages": messages}, ((_TURNS, ""),))


def _turn(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """Return several messages of one role as one, with all their fields."""
    made: dict[str, Any] = {}
    for it in messages:
        made |= it
    for name in REASONING.keys() & made.keys():
        made[name] = "\n\n".join(it[name] for it in messages if name in it)
    return made | _joined(messages, made["role"])


def _joined(messages: list[dict[str, Any]], role: str) -> dict[str, Any]:
    return {"role": role, "content": joined(it["content"] for it in messages)}
