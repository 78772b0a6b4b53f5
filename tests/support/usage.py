"""Requests whose usage is looked at: each has an id that its row names."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from tests.support.processes import AUTH, MESSAGES, GatewayProcess, post

CHAT = "/v1/chat/completions"


def ask(
    gateway: GatewayProcess, request_id: str, path: str = CHAT, *, patience: float = 30, **fields: Any
) -> httpx.Response:
    """What breaks is not resumed, but for `resumed`."""
    with gateway.client() as client:
        return _ask(client, request_id, path, patience, **fields)


def _ask(client: httpx.Client, request_id: str, path: str, patience: float, **fields: Any) -> httpx.Response:
    body = fields if path != CHAT else {"messages": MESSAGES, **fields}
    headers = AUTH | {"x-request-id": request_id} | ({} if request_id == "resumed" else {"x-stack-resume": "off"})
    return post(client, path, json=body, headers=headers, timeout=patience)


def ask_many(gateway: GatewayProcess, name: str, count: int) -> set[str]:
    """Their ids; every one is answered. Eight connections are used."""
    names = [f"{name}-{number}" for number in range(count)]
    with gateway.client() as client, ThreadPoolExecutor(8) as pool:
        assert {it.status_code for it in pool.map(lambda it: _ask(client, it, CHAT, 30), names)} == {200}
    return set(names)
