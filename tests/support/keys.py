"""Keys: requests with a key, the answers of every worker to it, and the client that manages keys."""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from typing import Any, Protocol

import httpx

from tests.support.processes import MESSAGES, NO_TLS

CHAT = "/v1/chat/completions"
ADMIN = "sk-admin-0123456789abcdef"


class Gateway(Protocol):
    """A process of this machine, or a container."""

    @property
    def url(self) -> str:
        """The URL at which it listens."""
        ...


def ask(gateway: Gateway, key: str, **fields: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"}
    body = {"messages": MESSAGES, **fields}
    return httpx.post(gateway.url + CHAT, json=body, headers=headers, timeout=30, verify=NO_TLS)


def status(gateway: Gateway, key: str) -> set[int]:
    """Return the statuses of ten connections, of which each of both workers takes some."""
    body = json.dumps({"messages": MESSAGES})
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}

    def one(_: int) -> int:
        """Without httpx, whose client takes 2 ms, because this is polled."""
        with closing(HTTPConnection(gateway.url.removeprefix("http://"), timeout=30)) as connection:
            connection.request("POST", CHAT, body, headers)
            return connection.getresponse().status

    with ThreadPoolExecutor(10) as pool:
        return set(pool.map(one, range(10)))


def admin(gateway: Gateway, key: str = ADMIN) -> httpx.Client:
    return httpx.Client(base_url=gateway.url, headers={"authorization": f"Bearer {key}"}, timeout=30, verify=NO_TLS)
