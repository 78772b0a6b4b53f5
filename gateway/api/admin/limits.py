"""Limits: the paths of a key's limits, and of the limits of keys that have none of their own."""

import asyncio
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from pydantic import BaseModel

from gateway.api.admin.reading import body, takes
from gateway.keys.book import Keybook
from gateway.keys.configured import defaults
from gateway.keys.limit_fields import LimitFields
from gateway.limits.rules import quotas_used
from gateway.settings import Settings
from gateway.usage.rows import UsageBook


class DefaultLimits(BaseModel):
    """The limits of keys that have none of their own. A limit that is not `stored` comes from a setting
    (STACK_LIMIT_…).
    """

    in_force: LimitFields
    stored: LimitFields


class KeyLimits(BaseModel):
    """`own` are the key's limits; a default applies where it has none. `used` are the tokens of this day and month
    in UTC.
    """

    in_force: LimitFields
    own: LimitFields
    used: dict[str, int]


def add_limit_routes(app: FastAPI, settings: Settings, book: Keybook, usage: UsageBook, common: dict[str, Any]) -> None:
    """Give the app the paths of limits."""

    def told(stored: LimitFields) -> DefaultLimits:
        return DefaultLimits(in_force=LimitFields(**asdict(stored.over(defaults(settings)))), stored=stored)

    @app.get("/admin/limits", **common)
    async def show_default_limits() -> DefaultLimits:
        """Show the limits of keys that have none of their own."""
        return told(await asyncio.to_thread(book.defaults))

    @app.patch("/admin/limits", openapi_extra=takes(LimitFields), **common)
    async def change_default_limits(request: HttpRequest) -> DefaultLimits:
        """Change the given limits; null restores the setting. A change takes effect within a second."""
        return told(await asyncio.to_thread(book.set_defaults, await body(request, LimitFields)))

    @app.get("/admin/keys/{key_id}/limits", **common)
    async def show_limits(key_id: str) -> KeyLimits:
        """Show the limits of a key, and what it has used of its quotas. To change limits, change the key."""
        entry, general = await asyncio.to_thread(lambda: (book.show(key_id), book.defaults()))
        in_force = entry.limits.over(general.over(defaults(settings)))
        used = await asyncio.to_thread(quotas_used, usage, key_id)
        return KeyLimits(in_force=LimitFields(**asdict(in_force)), own=entry.limits, used=used)
