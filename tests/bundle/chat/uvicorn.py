"""A stand-in for Open WebUI 0.12.4 where its image cannot be had.

It takes the same settings from the same places, and asks the gateway as `utils/headers.py` and `routers/openai.py` do
there. It has the standard library only, and no accounts: the header `x-person` says who asks.
"""

import base64
import hmac
import json
import os
import sys
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SECRET = os.environ["FORWARD_USER_INFO_HEADER_JWT_SECRET"]
FORWARDS = os.environ["ENABLE_FORWARD_USER_INFO_HEADERS"].lower() == "true"


def signed(person: str) -> str:
    now = int(time.time())
    user = {"sub": person, "email": f"{person}@people.example", "name": person, "role": "user"}
    parts = {"alg": "HS256", "typ": "JWT"}, user | {"iss": "open-webui", "iat": now, "exp": now + 300}
    text = b".".join(base64.urlsafe_b64encode(json.dumps(it).encode()).rstrip(b"=") for it in parts)
    digest = base64.urlsafe_b64encode(hmac.digest(SECRET.encode(), text, "sha256")).rstrip(b"=")
    return (text + b"." + digest).decode()


class Window(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.tell(200, b'{"status": true}')

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        headers = {"authorization": f"Bearer {os.environ['OPENAI_API_KEY']}", "content-type": "application/json"}
        if FORWARDS:
            headers["X-OpenWebUI-User-Jwt"] = signed(self.headers["x-person"])
        url = os.environ["OPENAI_API_BASE_URL"] + "/chat/completions"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60) as answer:
                self.tell(answer.status, answer.read())
        except urllib.error.HTTPError as error:
            with error:
                self.tell(error.code, error.read())

    def tell(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    assert sys.argv[1:] == ["open_webui.main:app", "--host", "0.0.0.0", "--port", "8080"], sys.argv
    assert os.environ["WEBUI_SECRET_KEY"]
    ThreadingHTTPServer(("0.0.0.0", 8080), Window).serve_forever()
