"""Admin: the HTTP API for whoever hands out keys, behind keys of its own. It can do what the `stack` command can.

Where no admin key is set there is no such path. The body is read here, after the key is checked, with a cap: FastAPI
would read it before, whoever sends it.
"""

import asyncio
import datetime as dt
import re
from dataclasses import asdict
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, Query
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gateway import complaints, live, schema, secret
from gateway.errors import BadRequest, InvalidKey, TooLarge
from gateway.exchange import Running
from gateway.keybook import YEAR, Entry, Keybook, KeyFields, LimitFields, NewKeyFields
from gateway.keys import defaults
from gateway.limits import quotas_used
from gateway.pipeline import parse
from gateway.promptbook import Holds, Of, Promptbook, Template, Use, Version
from gateway.settings import Settings
from gateway.usage import DIMENSIONS, UsageBook, check_prunable, dimensions, to_csv

MAX_BODY = 256 * 1024  # bytes
DAY = 86_400

_MOMENT = "A day (2027-01-31, UTC) or seconds since 1970"
Fields = TypeVar("Fields", bound=BaseModel)
_bearer = HTTPBearer(scheme_name="AdminKey", auto_error=False, description="One of STACK_ADMIN_KEYS.")


class NewKey(BaseModel):
    """A key with its secret, which is shown this once."""

    key: Entry
    secret: str


class KeyList(BaseModel):
    data: list[Entry]


class DefaultLimits(BaseModel):
    """Those of keys that have none of their own. What isn't `stored` is a setting (STACK_LIMIT_…)."""

    in_force: LimitFields
    stored: LimitFields


class KeyLimits(BaseModel):
    """`own` are the key's, else the defaults are in force. `used`: tokens of this day and month in UTC."""

    in_force: LimitFields
    own: LimitFields
    used: dict[str, int]


class PromptList(BaseModel):
    data: list[Version]
    uses: list[Holds]


class VersionList(BaseModel):
    data: list[Version]


class Sum(BaseModel):
    """What was used, by what was asked for."""

    key: str | None = None
    name: str | None = Field(None, description="The key's; STACK_API_KEYS of those of that setting.")
    model: str | None = None
    day: str | None = None
    engine: str | None = None
    arm: str | None = None
    outcome: str | None = None
    requests: int
    finished: int
    tokens_in: int
    tokens_out: int
    cached: int = Field(description="Of tokens_in, those the engine had in its cache.")
    counted: int = Field(description="Requests whose tokens the engine did not get to say; the gateway counted them.")


class SumList(BaseModel):
    data: list[Sum]


class RunningList(BaseModel):
    data: list[Running]


class Pruned(BaseModel):
    rows: int


class Rotation(BaseModel):
    """For how long the secrets there are go on working."""

    model_config = ConfigDict(extra="forbid")

    grace_seconds: Annotated[int, Field(ge=0, le=YEAR)] = DAY


def add_admin_routes(app: FastAPI, settings: Settings, book: Keybook, prompts: Promptbook, usage: UsageBook) -> None:
    """Give the app the paths below /admin, if there is a key for them."""
    digests = {secret.digest(key.encode()) for key in settings.admin_keys()}
    if not digests:
        return

    async def require_admin(request: HttpRequest, _: Annotated[Any, Depends(_bearer)]) -> None:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = secret.digest(token.strip().encode("latin-1"))
        if scheme.lower() != "bearer" or given not in digests:
            raise InvalidKey("This needs an admin key. Send it as a header: Authorization: Bearer <key>.")
        _check_query(request)

    errors: dict[int | str, dict[str, Any]] = {"default": {"model": schema.ErrorEnvelope}}
    common: dict[str, Any] = {"dependencies": [Depends(require_admin)], "tags": ["admin"], "responses": errors}
    _add_limit_routes(app, settings, book, usage, common)
    _add_usage_routes(app, settings, usage, common)

    @app.get("/admin/keys", **common)
    async def list_keys() -> KeyList:
        """All keys, without their secrets."""
        return KeyList(data=await asyncio.to_thread(book.list))

    @app.post("/admin/keys", status_code=201, openapi_extra=_takes(NewKeyFields), **common)
    async def create_key(request: HttpRequest) -> NewKey:
        """Make a key. Its secret is in the answer and can't be had again."""
        entry, text = await asyncio.to_thread(book.create, await _body(request, NewKeyFields))
        return NewKey(key=entry, secret=text)

    @app.get("/admin/keys/{key_id}", **common)
    async def show_key(key_id: str) -> Entry:
        """One key."""
        return await asyncio.to_thread(book.show, key_id)

    @app.patch("/admin/keys/{key_id}", openapi_extra=_takes(KeyFields), **common)
    async def change_key(key_id: str, request: HttpRequest) -> Entry:
        """Change what is given; the rest stays. `disabled`, limits, expiry and models hold within a second."""
        return await asyncio.to_thread(book.change, key_id, await _body(request, KeyFields))

    @app.post("/admin/keys/{key_id}/rotate", openapi_extra=_takes(Rotation), **common)
    async def rotate_key(key_id: str, request: HttpRequest) -> NewKey:
        """Make a new secret; the old ones work for the grace period. Not of a key that has expired."""
        asked = await _body(request, Rotation)
        entry, text = await asyncio.to_thread(book.rotate, key_id, asked.grace_seconds)
        return NewKey(key=entry, secret=text)

    @app.delete("/admin/keys/{key_id}", status_code=204, **common)
    async def delete_key(key_id: str) -> Response:
        """Delete a key for good. Its usage stays, with its name."""
        await asyncio.to_thread(book.delete, key_id)
        return Response(status_code=204)

    @app.get("/admin/prompts", **common)
    async def list_prompts() -> PromptList:
        """Every prompt's newest version, and for whom which prompt holds."""
        return PromptList(data=await asyncio.to_thread(prompts.newest), uses=await asyncio.to_thread(prompts.uses))

    @app.put("/admin/prompts/{name}", status_code=201, openapi_extra=_takes(Template), **common)
    async def set_prompt(name: str, request: HttpRequest) -> Version:
        """Make the next version of a prompt."""
        asked = await _body(request, Template)
        named = understand({"name": name}, Use)
        return await asyncio.to_thread(prompts.set, named.name, asked.template)

    @app.get("/admin/prompts/{name}", **common)
    async def show_prompt(name: str) -> VersionList:
        """All versions of a prompt."""
        return VersionList(data=await asyncio.to_thread(prompts.show, name))

    @app.delete("/admin/prompts/{name}", status_code=204, **common)
    async def delete_prompt(name: str) -> Response:
        """Delete a prompt that holds for nobody, with all its versions."""
        await asyncio.to_thread(prompts.delete, name)
        return Response(status_code=204)

    @app.put("/admin/{of}s/{target:path}/prompt", openapi_extra=_takes(Use), **common)
    async def use_prompt(of: Of, target: str, request: HttpRequest) -> Holds:
        """Let a prompt hold for a key, or for a model whoever asks it. It stands before whatever is asked."""
        return await asyncio.to_thread(prompts.use, of, target, await _body(request, Use))

    @app.delete("/admin/{of}s/{target:path}/prompt", status_code=204, **common)
    async def stop_prompt(of: Of, target: str) -> Response:
        """Let none hold for it any more."""
        await asyncio.to_thread(prompts.stop, of, target)
        return Response(status_code=204)


def _add_limit_routes(
    app: FastAPI, settings: Settings, book: Keybook, usage: UsageBook, common: dict[str, Any]
) -> None:
    def told(stored: LimitFields) -> DefaultLimits:
        return DefaultLimits(in_force=LimitFields(**asdict(stored.over(defaults(settings)))), stored=stored)

    @app.get("/admin/limits", **common)
    async def show_default_limits() -> DefaultLimits:
        """What keys may use that have no limits of their own."""
        return told(await asyncio.to_thread(book.defaults))

    @app.patch("/admin/limits", openapi_extra=_takes(LimitFields), **common)
    async def change_default_limits(request: HttpRequest) -> DefaultLimits:
        """Change what is given; null leaves a limit to the settings. It holds within a second."""
        return told(await asyncio.to_thread(book.set_defaults, await _body(request, LimitFields)))

    @app.get("/admin/keys/{key_id}/limits", **common)
    async def show_limits(key_id: str) -> KeyLimits:
        """What a key may use, and what it has used of its quotas. They are changed with the key."""
        entry, general = await asyncio.to_thread(lambda: (book.show(key_id), book.defaults()))
        in_force = entry.limits.over(general.over(defaults(settings)))
        used = await asyncio.to_thread(quotas_used, usage, key_id)
        return KeyLimits(in_force=LimitFields(**asdict(in_force)), own=entry.limits, used=used)


def _add_usage_routes(app: FastAPI, settings: Settings, usage: UsageBook, common: dict[str, Any]) -> None:
    in_csv = {200: {"content": {"text/csv": {"schema": {"type": "string"}}}}}
    in_either = common | {"responses": common["responses"] | in_csv}

    @app.get("/admin/usage", response_model=SumList, response_model_exclude_unset=True, **in_either)
    async def show_usage(
        by: Annotated[str, Query(description="What to sum up by, of " + ", ".join(DIMENSIONS))] = "key,model",
        since: Annotated[str, Query(alias="from", description=_MOMENT)] = "0",
        until: Annotated[str | None, Query(alias="to", description=_MOMENT + "; that day is included")] = None,
        key: Annotated[str | None, Query(description="Of this key alone, by its id")] = None,
        model: Annotated[str | None, Query(description="Of this model alone")] = None,
        form: Annotated[str, Query(alias="format", description="json or csv")] = "json",
    ) -> SumList | Response:
        """Who used what. A row is there within a second or two of its request's end."""
        try:
            groups = dimensions(by)
        except ValueError as exc:
            raise BadRequest(f"'by': {exc}.", param="by") from None
        begin = _moment("from", since)
        end = _moment("to", until, end=True) if until is not None else 1 << 60
        if begin > end:
            raise BadRequest("'from' is after 'to'.", param="from")
        if form not in ("json", "csv"):
            raise BadRequest("'format' must be json or csv.", param="format")
        if "\0" in f"{key}{model}":
            raise BadRequest("No key and no model has a NUL in its name.", param="key" if "\0" in f"{key}" else "model")
        found = await asyncio.to_thread(usage.totals, groups, begin, end, key, model)
        if form == "csv":
            return Response(to_csv(groups, found), media_type="text/csv")
        return SumList(data=[Sum(**row) for row in found])

    @app.delete("/admin/usage", **common)
    async def prune_usage(before: Annotated[str, Query(description=_MOMENT)]) -> Pruned:
        """Delete what came before, for good: before this month (UTC) at most, as its quotas are counted from it."""
        moment = _moment("before", before)
        check_prunable(moment)
        return Pruned(rows=await asyncio.to_thread(lambda: sum(usage.prune(moment))))

    @app.get("/admin/running", **common)
    async def show_running() -> RunningList:
        """Who is being answered right now, by the gateway of this data directory; a second old at most."""
        return RunningList(data=await asyncio.to_thread(live.look, settings.journals))


def _check_query(request: HttpRequest) -> None:
    """Raises BadRequest that names a parameter which the path doesn't know."""
    route = request.scope["route"]  # FastAPI's
    known = [it.alias for it in route.dependant.query_params]
    for name in request.query_params:
        if name not in known:
            possible = f"There are: {', '.join(known)}." if known else "There is none here."
            raise BadRequest(f"'{name[:64]}' is no query parameter of {route.path}. {possible}", param=name[:64])


def _moment(name: str, words: str, *, end: bool = False) -> int:
    """A day (its end, if asked for) or seconds since 1970, in milliseconds. Raises BadRequest."""
    if re.fullmatch(r"[0-9]{1,11}", words):
        return int(words) * 1000
    try:
        begins = dt.datetime.strptime(words, "%Y-%m-%d").replace(tzinfo=dt.UTC)
    except ValueError:
        raise BadRequest(f"'{name}' must be a day, such as 2027-01-31, or seconds since 1970.", param=name) from None
    return int(begins.timestamp() + end * DAY) * 1000


def _takes(model: type[BaseModel]) -> dict[str, Any]:
    content = {"application/json": {"schema": model.model_json_schema(ref_template="#/components/schemas/{model}")}}
    return {"requestBody": {"required": True, "content": content}}


async def _body(request: HttpRequest, model: type[Fields]) -> Fields:
    """The request's body as `model`. Raises BadRequest that names the field, or TooLarge."""
    raw = b""
    async for piece in request.stream():
        raw += piece
        if len(raw) > MAX_BODY:
            raise TooLarge(f"The body is larger than {MAX_BODY} bytes.")
    return understand(parse(raw or b"{}"), model)


def understand(body: dict[str, Any], model: type[Fields]) -> Fields:
    """The body as `model`. Raises BadRequest that names the field."""
    try:
        return model.model_validate(body, strict=True)
    except ValidationError as exc:
        param, message = complaints.first(exc, model)
        raise BadRequest(f"'{param or 'body'}': {message}.", param=param or None) from None
