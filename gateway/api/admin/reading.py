"""Reading: the bodies and moments of admin requests, checked field by field."""

import re
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import Request as HttpRequest
from pydantic import BaseModel, ValidationError

from gateway import validation
from gateway.api.body import parse
from gateway.api.reading import read
from gateway.byte_budget import Budget
from gateway.errors import BadRequest

MAX_BODY = 256 * 1024  # bytes
DAY = 86_400  # seconds
_COPIES = 4  # of a body, as it is read and decoded

Fields = TypeVar("Fields", bound=BaseModel)


def takes(model: type[BaseModel]) -> dict[str, Any]:
    """Describe a path's body in OpenAPI's words."""
    content = {"application/json": {"schema": model.model_json_schema(ref_template="#/components/schemas/{model}")}}
    return {"requestBody": {"required": True, "content": content}}


async def body(request: HttpRequest, model: type[Fields]) -> Fields:
    """Return the request's body as `model`. Raises BadRequest that names the field, and what `read` raises."""
    charge = Budget(_COPIES * MAX_BODY).charge("", 0)  # of its own: an operator need not wait for callers
    raw = await read(request.scope, request.receive, charge, MAX_BODY)
    return understand(parse(raw or b"{}"), model)


def understand(body: dict[str, Any], model: type[Fields]) -> Fields:
    """Return the body as `model`. Raises BadRequest that names the field."""
    try:
        return model.model_validate(body, strict=True)
    except ValidationError as exc:
        param, message = validation.first(exc, model)
        raise BadRequest(f"'{param or 'body'}': {message}.", param=param or None) from None


def moment(name: str, words: str, *, end: bool = False) -> int:
    """Return the milliseconds since 1970 of a day (its end, if asked for) or of seconds since 1970. Raises
    BadRequest."""
    if re.fullmatch(r"[0-9]{1,11}", words):
        return int(words) * 1000
    with suppress(ValueError):
        if (begins := validation.day(words)) is not None:
            return (begins + end * DAY) * 1000
    raise BadRequest(f"'{name}' must be a day, such as 2027-01-31, or seconds since 1970.", param=name)
