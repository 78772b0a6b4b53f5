"""Stored: the routes that read and delete stored responses. A response is visible only to the account that made
it (Key.account).

What a response takes of the memory is charged from before it is read until its client has it.
"""

import functools
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal

import orjson
from fastapi import Depends, FastAPI, Query
from fastapi.responses import Response
from pydantic import BaseModel

from gateway.byte_budget import Budget, Charge
from gateway.errors import BadRequest
from gateway.keys.known import Key
from gateway.responses.responses import Responses

MOST = 100  # items of one page
# Bytes of memory for each byte of JSON: as it is stored or written to the connection, and as it is. Items are unpacked
# for a page, with up to four bytes for a character of text; only one thread does that.
_COPIES, _COPIES_UNPACKED = 2, 6

Limit = Annotated[int, Query(ge=1, le=MOST)]
Order = Literal["asc", "desc"]


class ItemPage(BaseModel):
    """One page of a response's input items, for the OpenAPI document."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedResponse(BaseModel):
    id: str
    object: Literal["response"] = "response"
    deleted: bool = True


class _Charged(Response):
    """JSON whose charge is held until it is sent."""

    def __init__(self, body: bytes, charge: Charge) -> None:
        super().__init__(body, media_type="application/json")
        charge.resize(_COPIES * len(body))
        self._charge = charge


def add_stored_routes(
    app: FastAPI,
    responses: Responses,
    memory: Budget,
    caller: Callable[..., Awaitable[Key]],
    errors: dict[int | str, dict[str, Any]],
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
        charge = memory.charge(key.id, 0)
        body = await responses.show(
            key.account, response_id, "response", hold=lambda size: charge.resize(_COPIES * size)
        )
        return _Charged(body, charge)

    @app.delete("/v1/responses/{response_id}", **common)
    async def delete_response(response_id: str, key: Caller) -> DeletedResponse:
        """Delete a stored response. Responses that continue it can no longer be continued."""
        await responses.delete(key.account, response_id)
        return DeletedResponse(id=response_id)

    @app.get("/v1/responses/{response_id}/input_items", response_model=ItemPage, **common)
    async def list_input_items(
        response_id: str, key: Caller, limit: Limit = 20, order: Order = "desc", after: str | None = None
    ) -> Response:
        """List the input items of a stored response's own request, the last one first unless `order` is asc."""
        charge = memory.charge(key.id, 0)
        body = await responses.show(
            key.account,
            response_id,
            "input",
            hold=lambda size: charge.resize(_COPIES_UNPACKED * size),
            write=functools.partial(page, limit=limit, order=order, after=after),
        )
        return _Charged(body, charge)


def page(written: bytes, limit: int, order: Order, after: str | None) -> bytes:
    """Return the JSON of an ItemPage: `limit` of the items in that order, beginning after the item with the id `after`.
    `written` is the JSON of all items.

    Raises BadRequest if there is no such item.
    """
    items: list[dict[str, Any]] = orjson.loads(written)
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
    return orjson.dumps(
        {
            "object": "list",
            "data": found,
            "first_id": ids[0] if ids else None,
            "last_id": ids[-1] if ids else None,
            "has_more": len(ordered) > start + limit,
        }
    )
