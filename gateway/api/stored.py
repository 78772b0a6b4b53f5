"""Stored: the routes that read and delete stored responses. A response is visible only to the account that made
it (Key.account).
"""

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal

import orjson
from fastapi import Depends, FastAPI, Query
from fastapi.responses import Response
from pydantic import BaseModel

from gateway.errors import BadRequest
from gateway.keys.known import Key
from gateway.responses.responses import Responses

MOST = 100  # items of one page

Limit = Annotated[int, Query(ge=1, le=MOST)]
Order = Literal["asc", "desc"]


class ItemPage(BaseModel):
    """One page of a response's input items."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedResponse(BaseModel):
    id: str
    object: Literal["response"] = "response"
    deleted: bool = True


def add_stored_routes(
    app: FastAPI, responses: Responses, caller: Callable[..., Awaitable[Key]], errors: dict[int | str, dict[str, Any]]
) -> None:
    """Give the app the paths below /v1/responses. `caller` is the dependency that authenticates."""
    Caller = Annotated[Key, Depends(caller)]  # noqa: N806  a type
    common: dict[str, Any] = {"tags": ["OpenAI"], "responses": errors}

    @app.get("/v1/responses/{response_id}", response_model=None, **common)
    async def get_response(response_id: str, key: Caller, *, stream: bool = False) -> Response:
        """Show a stored response."""
        if stream:
            raise BadRequest(
                "'stream' cannot be true, because a stored response is sent as one object.", param="stream"
            )
        stored = await responses.show(key.account, response_id)
        return Response(orjson.dumps(stored.response), media_type="application/json")

    @app.delete("/v1/responses/{response_id}", **common)
    async def delete_response(response_id: str, key: Caller) -> DeletedResponse:
        """Delete a stored response. Responses that continue it can no longer be continued."""
        await responses.delete(key.account, response_id)
        return DeletedResponse(id=response_id)

    @app.get("/v1/responses/{response_id}/input_items", **common)
    async def list_input_items(
        response_id: str, key: Caller, limit: Limit = 20, order: Order = "desc", after: str | None = None
    ) -> ItemPage:
        """List the input items of a stored response's own request, the last one first unless `order` is asc."""
        stored = await responses.show(key.account, response_id)
        return page(stored.items, limit, order, after)


def page(items: list[dict[str, Any]], limit: int, order: Order, after: str | None) -> ItemPage:
    """Return `limit` items in that order, beginning after the item with the id `after`.

    Raises BadRequest if there is no such item.
    """
    ordered = items if order == "asc" else items[::-1]
    start = 0
    if after is not None:
        start = next((index + 1 for index, it in enumerate(ordered) if it.get("id") == after), 0)
        if not start:
            raise BadRequest(
                f"'after' is '{after[:80]}', which is not the id of an input item of this response.", param="after"
            )
    found = ordered[start : start + limit]
    ids = [str(it["id"]) for it in found]
    return ItemPage(
        data=found,
        first_id=ids[0] if ids else None,
        last_id=ids[-1] if ids else None,
        has_more=len(ordered) > start + limit,
    )
