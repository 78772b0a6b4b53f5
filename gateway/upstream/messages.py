"""Messages: write a chat's messages in the form that an engine takes. Each engine's file in gateway.dialects says which
roles, parts and fields the engine takes. docs/parameters.md shows the tables, and a test compares them.

A part that an engine would silently drop or change is translated, if that loses nothing.
"""

from dataclasses import dataclass
from typing import Any

from gateway.dialects import DIALECTS
from gateway.dialects.dialect import Dialect, PartUse, ReasoningUse, RoleUse
from gateway.errors import BadRequest
from gateway.translation.contents import merged

# Each row has a column for each engine. The tables do not say whether a model can see or hear.
ROLES: dict[str, tuple[RoleUse, ...]] = {
    role: tuple(it.roles[role] for it in DIALECTS.values()) for role in next(iter(DIALECTS.values())).roles
}
PARTS: dict[str, tuple[PartUse, ...]] = {
    part: tuple(it.parts[part] for it in DIALECTS.values()) for part in next(iter(DIALECTS.values())).parts
}
REASONING: dict[str, tuple[ReasoningUse, ...]] = {
    name: tuple(it.reasoning[name] for it in DIALECTS.values()) for name in next(iter(DIALECTS.values())).reasoning
}


@dataclass(frozen=True, slots=True)
class _Ways:
    """How an engine takes messages."""

    roles: dict[str, str]  # roles that get another name
    plain: frozenset[str]  # roles that are taken as they are
    texts: frozenset[str]  # parts that become text
    parts: frozenset[str]  # parts that are taken as they are
    reasoning: dict[str, str]  # fields with reasoning that get another name
    picky: bool  # refuses contents without text, and makes a message of each text part


def _ways(dialect: Dialect) -> _Ways:
    return _Ways(
        roles={role: use.removeprefix("as ") for role, use in dialect.roles.items() if use.startswith("as ")},
        plain=frozenset(role for role, use in dialect.roles.items() if use == "taken"),
        texts=frozenset(part for part, use in dialect.parts.items() if use == "as text"),
        parts=frozenset(part for part, use in dialect.parts.items() if use == "taken"),
        reasoning={name: use.removeprefix("as ") for name, use in dialect.reasoning.items() if use.startswith("as ")},
        picky=dialect.picky_contents,
    )


_WAYS = {name: _ways(dialect) for name, dialect in DIALECTS.items()}


def read(engine: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages in the form that this engine takes. Raises BadRequest that names a part for which there is
    none."""
    ways = _WAYS[engine]
    if not ways.roles and not ways.texts and not ways.reasoning:
        return messages
    return [
        # Most messages are plain text of a known role, and need no change.
        it
        if type(it.get("content")) is str
        and it["role"] in ways.plain
        and "tool_calls" not in it
        and ways.reasoning.keys().isdisjoint(it)
        else _message(it, ways, f"messages[{index}]")
        for index, it in enumerate(messages)
    ]


def renamed(engine: str, messages: list[dict[str, Any]]) -> tuple[str, ...]:
    """Return the roles that this engine gets under another name, such as `developer=system`, each once."""
    names = _WAYS[engine].roles
    if not names:
        return ()
    return tuple(dict.fromkeys(f"{role}={names[role]}" for it in messages if (role := it["role"].lower()) in names))


def _message(message: dict[str, Any], ways: _Ways, where: str) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if role := ways.roles.get(message["role"].lower()):
        changes["role"] = role
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, list):
        content = _content(content, ways, f"{where}.content")
        changes["content"] = content
    if ways.picky:
        if content == [] or (content is None and not calls):
            changes["content"] = ""
        if isinstance(calls, list) and any(_lacks_arguments(call) for call in calls):
            changes["tool_calls"] = [_with_arguments(call) if _lacks_arguments(call) else call for call in calls]
    for name in ways.reasoning.keys() & message.keys():
        if isinstance(message[name], str):
            changes[ways.reasoning[name]] = message.get(ways.reasoning[name]) or message[name]
            message = {key: it for key, it in message.items() if key != name}
    return message | changes if changes else message


def _content(parts: list[Any], ways: _Ways, where: str) -> list[Any]:
    made: list[Any] = []
    for index, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if type(kind) is not str:
            kind = None
        if kind in ways.texts:
            if not isinstance(part.get(kind), str):
                param = f"{where}[{index}].{kind}"
                raise BadRequest(f"'{param}' must be a string.", param=param)
            part, kind = {"type": "text", "text": part[kind]}, "text"  # noqa: PLW2901
        if ways.picky and kind not in ways.parts:
            param = f"{where}[{index}].type"
            raise BadRequest(
                f"'{param}' must be one of {', '.join(sorted(ways.parts))}: the engine behind this model accepts no "
                "other parts.",
                param=param,
            )
        made.append(part)
    return merged(made, "\n") if ways.picky else made


def _lacks_arguments(call: Any) -> bool:
    return isinstance(call, dict) and isinstance(it := call.get("function"), dict) and it.get("arguments") in ("", None)


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    return call | {"function": call["function"] | {"arguments": "{}"}}
