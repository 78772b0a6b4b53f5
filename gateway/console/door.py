"""Door: decide who is signed in, and whether a form was sent from a page of ours.

An operator signs in with an admin key, and a key's owner with that key. A session lasts for a stated time at most, and
ends with its key. Every form holds a token that only a page of the same session can know, and the browser must say that
the form comes from a page of this host.
"""

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response

from gateway import headers as names
from gateway.console.sessions import Sessions
from gateway.errors import InvalidKey, StackError
from gateway.keys import secret
from gateway.keys.authenticate import Keys
from gateway.keys.known import Key
from gateway.settings import Settings

COOKIE = "stack_console"
BEFORE = "stack_console_before"  # of a visitor who is not signed in yet: what the form's token is made from
PATH = "/console"
HOUR = 3600  # seconds
_NUMBER = 16  # characters of a form's token that tell it from the session's other forms
WRONG = "This is neither an admin key nor a valid API key of this gateway."
SENT = (
    "This form was sent already, and it acts only once. Look at the key or the prompt first. If a secret was made and "
    "you did not see it, rotate that key. To send the form once more, load its page again."
)


class Refused(StackError):
    """Say that a form or a page is refused to this visitor."""

    status, type, code = 403, "invalid_request_error", "forbidden"


class SentAlready(Refused):
    """Say that a form that acts once was sent before."""

    status = 409


class TooOften(StackError):
    """Say that there were too many requests. `wait` is in seconds."""

    status, type, code = 429, "rate_limit_error", "rate_limit_exceeded"

    def __init__(self, message: str, wait: float) -> None:
        super().__init__(message)
        self.headers = {names.RETRY_AFTER: str(max(1, round(wait + 0.5)))}


@dataclass(frozen=True, slots=True)
class Visitor:
    """Whoever is signed in: the owner of `key`, or an operator if that is None."""

    token: str
    key: Key | None

    @property
    def operator(self) -> bool:
        """Whether all pages are open to the visitor."""
        return self.key is None

    @property
    def form_token(self) -> str:
        """What a form of this session must hold: another one for each form."""
        return form_token(self.token, secrets.token_hex(_NUMBER // 2))


class Door:
    """Let visitors in and out."""

    def __init__(self, settings: Settings, keys: Keys, sessions: Sessions) -> None:
        self._admins = {secret.digest(key.encode()) for key in settings.admin_keys()}
        self._seconds = settings.stack_console_hours * HOUR
        self._keys = keys
        self._sessions = sessions

    @property
    def exists(self) -> bool:
        """Whether there is an admin key, without which there is no console."""
        return bool(self._admins)

    async def visitor(self, request: Request) -> Visitor | None:
        """Whoever sends this request; None if nobody is signed in. Raises GatewayBusy, or StoreUnavailable if the
        session's key cannot be checked, and then the session goes on."""
        token = request.cookies.get(COOKIE, "")
        digest = self._sessions.find(token) if token else None
        if digest is None:
            return None
        if digest in self._admins:
            return Visitor(token, None)
        try:
            return Visitor(token, await self._keys.find(digest))
        except InvalidKey:
            self._sessions.end(token)
            return None

    async def sign_in(self, request: Request, typed: str) -> str:
        """Begin a session with a key that was typed in. Returns its token. Raises InvalidKey, TooOften, or another
        StackError if nobody can tell whether the key is right.
        """
        address = request.client.host if request.client else ""
        if (wait := self._sessions.try_in(address)) > 0:
            raise TooOften("There were too many attempts to sign in. Wait, and then try again.", wait)
        digest = await self._digest(request, typed.strip())
        self._sessions.was_right(address)
        return self._sessions.begin(digest, self._seconds)

    async def _digest(self, request: Request, typed: str) -> bytes:
        digest = secret.digest(typed.encode())
        if digest in self._admins:
            return digest
        try:
            key = await self._keys.authenticate(
                {names.AUTHORIZATION: b"Bearer " + typed.encode()}, request.scope["client"]
            )
        except InvalidKey as exc:
            raise InvalidKey(WRONG) from exc
        return key.digest

    def sign_out(self, request: Request, form_token: str) -> None:
        """End the session of this request's cookie, on all workers, also if its key cannot be checked. Without a
        session, nothing happens. Raises Refused or GatewayBusy."""
        token = request.cookies.get(COOKIE, "")
        if token and self._sessions.find(token) is not None:
            check_form(request, token, form_token)
            self._sessions.end(token)

    def use(self, form_token: str) -> None:
        """Use a form that acts once. Raises SentAlready, on all workers, or GatewayBusy."""
        if not self._sessions.use(form_token):
            raise SentAlready(SENT)

    def give_back(self, form_token: str) -> None:
        """Let a form be sent again, because nothing was done. Raises GatewayBusy."""
        self._sessions.give_back(form_token)

    def remember(self, request: Request, response: Response, token: str) -> None:
        """Give the browser the cookie of a session. It is for TLS alone if the page came by TLS, which only the
        browser knows: a proxy in front may have ended it."""
        _set(response, COOKIE, token, self._seconds, secure=_by_tls(request))


def form_token(token: str, number: str = "0" * _NUMBER) -> str:
    """Return the token of a form of that session, which begins with the form's number."""
    return number + hashlib.sha256(b"form " + number.encode() + token.encode()).hexdigest()


def welcome(request: Request, response: Response, before: str) -> None:
    """Give a browser that is not signed in the cookie from which the token of the form is made."""
    if request.cookies.get(BEFORE) != before:
        _set(response, BEFORE, before, HOUR, secure=False)


def before(request: Request) -> str:
    """Return the value of that cookie, or a new one."""
    return request.cookies.get(BEFORE) or secrets.token_urlsafe(32)


def forget(response: Response) -> None:
    """Have the browser drop its cookies."""
    response.delete_cookie(COOKIE, path=PATH, httponly=True, samesite="strict")
    response.delete_cookie(BEFORE, path=PATH, httponly=True, samesite="strict")


def check_form(request: Request, token: str, given: str) -> None:
    """Raises Refused unless the form holds that session's token and comes from a page of this host."""
    if not token or not hmac.compare_digest(form_token(token, given[:_NUMBER]).encode(), given.encode()):
        raise Refused("This form is out of date. Go back, load the page again, and then send the form again.")
    origin, host = request.headers.get("origin", ""), request.headers.get("host", "")
    if not origin or _host_of(origin) != host.lower():
        raise Refused(
            "This form was not sent from a page of this gateway. Open the page at this gateway's own address, and send "
            "the form again."
        )


def _host_of(origin: str) -> str | None:
    """Return the host of an origin, with its port; None if the origin is malformed."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def _by_tls(request: Request) -> bool:
    return request.headers.get("origin", "").lower().startswith("https://")


def _set(response: Response, name: str, value: str, seconds: int, *, secure: bool) -> None:
    response.set_cookie(name, value, max_age=seconds, path=PATH, secure=secure, httponly=True, samesite="strict")
