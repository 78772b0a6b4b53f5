"""Routes: let callers with an admin key alone use the paths below /admin."""

from typing import Annotated, Any

from fastapi import Depends, FastAPI
from fastapi import Request as HttpRequest
from fastapi.security import HTTPBearer

from gateway.api import openapi
from gateway.api.admin.keys import add_key_routes
from gateway.api.admin.limits import add_limit_routes
from gateway.api.admin.prompts import add_prompt_routes
from gateway.api.admin.usage import add_usage_routes
from gateway.errors import BadRequest, InvalidKey
from gateway.keys import secret
from gateway.keys.book import Keybook
from gateway.prompts.book import Promptbook
from gateway.routing.routes import Routes
from gateway.settings import Settings
from gateway.usage.rows import UsageBook

_bearer = HTTPBearer(scheme_name="AdminKey", auto_error=False, description="One of STACK_ADMIN_KEYS.")


def add_admin_routes(
    app: FastAPI, settings: Settings, book: Keybook, prompts: Promptbook, usage: UsageBook, routes: Routes
) -> None:
    """Give the app the paths below /admin, if there is a key for them."""
    digests = {secret.digest(key.encode()) for key in settings.admin_keys()}
    if not digests:
        return

    async def require_admin(request: HttpRequest, _: Annotated[Any, Depends(_bearer)]) -> None:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = secret.digest(token.strip().encode("latin-1"))
        if scheme.lower() != "bearer" or given not in digests:
            raise InvalidKey("This endpoint needs an admin key. Send it in a header: Authorization: Bearer <key>.")
        request.scope["stack.client"].known = True
        _check_query(request)

    errors: dict[int | str, dict[str, Any]] = {"default": {"model": openapi.ErrorEnvelope}}
    common: dict[str, Any] = {"dependencies": [Depends(require_admin)], "tags": ["admin"], "responses": errors}
    add_limit_routes(app, settings, book, usage, common)
    add_usage_routes(app, settings, usage, common)
    add_prompt_routes(app, prompts, routes, common)
    add_key_routes(app, book, common)


def _check_query(request: HttpRequest) -> None:
    """Raises BadRequest that names a parameter which the path doesn't know."""
    route = request.scope["route"]  # FastAPI's
    known = [it.alias for it in route.dependant.query_params]
    for name in request.query_params:
        if name not in known:
            possible = (
                f"Possible parameters: {', '.join(known)}." if known else "This endpoint has no query parameters."
            )
            raise BadRequest(f"'{name[:64]}' is not a query parameter of {route.path}. {possible}", param=name[:64])
