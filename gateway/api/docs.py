"""Docs: serve the pages at /docs and the OpenAPI document behind them.

Every address in the page is relative. The page therefore works below a prefix that a proxy strips, and needs no CDN.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import fastapi_offline
import orjson
from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, Response
from fastapi.staticfiles import StaticFiles

from gateway import __version__
from gateway.api import openapi
from gateway.endpoints import ROWS

_STATIC = Path(fastapi_offline.__file__).parent / "static"


class _App(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """Return FastAPI's document without its 422 answers, because a wrong request gets a 400 here."""
        if self.openapi_schema is None:
            document = super().openapi()
            for chunk in filter(None, (it.chunk for it in openapi.SCHEMAS.values())):  # FastAPI knows nothing of events
                shape = chunk.model_json_schema(ref_template="#/components/schemas/{model}")
                document["components"]["schemas"] |= {**shape.pop("$defs", {}), chunk.__name__: shape}
            for path in document["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            for row in ROWS:
                operation = document["paths"][row.path]["post"]
                if row.form:
                    content = operation["requestBody"]["content"]
                    content["multipart/form-data"] = content.pop("application/json")
                if row.sounds:
                    operation["responses"]["200"]["content"].pop("application/json")
            for name in ("HTTPValidationError", "ValidationError"):
                document["components"]["schemas"].pop(name, None)
        return super().openapi()


def documented_app(lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]]) -> FastAPI:
    """Return an application whose only routes are those of its documentation."""
    app = _App(
        title="stack",
        version=__version__,
        summary="An OpenAI-compatible endpoint in front of your own inference engine.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        openapi_url=None,  # its route would write the document anew for each request
        servers=[{"url": ".", "description": "This gateway."}],
    )
    app.mount("/docs/static", StaticFiles(directory=_STATIC))

    @app.get("/docs", include_in_schema=False)
    async def page() -> HTMLResponse:
        return get_swagger_ui_html(
            title="stack",
            openapi_url="openapi.json",
            swagger_js_url="docs/static/swagger-ui-bundle.js",
            swagger_css_url="docs/static/swagger-ui.css",
            swagger_favicon_url="docs/static/favicon.png",
        )

    @functools.cache
    def document() -> bytes:
        """Return the document as every response shares it, because anybody may ask for it and then not read it."""
        return orjson.dumps(app.openapi())

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi_json() -> Response:
        return Response(document(), media_type="application/json")

    return app
