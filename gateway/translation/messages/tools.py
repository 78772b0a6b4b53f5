"""Tools: translate the functions that a request offers, and the choice among them."""

from typing import Any

from gateway.errors import BadRequest
from gateway.translation.messages.fields import Notes, a_flag, a_list, an_object, name, one_of, text

_CHOICES = ("auto", "any", "tool", "none")
_IN_CHOICE = frozenset({"name", "disable_parallel_tool_use"})
_IN_TOOL = frozenset(
    {"name", "description", "input_schema", "strict", "defer_loading", "allowed_callers", "eager_input_streaming"}
)
_SEARCH = "tool_search_tool_"  # the names of Anthropic's own tools that find deferred ones


def read_tools(value: Any, choice: Any, used: tuple[str, ...], notes: Notes) -> dict[str, Any]:
    """Translate `tools` and `tool_choice` into chat's fields. Without tools there are none.

    A deferred tool is offered if a `tool_reference` has loaded it, or if it was called or is chosen. It stands after
    all others, in the order of `used`, so that the list grows at its end. If Anthropic's own search was to find the
    deferred tools, all of them are offered. Tools that run at Anthropic are left out and noted. Raises BadRequest by
    the caller's path.
    """
    offered: dict[str, dict[str, Any]] = {}
    deferred: dict[str, dict[str, Any]] = {}
    searched = False
    for index, it in enumerate(a_list(value, "tools") if value is not None else ()):
        where = f"tools[{index}]"
        tool = an_object(it, where)
        if (kind := tool.get("type")) not in (None, "custom"):
            searched = searched or text(kind, f"{where}.type").startswith(_SEARCH)
            notes.ignore("tools", where)
            continue
        read = _tool(tool, where, notes)
        called = read["function"]["name"]
        if called in offered or called in deferred:
            raise BadRequest(
                f"'{where}.name' is the name of an earlier tool too. Give each tool its own name.",
                param=f"{where}.name",
            )
        callers = tool.get("allowed_callers")
        if callers is not None and "direct" not in a_list(callers, f"{where}.allowed_callers"):
            notes.ignore("tools", where)  # only code that runs at Anthropic may call it
            continue
        (deferred if a_flag(tool.get("defer_loading"), f"{where}.defer_loading") else offered)[called] = read
    chosen, fields = _choice(choice, notes)
    loaded = deferred if searched else [it for it in (*used, *chosen) if it in deferred]
    offered |= {called: deferred[called] for called in loaded}
    return _fitted(offered, chosen, fields)


def _tool(tool: dict[str, Any], where: str, notes: Notes) -> dict[str, Any]:
    notes.unknown(tool, _IN_TOOL, "tools", where)
    function: dict[str, Any] = {"name": name(tool.get("name"), f"{where}.name")}
    if tool.get("description") is not None:
        function["description"] = text(tool["description"], f"{where}.description")
    function["parameters"] = an_object(tool.get("input_schema"), f"{where}.input_schema")
    if a_flag(tool.get("strict"), f"{where}.strict"):
        function["strict"] = True
    return {"type": "function", "function": function}


def _choice(value: Any, notes: Notes) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the name of the one tool that must be called, if any, and chat's fields."""
    if value is None:
        return (), {}
    choice = an_object(value, "tool_choice")
    notes.unknown(choice, _IN_CHOICE, "tool_choice", "tool_choice")
    kind = one_of(choice.get("type"), _CHOICES, "tool_choice.type")
    fields: dict[str, Any] = {"tool_choice": "required" if kind == "any" else kind}
    chosen: tuple[str, ...] = ()
    if kind == "tool":
        chosen = (name(choice.get("name"), "tool_choice.name"),)
        fields["tool_choice"] = {"type": "function", "function": {"name": chosen[0]}}
    if a_flag(choice.get("disable_parallel_tool_use"), "tool_choice.disable_parallel_tool_use"):
        fields["parallel_tool_calls"] = False
    return chosen, fields


def _fitted(offered: dict[str, dict[str, Any]], chosen: tuple[str, ...], fields: dict[str, Any]) -> dict[str, Any]:
    """Return tools and choice together. A choice without tools is refused if it demands a call, otherwise left out."""
    if chosen and chosen[0] not in offered:
        param = "tool_choice.name"
        raise BadRequest(f"'{param}' is not one of the tools that this gateway can offer to a model.", param=param)
    if offered:
        return {"tools": list(offered.values())} | fields
    if fields.get("tool_choice") == "required":
        raise BadRequest(
            "'tool_choice' demands a tool call, but 'tools' has no tool that can be offered to a model.",
            param="tool_choice",
        )
    return {}
