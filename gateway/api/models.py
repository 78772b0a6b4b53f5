"""Models: the routes that list the models, for clients of OpenAI's API and of Anthropic's."""

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Query
from starlette.exceptions import HTTPException

from gateway.api import openapi
from gateway.keys.known import Key
from gateway.routing.listing import Listing, page

Limit = Annotated[int | None, Query(ge=1, le=1000, description="The most models of one page, as in Anthropic's API.")]
# A client of Anthropic's API sends this. Its `capabilities` are another object than the list of words here.
AnthropicVersion = Annotated[str | None, Header(include_in_schema=False)]


def add_model_routes(
    app: FastAPI, listing: Listing, caller: Callable[..., Awaitable[Key]], errors: dict[int | str, dict[str, Any]]
) -> None:
    """Give the app the paths of the models. `caller` is the dependency that authenticates."""
    Caller = Annotated[Key, Depends(caller)]  # noqa: N806  a type
    common: dict[str, Any] = {"tags": ["OpenAI"], "response_model_exclude_none": True}

    @app.get("/v1/models", responses={401: errors[401]}, **common)
    async def list_models(
        key: Caller,
        limit: Limit = None,
        after_id: str | None = None,
        before_id: str | None = None,
        anthropic_version: AnthropicVersion = None,
    ) -> openapi.ModelList:
        """List every model name that can be used, aliases included."""
        found, more = page(await listing.entries(key), limit, after_id, before_id)
        data = [_model(entry, anthropic_version) for entry in found]
        ends = (data[0].id, data[-1].id) if data else (None, None)
        return openapi.ModelList(data=data, has_more=more, first_id=ends[0], last_id=ends[1])

    @app.get("/v1/models/{model:path}", responses=errors, **common)
    async def get_model(model: str, key: Caller, anthropic_version: AnthropicVersion = None) -> openapi.Model:
        """Show one model. Its name may have slashes and colons, escaped (`org%2Fname`) or not."""
        if not model:
            raise HTTPException(404)
        return _model(await listing.entry(model, key), anthropic_version)


def _model(entry: dict[str, Any], anthropic_version: str | None) -> openapi.Model:
    return openapi.Model(**(entry if anthropic_version is None else entry | {"capabilities": None}))
