"""What a caller sees: answers, errors, names and headers."""

import json
import re
import socket
from typing import Any

import httpx
import pytest

from tests.support.processes import AUTH, MESSAGES, FakeEngine, GatewayProcess, running_gateway

CHAT = "/v1/chat/completions"


def assert_envelope(response: httpx.Response, status: int, kind: str, code: str | None) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == (kind, code)
    assert error["message"]
    return error


def test_blocking_answer_is_the_engines_own(gateway: GatewayProcess, engine: FakeEngine, mark: str) -> None:
    body = {"messages": MESSAGES, "user": mark, "min_p": 0.1, "x_new_field": {"deep": [1, "ü"]}, "seed": 1}
    with gateway.client() as client:
        answer = client.post(CHAT, json=body)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"] == "one two three"
    assert answer.json()["x_engine_extra"] == {"kept": True}  # unknown fields of the answer survive
    seen = engine.wait_seen(mark)
    assert seen["body"] == body | {"model": "fake-model"}  # …and of the request; the default model is filled in


@pytest.mark.parametrize("name", ["llama3.1:8b", "org/name:tag"])
def test_alias_reaches_the_engine_as_its_model(
    gateway: GatewayProcess, engine: FakeEngine, mark: str, name: str
) -> None:
    with gateway.client() as client:
        assert client.post(CHAT, json={"model": name, "messages": MESSAGES, "user": mark}).status_code == 200
    assert engine.wait_seen(mark)["body"]["model"] == "fake-model"


def test_models_are_listed_and_found_by_any_name(gateway: GatewayProcess) -> None:
    with gateway.client() as client:
        listed = client.get("/v1/models").json()
        assert listed["object"] == "list"
        names = {"fake-model", "other/model:1b", "llama3.1:8b", "org/name:tag"}
        assert {model["id"] for model in listed["data"]} == names
        for name in names:
            for path in (name, name.replace("/", "%2F")):
                model = client.get(f"/v1/models/{path}").json()
                assert (model["id"], model["object"]) == (name, "model")
        assert_envelope(client.get("/v1/models/nope"), 404, "invalid_request_error", "model_not_found")


def test_completions_and_embeddings(gateway: GatewayProcess, engine: FakeEngine, mark: str) -> None:
    with gateway.client() as client:
        answer = client.post("/v1/embeddings", json={"input": ["a", "b"], "user": mark})
        assert answer.json()["data"][0]["embedding"] == [0.5, -0.25]
        assert engine.wait_seen(mark)["path"] == "/v1/embeddings"
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer wrong", "Basic Zm9vOmJhcg==", AUTH["authorization"][:-1]]
)
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/embeddings", "/v1/models", "/v1/models/fake-model"])
def test_no_key_no_entry(gateway: GatewayProcess, header: str | None, path: str) -> None:
    headers = {} if header is None else {"authorization": header}
    method = "GET" if "models" in path else "POST"
    answer = httpx.request(method, gateway.url + path, headers=headers, content=b"{}")
    assert_envelope(answer, 401, "invalid_request_error", "invalid_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_both_listed_keys_work_in_any_case_of_bearer(gateway: GatewayProcess, scheme: str) -> None:
    for key in (AUTH["authorization"].split()[1], "sk-second-0123456789abcdef"):
        assert httpx.get(gateway.url + "/v1/models", headers={"authorization": f"{scheme} {key}"}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "not_found"),
        ("GET", "/v1", 404, "not_found"),
        ("GET", "/v1/nope", 404, "not_found"),
        ("POST", "/api/pull", 404, "not_found"),
        ("POST", "/v1/chat/completions/", 404, "not_found"),
        ("POST", "//v1/chat/completions", 404, "not_found"),
        ("POST", "/v1/%2e%2e/api/pull", 404, "not_found"),
        ("POST", "/tokenize", 404, "not_found"),
        ("GET", "/slots", 404, "not_found"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("POST", "/v1/responses/compact", 404, "not_found"),
        ("DELETE", "/v1/models/fake-model", 405, "method_not_allowed"),
        ("PUT", "/health", 405, "method_not_allowed"),
        ("OPTIONS", CHAT, 405, "method_not_allowed"),
    ],
)
def test_only_listed_routes_exist(
    gateway: GatewayProcess, engine: FakeEngine, method: str, path: str, status: int, code: str
) -> None:
    before = len(engine.seen())
    with gateway.client() as client:
        answer = client.request(method, httpx.URL(gateway.url + path), content=b"{}")
    assert_envelope(answer, status, "invalid_request_error", code)
    assert ("allow" in answer.headers) == (status == 405)
    assert len(engine.seen()) == before


BAD = [
    (b"", None),
    (b"{", None),
    (b"[]", None),
    (b'"x"', None),
    (b'{"messages": NaN}', None),
    (b'{"messages": 1e400}', None),
    (b'{"messages": "\\ud800"}', None),
    (b"\xef\xbb\xbf{}", None),
    ('{"messages": []}'.encode("utf-16"), None),
    (b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
    (b'{"x":' + b"[" * 500 + b"]" * 500 + b', "messages": [{"role": "user"}]}', None),
    (b'{"x": ' + b"9" * 5000 + b"}", None),
    (b"{}", "messages"),
    (b'{"messages": []}', "messages"),
    (b'{"messages": "hi"}', "messages"),
    (b'{"messages": [1]}', "messages[0]"),
    (b'{"messages": [{"role": "user"}, {"content": "x"}]}', "messages[1]"),
    (b'{"messages": [{"role": "user"}], "model": 7}', "model"),
    (b'{"messages": [{"role": "user"}], "stream": "yes"}', "stream"),
    (b'{"messages": [{"role": "user"}], "stream_options": true}', "stream_options"),
]


@pytest.mark.parametrize(("body", "param"), BAD, ids=[repr(body[:24]) for body, _ in BAD])
def test_bad_bodies_name_the_field(gateway: GatewayProcess, body: bytes, param: str | None) -> None:
    with gateway.client() as client:
        answer = client.post(CHAT, content=body)
    error = assert_envelope(answer, 400, "invalid_request_error", "too_many_values" if len(body) > 100_000 else None)
    assert error["param"] == param


def test_unknown_model_is_refused_before_the_engine_is_asked(
    gateway: GatewayProcess, engine: FakeEngine, mark: str
) -> None:
    with gateway.client() as client:
        answer = client.post(CHAT, json={"model": "../../api/pull", "messages": MESSAGES, "user": mark})
    error = assert_envelope(answer, 404, "invalid_request_error", "model_not_found")
    assert "fake-model" in error["message"]  # says what there is
    assert not engine.seen(mark)


def test_bodies_over_the_cap_are_refused_declared_or_not(gateway: GatewayProcess) -> None:
    big = b'{"messages": "' + b"x" * 1_000_000 + b'"}'
    with gateway.client() as client:
        assert_envelope(client.post(CHAT, content=big), 413, "invalid_request_error", "request_too_large")
        pieces = (big[start : start + 65536] for start in range(0, len(big), 65536))  # chunked: no length declared
        assert_envelope(client.post(CHAT, content=pieces), 413, "invalid_request_error", "request_too_large")
        answer = client.post(CHAT, content=b"x", headers={"content-encoding": "br"})
        assert_envelope(answer, 415, "invalid_request_error", "unsupported_encoding")


def test_a_declared_body_over_the_cap_is_refused_before_it_is_sent(gateway: GatewayProcess) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\nauthorization: {AUTH['authorization']}\r\n"
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=30) as raw:
        raw.sendall(
            f"{head}content-type: application/json\r\ncontent-length: 2000000\r\nexpect: 100-continue\r\n\r\n".encode()
        )
        assert raw.recv(64).startswith(b"HTTP/1.1 413 ")  # and no "100 Continue"


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("abc-DEF_9", True),
        ("x" * 64, True),
        ("x" * 65, False),
        ("a b", False),
        ("a;b", False),
        ("ü", False),
        (None, False),
    ],
)
def test_a_callers_request_id_comes_back_and_does_not_reach_the_engine(
    gateway: GatewayProcess, engine: FakeEngine, mark: str, sent: str | None, kept: bool
) -> None:
    headers = {} if sent is None else {"x-request-id": sent.encode()}
    with gateway.client() as client:
        answer = client.post(CHAT, json={"messages": MESSAGES, "user": mark}, headers=headers)
    returned = answer.headers["x-request-id"]
    assert (returned == sent) == kept
    at_engine = engine.wait_seen(mark)["headers"]["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", at_engine), "128 bits that nobody can guess"
    assert at_engine != returned
    assert gateway.lines(returned)[-2]["engine_request_id"] == at_engine
    if not kept:
        assert re.fullmatch("req_[0-9a-f]{32}", returned)


def test_each_attempt_at_an_engine_has_an_id_of_its_own(gateway: GatewayProcess, engine: FakeEngine, mark: str) -> None:
    fails = {"messages": MESSAGES, "user": mark, "script": [["json", [500, {"error": "no"}]]]}
    with gateway.client() as client:
        for _ in range(2):
            client.post(CHAT, json=fails, headers={"x-request-id": "the-same"})
    ids = [it["headers"]["x-request-id"] for it in engine.seen(mark)]
    assert len(ids) >= 3, "it is asked again"
    assert len(set(ids)) == len(ids)
    assert "the-same" not in ids


def test_request_ids_that_the_gateway_makes_have_nothing_in_common(gateway: GatewayProcess) -> None:
    with gateway.client() as client:
        ids = [client.get("/v1/models").headers["x-request-id"].removeprefix("req_") for _ in range(20)]
    for place in range(0, 32, 8):
        assert len({it[place : place + 8] for it in ids}) == 20


def test_callers_headers_stay_here(gateway: GatewayProcess, engine: FakeEngine, mark: str) -> None:
    private = {
        "cookie": "a=b",
        "x-api-key": "k",
        "proxy-authorization": "p",
        "openai-organization": "o",
        "x-stainless-os": "l",
    }
    with gateway.client() as client:
        client.post(CHAT, json={"messages": MESSAGES, "user": mark}, headers=private)
    seen = engine.wait_seen(mark)["headers"]
    assert set(seen) == {"host", "content-type", "content-length", "accept-encoding", "user-agent", "x-request-id"}


def test_the_engines_own_key_is_sent_to_it(engine: FakeEngine, tmp_path: Any, mark: str) -> None:
    with running_gateway(tmp_path / "log", engine.url, LLM_API_KEY="engine-secret", STACK_WORKERS="1") as gateway:
        with gateway.client() as client:
            client.post(CHAT, json={"messages": MESSAGES, "user": mark})
        assert engine.wait_seen(mark)["headers"]["authorization"] == "Bearer engine-secret"
        assert "engine-secret" not in gateway.log_path.read_text()


ENGINE_ERRORS = [
    (400, {"error": {"message": "bad temperature", "param": "temperature", "code": 400}}, 400, None, "bad temperature"),
    (422, {"error": "native text"}, 422, None, "native text"),
    (400, {"error": {"message": "too long", "type": "exceed_context_size_error"}}, 400, "context_length_exceeded", ""),
    (400, {"message": "This model's maximum context length is 8"}, 400, "context_length_exceeded", ""),
    (401, {"error": "Unauthorized"}, 502, "engine_unauthorized", ""),
    (403, {}, 502, "engine_unauthorized", ""),
    (404, {"error": {"message": "model 'x' not found"}}, 404, "model_not_found", ""),
    (429, {}, 503, "server_is_overloaded", ""),
    (503, {"error": "server busy, please try again"}, 503, "server_is_overloaded", ""),
    (503, {"error": {"message": "Loading model", "code": 503}}, 503, "model_loading", ""),
    (500, {"error": "panic at /root/secret.go:17"}, 502, "engine_error", ""),
    (501, {"error": {"message": "This server does not support embeddings"}}, 400, "unsupported", ""),
    *((it, {}, 502, "engine_error", "LLM_BASE_URL") for it in (301, 302, 303, 307, 308)),
    (304, {}, 502, "engine_error", ""),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("status", "body", "expected", "code", "says"), ENGINE_ERRORS)
def test_engine_errors_come_out_in_one_shape(
    gateway: GatewayProcess, status: int, body: object, expected: int, code: str | None, says: str, stream: bool
) -> None:
    request = {"messages": MESSAGES, "stream": stream, "script": [["json", [status, body]]]}
    with gateway.client() as client:
        answer = client.post(CHAT, json=request)
    kind = "invalid_request_error" if expected < 500 else "server_error"
    error = assert_envelope(answer, expected, kind, code)
    assert says in error["message"]
    assert "secret.go" not in answer.text
    assert ("retry-after" in answer.headers) == (expected == 503)


def test_an_engine_that_redirects_is_asked_once_and_its_location_does_not_leak(
    gateway: GatewayProcess, engine: FakeEngine, mark: str
) -> None:
    script = [["head", [308, {"location": "https://inner.example/v1", "content-length": "0"}]], ["end"]]
    with gateway.client() as client:
        answer = client.post(CHAT, json={"messages": MESSAGES, "user": mark, "script": script})
    error = assert_envelope(answer, 502, "server_error", "engine_error")
    assert "LLM_BASE_URL" in error["message"]
    assert "inner.example" not in answer.text
    assert len(engine.seen(mark)) == 1


def test_html_from_a_broken_engine_does_not_leak(gateway: GatewayProcess) -> None:
    page = "<html>10.0.0.7 internal</html>"
    script = [["head", [500, {"content-type": "text/html"}]], ["text", page], ["end"]]
    with gateway.client() as client:
        answer = client.post(CHAT, json={"messages": MESSAGES, "script": script})
    assert_envelope(answer, 502, "server_error", "engine_error")
    assert "10.0.0.7" not in answer.text


@pytest.mark.parametrize("body", ["not json", "[1]", '{"choices": ['])
def test_an_unusable_answer_is_502(gateway: GatewayProcess, body: str) -> None:
    script = [["head", [200, {"content-type": "application/json"}]], ["text", body], ["end"]]
    with gateway.client() as client:
        answer = client.post(CHAT, json={"messages": MESSAGES, "script": script})
    assert_envelope(answer, 502, "server_error", "engine_error")


def raw_request(gateway: GatewayProcess, head: str) -> bytes:
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=30) as raw:
        raw.sendall(head.replace("\n", "\r\n").encode())
        return raw.makefile("rb").readline()


@pytest.mark.parametrize(
    ("hosts", "status"),
    [
        (["localhost"], 200),
        (["127.0.0.1:9000"], 200),
        (["[::1]:1"], 200),
        (["LOCALHOST:80"], 200),
        (["gateway:9000"], 200),
        ([], 400),
        (["localhost", "localhost"], 400),
        (["evil.example"], 400),
        (["localhost.evil.example"], 400),
        (["x/health?"], 400),
        (["localhost:"], 400),
        ([""], 400),
    ],
)
def test_host_must_be_one_and_local(gateway: GatewayProcess, hosts: list[str], status: int) -> None:
    lines = "".join(f"host: {host}\n" for host in hosts)
    assert (
        raw_request(gateway, f"GET /health HTTP/1.1\n{lines}connection: close\n\n").split()[1] == str(status).encode()
    )


def test_allowed_hosts_and_cors_are_opt_in(gateway: GatewayProcess, engine: FakeEngine, tmp_path: Any) -> None:
    origin = {"origin": "https://app.example"}
    preflight = origin | {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    with gateway.client() as client:
        assert "access-control-allow-origin" not in client.get("/v1/models", headers=origin).headers
    settings = {"STACK_ALLOWED_HOSTS": "LLM.example.:9000,fd00::1", "STACK_CORS_ORIGINS": "https://App.example:443/"}
    settings |= {"STACK_PUBLISH": "[fd00::2]:9000", "STACK_WORKERS": "1"}
    with running_gateway(tmp_path / "log", engine.url, **settings) as other, other.client() as client:
        for host in ("llm.example", "llm.example:443", "[fd00::1]:9000", "[fd00::2]:9000"):
            assert client.get("/health", headers={"host": host}).status_code == 200, host
        assert client.get("/health", headers={"host": "evil.example"}).status_code == 400
        allowed = client.options(CHAT, headers=preflight)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://app.example"
        assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
        refused = client.options(CHAT, headers=preflight | {"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in refused.headers
        error = client.post(CHAT, headers=origin, content=b"{")
        assert error.headers["access-control-allow-origin"] == "https://app.example"  # a page may read the error


def test_the_schema_tells_a_form_and_a_sound(gateway: GatewayProcess) -> None:
    with gateway.client() as client:
        paths = client.get("/openapi.json").json()["paths"]
    assert paths["/v1/audio/transcriptions"]["post"]["requestBody"]["content"].keys() == {"multipart/form-data"}
    assert paths["/v1/audio/speech"]["post"]["responses"]["200"]["content"].keys() == {"audio/*"}


def test_health_names_the_backend_and_asks_nobody(gateway: GatewayProcess, engine: FakeEngine) -> None:
    answer = httpx.get(gateway.url + "/health").json()
    assert answer["status"] == "ok"
    assert answer["backend"] == engine.url + "/v1"


def test_schema_and_docs_work_offline(gateway: GatewayProcess) -> None:
    with gateway.client() as client:
        schema = client.get("/openapi.json").json()
        page = client.get("/docs").text
        assert "cdn" not in page.lower()
        for source in ("/docs/static/swagger-ui-bundle.js", "/docs/static/swagger-ui.css"):
            assert source.removeprefix("/") in page
            assert client.get(source).status_code == 200
    assert set(schema["paths"]) == {
        CHAT,
        "/v1/completions",
        "/v1/embeddings",
        "/v1/rerank",
        "/v2/rerank",
        "/rerank",
        "/v1/audio/transcriptions",
        "/v1/audio/speech",
        "/v1/responses",
        "/v1/responses/input_tokens",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/responses/{response_id}",
        "/v1/responses/{response_id}/input_items",
        "/v1/models",
        "/v1/models/{model}",
        "/health",
        "/livez",
        "/readyz",
    }
    chat = schema["paths"][CHAT]["post"]
    assert set(chat["responses"]) >= {"200", "400", "401", "404", "413", "429", "502", "503", "504"}
    assert "422" not in chat["responses"]  # FastAPI's own validation isn't used: bad bodies are 400
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert {"retry-after", "x-ratelimit-remaining-tokens"} <= set(chat["responses"]["429"]["headers"])
    assert chat["security"]
    assert "stack keys create" in schema["components"]["securitySchemes"]["HTTPBearer"]["description"]
    assert json.dumps(schema).count("$ref") > 5
