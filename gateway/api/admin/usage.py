"""Usage: the paths of the requests that were, and of those that run now."""

import asyncio
from typing import Annotated, Any

from fastapi import FastAPI, Query
from fastapi.responses import Response
from pydantic import BaseModel, Field

from gateway.api.admin.reading import moment
from gateway.errors import BadRequest
from gateway.exchange import Running
from gateway.settings import Settings
from gateway.usage import running
from gateway.usage.rows import DIMENSIONS, Dimension, UsageBook, check_prunable, dimensions, to_csv

_MOMENT = "A day (2027-01-31, UTC) or seconds since 1970"


class Sum(BaseModel):
    """The usage of one group."""

    key: str | None = None
    name: str | None = Field(
        None, description="The key's name; for keys of the setting STACK_API_KEYS, the setting's name."
    )
    model: str | None = None
    day: str | None = None
    engine: str | None = None
    arm: str | None = None
    outcome: str | None = None
    api: str | None = None
    user: str | None = Field(None, description="The pseudonym of the key's user; null if it tells no users apart.")
    requests: int
    finished: int
    tokens_in: int
    tokens_out: int
    cached: int = Field(description="The part of tokens_in that the engine had in its cache.")
    documents: int = Field(description="Documents that were ranked.")
    audio_ms: int = Field(description="Milliseconds of sound that were transcribed.")
    characters: int = Field(description="Characters of text that were spoken.")
    counted: int = Field(
        description="Requests whose tokens the gateway counted, because the engine did not report them."
    )


class SumList(BaseModel):
    data: list[Sum]


class RunningList(BaseModel):
    data: list[Running]


class Pruned(BaseModel):
    rows: int


def add_usage_routes(app: FastAPI, settings: Settings, usage: UsageBook, common: dict[str, Any]) -> None:
    """Give the app the paths of usage, and of the requests that run now."""
    in_csv = {200: {"content": {"text/csv": {"schema": {"type": "string"}}}}}
    in_either = common | {"responses": common["responses"] | in_csv}

    @app.get("/admin/usage", response_model=SumList, response_model_exclude_unset=True, **in_either)
    async def show_usage(
        by: Annotated[
            str, Query(description="What to group by: one or several of " + ", ".join(DIMENSIONS))
        ] = "key,model",
        since: Annotated[str, Query(alias="from", description=_MOMENT)] = "0",
        until: Annotated[str | None, Query(alias="to", description=_MOMENT + "; the day itself is included")] = None,
        key: Annotated[str | None, Query(description="Only the usage of this key, given by its id")] = None,
        model: Annotated[str | None, Query(description="Only the usage of this model")] = None,
        user: Annotated[str | None, Query(description="Only the usage of this user, given by the pseudonym")] = None,
        form: Annotated[str, Query(alias="format", description="json or csv")] = "json",
    ) -> SumList | Response:
        """Sum up the usage. A request is counted within two seconds of its end."""
        groups = _groups(by)
        begin = moment("from", since)
        end = moment("to", until, end=True) if until is not None else 1 << 60
        if begin > end:
            raise BadRequest("'from' is after 'to'.", param="from")
        if form not in ("json", "csv"):
            raise BadRequest("'format' must be json or csv.", param="format")
        _refuse_nul(key=key, model=model, user=user)
        found = await asyncio.to_thread(usage.totals, groups, begin, end, key, model, user)
        if form == "csv":
            return Response(to_csv(groups, found), media_type="text/csv")
        return SumList(data=[Sum(**row) for row in found])

    @app.delete("/admin/usage", **common)
    async def prune_usage(before: Annotated[str, Query(description=_MOMENT)]) -> Pruned:
        """Delete old usage permanently. This month's (UTC) cannot be deleted, because quotas are counted from it."""
        until = moment("before", before)
        check_prunable(until)
        return Pruned(rows=await asyncio.to_thread(lambda: sum(usage.prune(until))))

    @app.get("/admin/running", **common)
    async def show_running() -> RunningList:
        """Show the requests that run now, on the gateway with this data directory. The view is at most a second old."""
        return RunningList(data=await asyncio.to_thread(running.look, settings.journals))


def _groups(by: str) -> list[Dimension]:
    """Raises BadRequest."""
    try:
        return dimensions(by)
    except ValueError as exc:
        raise BadRequest(f"'by': {exc}.", param="by") from None


def _refuse_nul(**words: str | None) -> None:
    """Raise BadRequest for a NUL character, which PostgreSQL does not take."""
    for name, value in words.items():
        if "\0" in (value or ""):
            raise BadRequest(
                "The query holds a NUL character, which no key or model has in its name. Remove it.", param=name
            )
