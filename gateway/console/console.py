"""Console: own the paths below /console: who may ask for which, and what answers.

What a page needs is read and rendered in one thread of the worker, one page at a time, so that the event loop goes on
with its answers. A worker spends a bounded time on pages; a visitor beyond that is told to wait.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.console import door as doors
from gateway.console import forms
from gateway.console.allowances import TOO_OFTEN, Allowance, Allowances
from gateway.console.ask import Ask
from gateway.console.door import PATH, Door, Refused, TooOften, Visitor, check_form
from gateway.console.keys import KeyPages
from gateway.console.now import Now
from gateway.console.pages import HTML, Pages, answer, redirect
from gateway.console.requests import RequestPages
from gateway.console.sessions import network
from gateway.console.usage import UsagePages
from gateway.errors import InvalidKey, StackError, StoreUnavailable
from gateway.keys.known import Key
from gateway.routing.routes import Routes

# Seconds of processor time that a worker spends on all visitors of a kind: in a second, and at once.
OPERATORS, OWNERS, STRANGERS = (0.05, 1.5), (0.02, 0.5), (0.01, 0.2)
USUAL = 0.02  # seconds that a page in the thread usually costs
HELD = 1.0  # seconds for which a visitor who asked for too much waits for the answer that says so
_HOME = {True: f"{PATH}/now", False: f"{PATH}/own"}  # by whether the visitor is an operator

View = Callable[[Ask], Response]
_Made = TypeVar("_Made")
_ANY = Key(id="")  # may use all models
_FOR_OPERATORS = (
    "This page is for operators. You are signed in with an API key, which sees only its own usage and limits."
)
_FOR_OWNERS = (
    "This page is for the owners of keys, and shows them the usage of their own key. You are signed in as an operator: "
    "see Usage and Keys."
)


class Console:
    """Serve the console. Use it with `async with`."""

    def __init__(
        self,
        door: Door,
        now: Now,
        keys: KeyPages,
        usage: UsagePages,
        requests: RequestPages,
        routes: Routes,
        pages: Pages,
    ) -> None:
        self._door = door
        self._now = now
        self._keys = keys
        self._usage = usage
        self._requests = requests
        self._routes = routes
        self._pages = pages
        self._operators = Allowance(*OPERATORS)
        self._owners, self._strangers = Allowances(*OWNERS), Allowances(*STRANGERS)
        self._thread = ThreadPoolExecutor(1, "console")
        # Made once: whoever asks for too many pages costs no more than any wrong request.
        self._too_often = bytes(self._failed(None, TooOften(TOO_OFTEN, 1.0)).body)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def paths(self) -> list[Route]:
        """Return every path of the console; none if there is no admin key."""
        if not self._door.exists:
            return []
        keys, operator = self._keys, self._operator
        one = f"{PATH}/keys/{{key_id}}"
        return [
            _get(PATH, self._home),
            _get(f"{PATH}/sign-in", self._welcome),
            _post(f"{PATH}/sign-in", self._sign_in),
            _post(f"{PATH}/sign-out", self._sign_out),
            _get(f"{PATH}/static/{{name}}", self._static),
            _get(f"{PATH}/now", operator(self._now_page)),
            _get(f"{PATH}/now.json", self._now_json),
            _get(f"{PATH}/usage", operator(self._usage.show)),
            _get(f"{PATH}/usage.csv", operator(self._usage.csv)),
            _get(f"{PATH}/keys", operator(keys.listing)),
            _post(f"{PATH}/keys", operator(keys.create)),
            _get(f"{PATH}/keys/new", operator(keys.new)),
            _get(one, operator(keys.show)),
            _post(one, operator(keys.change)),
            _post(f"{one}/switch", operator(keys.switch)),
            _post(f"{one}/rotate", operator(keys.rotate)),
            _post(f"{one}/delete", operator(keys.delete)),
            _post(f"{one}/prompt", operator(keys.use_prompt)),
            _post(f"{one}/capture", operator(keys.capture)),
            _get(f"{PATH}/limits", operator(keys.limits)),
            _post(f"{PATH}/limits", operator(keys.set_limits)),
            _get(f"{PATH}/prompts", operator(keys.prompts)),
            _post(f"{PATH}/prompts", operator(keys.set_prompt)),
            _get(f"{PATH}/requests", operator(self._requests.listing)),
            _get(f"{PATH}/requests/{{request_id}}", operator(self._requests.show)),
            _get(f"{PATH}/own", self._owner(self._usage.own)),
            _get(f"{PATH}/own.csv", self._owner(self._usage.own_csv)),
            _get(f"{PATH}/try", self._try),
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
            check_form(request, request.cookies.get(doors.BEFORE, ""), form.get("form_token", ""))
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

    # -- pages ----------------------------------------------------------------------------------------------------

    async def _static(self, request: Request) -> Response:
        found = self._pages.static(request.path_params["name"])
        return found or self._failed(None, Refused("There is no such file.", code="not_found"))

    def _now_page(self, ask: Ask) -> Response:
        return self._pages.page("now", ask.visitor, picture=self._now.picture())

    async def _now_json(self, request: Request) -> Response:
        """The picture for the script. Errors have the API's shape, which the script reads."""
        visitor = await self._door.visitor(request)
        if visitor is None or not visitor.operator:
            raise InvalidKey("Sign in as an operator at /console.")
        await self._allowed(request, visitor)
        return answer(await self._in_thread(request, visitor, self._now.json), "application/json")

    async def _try(self, request: Request) -> Response:
        async def show(visitor: Visitor) -> Response:
            entries = await self._routes.entries(visitor.key or _ANY)
            names = [str(it["id"]) for it in entries[:200]]
            return self._pages.page("try", visitor, models=names)

        return await self._seen(request, show)

    # -- what all of them have in common --------------------------------------------------------------------------

    def _operator(self, view: View) -> Callable[[Request], Awaitable[Response]]:
        """A page for operators."""
        return self._page(view, operator=True)

    def _owner(self, view: View) -> Callable[[Request], Awaitable[Response]]:
        """A page for the owner of a key."""
        return self._page(view, operator=False)

    def _page(self, view: View, *, operator: bool) -> Callable[[Request], Awaitable[Response]]:
        async def serve(request: Request) -> Response:
            async def show(visitor: Visitor) -> Response:
                if visitor.operator != operator:
                    raise Refused(_FOR_OPERATORS if operator else _FOR_OWNERS)
                form: forms.Form = {}
                if request.method == "POST":
                    form = await forms.read(request, forms.LARGE)
                    check_form(request, visitor.token, form.pop("form_token", ""))
                ask = Ask(visitor, dict(request.query_params), request.path_params, form)
                return await self._in_thread(request, visitor, lambda: view(ask))

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
        return self._operators if visitor.key is None else self._owners.of(visitor.key.id)

    def _failed(self, visitor: Visitor | None, error: StackError) -> Response:
        return self._pages.page("error", visitor, error.status, error=error)

    async def _in_thread(self, request: Request, visitor: Visitor, make: Callable[[], _Made]) -> _Made:
        allowance = self._allowance(request, visitor)
        # Now, so that many pages at once are not begun on the same time. `_timed` gives it back.
        allowance.charge(USUAL)
        return await asyncio.get_running_loop().run_in_executor(self._thread, _timed, allowance, make)


def _timed(allowance: Allowance, make: Callable[[], _Made]) -> _Made:
    """Make something in this thread, and charge the time."""
    began = time.thread_time()
    try:
        return make()
    finally:
        allowance.charge(time.thread_time() - began - USUAL)


def _get(path: str, serve: Callable[[Request], Awaitable[Response]]) -> Route:
    return Route(path, serve, methods=["GET"], include_in_schema=False)


def _post(path: str, serve: Callable[[Request], Awaitable[Response]]) -> Route:
    return Route(path, serve, methods=["POST"], include_in_schema=False)
