"""Attacks, one row each: what is sent on a bare socket, and what comes back. For every row the engine sees nothing of
it, the workers stay the same processes, and others are served meanwhile."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from gateway import guard
from tests.processes import KEY, MESSAGES, FakeEngine, GatewayProcess, fake_engine, running_gateway

CHAT = "/v1/chat/completions"
READ = 1  # seconds, STACK_READ_TIMEOUT here
SWEEP = 1  # a bound is kept to within this
CANARY = "canary-9c4e"
HOST = "host: localhost\r\n"
KEYED = f"{HOST}authorization: Bearer {KEY}\r\n"
BODY = '{"messages":[{"role":"user","content":"Hello"}]}'


@pytest.fixture(scope="module")
def engine() -> Iterator[FakeEngine]:
    with fake_engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def gateway(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    settings = {
        "STACK_READ_TIMEOUT": str(READ),
        "STACK_MAX_BODY_BYTES": "1000000",
        "STACK_LOG_LEVEL": "DEBUG",
    }
    with running_gateway(tmp_path_factory.mktemp("attacked") / "log", engine.url, **settings) as gateway:
        workers = gateway.workers()
        yield gateway
        assert gateway.workers() == workers
        text = gateway.log_path.read_text()
        assert "Traceback" not in text
        for secret in (CANARY, KEY, "\x1b"):
            assert secret not in text


@pytest.fixture(autouse=True)
def _unharmed(gateway: GatewayProcess, engine: FakeEngine, request: pytest.FixtureRequest) -> Iterator[None]:
    before = len(engine.seen())
    yield
    if not request.node.get_closest_marker("usefixtures"):  # those that are let through on purpose
        assert len(engine.seen()) == before
    with gateway.client() as client:
        assert client.get("/livez").status_code == 200


reaches_the_engine = pytest.mark.usefixtures("mark")


def connect(gateway: GatewayProcess) -> socket.socket:
    return socket.create_connection(("127.0.0.1", gateway.port), timeout=30)


def send(raw: socket.socket, data: bytes) -> None:
    """Send as much as is wanted: the gateway may have closed before the end."""
    with suppress(ConnectionError, TimeoutError):
        raw.sendall(data)


def rest(raw: socket.socket) -> bytes:
    """Everything up to the end of the connection, which must come."""
    got = b""
    while data := raw.recv(65536):
        got += data
    return got


def answer(got: bytes) -> tuple[int, dict[str, str], bytes]:
    head, _, body = got.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(first.split()[1]), headers, body


def assert_refused(gateway: GatewayProcess, got: bytes, status: int, code: str | None = None) -> None:
    """One whole answer in our envelope, and one line in the log."""
    seen, headers, body = answer(got)
    assert seen == status, got
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert code is None or error["code"] == code
    lines = gateway.lines(headers["x-request-id"])
    assert [(line["msg"], line["status"]) for line in lines] == [("request", status)]


def get(target: str, version: str = "1.1") -> str:
    return f"GET {target} HTTP/{version}\r\n{KEYED}\r\n"


def post(headers: str = "", body: str = BODY, target: str = CHAT) -> str:
    return f"POST {target} HTTP/1.1\r\n{KEYED}{headers}content-length: {len(body)}\r\n\r\n{body}"


def chunked(body: str, headers: str = "transfer-encoding: chunked\r\n", version: str = "1.1") -> str:
    return f"POST {CHAT} HTTP/{version}\r\n{KEYED}{headers}\r\n{body}"


WHOLE = f"{len(BODY):x}\r\n{BODY}\r\n"  # the body as a chunk

# ── The head is refused: our envelope, then the connection is closed ─────────────────────────────────────────────────

HEADS = {
    # framing that two servers could read differently
    "Content-Length and Transfer-Encoding": (
        chunked("0\r\n\r\n", "content-length: 3\r\ntransfer-encoding: chunked\r\n"),
        400,
    ),
    "Transfer-Encoding and Content-Length": (
        chunked("0\r\n\r\n", "transfer-encoding: chunked\r\ncontent-length: 3\r\n"),
        400,
    ),
    "two Content-Lengths": (post("content-length: 3\r\n"), 400),
    "Content-Length: +3": (chunked("abc", "content-length: +3\r\n"), 400),
    "Content-Length: -3": (chunked("abc", "content-length: -3\r\n"), 400),
    "Content-Length: 3, 3": (chunked("abc", "content-length: 3, 3\r\n"), 400),
    "Content-Length beyond 64 bits": (chunked("abc", f"content-length: {'9' * 30}\r\n"), 400),
    "Transfer-Encoding: xchunked": (chunked("0\r\n\r\n", "transfer-encoding: xchunked\r\n"), 400),
    "Transfer-Encoding twice": (chunked("0\r\n\r\n", "transfer-encoding: chunked\r\n" * 2), 400),
    "Transfer-Encoding, vertical tab": (chunked("0\r\n\r\n", "transfer-encoding:\x0bchunked\r\n"), 400),
    "space before the colon": (chunked("0\r\n\r\n", "transfer-encoding : chunked\r\n"), 400),
    "bare LF for all lines": (get("/livez").replace("\r\n", "\n"), 400),
    "bare LF in a header": (f"GET /livez HTTP/1.1\r\nx: y\n{KEYED}\r\n", 400),
    "bare CR in a header": (f"GET /livez HTTP/1.1\r\nx: y\rz: a\r\n{KEYED}\r\n", 400),
    "a folded header": (f"GET /livez HTTP/1.1\r\nx: y\r\n z\r\n{KEYED}\r\n", 400),
    "a fold before the first header": (f"GET /livez HTTP/1.1\r\n {KEYED}\r\n", 400),
    # a head that isn't one
    "NUL in a header": (f"GET /livez HTTP/1.1\r\nx: a\0b\r\n{KEYED}\r\n", 400),
    "an escape sequence in a header": (f"GET /livez HTTP/1.1\r\nx: \x1b[31m\r\n{KEYED}\r\n", 400),
    "a header without a name": (f"GET /livez HTTP/1.1\r\n: y\r\n{KEYED}\r\n", 400),
    "a header without a colon": (f"GET /livez HTTP/1.1\r\nxy\r\n{KEYED}\r\n", 400),
    "an unknown method": (get("/livez").replace("GET", "BREW"), 400),
    "a method in small letters": (get("/livez").replace("GET", "get"), 400),
    "TLS": ("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "HTTP/0.9": ("GET /livez\r\n\r\n", 400),
    "HTTP/1.2": (get("/livez", "1.2"), 400),
    "HTTP/2.0": (get("/livez", "2.0"), 400),
    "HTTP/2's preface": ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    # targets
    "an absolute-form target": (get(f"http://localhost{CHAT}"), 404),
    "an absolute-form target inside": (get("http://engine:8080/slots"), 404),
    "a file": (get("file:///etc/passwd"), 404),
    "an authority": (f"CONNECT engine:8080 HTTP/1.1\r\n{KEYED}\r\n", 404),
    "CONNECT with a path": (f"CONNECT {CHAT} HTTP/1.1\r\n{KEYED}\r\n", 404),
    "an authority with GET": (get("engine:8080"), 400),
    "an asterisk": (f"OPTIONS * HTTP/1.1\r\n{KEYED}\r\n", 404),
    "a fragment": (get(f"{CHAT}#x"), 400),
    "NUL in the target": (get("/livez\0"), 400),
    "a tab in the target": (get("/li\tvez"), 400),
    "a space in the target": (get("/li vez"), 400),
    "an escape sequence in the target": (get("/\x1b[31m"), 400),
    "a target beyond ASCII": (get("/\xff"), 400),
    # sizes
    "101 headers": (f"GET /livez HTTP/1.1\r\n{HOST}" + "x: y\r\n" * 100 + "\r\n", 431),
    "2,000 headers": (f"GET /livez HTTP/1.1\r\n{HOST}" + "x: y\r\n" * 2000 + "\r\n", 431),
    "90 headers of 7 KB": (f"GET /livez HTTP/1.1\r\n{HOST}" + f"x: {'y' * 7000}\r\n" * 90 + "\r\n", 431),
    "a header of 33 KB": (f"GET /livez HTTP/1.1\r\n{HOST}x: {'y' * 33_000}\r\n\r\n", 431),
    "a header of 20 MB": (f"GET /livez HTTP/1.1\r\n{HOST}x: {'y' * 20_000_000}\r\n\r\n", 431),
    "a header's name of 20 MB": (f"GET /livez HTTP/1.1\r\n{HOST}{'y' * 20_000_000}: x\r\n\r\n", 431),
    "a target of 40 KB": (get("/" + "a" * 40_000), 431),
    "a target of 20 MB": (get("/" + "a" * 20_000_000), 431),
    # bodies whose framing breaks
    "a chunk's size in bad hex": (chunked("0x3\r\nabc\r\n0\r\n\r\n"), 400),
    "a negative chunk": (chunked("-1\r\nabc\r\n0\r\n\r\n"), 400),
    "a chunk beyond 64 bits": (chunked("f" * 17 + "\r\nabc\r\n0\r\n\r\n"), 400),
    "a chunk longer than it says": (chunked("1\r\nabc\r\n0\r\n\r\n"), 400),
    "a bare LF after a chunk's size": (chunked("3\nabc\n0\n\n"), 400),
    "endless trailers": (chunked(WHOLE + "0\r\n" + "x: y\r\n" * 200_000), 431),
    "a trailer of 20 MB": (chunked(f"{WHOLE}0\r\nx: {'y' * 20_000_000}"), 431),
    "an endless chunk extension": (chunked(f"3;x={'y' * 20_000_000}"), 431),
}


@pytest.mark.parametrize("name", HEADS)
def test_refused_by_the_protocol(gateway: GatewayProcess, name: str) -> None:
    text, status = HEADS[name]
    with connect(gateway) as raw:
        send(raw, text.encode("latin-1"))
        got = rest(raw)  # the connection ends
    assert_refused(gateway, got, status, {400: "invalid_http", 404: "not_found", 431: "headers_too_large"}[status])
    assert answer(got)[1]["connection"] == "close"


def test_a_hundred_headers_are_served(gateway: GatewayProcess) -> None:
    with connect(gateway) as raw:
        send(raw, f"GET /livez HTTP/1.1\r\n{HOST}{CLOSE}".encode() + b"x: y\r\n" * 98 + b"\r\n")
        assert answer(rest(raw))[0] == 200


# ── Refused further in ───────────────────────────────────────────────────────────────────────────────────────────────

CLOSE = "connection: close\r\n"
REQUESTS = {
    # Hosts
    "no Host": (f"GET /livez HTTP/1.1\r\n{CLOSE}\r\n", 400, "invalid_host"),
    "HTTP/1.0 without a Host": ("GET /livez HTTP/1.0\r\n\r\n", 400, "invalid_host"),
    "two Hosts": (f"GET /livez HTTP/1.1\r\n{HOST}{HOST}{CLOSE}\r\n", 400, "invalid_host"),
    "a Host that moves the path": (f"GET /v1/models HTTP/1.1\r\nhost: x/health?\r\n{CLOSE}\r\n", 400, "invalid_host"),
    "a Host with a user": (f"GET /livez HTTP/1.1\r\nhost: localhost@evil\r\n{CLOSE}\r\n", 400, "invalid_host"),
    "a strange Host": (f"GET /livez HTTP/1.1\r\nhost: evil.example\r\n{CLOSE}\r\n", 400, "invalid_host"),
    # trailers are no headers
    "the key in a trailer": (
        chunked(f"{WHOLE}0\r\nauthorization: Bearer {KEY}\r\n\r\n").replace(KEYED, HOST + CLOSE),
        401,
        "invalid_api_key",
    ),
    # bodies
    "gzip": (post(f"{CLOSE}content-encoding: gzip\r\n"), 415, "unsupported_encoding"),
    "gzip as a transfer coding": (
        chunked(WHOLE + "0\r\n\r\n", f"{CLOSE}transfer-encoding: gzip, chunked\r\n"),
        415,
        "unsupported_encoding",
    ),
    "a declared body beyond the cap": (chunked("", f"{CLOSE}content-length: 1000001\r\n"), 413, "request_too_large"),
    "a chunked body beyond the cap": (
        chunked("f4241\r\n" + "x" * 1_000_001 + "\r\n0\r\n\r\n", f"{CLOSE}transfer-encoding: chunked\r\n"),
        413,
        "request_too_large",
    ),
    "an endless body": (
        chunked(("f4240\r\n" + "x" * 1_000_000 + "\r\n") * 50, f"{CLOSE}transfer-encoding: chunked\r\n"),
        413,
        "request_too_large",
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_refused_by_the_application(gateway: GatewayProcess, name: str) -> None:
    text, status, code = REQUESTS[name]
    with connect(gateway) as raw:
        send(raw, text.encode())
        got = rest(raw)
    assert_refused(gateway, got, status, code)


PATHS = [
    "/v1/../api/pull",
    "/v1/%2e%2e/api/pull",
    "/v1/models/../../api/pull",
    "/v1/models/%2e%2e%2f%2e%2e%2fapi%2fpull",
    "/v1/models/..%5c..%5cslots",
    "/v1/models/%00",
    "//v1//chat/completions",
    "//engine:8080/slots",
    "/v1//chat/completions",
    "/v1/chat/completions/",
    "/v1/chat/completions;x",
    "/v1/chat/completions%00",
    "/v1/chat/completions%20",
    "/v1/chat%2fcompletions",
    "/v1%2Fchat%2Fcompletions",
    "/v1/chat/%63ompletions",
    "/v1/chat\\completions",
    "/V1/chat/completions",
    "/%6divez",
    "/api/pull",
    "/slots",
    "/metrics",
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_paths_off_the_list_do_not_exist(gateway: GatewayProcess, method: str, path: str) -> None:
    text = f"{method} {path} HTTP/1.1\r\n{KEYED}{CLOSE}content-length: {len(BODY)}\r\n\r\n{BODY}"
    with connect(gateway) as raw:
        send(raw, text.encode())
        got = rest(raw)
    allowed = (404, 405) if path.startswith("/v1/models/") else (404,)
    assert_refused(gateway, got, answer(got)[0])
    assert answer(got)[0] in allowed


METHODS = ["PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "LINK"]


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/embeddings", "/v1/models", "/readyz"])
def test_methods_off_the_list_are_405(gateway: GatewayProcess, path: str) -> None:
    for method in [*METHODS, "POST" if path in ("/v1/models", "/readyz") else "GET"]:
        with connect(gateway) as raw:
            send(raw, post(CLOSE, target=path).replace("POST", method, 1).encode())
            got = rest(raw)
        assert_refused(gateway, got, 405, "method_not_allowed")
        assert method not in answer(got)[1]["allow"]


# ── Slow ones ────────────────────────────────────────────────────────────────────────────────────────────────────────

SLOW = {
    # name: what is sent at once, what is then sent every tenth of a second, the answer (None: closed without one)
    "silence": (b"", b"", None),
    "empty lines": (b"", b"\r\n", None),
    "half a request line": (b"GET /li", b"", 408),
    "a dripped target": (b"GET /", b"a", 408),
    "dripped headers": (f"GET /livez HTTP/1.1\r\n{HOST}".encode(), b"x: y\r\n", 408),
    "a dripped header": (f"GET /livez HTTP/1.1\r\n{HOST}x: ".encode(), b"y", 408),
    "no body": (f"POST {CHAT} HTTP/1.1\r\n{KEYED}content-length: 9000\r\n\r\n".encode(), b"", 408),
    "a dripped body": (f"POST {CHAT} HTTP/1.1\r\n{KEYED}content-length: 9000\r\n\r\n".encode(), b" ", 408),
    "dripped chunks": (chunked("").encode(), b"1\r\n \r\n", 408),
    "dripped trailers": (chunked(WHOLE + "0\r\n").encode(), b"x: y\r\n", 408),
    "a dripped body that nobody waits for": (
        f"POST /v1/nope HTTP/1.1\r\n{KEYED}content-length: 9000\r\n\r\n".encode(),
        b" ",
        404,
    ),
}


@pytest.mark.parametrize("name", SLOW)
def test_slow_ones_are_closed_and_others_served(gateway: GatewayProcess, name: str) -> None:
    """Fifty at once. The bound is READ + SWEEP, or LINGER after an answer; five times that is waited."""
    first, drip, status = SLOW[name]
    bound = 5 * (5 + SWEEP if status == 404 else READ + SWEEP)
    open_ones = {}
    for _ in range(50):
        raw = connect(gateway)
        raw.setblocking(False)
        raw.send(first)
        open_ones[raw] = b""
    done = []
    deadline = time.monotonic() + bound
    with gateway.client() as others:
        while open_ones:
            assert time.monotonic() < deadline, f"{len(open_ones)} are still open"
            assert others.get("/livez").status_code == 200
            for raw in list(open_ones):
                try:
                    data = raw.recv(65536)
                    open_ones[raw] += data
                    ended = not data
                except BlockingIOError:
                    ended = False
                except ConnectionError:  # it dripped into the closed connection
                    ended = True
                if ended:
                    done.append(open_ones.pop(raw))
                    raw.close()
                elif drip:
                    with suppress(OSError):
                        raw.send(drip)
            time.sleep(0.1)
    for got in done:
        if status is None:
            assert got == b""
        elif got:  # a reset may have overtaken the answer where the client went on sending
            assert_refused(gateway, got, status, "request_timeout" if status == 408 else None)
    assert status is None or sum(map(bool, done)) > 40


@reaches_the_engine
def test_a_body_that_makes_progress_is_waited_for(gateway: GatewayProcess, engine: FakeEngine, mark: str) -> None:
    body = json.dumps({"messages": MESSAGES, "user": mark, "x": "y" * 40_000}).encode()
    with connect(gateway) as raw:
        send(raw, f"POST {CHAT} HTTP/1.1\r\n{KEYED}{CLOSE}content-length: {len(body)}\r\n\r\n".encode())
        for start in range(0, len(body), 1000):  # four seconds, four times the timeout
            time.sleep(0.1)
            raw.sendall(body[start : start + 1000])
        assert answer(rest(raw))[0] == 200
    assert engine.wait_seen(mark)


def stream_head(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    return f"POST {CHAT} HTTP/1.1\r\n{KEYED}content-length: {len(content)}\r\n\r\n".encode() + content


# ── Several requests on one connection ───────────────────────────────────────────────────────────────────────────────


@reaches_the_engine
@pytest.mark.parametrize(
    "second",
    [b"\0\0\0\0", b"GET http://x/ HTTP/1.1\r\n\r\n", b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n" * 10_000],
)
def test_what_follows_a_stream_never_gets_into_it(
    gateway: GatewayProcess, engine: FakeEngine, mark: str, second: bytes
) -> None:
    script = [["role"], ["token", "A"], ["gate", mark], ["token", "B"], ["finish", "stop"], ["done"], ["end"]]
    with connect(gateway) as raw:
        raw.sendall(stream_head({"messages": MESSAGES, "stream": True, "user": mark, "script": script}))
        got = b""
        while b'"A"' not in got:
            got += raw.recv(65536)
        raw.settimeout(1)  # the flood fills the buffers: the rest is never read
        send(raw, second)
        raw.settimeout(30)
        engine.release(mark)
        try:
            got += rest(raw)
        except ConnectionResetError:  # there was more of the flood to come
            assert len(second) > 100
    first, _, after = got.partition(b"0\r\n\r\n")
    assert b'"B"' in first
    assert first.count(b"HTTP/1.1") == 1
    assert after.count(b"HTTP/1.1 200") <= 9  # what may wait in line
    assert after.count(b"HTTP/1.1 40") == 1
    assert after.rstrip().endswith(b"}")


@reaches_the_engine
@pytest.mark.parametrize("cut", [None, 20, 150], ids=["in one piece", "cut in the first line", "cut in the headers"])
def test_an_offer_to_upgrade_is_ignored(
    gateway: GatewayProcess, engine: FakeEngine, mark: str, cut: int | None
) -> None:
    """Java's client offers h2c with every first request; the parser would take the body for HTTP/2."""
    offer = (
        "connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAA\r\n"
    )
    body = json.dumps({"messages": MESSAGES, "user": mark})
    data = post(offer, body).encode()
    with connect(gateway) as raw:
        if cut:
            raw.sendall(data[:cut])
            time.sleep(0.2)
        raw.sendall(data[cut or 0 :])
        got = b""
        while b"x_engine_extra" not in got:
            got += raw.recv(65536)
        raw.sendall(f"GET /livez HTTP/1.1\r\n{HOST}{CLOSE}\r\n".encode())  # the connection can be used again
        assert rest(raw).endswith(b'{"status":"ok"}')
    assert engine.wait_seen(mark)


# ── Bodies ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def chat(extra: str) -> bytes:
    return BODY[:-1].encode() + b"," + extra.encode() + b"}"


def parts(*contents: Any) -> bytes:
    messages = [
        {"role": "user", "content": "x"},
        {"role": "user", "content": [{"type": "text", "text": "x"}, *contents]},
    ]
    return json.dumps({"messages": messages}).encode()


AT = "messages[1].content[1]"
BODIES: dict[str, tuple[bytes, str | None]] = {
    # JSON that parsers read differently, or not at all
    "empty": (b"", None),
    "depth 100,000": (chat(f'"x":{"[" * 100_000}{"]" * 100_000}'), None),
    "depth 1,000": (chat(f'"x":{"[" * 1000}{"]" * 1000}'), None),
    "depth 1,000 of objects": (chat('"x":' + '{"a":' * 999 + "{}" + "}" * 999), None),
    "an integer of 5,000 digits": (chat(f'"seed":{"9" * 5000}'), None),
    "NaN": (chat('"temperature":NaN'), None),
    "Infinity": (chat('"temperature":Infinity'), None),
    "1e400": (chat('"temperature":1e400'), None),
    "a lone surrogate": (chat('"user":"\\ud800"'), None),
    "a byte order mark": (b"\xef\xbb\xbf" + BODY.encode(), None),
    "UTF-16": (BODY.encode("utf-16"), None),
    "UTF-32": (BODY.encode("utf-32"), None),
    "broken UTF-8": (chat('"user":"').replace(b'"user":"', b'"user":"\xff"'), None),
    "two objects": (BODY.encode() * 2, None),
    "a comment": (BODY.encode() + b"//", None),
    "a name twice": (chat('"messages":[{"role":"user","content":"x"}]'), "messages"),
    "a name twice, escaped": (chat('"m\\u006fdel":"a","model":"b"'), "model"),
    "a name twice, deep inside": (chat('"tools":[{"function":{"name":"a", "name":"b"}}]'), "name"),
    "a name twice, spaced": (chat('"n" : 1, "n" : 2'), "n"),
    # how much
    "a million answers": (chat('"n":1000000'), "n"),
    "no answers": (chat('"n":0'), "n"),
    "half an answer": (chat('"n":0.5'), "n"),
    "best of a million": (chat('"best_of":1000000'), "best_of"),
    # what steers the engine
    **{
        f"the field {field}": (chat(f'"{field}":{value}'), field)
        for field, value in {
            "cache_salt": '"x"',
            "priority": "-1",
            "request_id": '"x"',
            "kv_transfer_params": "{}",
            "n_discard": "-1",
            "slot_id": "0",
            "id_slot": "0",
            "n_keep": "-1",
            "n_cmpl": "99",
            "cache_prompt": "false",
            "lora": "[]",
            "chat_template": '"{{ x }}"',
            "keep_alive": "-1",
            "options": '{"num_ctx": 1000000}',
        }.items()
    },
    # what the engine would fetch
    **{
        f"a picture at {url}": (parts({"type": "image_url", "image_url": {"url": url}}), f"{AT}.image_url")
        for url in (
            "http://169.254.169.254/latest/meta-data",
            "https://example.com/x.png",
            "file:///etc/passwd",
            "ftp://example.com/x",
            "//example.com/x.png",
            " data:image/png;base64,AAAA",
            "DATA:image/png;base64,AAAA",
            "gopher://engine:8080/",
            "",
        )
    },
    "a picture as a string": (parts({"type": "image_url", "image_url": "http://x/"}), f"{AT}.image_url"),
    "a picture without a URL": (parts({"type": "image_url", "image_url": None}), f"{AT}.image_url"),
    "a picture in a part of another type": (parts({"type": "text", "image_url": "http://x/"}), f"{AT}.image_url"),
    "a film": (parts({"type": "video_url", "video_url": {"url": "https://x/"}}), f"{AT}.video_url"),
    "a sound": (parts({"type": "audio_url", "audio_url": {"url": "file:///x"}}), f"{AT}.audio_url"),
    "a sound's data as a URL": (
        parts({"type": "input_audio", "input_audio": {"data": "http://x/"}}),
        f"{AT}.input_audio",
    ),
    "a file's data as a URL": (parts({"type": "file", "file": {"file_data": "file:///etc/passwd"}}), f"{AT}.file"),
    "another caller's picture": (
        parts({"type": "image_url", "image_url": {"url": "data:,"}, "uuid": "x"}),
        f"{AT}.uuid",
    ),
    "a pickled tensor": (parts({"type": "image_embeds", "image_embeds": "AAAA"}), f"{AT}.image_embeds"),
}


@pytest.mark.parametrize("name", BODIES)
def test_refused_bodies_name_the_field(gateway: GatewayProcess, name: str) -> None:
    body, param = BODIES[name]
    with gateway.client() as client:
        got = client.post(CHAT, content=body)
    assert got.status_code == 400, got.text
    assert got.json()["error"]["param"] == param
    assert param is None or param in got.json()["error"]["message"]


def test_every_field_that_steers_an_engine_is_refused(gateway: GatewayProcess) -> None:
    with gateway.client() as client:
        for field in set().union(*guard.CONTROL_FIELDS.values()):
            got = client.post(CHAT, json={"messages": MESSAGES, field: None})
            assert (got.status_code, got.json()["error"]["param"]) == (400, field)


@pytest.mark.parametrize(("path", "field"), [("/v1/completions", "prompt"), ("/v1/embeddings", "input")])
def test_lists_of_prompts_are_bounded(gateway: GatewayProcess, path: str, field: str) -> None:
    for many in (["x"] * 2049, [1] + ["x"] * 2048, [[1]] * 100_000):
        with gateway.client() as client:
            got = client.post(path, json={field: many})
        assert (got.status_code, got.json()["error"]["param"]) == (400, field)


@reaches_the_engine
@pytest.mark.parametrize(
    "body",
    [
        {"messages": MESSAGES, "n": 16, "best_of": None, "bad_words": ["x"], "top_k": 5, "grammar": "root ::= x"},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]}
            ]
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "//uQ", "format": "mp3"}}]}
            ]
        },
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"options": 1, "priority": 2}]}]},
        {"messages": MESSAGES, "metadata": {"priority": "high", "options": "x"}, "chat_template_kwargs": {"a": False}},
        {"prompt": list(range(5000))},
        {"prompt": ["x"] * 2048},
        {"messages": MESSAGES, "seed": 2**63},
    ],
)
def test_what_is_right_passes_untouched(
    gateway: GatewayProcess, engine: FakeEngine, mark: str, body: dict[str, Any]
) -> None:
    body = body | {"user": mark, "model": "fake-model"}
    for content in (json.dumps(body), json.dumps(body, indent=2)):
        with gateway.client() as client:
            got = client.post(CHAT if "messages" in body else "/v1/completions", content=content)
        assert got.status_code == 200, got.text
        assert engine.wait_seen(mark)["body"] == body


# ── Keys, headers, descriptors ───────────────────────────────────────────────────────────────────────────────────────


@reaches_the_engine
def test_no_header_of_the_callers_reaches_the_engine(gateway: GatewayProcess, engine: FakeEngine, mark: str) -> None:
    headers = {
        "x-api-key": CANARY,
        "cookie": CANARY,
        "proxy-authorization": CANARY,
        "proxy-connection": CANARY,
        "connection": "x-named",
        "x-named": CANARY,
        "x-forwarded-for": CANARY,
        "x-request-id": f"{CANARY} \\ evil",
        "x-data-parallel-rank": "1",
    }
    with gateway.client() as client:
        got = client.post(CHAT, json={"messages": MESSAGES, "user": mark}, headers=headers)
    seen = engine.wait_seen(mark)["headers"]
    expected = {"host", "content-type", "accept-encoding", "user-agent", "x-request-id", "content-length"}
    assert set(seen) == expected
    assert seen["accept-encoding"] == "identity"
    assert CANARY not in str(seen)
    assert CANARY not in str(got.headers)
    assert KEY not in str(seen)


@pytest.mark.parametrize("key", [CANARY, "' OR 1=1 --", "x" * 20_000, "\xff\xfe", "", "${jndi:ldap://x}", f"{KEY} x"])
def test_keys_that_are_none(gateway: GatewayProcess, key: str) -> None:
    with connect(gateway) as raw:
        send(raw, f"GET /v1/models HTTP/1.1\r\n{HOST}{CLOSE}authorization: Bearer {key}\r\n\r\n".encode("latin-1"))
        got = rest(raw)
    assert_refused(gateway, got, 401, "invalid_api_key")
    assert not key or key.encode("latin-1") not in got
