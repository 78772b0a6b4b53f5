"""Edges of HTTP: what clients, browsers and proxies need besides the API itself, and the errors that they get."""

import json
import re
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx
import pytest

from tests.support.processes import AUTH, MESSAGES, FakeEngine, GatewayProcess, running_gateway

CHAT = "/v1/chat/completions"
ORIGIN = {"origin": "https://app.example"}


def raw_request(gateway: GatewayProcess, head: str | bytes) -> bytes:
    """Return everything that comes back until the gateway closes."""
    head = head if isinstance(head, bytes) else head.replace("\n", "\r\n").encode()
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=30) as raw:
        raw.sendall(head)
        return raw.makefile("rb").read()


@pytest.fixture(scope="module")
def browsed(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """A gateway that a web page may call."""
    settings = {"STACK_CORS_ORIGINS": ORIGIN["origin"], "STACK_WORKERS": "1"}
    with running_gateway(tmp_path_factory.mktemp("browsed") / "log", engine.url, **settings) as gateway:
        yield gateway


@pytest.mark.parametrize(
    "path",
    ["/health", "/livez", "/readyz", "/docs", "/docs/static/swagger-ui.css", "/openapi.json", "/v1/models",
     "/v1/models/fake-model"],
)  # fmt: skip
def test_head_is_answered_as_get_without_a_body(gateway: GatewayProcess, path: str) -> None:
    with gateway.client() as client:
        get, head = client.get(path), client.head(path)
    assert head.status_code == get.status_code == 200
    assert head.content == b""
    assert head.headers["content-type"] == get.headers["content-type"]
    if path not in ("/readyz", "/health"):  # they may tell another moment
        assert head.headers["content-length"] == get.headers["content-length"]


def test_head_of_what_is_only_posted_is_405_and_of_nothing_404(gateway: GatewayProcess) -> None:
    with gateway.client() as client:
        assert client.head(CHAT).status_code == 405
        assert client.head(CHAT).headers["allow"] == "POST"
        assert client.head("/nothing").status_code == 404
        assert client.post("/livez").headers["allow"] == "GET, HEAD"
        client.headers.pop("authorization")
        assert client.head("/v1/models").status_code == 401


PREFLIGHT = ORIGIN | {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}


def test_a_listed_page_may_call_a_gateway_on_its_visitors_own_network(browsed: GatewayProcess) -> None:
    with browsed.client() as client:
        answer = client.options(CHAT, headers=PREFLIGHT | {"access-control-request-private-network": "true"})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-private-network"] == "true"
    assert answer.headers["access-control-allow-origin"] == ORIGIN["origin"]


def test_a_listed_page_may_delete_a_stored_response(browsed: GatewayProcess) -> None:
    asks = PREFLIGHT | {"access-control-request-method": "DELETE"}
    with browsed.client() as client:
        answer = client.options("/v1/responses/resp_1", headers=asks)
    assert answer.status_code == 200
    assert "DELETE" in answer.headers["access-control-allow-methods"]


@pytest.mark.parametrize(
    "headers",
    [{"origin": "https://evil.example"}, {"access-control-request-method": "PUT"},
     {"origin": "https://evil.example", "access-control-request-private-network": "true"}],
)  # fmt: skip
def test_a_refused_preflight_has_the_shape_of_every_error(browsed: GatewayProcess, headers: dict[str, str]) -> None:
    with browsed.client() as client:
        answer = client.options(CHAT, headers=PREFLIGHT | headers)
    assert answer.status_code == 400
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert answer.json()["error"]["code"] == "cors_refused"
    told = "STACK_CORS_ORIGINS" if "origin" in headers else "A web page may use DELETE, GET, HEAD, POST."
    assert told in answer.json()["error"]["message"]
    assert answer.headers["x-request-id"]
    if headers.get("origin"):
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("request_line", "headers", "status"),
    [
        (f"POST {CHAT}", "x-long: " + "x" * 40_000, 431),
        (f"OPTIONS {CHAT}", "access-control-request-method: POST\nx-long: " + "x" * 40_000, 431),
        (f"POST {CHAT}", "content-length: 1\ncontent-length: 2", 400),
        ("GET /livez", "host: evil.example\nconnection: close", 400),
    ],
)
def test_a_page_can_read_the_errors_of_the_protocol_too(
    browsed: GatewayProcess, request_line: str, headers: str, status: int
) -> None:
    host = "" if headers.startswith("host") else "host: localhost\n"
    answer = raw_request(browsed, f"{request_line} HTTP/1.1\n{host}origin: {ORIGIN['origin']}\n{headers}\n\n")
    head = answer.partition(b"\r\n\r\n")[0].lower()
    assert head.split()[1] == str(status).encode()
    assert f"access-control-allow-origin: {ORIGIN['origin']}".encode() in head


def test_docs_work_below_a_prefix_that_a_proxy_strips(gateway: GatewayProcess) -> None:
    outside = "https://team.example/llm/docs"
    with gateway.client() as client:
        page = client.get("/docs").text
        named = re.findall(r"""(?:src|href|url)(?:=|: )["']([^"']+)["']""", page)
        assert len(named) >= 4
        for name in named:
            path = urlsplit(urljoin(outside, name)).path
            assert path.startswith("/llm/"), name
            assert client.get(path.removeprefix("/llm")).status_code == 200, name
        (server,) = client.get("/openapi.json").json()["servers"]
    assert urljoin("https://team.example/llm/openapi.json", server["url"]).rstrip("/") == "https://team.example/llm"


def test_the_schema_tells_what_is_really_sent(gateway: GatewayProcess) -> None:
    with gateway.client() as client:
        document = client.get("/openapi.json").json()
    shapes = document["components"]["schemas"]
    for path in document["paths"].values():
        for operation in path.values():
            assert "422" not in operation["responses"]
    assert "HTTPValidationError" not in shapes
    for path, chunk, text in ((CHAT, "ChatCompletionChunk", "delta"), ("/v1/completions", "CompletionChunk", "text")):
        content = document["paths"][path]["post"]["responses"]["200"]["content"]
        assert content["text/event-stream"]["schema"] == {"$ref": f"#/components/schemas/{chunk}"}
        choice = shapes[chunk]["properties"]["choices"]["items"]["$ref"].rpartition("/")[2]
        assert {"finish_reason", text} <= set(shapes[choice]["properties"])
    for name in set(re.findall(r"#/components/schemas/(\w+)", str(document))):
        assert name in shapes


SLIPS = {
    "POST /chat/completions": CHAT,
    "POST /v1/v1/chat/completions": CHAT,
    "POST //v1/chat/completions": CHAT,
    "POST /v1//chat/completions": CHAT,
    "POST /v1/chat/completions/": CHAT,
    "POST /v1/chat/completions/chat/completions": CHAT,
    "POST /openai/v1/completions": "/v1/completions",
    "POST /embeddings": "/v1/embeddings",
    "GET /models": "/v1/models",
    "GET /v1/models/": "/v1/models",
    "GET /v1/v1/models": "/v1/models",
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_mistake_in_the_base_url_names_the_right_path(gateway: GatewayProcess, slip: str) -> None:
    method, path = slip.split()
    with gateway.client() as client:
        answer = client.request(method, gateway.url + path)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (404, "not_found")
    assert f"Did you mean {SLIPS[slip]}?" in error["message"]
    assert "in a single /v1" in error["message"]


@pytest.mark.parametrize("call", ["GET /api/tags", "POST /api/chat", "POST /api/generate", "POST /v1/api/chat"])
def test_a_client_of_ollamas_own_api_is_told_which_one_to_use(gateway: GatewayProcess, call: str) -> None:
    with gateway.client() as client:
        answer = client.request(*call.split())
    assert answer.status_code == 404
    assert "OpenAI client" in answer.json()["error"]["message"]
    assert "/v1" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("host.docker.internal:9000", 200),
        ("host.containers.internal", 200),
        ("localhost.", 200),
        ("stack.localhost", 200),
        ("127.0.0.2:9000", 200),
        ("[::1]:9000", 200),
        ("127.0.0.1.evil.example", 400),
        ("docker.internal.evil.example", 400),
        ("evil.host.docker.internal.example", 400),
        ("localhost.evil", 400),
        ("evil.internal", 400),
        ("10.0.0.1", 400),
    ],
)
def test_names_that_can_only_mean_this_machine_are_local(gateway: GatewayProcess, host: str, status: int) -> None:
    answer = raw_request(gateway, f"GET /health HTTP/1.1\nhost: {host}\nconnection: close\n\n")
    assert int(answer.split()[1]) == status


@pytest.mark.parametrize(
    ("target", "host", "status"),
    [
        ("http://localhost/v1/models", "localhost", 200),
        ("http://localhost:9000/v1/models?x=1", "localhost:9000", 200),
        ("HTTP://LOCALHOST/livez", "localhost", 200),
        ("http://localhost/livez", "LocalHost", 200),
        ("http://localhost:80/livez", "localhost", 200),
        ("http://localhost/livez", "localhost:80", 200),
        ("http://localhost", "localhost", 404),  # the path /
        ("http://other.example/v1/models", "localhost", 404),
        ("http://other.example/v1/models", "other.example", 400),
        ("http://localhost@other.example/v1/models", "localhost", 404),
        ("http://localhost/v1/../api/pull", "localhost", 404),
        ("https://localhost/v1/models", "localhost", 404),
    ],
)
def test_an_absolute_target_is_served_if_it_names_this_server(
    gateway: GatewayProcess, target: str, host: str, status: int
) -> None:
    lines = f"host: {host}\nauthorization: {AUTH['authorization']}\nconnection: close\n"
    assert int(raw_request(gateway, f"GET {target} HTTP/1.1\n{lines}\n").split()[1]) == status


@pytest.mark.parametrize(
    ("first", "said"),
    [
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"this port serves HTTP/1.1"),
        (b"\x16\x03\x01\x02\x00\x01\x00", b"not TLS"),
    ],
)
def test_a_client_of_another_protocol_is_told_which_one_this_port_serves(
    gateway: GatewayProcess, first: bytes, said: bytes
) -> None:
    answer = raw_request(gateway, first)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert said in answer


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 200),
        ("application/json; charset=utf-8", 200),
        ("application/json\t ;charset=utf-8", 200),
        ("Application/JSON", 200),
        ("application/vnd.api+json", 200),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),  # what curl says when nobody tells it otherwise
        ("multipart/form-data; boundary=x", 415),
        ("", 415),
        (None, 415),
    ],
)
def test_only_a_json_body_is_read(gateway: GatewayProcess, content_type: str | None, status: int) -> None:
    headers = AUTH if content_type is None else AUTH | {"content-type": content_type}
    body = httpx.Request("POST", "http://x", json={"messages": MESSAGES}).content
    answer = httpx.post(gateway.url + CHAT, content=body, headers=headers)
    assert answer.status_code == status
    if status == 415:
        assert answer.json()["error"]["param"] == "content-type"
        assert "Content-Type: application/json" in answer.json()["error"]["message"]


INCORRECT = "Incorrect API key provided"


def test_a_wrong_key_is_told_in_the_words_that_clients_look_for(gateway: GatewayProcess) -> None:
    """Some clients recognise a wrong key only by OpenAI's words."""
    for authorization, said in (({}, "You didn't provide an API key"), ({"authorization": "Bearer sk-x"}, INCORRECT)):
        answer = httpx.get(gateway.url + "/v1/models", headers=authorization)
        assert answer.status_code == 401
        assert answer.json()["error"]["message"].startswith(said)


STOPS = [[{}], [1], {}, 5, [["x"]], [None], True]


@pytest.mark.parametrize("stop", STOPS)
def test_a_stop_that_is_not_text_is_refused(gateway: GatewayProcess, stop: Any) -> None:
    with gateway.client() as client:
        answer = client.post(CHAT, json={"messages": MESSAGES, "stop": stop})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "stop")


@pytest.mark.parametrize(("version", "says"), [("1.1", b"HTTP/1.1 100 "), ("1.0", b"HTTP/1.1 200 ")])
def test_only_a_client_of_http_1_1_is_told_to_continue(gateway: GatewayProcess, version: str, says: bytes) -> None:
    """A client of HTTP/1.0 takes the first head for the answer's (RFC 9110, 10.1.1)."""
    body = json.dumps({"messages": MESSAGES})
    head = f"POST /v1/chat/completions HTTP/{version}\r\nhost: localhost\r\nauthorization: {AUTH['authorization']}\r\n"
    head += f"content-type: application/json\r\nexpect: 100-continue\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=30) as raw:
        raw.sendall((head + body).encode())
        assert raw.recv(100).startswith(says)
