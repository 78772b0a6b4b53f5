"""Console: own the paths below /console: who may ask for which, and what answers.

A worker keeps the door, and has pages made in a process beside the workers (gateway.console.process). How much of that
process's time visitors may use is bounded; a visitor beyond that is told to wait.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.console import door as doors
from gateway.console import forms
from gateway.console.allowances import TOO_OFTEN, Allowance, Allowances
from gateway.console.ask import Ask
from gateway.console.door import PATH, Door, Refused, TooOften, Visitor, check_form
from gateway.console.now import Engines
from gateway.console.pages import HTML, Pages, answer, redirect
from gateway.console.process import Client
from gateway.console.sessions import network
from gateway.errors import BadRequest, InvalidKey, NotFound, StackError, StoreUnavailable
from gateway.keys.known import Key
from gateway.routing.routes import Routes

# Seconds that a worker lets all visitors of a kind use: in a second, and at once. README.md has the reasons.
OPERATORS, OWNERS, STRANGERS = (0.15, 3.0), (0.06, 1.0), (0.1, 2.0)
USUAL = 0.02  # seconds that a page usually costs in the console's process
HELD = 1.0  # seconds for which a visitor who asked for too much waits for the answer that says so
_HOME = {True: f"{PATH}/now", False: f"{PATH}/own"}  # by whether the visitor is an operator

_ONCE = {"keys.create", "key.rotate", "prompts.set"}  # what a form that is sent twice would do twice
Live = Callable[[Visitor], Awaitable[dict[str, Any]]]  # what only a worker knows
_ANY = Key(id="")  # may use all models
_FOR_OPERATORS = (
    "This page is for operators. You are signed in with an API key, which sees only its own usage and limits."
)
_FOR_OWNERS = (
    "This page is for the owners of keys, and shows them the usage of their own key. You are signed in as an operator: "
    "see Usage and Keys."
)


class Console:
    """Serve the console."""

    def __init__(self, door: Door, engines: Engines, routes: Routes, pages: Pages, process: Client) -> None:
        self._door = door
        self._engines = engines
        self._routes = routes
        self._pages = pages
        self._process = process
        self._operators = Allowances(*OPERATORS)  # by session: several people may have one admin key
        self._owners, self._strangers = Allowances(*OWNERS), Allowances(*STRANGERS)
        # Made once: whoever asks for too many pages costs no more than any wrong request.
        self._too_often = bytes(self._failed(None, TooOften(TOO_OFTEN, 1.0)).body)

    def paths(self) -> list[Route]:
        """Return every path of the console; none if there is no admin key."""
        if not self._door.exists:
            return []
        operator, owner = self._operator, self._owner
        one = f"{PATH}/keys/{{key_id}}"
        return [
            _get(PATH, self._home),
            _get(f"{PATH}/sign-in", self._welcome),
            _post(f"{PATH}/sign-in", self._sign_in),
            _post(f"{PATH}/sign-out", self._sign_out),
            _get(f"{PATH}/static/{{name}}", self._static),
            _get(f"{PATH}/now", operator("now", self._now)),
            _get(f"{PATH}/now.json", self._now_json),
            _get(f"{PATH}/usage", operator("usage")),
            _get(f"{PATH}/usage.csv", operator("usage.csv")),
            _get(f"{PATH}/keys", operator("keys")),
            _post(f"{PATH}/keys", operator("keys.create")),
            _get(f"{PATH}/keys/new", operator("keys.new")),
            _get(one, operator("key")),
            _post(one, operator("key.change")),
            _post(f"{one}/switch", operator("key.switch")),
            _post(f"{one}/rotate", operator("key.rotate")),
            _post(f"{one}/delete", operator("key.delete")),
            _post(f"{one}/prompt", operator("key.prompt")),
            _post(f"{one}/capture", operator("key.capture")),
            _get(f"{PATH}/limits", operator("limits")),
            _post(f"{PATH}/limits", operator("limits.set")),
            _get(f"{PATH}/prompts", operator("prompts")),
            _post(f"{PATH}/prompts", operator("prompts.set")),
            _get(f"{PATH}/requests", operator("requests")),
            _get(f"{PATH}/requests/{{request_id}}", operator("request")),
            _get(f"{PATH}/own", owner("own")),
            _get(f"{PATH}/own.csv", owner("own.csv")),
            _get(f"{PATH}/try", self._anyone("try", self._models)),
            _get(f"{PATH}/{{rest:path}}", self._nothing),
        ]

    # -- coming and going -----------------------------------------------------------------------------------------

    async def _home(self, request: Request) -> Response:
        async def show(visitor: Visitor) -> Response:
            return redirect(_HOME[visitor.operator])

        return await self._seen(request, show)

    async def _welcome(self, request: Request) -> Response:
        return await self._told(request, None, lambda: self._sign_in_page(request))

    async def _sign_in(self, request: Request) -> Response:
        async def sign_in() -> Response:
            form = await forms.read(request, forms.SMALL)
            try:
                check_form(request, request.cookies.get(doors.BEFORE, ""), form.get("form_token", ""))
            except Refused:
                if await self._door.visitor(request) is not None:
                    return redirect(PATH)  # signed in meanwhile, in another tab
                raise
            try:
                token = await self._door.sign_in(request, form.get("key", ""))
            except (InvalidKey, TooOften) as exc:
                return self._sign_in_page(request, exc)
            response = redirect(PATH)
            doors.forget(response)
            self._door.remember(request, response, token)
            return response

        return await self._told(request, None, sign_in)

    async def _sign_out(self, request: Request) -> Response:
        async def sign_out() -> Response:
            form = await forms.read(request, forms.SMALL)
            self._door.sign_out(request, form.get("form_token", ""))
            response = redirect(f"{PATH}/sign-in")
            doors.forget(response)
            return response

        return await self._told(request, None, sign_out)

    def _sign_in_page(self, request: Request, error: StackError | None = None) -> Response:
        before = doors.before(request)
        status = error.status if error else 200
        page = self._pages.page("sign_in", None, status, error=error, form_token=doors.form_token(before))
        doors.welcome(request, page, before)
        return page

    async def _nothing(self, request: Request) -> Response:
        async def show(_: Visitor) -> Response:
            raise NotFound("The console has no such page.")

        return await self._seen(request, show)

    # -- pages ----------------------------------------------------------------------------------------------------

    async def _static(self, request: Request) -> Response:
        found = self._pages.static(request.path_params["name"])
        return found or self._failed(None, NotFound("There is no such file."))

    async def _now_json(self, request: Request) -> Response:
        """The picture for the script. Errors have the API's shape, which the script reads."""
        visitor = await self._door.visitor(request)
        if visitor is None or not visitor.operator:
            raise InvalidKey("Sign in as an operator at /console.")
        await self._allowed(request, visitor)
        return await self._made(request, "now.json", Ask(visitor, live=await self._now(visitor)))

    async def _now(self, _: Visitor) -> dict[str, Any]:
        return self._engines.told()

    async def _models(self, visitor: Visitor) -> dict[str, Any]:
        entries = await self._routes.entries(visitor.key or _ANY)
        return {"models": [str(it["id"]) for it in entries[:200]]}

    # -- what all of them have in common --------------------------------------------------------------------------

    def _operator(self, view: str, live: Live | None = None) -> Callable[[Request], Awaitable[Response]]:
        """A page for operators."""
        return self._page(view, live, lambda it: None if it.operator else _FOR_OPERATORS)

    def _owner(self, view: str) -> Callable[[Request], Awaitable[Response]]:
        """A page for the owner of a key."""
        return self._page(view, None, lambda it: _FOR_OWNERS if it.operator else None)

    def _anyone(self, view: str, live: Live) -> Callable[[Request], Awaitable[Response]]:
        """A page for everybody who is signed in."""
        return self._page(view, live, lambda _: None)

    def _page(
        self, view: str, live: Live | None, refuse: Callable[[Visitor], str | None]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def serve(request: Request) -> Response:
            async def show(visitor: Visitor) -> Response:
                if (why := refuse(visitor)) is not None:
                    raise Refused(why)
                if any("\0" in it for it in request.query_params.values()):
                    raise BadRequest("The address has a NUL character. Remove it.")  # PostgreSQL refuses it
                form: forms.Form = {}
                form_token = ""
                if request.method == "POST":
                    form = await forms.read(request, forms.LARGE)
                    form_token = form.pop("form_token", "")
                    check_form(request, visitor.token, form_token)
                known = {} if live is None else await live(visitor)
                ask = Ask(visitor, dict(request.query_params), request.path_params, form, known)
                if view in _ONCE:
                    return await self._once(request, view, ask, form_token)
                return await self._made(request, view, ask)

            return await self._seen(request, show)

        return serve

    async def _seen(self, request: Request, show: Callable[[Visitor], Awaitable[Response]]) -> Response:
        """Show something to whoever is signed in, and the way to the door to anybody else."""
        try:
            visitor = await self._door.visitor(request)
        except StoreUnavailable as exc:
            error = exc
            return await self._told(request, None, lambda: self._failed(None, error))
        if visitor is None:
            if request.method == "GET":
                return redirect(f"{PATH}/sign-in")
            return self._failed(None, Refused("You are not signed in any more. Sign in, and send the form again."))
        request.scope["stack.client"].known = True
        return await self._told(request, visitor, lambda: show(visitor))

    async def _told(
        self, request: Request, visitor: Visitor | None, show: Callable[[], Response | Awaitable[Response]]
    ) -> Response:
        """What it shows; or what is wrong, on a page."""
        try:
            await self._allowed(request, visitor)
        except TooOften as exc:
            return answer(self._too_often, HTML, exc.status, exc.headers)
        try:
            shown = show()
            return shown if isinstance(shown, Response) else await shown
        except StackError as exc:
            return self._failed(visitor, exc)

    async def _allowed(self, request: Request, visitor: Visitor | None) -> None:
        """Begin a page. Raises TooOften, after a while: a program that does not wait by itself has to."""
        try:
            self._allowance(request, visitor).take()
        except TooOften:
            await asyncio.sleep(HELD)
            raise

    def _allowance(self, request: Request, visitor: Visitor | None) -> Allowance:
        if visitor is None:
            return self._strangers.of(network(request.client.host if request.client else ""))
        return self._operators.of(visitor.token) if visitor.key is None else self._owners.of(visitor.key.id)

    def _failed(self, visitor: Visitor | None, error: StackError) -> Response:
        return self._pages.page("error", visitor, error.status, error=error)

    async def _once(self, request: Request, view: str, ask: Ask, form_token: str) -> Response:
        """Have the page of a form made that acts once. It may be sent again if it did nothing."""
        self._door.use(form_token)
        page = await self._made(request, view, ask)
        if page.status_code >= BadRequest.status:
            self._door.give_back(form_token)
        return page

    async def _made(self, request: Request, view: str, ask: Ask) -> Response:
        """Have a page made, and charge its time."""
        allowance = self._allowance(request, ask.visitor)
        allowance.charge(USUAL)  # now, so that many pages at once are not begun on the same time
        page, seconds = await self._process.page(view, ask)
        allowance.charge(seconds - USUAL)
        return page


def _get(path: str, serve: Callable[[Request], Awaitable[Response]]) -> Route:
    return Route(path, serve, methods=["GET"], include_in_schema=False)


def _post(path: str, serve: Callable[[Request], Awaitable[Response]]) -> Route:
    return Route(path, serve, methods=["POST"], include_in_schema=False)
