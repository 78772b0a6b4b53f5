"""HTTP that is refused, one row each: heads, framing, hosts, paths and methods, sent on a bare socket. The engine sees
nothing of it, and others are served meanwhile."""

import pytest

from tests.support.attacks import (
    BODY,
    CHAT,
    CLOSE,
    HOST,
    KEYED,
    WHOLE,
    answer,
    assert_refused,
    chunked,
    connect,
    get,
    post,
    rest,
    send,
)
from tests.support.processes import KEY, GatewayProcess

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
    "an absolute-form target of another server": (get(f"http://other.example{CHAT}"), 404),
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
    "gzip in name only": (post(f"{CLOSE}content-encoding: gzip\r\n"), 400, None),
    "an encoding that is not known": (post(f"{CLOSE}content-encoding: br\r\n"), 415, "unsupported_encoding"),
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
