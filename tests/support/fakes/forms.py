"""Forms: a request's multipart/form-data as the fake engine reads it: an object, with a description of each file."""

import email.policy
import hashlib
import json
from email.parser import BytesParser
from typing import Any


def as_json(content_type: str, body: bytes) -> bytes:
    """The same request as JSON. Numbers and truth values are read as such, as an engine's own form reader does it."""
    parser = BytesParser(policy=email.policy.HTTP)
    form = parser.parsebytes(b"content-type: %b\r\n\r\n%b" % (content_type.encode(), body))
    fields: dict[str, Any] = {}
    for part in form.iter_parts():
        name, data = str(part.get_param("name", header="content-disposition")), part.get_payload(decode=True)
        if part.get_filename() is not None:
            fields[name] = described(str(part.get_filename()), part.get_content_type(), data)
        elif name.endswith("[]"):
            fields.setdefault(name, []).append(data.decode())
        else:
            fields[name] = _value(data.decode())
    return json.dumps(fields).encode()


def described(name: str, kind: str, data: bytes) -> dict[str, Any]:
    """A file as a request that was seen tells it."""
    return {"filename": name, "type": kind, "sha256": hashlib.sha256(data).hexdigest()}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
