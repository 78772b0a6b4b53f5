"""Tools: translate a request's tools for an engine, and an engine's tool names back to the client's.

Engines know only functions. A custom tool becomes a function with one text, and each tool in a namespace becomes a
function whose name begins with the namespace's. Hosted tools (web_search and others) run on OpenAI's servers. They are
not offered to the model, and the answer's header names them, because Codex sends a web_search with every request.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from gateway.errors import BadRequest
from gateway.translation.responses.fields import Ignored, boolean, mapping, name, one_of, sequence, string

MAX_NAME = 64  # characters of a function's name: OpenAI's limit
INPUT = "input"  # the one parameter of a custom tool's function
_CUSTOM_SCHEMA = {"type": "object", "properties": {INPUT: {"type": "string"}}, "required": [INPUT]}
_FUNCTION = frozenset(
    {"type", "name", "description", "parameters", "strict"}
    # Fields for loading a tool later, or calling it from code. The gateway offers every tool at once, and only the
    # model calls it.
    | {"defer_loading", "allowed_callers"}
    | {"output_schema", "async"}  # descriptions of what the client does with a call
)
_CUSTOM = frozenset({"type", "name", "description", "format", "defer_loading", "allowed_callers", "async"})
_NAMESPACE = frozenset({"type", "name", "description", "tools"})
_CHOICES = ("auto", "none", "required")


@dataclass(frozen=True, slots=True)
class Origin:
    """The client's name of a tool."""

    name: str
    namespace: str | None = None
    custom: bool = False


@dataclass(frozen=True, slots=True)
class Toolbox:
    """The tools of one request. `offered` are chat tools, in the client's order."""

    offered: tuple[dict[str, Any], ...] = ()
    origins: dict[str, Origin] = field(default_factory=dict)  # by the engine's name
    names: dict[tuple[str | None, str], str] = field(default_factory=dict)  # the engine's names, by namespace and name

    def engine_name(self, own: str, namespace: str | None) -> str:
        """Return the engine's name of a tool. The tool may be missing in the request, because the history may call
        others."""
        return self.names.get((namespace, own)) or _flat(own, namespace)

    def origin(self, called: str) -> Origin:
        """Return the client's name of the tool that the model called. A bare name stands for the one tool of that name
        in any namespace, because small models leave the namespace out."""
        if (known := self.origins.get(called)) is not None:
            return known
        bare = [it for it in self.origins.values() if it.name == called]
        return bare[0] if len(bare) == 1 else Origin(called)

    def only(self, names: set[str]) -> "Toolbox":
        """Return a toolbox with only these tools, by the engine's names."""
        kept = tuple(tool for tool in self.offered if tool["function"]["name"] in names)
        return Toolbox(kept, {it: self.origins[it] for it in self.origins if it in names}, self.names)


def read_tools(value: Any, ignored: Ignored) -> Toolbox:
    """Read the field `tools`. Raises BadRequest that names what is wrong in it."""
    offered: list[dict[str, Any]] = []
    origins: dict[str, Origin] = {}
    names: dict[tuple[str | None, str], str] = {}
    for tool, origin, where in _each(sequence(value, "tools"), ignored):
        key = (origin.namespace, origin.name)
        if key in names:
            raise BadRequest(f"'{where}.name' is the name of two tools.", param=f"{where}.name")
        flat = _flat(origin.name, origin.namespace)
        if flat in origins:
            flat = _hashed(flat, f"{origin.namespace}\n{origin.name}")
        origins[flat] = origin
        names[key] = flat
        offered.append({"type": "function", "function": {"name": flat, **tool}})
    return Toolbox(tuple(offered), origins, names)


def _each(tools: list[Any], ignored: Ignored) -> Iterator[tuple[dict[str, Any], Origin, str]]:
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        kind = name(mapping(tool, where).get("type"), f"{where}.type")
        if kind != "namespace":
            if (read := _tool(tool, kind, None, where, ignored)) is not None:
                yield *read, where
            continue
        ignored.unknown(tool, _NAMESPACE, "tools[]")
        space = name(tool.get("name"), f"{where}.name")
        about = string(tool.get("description") or "", f"{where}.description")
        for at, inner in enumerate(sequence(tool.get("tools"), f"{where}.tools")):
            path = f"{where}.tools[{at}]"
            kind = name(mapping(inner, path).get("type"), f"{path}.type")
            if (read := _tool(inner, kind, space, path, ignored)) is not None:
                if about:  # only before the namespace's first tool
                    read[0]["description"] = f"{about}\n\n{read[0].get('description', '')}".rstrip()
                    about = ""
                yield *read, path


def _tool(
    tool: dict[str, Any], kind: str, space: str | None, where: str, ignored: Ignored
) -> tuple[dict[str, Any], Origin] | None:
    """Return a chat tool without its name, and the client's own name. None: a hosted tool."""
    if kind not in ("function", "custom"):
        ignored.add(f"tools.{kind}")
        return None
    own = name(tool.get("name"), f"{where}.name")
    made: dict[str, Any] = {}
    if (about := tool.get("description")) is not None:
        made["description"] = string(about, f"{where}.description")
    if kind == "custom":
        ignored.unknown(tool, _CUSTOM, "tools[]")
        if (rule := _format(tool.get("format"), f"{where}.format")) is not None:
            ignored.add("tools.custom.format")  # the model is told the format, but it is not enforced
            made["description"] = f"{made.get('description', '')}\n\n{rule}".lstrip()
        return made | {"parameters": _CUSTOM_SCHEMA}, Origin(own, space, custom=True)
    ignored.unknown(tool, _FUNCTION, "tools[]")
    if (schema := tool.get("parameters")) is not None:
        made["parameters"] = mapping(schema, f"{where}.parameters")
    if (strict := tool.get("strict")) is not None:
        made["strict"] = boolean(strict, f"{where}.strict")
    return made, Origin(own, space)


def _format(value: Any, where: str) -> str | None:
    """Return the text that tells the model the format of a custom tool's input."""
    if value is None:
        return None
    if one_of(mapping(value, where).get("type"), f"{where}.type", ("text", "grammar")) == "text":
        return None
    syntax = one_of(value.get("syntax"), f"{where}.syntax", ("lark", "regex"))
    definition = string(value.get("definition"), f"{where}.definition")
    return f"The input must match this {syntax} grammar:\n{definition}"


def read_choice(value: Any, tools: Toolbox) -> tuple[str | dict[str, Any] | None, Toolbox]:
    """Read the field `tool_choice`, which is not null. Return it in chat's form, and the tools that may be offered:
    `allowed_tools` leaves the others out, because no engine takes such a choice itself. None: there is no tool.

    Raises BadRequest if the choice demands a tool that is not among the request's functions.
    """
    if type(value) is str:
        return _mode(one_of(value, "tool_choice", _CHOICES), tools, "tool_choice"), tools
    kind = name(mapping(value, "tool_choice").get("type"), "tool_choice.type")
    if kind == "allowed_tools":
        mode = one_of(value.get("mode"), "tool_choice.mode", ("auto", "required"))
        listed = sequence(value.get("tools"), "tool_choice.tools")
        allowed = {it for at, tool in enumerate(listed) if (it := _allowed(tool, f"tool_choice.tools[{at}]", tools))}
        tools = tools.only(allowed)
        return _mode(mode, tools, "tool_choice.tools"), tools
    if kind not in ("function", "custom"):
        raise BadRequest(
            f"'tool_choice.type' demands the hosted tool {kind[:64]!r}, which does not exist here. Choose 'auto', "
            "'required', or one of the request's own functions.",
            param="tool_choice.type",
        )
    return {"type": "function", "function": {"name": _chosen(value, "tool_choice", tools)}}, tools


def _mode(mode: str, tools: Toolbox, where: str) -> str | None:
    if tools.offered:
        return mode
    if mode == "required":
        raise BadRequest(
            f"'{where}' demands a tool call, but the request has no tool that can be called here.", param=where
        )
    return None


def _allowed(tool: Any, where: str, tools: Toolbox) -> str | None:
    kind = name(mapping(tool, where).get("type"), f"{where}.type")
    return _chosen(tool, where, tools) if kind in ("function", "custom") else None


def _chosen(value: dict[str, Any], where: str, tools: Toolbox) -> str:
    own = name(value.get("name"), f"{where}.name")
    space = value.get("namespace")
    if space is not None:
        string(space, f"{where}.namespace")
    flat = tools.names.get((space, own))
    if flat is None and own in tools.origins:
        flat = own
    if flat is None:
        raise BadRequest(f"'{where}.name' is not the name of one of the request's tools.", param=f"{where}.name")
    return flat


def _flat(own: str, namespace: str | None) -> str:
    if namespace is None:
        return own  # as the client wrote it, because the engine decides whether it is valid
    flat = f"{namespace}__{own}"
    return flat if len(flat) <= MAX_NAME else _hashed(flat, f"{namespace}\n{own}")


def _hashed(flat: str, whole: str) -> str:
    return f"{flat[: MAX_NAME - 9]}_{hashlib.sha256(whole.encode()).hexdigest()[:8]}"
