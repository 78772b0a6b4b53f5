"""Keys: the paths of keys and their secrets."""

import asyncio
import functools
from typing import Annotated, Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from gateway.api.admin.reading import DAY, body, takes
from gateway.keys.book import Keybook
from gateway.keys.entries import YEAR, Entry, KeyFields, NewKeyFields


class NewKey(BaseModel):
    """A key with its secret, which is shown only once. So is the signing secret, if the key tells its users apart."""

    key: Entry
    secret: str
    signing_secret: str | None = None


class NewSigning(BaseModel):
    """A key with the secret with which its front end signs the names of users. It is shown only once."""

    key: Entry
    signing_secret: str


class KeyList(BaseModel):
    data: list[Entry]


class Rotation(BaseModel):
    """How long the present secrets continue to work."""

    model_config = ConfigDict(extra="forbid")

    grace_seconds: Annotated[int, Field(ge=0, le=YEAR)] = DAY


def add_key_routes(app: FastAPI, book: Keybook, common: dict[str, Any]) -> None:
    """Give the app the paths below /admin/keys."""

    @app.get("/admin/keys", **common)
    async def list_keys() -> KeyList:
        """List all keys, without their secrets."""
        return KeyList(data=await asyncio.to_thread(book.list))

    @app.post("/admin/keys", status_code=201, openapi_extra=takes(NewKeyFields), **common)
    async def create_key(request: HttpRequest) -> NewKey:
        """Create a key. Its secret is in the answer, and cannot be shown again."""
        entry, text = await asyncio.to_thread(book.create, await body(request, NewKeyFields))
        return NewKey(key=entry, secret=text, signing_secret=entry.signing)

    @app.get("/admin/keys/{key_id}", **common)
    async def show_key(key_id: str) -> Entry:
        """Show one key."""
        return await asyncio.to_thread(book.show, key_id)

    @app.patch("/admin/keys/{key_id}", openapi_extra=takes(KeyFields), **common)
    async def change_key(key_id: str, request: HttpRequest) -> Entry:
        """Change the given fields, and keep the others. A change takes effect within a second.

        All requests of a disabled key end within two seconds, and so do its older secrets that still have a grace.
        """
        return await asyncio.to_thread(book.change, key_id, await body(request, KeyFields))

    @app.post("/admin/keys/{key_id}/rotate", openapi_extra=takes(Rotation), **common)
    async def rotate_key(key_id: str, request: HttpRequest) -> NewKey:
        """Create a new secret. The old ones work for the grace period; those of a disabled key end at once. An expired
        key cannot be rotated."""
        asked = await body(request, Rotation)
        entry, text = await asyncio.to_thread(book.rotate, key_id, asked.grace_seconds)
        return NewKey(key=entry, secret=text)

    @app.delete("/admin/keys/{key_id}", status_code=204, **common)
    async def delete_key(key_id: str) -> Response:
        """Delete a key permanently. Its usage stays, with its name."""
        await asyncio.to_thread(book.delete, key_id)
        return Response(status_code=204)

    _add_user_routes(app, book, common)


def _add_user_routes(app: FastAPI, book: Keybook, common: dict[str, Any]) -> None:
    @app.post("/admin/keys/{key_id}/users", **common)
    async def tell_users_apart(key_id: str) -> NewSigning:
        """Tell the key's users apart, by a new signing secret for its front end. An older one ends within a second."""
        entry = await asyncio.to_thread(functools.partial(book.tell_users_apart, key_id, on=True))
        return NewSigning(key=entry, signing_secret=entry.signing or "")

    @app.delete("/admin/keys/{key_id}/users", **common)
    async def stop_telling_users_apart(key_id: str) -> Entry:
        """Do not tell the key's users apart any more. Their usage stays."""
        return await asyncio.to_thread(functools.partial(book.tell_users_apart, key_id, on=False))
