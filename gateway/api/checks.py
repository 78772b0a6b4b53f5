"""Checks: check what a request must have, and find the engines of its route that can serve it."""

from dataclasses import replace
from types import NoneType
from typing import Any

from gateway.api import guard
from gateway.endpoints import ENDPOINTS, Endpoint, Kind
from gateway.errors import BadRequest
from gateway.multipart import File
from gateway.routing.routes import Route
from gateway.upstream import parameters


def check(kind: Kind, body: dict[str, Any]) -> int:
    """Check the fields that the gateway relies on, and what a request may not contain (`guard`). Everything else is
    passed on unchanged.

    Returns the number of messages, prompts or inputs. Raises BadRequest that names the field.
    """
    guard.refuse_control(kind, body)
    model = body.get("model")
    if model is not None and (not isinstance(model, str) or not model):
        raise BadRequest("'model' must be the name of a model. Leave it out to get the default model.", param="model")
    if type(body.get("stream")) not in (bool, NoneType):
        raise BadRequest("'stream' must be true or false.", param="stream")
    if type(body.get("stream_options")) not in (dict, NoneType):
        raise BadRequest("'stream_options' must be an object.", param="stream_options")
    stop = body.get("stop")
    if not isinstance(stop, str | NoneType) and not (type(stop) is list and all(type(it) is str for it in stop)):
        raise BadRequest("'stop' must be a string or a list of strings.", param="stop")
    endpoint = ENDPOINTS[kind]
    field = endpoint.content
    content = body.get(field)
    if content is None:
        raise BadRequest(f"'{field}' is missing.", param=field)
    if not endpoint.metered:
        return _check_sound(endpoint, body)
    if endpoint.chats:
        if not isinstance(content, list) or not content:
            raise BadRequest("'messages' must be a list with at least one message.", param=field)
        for index, message in enumerate(content):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise BadRequest(f"'messages[{index}]' must be an object with a 'role'.", param=f"messages[{index}]")
    elif not isinstance(content, str | list):
        raise BadRequest(f"'{field}' must be a string or a list.", param=field)
    # A list of numbers is one prompt in tokens. In any other list, each entry is a prompt.
    return len(content) if isinstance(content, list) and not (content and isinstance(content[0], int)) else 1


def _check_sound(endpoint: Endpoint, body: dict[str, Any]) -> int:
    """Check a request that is for a sound, or for the text of one. Returns 1. Raises BadRequest."""
    field = endpoint.content
    if endpoint.form:
        for name, value in body.items():
            if (type(value) is File) != (name == field):
                what = "must be a file" if name == field else "must not be a file"
                raise BadRequest(f"'{name}' {what}.", param=name)
    elif type(body[field]) is not str or not body[field]:
        raise BadRequest(f"'{field}' must be a text that is not empty.", param=field)
    if body.get("stream"):
        raise BadRequest("This endpoint does not stream. Leave 'stream' out.", param="stream", code="unsupported")
    return 1


def suited(route: Route, kind: Kind, body: dict[str, Any], *, strict: bool) -> Route:
    """Return the route without the engines that cannot serve the request, and if `strict`, also without those that
    would ignore one of its parameters. Raises BadRequest that names the field if none is left."""
    dialects = [target.upstream.dialect.name for tier in route.tiers for target in tier]
    refusals = {name: _refusal(name, kind, body, strict=strict) for name in dict.fromkeys(dialects)}
    if not any(refusals.values()):
        return route
    tiers = tuple(tuple(it for it in tier if not refusals[it.upstream.dialect.name]) for tier in route.tiers)
    if not any(tiers):
        raise refusals[dialects[0]] or BadRequest("No engine of this model accepts this request.")
    return replace(route, tiers=tuple(filter(None, tiers)))


def _refusal(dialect: str, kind: Kind, body: dict[str, Any], *, strict: bool) -> BadRequest | None:
    try:
        ignored = parameters.read(dialect, kind, body).ignored
    except BadRequest as exc:
        return exc
    if not strict or not ignored:
        return None
    return BadRequest(
        f"The engine behind this model would ignore '{ignored[0]}', and strict mode is on. Leave it out.",
        param=ignored[0],
        code="unsupported_parameter",
    )
