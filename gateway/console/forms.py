"""Forms: read what a browser sends, within bounds, and turn typed fields into checked values."""

import datetime as dt
import re
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from gateway import validation
from gateway.errors import BadRequest, ClientLeft, TooLarge, UnsupportedMediaType
from gateway.keys.entries import Entry
from gateway.keys.limit_fields import LimitFields

SMALL, LARGE = 16 * 1024, 512 * 1024  # bytes of a form: of one before anybody is known, and of any other
MAX_FIELDS = 40
LIMITS = tuple(LimitFields.model_fields)

Form = dict[str, str]
Fields = TypeVar("Fields", bound=BaseModel)


async def read(request: Request, most: int) -> Form:
    """Return the fields of a form. Raises TooLarge, UnsupportedMediaType, BadRequest, and what `_body` raises."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise UnsupportedMediaType("Send the form as application/x-www-form-urlencoded.")
    text = await _body(request, most)
    try:
        pairs = parse_qsl(
            text.decode("ascii"), keep_blank_values=True, max_num_fields=MAX_FIELDS, encoding="utf-8", errors="strict"
        )
    except ValueError:  # of any kind: UnicodeDecodeError is one
        raise BadRequest("The form cannot be read.") from None
    return dict(pairs)


async def _body(request: Request, most: int) -> bytes:
    """Return the whole body of a form. Raises TooLarge, ClientLeft if the client disconnects, and the protocol's
    rejection of a body that never came whole: a part of a form is never taken for all of it."""
    raw = bytearray()
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft("The client disconnected.")
        raw += message.get("body", b"")
        if len(raw) > most:
            raise TooLarge(f"The form is larger than {most} bytes.")
        more = message.get("more_body", False)
    if "refusal" in request.scope:  # the rest of the body did not come, or was malformed (server/protocol.py)
        raise request.scope["refusal"]
    return bytes(raw)


def understood(values: dict[str, Any], model: type[Fields]) -> Fields:
    """Return the values as `model`. Raises BadRequest with a sentence that names the field."""
    try:
        return model.model_validate(values, strict=True)
    except ValidationError as exc:
        field, why = validation.first(exc, model)
        raise BadRequest(f"{(field or 'The form').replace('_', ' ').replace('.', ': ')}: {why}.", param=field) from None


def shown(entry: Entry) -> Form:
    """Return what the form of a key shows."""
    limits = {name: "" if value is None else str(value) for name, value in entry.limits.model_dump().items()}
    return {
        "name": entry.name,
        "owner": entry.owner,
        "models": ", ".join(entry.models or ()),
        "expires": day(entry.expires_at),
        "priority": str(entry.priority),
        **limits,
    }


def key_fields(form: Form, there: Entry | None = None) -> dict[str, Any]:
    """Return the fields of a key in a form, for KeyFields. Those that are as the key `there` is shown are left out,
    because a form cannot show all that a key may have: names with commas or spaces, and hours. Raises BadRequest."""
    same = {} if there is None else {name: it for name, it in shown(there).items() if form.get(name, "") == it}
    values: dict[str, Any] = {}
    if "name" not in same:
        values["name"] = form.get("name", "").strip()
    if "owner" not in same:
        values["owner"] = form.get("owner", "").strip()
    if "models" not in same:
        models = re.split(r"[,\r\n]+", form.get("models", ""))
        values["models"] = [it.strip() for it in models if it.strip()] or None
    if "priority" not in same:
        values["priority"] = 1 if (priority := number(form, "priority")) is None else priority
    if "expires" not in same:
        typed = form.get("expires", "").strip()
        values["expires_at"] = _moment(typed) if typed else None
    values["limits"] = {name: number(form, name) for name in LIMITS if name not in same}
    return values


def limits(form: Form) -> dict[str, int | None]:
    """Return the limits in a form; None for each empty field. Raises BadRequest."""
    return {name: number(form, name) for name in LIMITS}


def number(form: Form, name: str) -> int | None:
    """Return a whole number, None if the field is empty. Raises BadRequest."""
    typed = form.get(name, "").strip()
    if not typed:
        return None
    if not re.fullmatch(r"[0-9]{1,16}", typed):
        raise BadRequest(f"{name.replace('_', ' ')}: it must be a whole number.", param=name)
    return int(typed)


def day(moment: int | None) -> str:
    """Return the UTC day of a time in seconds since 1970, as a form has it; empty for None."""
    return "" if moment is None else dt.datetime.fromtimestamp(moment, dt.UTC).date().isoformat()


def _moment(typed: str) -> int:
    try:
        return int(dt.datetime.strptime(typed, "%Y-%m-%d").replace(tzinfo=dt.UTC).timestamp())
    except ValueError:
        raise BadRequest("expires: it must be a day, such as 2027-01-31.", param="expires") from None
