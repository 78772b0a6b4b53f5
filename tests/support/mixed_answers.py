"""Mixed answers of a real engine that is killed: JSON, tool calls and several choices, and what each has to be."""

import json
from contextlib import suppress
from typing import Any

import httpx
import jsonschema_rs

from tests.support.processes import AUTH, events

CHAT = "/v1/chat/completions"
PET = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "kind": {"enum": ["cat", "dog"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 10}, "minItems": 1, "maxItems": 2},
        "age": {"type": "integer"},
    },
    "required": ["name", "kind", "tags", "age"],
    "additionalProperties": False,
}
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 10}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "forecast", "description": "Weather", "parameters": CITY}}]
NAMED = {"type": "function", "function": {"name": "forecast"}}
PET_SCHEMA = {"type": "json_schema", "json_schema": {"name": "pet", "schema": PET}}
ASKED: list[dict[str, Any]] = [
    {"response_format": PET_SCHEMA},
    {"tools": TOOLS, "tool_choice": NAMED},
    {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False},
    {"response_format": PET_SCHEMA, "n": 2},
    {"n": 2, "max_tokens": 24, "ignore_eos": True},
]


class MixedAnswer:
    """One answer, as far as its client has it."""

    def __init__(self, url: str, number: int) -> None:
        self.asked = ASKED[number % len(ASKED)]
        message = {"role": "user", "content": f"Tell me about pet number {number}, and the weather in Paris."}
        said = {"model": "few", "messages": [message], "stream": True, "temperature": 0, "max_tokens": 120}
        self.body, self.url, self.raw = said | self.asked, url, ""

    def run(self) -> None:
        told = suppress(httpx.RemoteProtocolError)  # of one that is cut, the text says how it ended
        with told, httpx.stream("POST", self.url + CHAT, json=self.body, headers=AUTH, timeout=250) as answer:
            for piece in answer.iter_text():
                self.raw += piece

    @property
    def at_work(self) -> bool:
        """Whether a part of it has come, and not all."""
        return self.raw.count("data: ") > 4 and "[DONE]" not in self.raw

    def check(self) -> None:
        """It is whole: every choice has one end, and what it has to be."""
        *chunks, done = events(self.raw)
        assert done == "[DONE]", self.raw
        said = [choice for chunk in chunks for choice in chunk["choices"]]
        for index in range(self.asked.get("n", 1)):
            mine = [it for it in said if it["index"] == index]
            ends = [it["finish_reason"] for it in mine if it["finish_reason"]]
            assert len(ends) == 1, self.raw
            text = "".join(it["delta"].get("content") or "" for it in mine)
            calls = [call for it in mine for call in it["delta"].get("tool_calls") or ()]
            if "tools" in self.asked:
                assert ends == ["tool_calls"], self.raw
                assert [it["id"] for it in calls if it.get("id")] == [calls[0]["id"]]
                text = "".join(it["function"]["arguments"] for it in calls)
                jsonschema_rs.validate(CITY, json.loads(text))
            elif "response_format" in self.asked:
                jsonschema_rs.validate(PET, json.loads(text))
            else:
                assert text, self.raw
