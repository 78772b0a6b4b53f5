"""Multipart: read and write forms with a file (multipart/form-data, RFC 7578). A file stays a view of the body.

A request's form becomes a body like that of any JSON request: a text for each field, a list for a field whose name ends
with `[]`, and a File. An engine gets a form that the gateway wrote, never the caller's bytes.
"""

import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from gateway.errors import BadRequest

MOST_PARTS = 64
_MOST_CHUNKS = 1000  # of a WAV file that are read; there are usually fewer than ten
_LONGEST_HEAD = 4096  # bytes of a part's header lines
# A parameter of a header: a token or a quoted string (RFC 9110, 5.6.6). The time to find all is linear.
_PARAMETER = re.compile(rb';[ \t]*([^\s;="]+)[ \t]*=[ \t]*(?:"((?:[^"\\\r\n]|\\.)*)"|([^\s";]+))')
_LONGEST_BOUNDARY = 70  # bytes (RFC 2046, 5.1.1)
_NAME = re.compile(rb"[A-Za-z0-9_.\[\]-]{1,64}")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_WHOLE = re.compile(r"-?[0-9]{1,18}")
_KIND = re.compile(rb"[A-Za-z0-9!#$&^_.+-]{1,64}/[A-Za-z0-9!#$&^_.+-]{1,64}")
_TEXTS = frozenset({"model", "prompt", "language"})  # a name or a text may be a number
_WORDS = {"true": True, "false": False}

# Nobody outside can know it, so no file can contain it. It is the same for all requests of a process.
_OURS = secrets.token_hex(24)
CONTENT_TYPE = f"multipart/form-data; boundary={_OURS}"


@dataclass(frozen=True, slots=True)
class File:
    """A file in a form. Its name has no other characters than letters, digits, dots, hyphens and underscores."""

    name: str
    kind: str  # its media type
    data: memoryview

    def __str__(self) -> str:
        """Describe it without its content, for the log."""
        return f"({self.kind}, {len(self.data)} bytes)"


def is_form(content_type: bytes) -> bool:
    """Return whether a Content-Type is that of a form that can be read."""
    return _boundary(content_type) is not None


def parse(raw: bytes, content_type: bytes) -> dict[str, Any]:
    """Read a form. Raises BadRequest that names the field."""
    boundary = _boundary(content_type)
    if boundary is None:
        raise BadRequest("The Content-Type names no boundary of the form's parts.", param="content-type")
    body: dict[str, Any] = {}
    for head, data in _parts(raw, b"--" + boundary):
        name, value = _field(head, data)
        if name.endswith("[]"):
            body.setdefault(name, []).append(value)
        elif name in body:
            raise BadRequest(f"The name '{name}' appears twice in the form.", param=name)
        else:
            body[name] = value
    return body


def write(fields: Mapping[str, Any]) -> bytes:
    """Write a form with these fields, for CONTENT_TYPE. Null is left out."""
    out: list[bytes | memoryview] = []
    for name, value in fields.items():
        for it in value if type(value) is list else [value]:
            if it is None:
                continue
            out.append(f'--{_OURS}\r\ncontent-disposition: form-data; name="{name}"'.encode())
            if type(it) is File:
                out += (f'; filename="{it.name}"\r\ncontent-type: {it.kind}\r\n\r\n'.encode(), it.data, b"\r\n")
            else:
                out.append(b"\r\n\r\n%b\r\n" % (it if type(it) is str else orjson.dumps(it).decode()).encode())
    out.append(f"--{_OURS}--\r\n".encode())
    return b"".join(out)


def says(fields: Mapping[str, Any]) -> Iterator[bytes | memoryview]:
    """Return a description of the form's content, which is the same for every boundary."""
    for name, value in fields.items():
        for it in value if type(value) is list else [value]:
            yield f"\n{name}\n".encode()
            yield it.data if type(it) is File else str(it).encode()


def seconds(file: File) -> float | None:
    """Return the length of a sound in seconds, if one of the first chunks of a WAV file tells it; None for every other
    file."""
    data = file.data
    if len(data) < 44 or bytes(data[:4]) != b"RIFF" or bytes(data[8:12]) != b"WAVE":
        return None
    at, rate = 12, 0
    for _ in range(_MOST_CHUNKS):
        if at + 8 > len(data):
            break
        name, size = bytes(data[at : at + 4]), int.from_bytes(data[at + 4 : at + 8], "little")
        if name == b"fmt " and size >= 16:
            rate = int.from_bytes(data[at + 16 : at + 20], "little")  # bytes for a second
        elif name == b"data":
            return min(size, len(data) - at - 8) / rate if rate else None
        at += 8 + size + size % 2
    return None


def _boundary(content_type: bytes) -> bytes | None:
    kind, parameters = _read(content_type)
    boundary = parameters.get(b"boundary", b"")
    return boundary if kind == b"multipart/form-data" and 0 < len(boundary) <= _LONGEST_BOUNDARY else None


def _read(header: bytes) -> tuple[bytes, dict[bytes, bytes]]:
    """Return a header's value, in lower case, and its parameters. Of two with the same name, the first one counts."""
    parameters: dict[bytes, bytes] = {}
    for name, quoted, token in _PARAMETER.findall(header):
        parameters.setdefault(name.lower(), quoted or token)
    return header.partition(b";")[0].strip().lower(), parameters


def _parts(raw: bytes, boundary: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Give the header lines and the data of each part."""
    view, delimiter = memoryview(raw), b"\r\n" + boundary
    at = 0 if raw.startswith(boundary) else raw.find(delimiter) + 2
    if at == 1:
        raise _damaged("has no part")
    for _ in range(MOST_PARTS + 1):
        at += len(boundary)
        if raw.startswith(b"--", at):
            return
        if not raw.startswith(b"\r\n", at):
            raise _damaged("has a line that begins like its boundary")
        begin, blank = at + 2, raw.find(b"\r\n\r\n", at, at + _LONGEST_HEAD)
        end = raw.find(delimiter, blank + 2)
        if blank < 0 or end < 0:
            raise _damaged("ends in the midst of a part, or a part has too long a head")
        yield raw[begin:blank], view[blank + 4 : max(end, blank + 4)]
        at = end + 2
    raise BadRequest(f"The form has more than {MOST_PARTS} parts.")


def _field(head: bytes, data: memoryview) -> tuple[str, Any]:
    pairs = (line.partition(b":") for line in head.split(b"\r\n"))
    lines = {name.strip().lower(): value.strip() for name, _, value in pairs}
    disposition, said = _read(lines.get(b"content-disposition", b""))
    if disposition != b"form-data" or not _NAME.fullmatch(said.get(b"name", b"")):
        raise BadRequest("Each part of the form needs a Content-Disposition with a plain name.")
    name = said[b"name"].decode()
    extended = said.get(b"filename*")  # for example utf-8''a.mp3, which .NET writes beside the other one
    filename = said.get(b"filename", extended and extended.rpartition(b"'")[2])
    if filename is not None:
        safe = _UNSAFE.sub("_", filename.decode(errors="replace"))[-100:] or "file"
        kind = lines.get(b"content-type", b"").partition(b";")[0].strip()
        return name, File(safe, kind.decode() if _KIND.fullmatch(kind) else "application/octet-stream", data)
    try:
        text = str(data, "utf-8")
    except UnicodeDecodeError:
        raise BadRequest(f"'{name}' is not UTF-8.", param=name) from None
    if name in _TEXTS or name.endswith("[]"):
        return name, text
    return name, int(text) if _WHOLE.fullmatch(text) else _WORDS.get(text, text)


def _damaged(what: str) -> BadRequest:
    return BadRequest(f"The body is not a valid form: it {what}.")
