"""A front end whose users share one key: it signs their names as Open WebUI 0.12.4 does (its utils/headers.py)."""

import time
from typing import Any

import httpx
import jwt

from tests.support.keys import CHAT
from tests.support.processes import MESSAGES, NO_TLS, GatewayProcess

HEADER = "x-openwebui-user-jwt"


def token(signing: str, name: str, **claims: Any) -> str:
    now = int(time.time())
    user = {"sub": name, "email": f"{name}@people.example", "name": f"Name of {name}", "role": "user"}
    return jwt.encode(user | {"iss": "open-webui", "iat": now, "exp": now + 300} | claims, signing, algorithm="HS256")


class FrontEnd:
    """Ask a gateway, with a key and the signing secret of the key's users."""

    def __init__(self, gateway: GatewayProcess, key: str, signing: str) -> None:
        self._gateway = gateway
        self._key = key
        self.signing = signing

    def ask(self, name: str, path: str = CHAT, **fields: Any) -> httpx.Response:
        """Ask for a user. `fields` are of the body, and `x_…` of the head."""
        head = {it.replace("_", "-"): fields.pop(it) for it in list(fields) if it.startswith("x_")}
        body = ({"messages": MESSAGES} if path == CHAT else {}) | fields
        return self.call("POST", path, {HEADER: token(self.signing, name)} | head, json=body)

    def call(self, method: str, path: str, head: dict[str, str], **more: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {self._key}"} | head
        return httpx.request(method, self._gateway.url + path, headers=headers, timeout=60, verify=NO_TLS, **more)
