"""Prompts: the paths of the operator's prompts, and of the keys and models that use them."""

import asyncio
from contextlib import suppress
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from pydantic import BaseModel

from gateway.api.admin.reading import body, takes, understand
from gateway.errors import ModelNotFound
from gateway.prompts.book import Holds, Of, Promptbook, Template, Use, Version
from gateway.routing.routes import Routes


class PromptList(BaseModel):
    data: list[Version]
    uses: list[Holds]


class VersionList(BaseModel):
    data: list[Version]


def add_prompt_routes(app: FastAPI, prompts: Promptbook, routes: Routes, common: dict[str, Any]) -> None:
    """Give the app the paths of prompts."""

    @app.get("/admin/prompts", **common)
    async def list_prompts() -> PromptList:
        """List the newest version of every prompt, and the keys and models that use prompts."""
        return PromptList(data=await asyncio.to_thread(prompts.newest), uses=await asyncio.to_thread(prompts.uses))

    @app.put("/admin/prompts/{name}", status_code=201, openapi_extra=takes(Template), **common)
    async def set_prompt(name: str, request: HttpRequest) -> Version:
        """Create the next version of a prompt."""
        asked = await body(request, Template)
        named = understand({"name": name}, Use)
        return await asyncio.to_thread(prompts.set, named.name, asked.template)

    @app.get("/admin/prompts/{name}", **common)
    async def show_prompt(name: str) -> VersionList:
        """Show all versions of a prompt."""
        return VersionList(data=await asyncio.to_thread(prompts.show, name))

    @app.delete("/admin/prompts/{name}", status_code=204, **common)
    async def delete_prompt(name: str) -> Response:
        """Delete a prompt that no key or model uses, with all its versions."""
        await asyncio.to_thread(prompts.delete, name)
        return Response(status_code=204)

    @app.put("/admin/{of}s/{target:path}/prompt", openapi_extra=takes(Use), **common)
    async def use_prompt(of: Of, target: str, request: HttpRequest) -> Holds:
        """Use a prompt for a key or a model. It comes before every request. A prompt for an alias applies to the
        alias's model. A prompt for a split applies to requests that use the split's name."""
        use = await body(request, Use)
        if of == "model":
            target = await routes.named(target)
        return await asyncio.to_thread(prompts.use, of, target, use)

    @app.delete("/admin/{of}s/{target:path}/prompt", status_code=204, **common)
    async def stop_prompt(of: Of, target: str) -> Response:
        """Use no prompt for this key or model any more."""
        also = []
        with suppress(ModelNotFound):  # one that is not here any more may have a prompt all the same
            if of == "model":
                also = [await routes.named(target)]
        await asyncio.to_thread(prompts.stop, of, target, *also)
        return Response(status_code=204)
