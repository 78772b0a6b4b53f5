"""A stand-in for Open WebUI 0.12.4 where its image cannot be had.

It takes the same settings from the same places, and asks the gateway as `utils/headers.py` and `routers/openai.py` do
there, and after each answer its own questions as `utils/middleware.py` and `routers/tasks.py` do. The paths of its
accounts, and who may add one, are those of `routers/auths.py`. It has the standard library only, a page of its own, and
short questions. Open WebUI tells its pages of titles by a socket, which this program does not have.
"""

import base64
import hmac
import json
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from http.cookies import SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

SECRET = os.environ["FORWARD_USER_INFO_HEADER_JWT_SECRET"]
SESSIONS = os.environ["WEBUI_SECRET_KEY"]
FORWARDS, SIGN_UP, SECURE = (
    os.environ.get(it, "").lower() == "true"
    for it in ("ENABLE_FORWARD_USER_INFO_HEADERS", "ENABLE_SIGNUP", "WEBUI_AUTH_COOKIE_SECURE")
)
ORIGINS = os.environ["CORS_ALLOW_ORIGIN"].split(";")
TASK_MODEL = os.environ.get("TASK_MODEL_EXTERNAL")
QUESTIONS = [
    it for it in ("FOLLOW_UP", "TITLE", "TAGS") if os.environ.get(f"ENABLE_{it}_GENERATION", "True").lower() == "true"
]
FILE = Path("/app/backend/data/accounts.json")
ACCOUNTS: dict[str, dict[str, str]] = json.loads(FILE.read_text()) if FILE.exists() else {}


def jwt(claims: dict[str, Any], secret: str) -> str:
    parts = {"alg": "HS256", "typ": "JWT"}, claims
    text = b".".join(base64.urlsafe_b64encode(json.dumps(it).encode()).rstrip(b"=") for it in parts)
    digest = base64.urlsafe_b64encode(hmac.digest(secret.encode(), text, "sha256")).rstrip(b"=")
    return (text + b"." + digest).decode()


def session(account: dict[str, str]) -> str:
    return jwt({"id": account["id"]}, SESSIONS)


def signed(account: dict[str, str]) -> str:
    now, (person, email) = int(time.time()), (account["id"], account["email"])
    user = {"sub": person, "email": email, "name": email, "role": account["role"]}
    return jwt(user | {"iss": "open-webui", "iat": now, "exp": now + 300}, SECRET)


def open_gateway(path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Any:
    own = {"authorization": f"Bearer {os.environ['OPENAI_API_KEY']}", "content-type": "application/json"}
    url = os.environ["OPENAI_API_BASE_URL"] + path
    return urllib.request.urlopen(urllib.request.Request(url, body, own | (headers or {})))


def ask_more(chat: dict[str, Any], headers: dict[str, str]) -> None:
    """Ask for follow-ups, a title and tags, if these are switched on."""
    with open_gateway("/models") as answer:
        models = [it["id"] for it in json.load(answer)["data"]]
    model = TASK_MODEL if TASK_MODEL in models else chat.get("model", models[0])
    for question in QUESTIONS:
        messages = [{"role": "user", "content": f"Suggest: {question}"}]
        body = {"model": model, "messages": messages, "stream": False, "max_tokens": 3}
        open_gateway("/chat/completions", json.dumps(body).encode(), headers).close()


class Window(BaseHTTPRequestHandler):
    @property
    def account(self) -> dict[str, str] | None:
        """Whoever is signed in."""
        cookie = SimpleCookie(self.headers.get("cookie")).get("token")
        return next((it for it in ACCOUNTS.values() if cookie and hmac.compare_digest(session(it), cookie.value)), None)

    def do_GET(self) -> None:
        if self.path == "/health":
            self.tell(200, {"status": True})
        elif self.path == "/":
            self.begin(200, "text/html")
            self.wfile.write(Path(__file__).with_name("page.html").read_bytes())
        elif self.path == "/api/models" and self.account:
            self.ask("/models")
        else:
            self.refuse(404 if self.account else 401)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        action, account = self.path.removeprefix("/api/v1/auths/"), self.account
        if self.headers.get("origin", ORIGINS[0]) not in ORIGINS:  # there, the socket for the answers is refused
            self.refuse(400)
        elif self.path == "/api/chat/completions" and account:
            headers = {"X-OpenWebUI-User-Jwt": signed(account)} if FORWARDS else {}
            if self.ask("/chat/completions", body, headers):
                threading.Thread(target=ask_more, args=(json.loads(body), headers)).start()
        elif action == "signup":
            self.enter(self.added(body) if SIGN_UP or not ACCOUNTS else None)
        elif action == "signin":
            wanted = json.loads(body)
            self.enter(next((it for it in ACCOUNTS.values() if it.items() >= wanted.items()), None))
        elif action == "add" and account and account["role"] == "admin":
            self.tell(200, self.added(body))
        else:
            self.refuse(403 if account else 401)

    def added(self, body: bytes) -> dict[str, str]:
        """A new account. The first one is the administrator's."""
        account = json.loads(body) | {"id": str(uuid4()), "role": "user" if ACCOUNTS else "admin"}
        ACCOUNTS[account["id"]] = account
        FILE.write_text(json.dumps(ACCOUNTS))
        return account

    def enter(self, account: dict[str, str] | None) -> None:
        if not account:
            return self.refuse(403)
        cookie = f"token={session(account)}; Path=/; HttpOnly; SameSite=lax" + "; Secure" * SECURE
        return self.tell(200, account, {"set-cookie": cookie})

    def ask(self, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> bool:
        """Pass on the gateway's answer as it comes, and return whether it came whole. If the browser goes away, leave
        the gateway."""
        try:
            with open_gateway(path, body, headers) as answer:
                self.begin(answer.status, answer.headers["content-type"])
                while piece := answer.read1():
                    self.wfile.write(piece)
                return True
        except urllib.error.HTTPError as error:
            with error:
                self.begin(error.code, "application/json")
                self.wfile.write(error.read())
        except ConnectionError:
            pass
        return False

    def refuse(self, status: int) -> None:
        self.tell(status, {"detail": f"refused with {status}"})

    def tell(self, status: int, answer: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        self.begin(status, "application/json", headers)
        self.wfile.write(json.dumps(answer).encode())

    def begin(self, status: int, content_type: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"content-type": content_type} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()


if __name__ == "__main__":
    assert sys.argv[1:] == ["open_webui.main:app", "--host", "0.0.0.0", "--port", "8080"], sys.argv
    ThreadingHTTPServer(("0.0.0.0", 8080), Window).serve_forever()
