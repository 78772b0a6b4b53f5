"""Write Messages requests in few words."""

from typing import Any

from gateway.translation.messages import Asked, read

PNG = "iVBORw0KGgo="
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}
TOOL = {"name": "look_up", "description": "d", "input_schema": {"type": "object"}}
FUNCTION = {"name": "look_up", "description": "d", "parameters": {"type": "object"}}


def asked(*messages: dict[str, Any], counting: bool = False, **fields: Any) -> Asked:
    given = {"model": "m", "max_tokens": 9, "messages": list(messages) or [user("hi")]} | fields
    return read(given, request_id="r1", now=0, counting=counting)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def text(told: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": told, **more}


def image(source: dict[str, Any]) -> dict[str, Any]:
    return {"type": "image", "source": source}


def result(content: Any, called: str = "t1", **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": called, "content": content, **more}


def call(name: str = "look_up", called: str = "t1", given: Any = None) -> dict[str, Any]:
    return {"type": "tool_use", "id": called, "name": name, "input": given or {}}


def messages(*given: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    return asked(*given, **fields).chat["messages"]
