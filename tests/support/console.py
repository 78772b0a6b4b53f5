"""The console as a browser without scripts uses it: cookies, forms and pages."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import unescape
from pathlib import Path
from typing import Any

import httpx

from tests.support.keys import ADMIN
from tests.support.processes import NO_TLS, GatewayProcess, running_gateway

SETTINGS = {"STACK_ADMIN_KEYS": ADMIN}


class Visit:
    """One browser at one gateway."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=30, verify=NO_TLS)
        self.origin = url

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.http.get(path, **options)

    def post(self, path: str, form: dict[str, str], **headers: str) -> httpx.Response:
        """Send a form as a browser does, with the token of the page that was loaded last."""
        return self.http.post(path, data=form, headers={"origin": self.origin, **headers})

    def token(self, path: str) -> str:
        """The token in the forms of a page."""
        return token_of(self.get(path))

    def send(self, page: str, path: str, **form: str) -> httpx.Response:
        """Load a page, and send a form with its token."""
        return self.post(path, {"form_token": self.token(page), **form})

    def sign_in(self, key: str) -> httpx.Response:
        return self.send("/console/sign-in", "/console/sign-in", key=key)


def token_of(page: httpx.Response) -> str:
    found = re.search(r'name="form_token" value="([0-9a-f]+)"', page.text)
    assert found, page.text
    return found[1]


def secret_of(page: httpx.Response) -> str:
    """The secret that a page shows once."""
    found = re.search(r'<code id="secret">([^<]+)</code>', page.text)
    assert found, page.text
    return unescape(found[1])


def key_id_of(page: httpx.Response) -> str:
    found = re.search(r'href="/console/keys/([0-9A-Za-z]{10})"', page.text)
    assert found, page.text
    return found[1]


def names_of(page: str) -> list[str]:
    """The names of the keys in the list of keys."""
    return re.findall(r'<th scope="row"><a href="/console/keys/[^"]+">([^<]+)</a>', page)


def make_key(operator: Visit, name: str, **fields: str) -> tuple[str, str]:
    """A new key's id and secret."""
    page = operator.send("/console/keys/new", "/console/keys", name=name, **fields)
    assert page.status_code == 201, page.text
    return key_id_of(page), secret_of(page)


def change_key(operator: Visit, key_id: str, action: str = "", **form: str) -> str:
    """Send a form of a key's page, and return the page that follows."""
    answer = operator.send(f"/console/keys/{key_id}", f"/console/keys/{key_id}{action}", **form)
    assert answer.status_code == 303, answer.text
    return operator.get(answer.headers["location"]).text


@contextmanager
def visiting(gateway: GatewayProcess, key: str | None = ADMIN) -> Iterator[Visit]:
    """A browser that is signed in with that key, if it has one."""
    visit = Visit(gateway.url)
    with visit.http:
        if key is not None:
            assert visit.sign_in(key).headers["location"] == "/console"
        yield visit


@contextmanager
def console_gateway(log: Path, engine_url: str, **settings: str) -> Iterator[GatewayProcess]:
    with running_gateway(log, engine_url, **SETTINGS, **settings) as gateway:
        yield gateway
