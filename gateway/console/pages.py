"""Pages: render the templates, and give every answer of the console its headers."""

import datetime as dt
import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.responses import Response

from gateway import __version__
from gateway.console.door import Visitor
from gateway.errors import StackError

NOTHING = "\u2013"  # a dash
ROUNDED = 0.9995  # of 1,000 and more is shown as 1,000, if three digits are shown
HTML = "text/html; charset=utf-8"
HERE = Path(__file__).parent
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
_TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
# Referrers go to our own pages alone. With "no-referrer" browsers would not say where a form comes from (Origin: null).
_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}


class Pages:
    """Hold the templates and the static files, all read once."""

    def __init__(self) -> None:
        self._static = {it.name: it.read_bytes() for it in sorted((HERE / "static").iterdir()) if it.suffix in _TYPES}
        digest = hashlib.sha256(b"".join(self._static.values())).hexdigest()
        self._environment = Environment(
            loader=FileSystemLoader(HERE / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
        )
        self._environment.globals |= {"version": __version__, "files": digest[:12]}
        self._environment.filters |= {
            "day": day, "moment": moment, "count": count, "seconds": seconds, "short": short,
        }  # fmt: skip

    def page(self, name: str, visitor: Visitor | None, status: int = 200, **values: Any) -> Response:
        """Render a template. An `error` among the values brings its headers."""
        body = self._environment.get_template(f"{name}.html").render(visitor=visitor, page=name, **values)
        error = values.get("error")
        return answer(body.encode(), HTML, status, error.headers if isinstance(error, StackError) else {})

    def static(self, name: str) -> Response | None:
        """Return a static file; None if there is none of that name. Its address changes with its content."""
        content = self._static.get(name)
        if content is None:
            return None
        return answer(content, _TYPES[Path(name).suffix], cache="public, max-age=31536000, immutable")


def answer(
    body: bytes, kind: str, status: int = 200, more: Mapping[str, str] = MappingProxyType({}), cache: str = "no-store"
) -> Response:
    """Return a response with the headers of the console, and `more`."""
    return Response(body, status, {**_HEADERS, "cache-control": cache, "content-type": kind, **more})


def redirect(where: str) -> Response:
    """Send the browser to another page of the console."""
    return Response(b"", 303, {**_HEADERS, "cache-control": "no-store", "location": where})


def day(at: int | None) -> str:
    """Return a time in seconds since 1970 as a day in UTC."""
    return "never" if at is None else f"{dt.datetime.fromtimestamp(at, dt.UTC):%Y-%m-%d}"


def moment(at: int) -> str:
    """Return a time in milliseconds since 1970, in UTC."""
    return f"{dt.datetime.fromtimestamp(at / 1000, dt.UTC):%Y-%m-%d %H:%M:%S}"


def count(number: float | None) -> str:
    """Return a number with separators; a dash for None."""
    return NOTHING if number is None else f"{number:,.0f}"


def short(number: float) -> str:
    """Return a number in a few characters: 950, 1.2k, 34M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size * ROUNDED:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def seconds(milliseconds: float | None) -> str:
    """Return a duration in a few characters; a dash for None. now.js has the same in JavaScript."""
    if milliseconds is None:
        return NOTHING
    if milliseconds < 1000 * ROUNDED:
        return f"{milliseconds:.0f} ms"
    of_it = milliseconds / 1000
    return f"{of_it:.3g} s" if of_it < 1000 * ROUNDED else f"{of_it:,.0f} s"
