"""Tool streams: scripts of a fake engine whose answer calls a tool."""

from typing import Any

from tests.support.faces import END, script

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def calls(*pieces: str) -> str:
    """A stream that calls the tool, with its arguments in these pieces."""
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}}
    told = [delta({"tool_calls": [call]})]
    told += [delta({"tool_calls": [{"index": 0, "function": {"arguments": it}}]}) for it in pieces]
    return script(["role"], *told, *[["finish", "tool_calls"], *END[1:]])


def calls_at_0() -> list[list[Any]]:
    """The steps of a stream with two calls of the tool, both with the index 0."""
    told = []
    for city in ("Oslo", "Rome"):
        function = {"name": "weather", "arguments": '{"city":'}
        told.append(delta({"tool_calls": [{"index": 0, "id": city, "type": "function", "function": function}]}))
        told.append(delta({"tool_calls": [{"index": 0, "function": {"arguments": f'"{city}"}}'}}]}))
    return [["role"], *told, ["finish", "tool_calls"], *END[1:]]


def alternating() -> list[list[Any]]:
    """The steps of a stream with two calls of the tool whose pieces alternate, with text between them."""
    told = []
    for at in range(3):
        for index, city in enumerate(("Oslo", "Rome")):
            function = {"arguments": ("", '{"city":', f'"{city}"}}')[at]} | ({} if at else {"name": "weather"})
            told.append(delta({"tool_calls": [{"index": index, "function": function} | ({} if at else {"id": city})]}))
        told.append(delta({"content": "Hm. "}))
    return [["role"], *told, ["finish", "tool_calls"], *END[1:]]


def delta(fields: dict[str, Any]) -> list[Any]:
    return ["event", {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}]
