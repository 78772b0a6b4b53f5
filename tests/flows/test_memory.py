"""Memory: what bodies, connections and waiting requests may take of a worker. No caller's requests end another's."""

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import KEY, MESSAGES, FakeEngine, GatewayProcess, fake_engine, running_gateway, wait_for
from tests.support.rows import Rows

CHAT = "/v1/chat/completions"
SECOND = {"authorization": "Bearer sk-second-0123456789abcdef"}
MB = 1_000_000
STREAM_BOUND = 5.0  # seconds: five times what the first token may take while others attack
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def engine() -> Iterator[FakeEngine]:
    with fake_engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def roomy(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """A gateway with one worker, and room for several of the largest bodies."""
    settings = {"STACK_WORKERS": "1", "STACK_BODY_BUDGET_BYTES": str(300 * MB), "STACK_RESPONSES_DAYS": "1"}
    directory = tmp_path_factory.mktemp("roomy")
    settings |= {"STACK_DATA_DIR": str(directory)}
    with running_gateway(directory / "log", engine.url, **settings) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def tight(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """A gateway with one worker that may hold 8 MB of requests. Its engine takes one request at a time."""
    settings = {"STACK_WORKERS": "1", "STACK_BODY_BUDGET_BYTES": str(8 * MB), "LLM_SLOTS": "1"}
    directory = tmp_path_factory.mktemp("tight")
    settings |= {"STACK_CONNECTIONS": "32", "STACK_DATA_DIR": str(directory), "STACK_RESPONSES_DAYS": "1"}
    with running_gateway(directory / "log", engine.url, **settings) as gateway:
        yield gateway


def rss(gateway: GatewayProcess, what: str = "VmRSS") -> int:
    """Bytes of memory of its first worker: now, or at most so far (VmHWM)."""
    status = Path(f"/proc/{gateway.workers()[0]}/status").read_text()
    found = re.search(rf"{what}:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024


def padded(content: bytes) -> bytes:
    """A chat request with another field beside its messages."""
    return b'{"messages":[{"role":"user","content":"Hello"}],"x":' + content + b"}"


# ── Values ───────────────────────────────────────────────────────────────────────────────────────────────────────────

BOMBS = {
    "lists": b"[" + b"[] ," * 5_000_000 + b"1]",
    "objects": b"[" + b"{}," * 6_000_000 + b"1]",
    "objects with a name": b"[" + b'{"a":1},' * 2_000_000 + b"1]",
    "lists of lists": b"[" + b"[[[[1]]]]," * 1_500_000 + b"1]",
    "numbers": b"[" + b"1," * 9_000_000 + b"1]",
    "floats": b"[" + b"1.5," * 4_000_000 + b"1]",
    "short texts": b"[" + b'"ab",' * 3_500_000 + b"1]",
    "names": b"{" + b",".join(b'"%d":1' % number for number in range(1_200_000)) + b"}",
    "lists behind a text with escapes": b'["\\\\\\"[,' + b'",' + b"[]," * 5_000_000 + b"1]",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_body_of_too_many_values_is_refused_at_little_cost(roomy: GatewayProcess, name: str) -> None:
    before = rss(roomy)
    with roomy.client() as client:
        got = client.post(CHAT, content=padded(BOMBS[name]))
    assert (got.status_code, got.json()["error"]["code"]) == (400, "too_many_values"), got.text
    assert "values" in got.json()["error"]["message"]
    assert rss(roomy) - before < 150 * MB


LARGE = {
    "a picture of 15 MB": padded(b'"data:image/png;base64,' + b"A" * 15 * MB + b'"'),
    "a picture of 15 MB beside an emoji": padded(b'["' + b"A" * 15 * MB + '","🎉"]'.encode()),
    "prose with commas": padded(b'"' + b"The quick, brown fox: [it] jumps. " * 200_000 + b'"'),
    "JSON inside a text": padded(json.dumps(json.dumps([{"a": [1, 2, {"b": "c"}]}] * 100_000)).encode()),
    "a text of quotation marks": padded(json.dumps('"' * 2 * MB).encode()),
    "a text of backslashes": padded(json.dumps("\\" * 2 * MB).encode()),
    "indented JSON": json.dumps({"messages": MESSAGES, "x": [{"a": 1}] * 20_000}, indent=8).encode(),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_large_body_of_text_passes(roomy: GatewayProcess, name: str) -> None:
    with roomy.client() as client:
        got = client.post(CHAT, content=LARGE[name])
    assert got.status_code == 200, got.text


@pytest.mark.parametrize("tokens", [(2048, 512), (1, 300_000), (2048, 1)], ids=lambda it: f"{it[0]} of {it[1]} tokens")
def test_inputs_in_tokens_pass(roomy: GatewayProcess, tokens: tuple[int, int]) -> None:
    inputs = [list(range(1000, 1000 + tokens[1]))] * tokens[0]
    with roomy.client() as client:
        got = client.post("/v1/embeddings", json={"input": inputs})
    assert got.status_code == 200, got.text


def test_a_name_that_stands_twice_is_found_in_a_large_body(roomy: GatewayProcess) -> None:
    texts = [b'"' + b"x: y, " * 300_000 + b'"', b'"' + b'\\"a\\": ' * 200_000 + b'"']
    for text in texts:
        for twice in (b'{"a" : 1, "a" : 2}', b'[{"b":{"c":1, "\\u0063":2}}]'):
            with roomy.client() as client:
                got = client.post(CHAT, content=padded(b"[" + text + b"," + twice + b"]"))
            assert got.status_code == 400, got.text
            assert "appears twice" in got.json()["error"]["message"]


def test_others_are_served_while_large_bodies_are_parsed(roomy: GatewayProcess) -> None:
    """A parser holds the interpreter, so the time for one body is limited."""
    bodies = [padded(BOMBS["lists"]), padded(b"[" + b"1," * 1_000_000 + b"1]"), LARGE["indented JSON"]]
    waits: list[float] = []
    done = threading.Event()

    def probe() -> None:
        with roomy.client() as client:
            while not done.is_set():
                since = time.monotonic()
                assert client.get("/livez").status_code == 200
                waits.append(time.monotonic() - since)

    thread = threading.Thread(target=probe)
    thread.start()
    try:
        with roomy.client() as client:
            for body in bodies * 2:
                client.post(CHAT, content=body)
    finally:
        done.set()
        thread.join()
    assert max(waits) < STREAM_BOUND / 5


# ── Bytes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def half_sent(gateway: GatewayProcess, size: int, sent: int, key: str = KEY) -> socket.socket:
    """A connection on which a part of a request's body was sent."""
    raw = socket.create_connection(("127.0.0.1", gateway.port), timeout=30)
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {key}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {size}\r\n\r\n"
    raw.sendall(head.encode() + b'{"x":"' + b"y" * (sent - 6))
    return raw


def test_a_key_with_half_sent_bodies_leaves_room_for_others(tight: GatewayProcess) -> None:
    with ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(half_sent(tight, MB, 10_000))
        with tight.client() as client:
            refused = client.post(CHAT, content=padded(b'"' + b"x" * MB + b'"'))
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_is_overloaded")
            assert int(refused.headers["retry-after"]) >= 1
            other = client.post(CHAT, content=padded(b'"' + b"x" * MB + b'"'), headers=SECOND)
            assert other.status_code == 200, other.text

    def is_free() -> bool:
        with tight.client() as client:
            return client.post(CHAT, content=padded(b'"' + b"x" * 2 * MB + b'"')).status_code == 200

    wait_for(is_free)  # they left


def test_a_refusal_for_lack_of_room_comes_before_the_body(tight: GatewayProcess) -> None:
    with ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(half_sent(tight, MB, 10_000))
        raw = stack.enter_context(half_sent(tight, 2 * MB, 10))
        assert raw.recv(65536).startswith(b"HTTP/1.1 503 ")


def test_a_body_that_never_fits_is_told_so(tight: GatewayProcess) -> None:
    with tight.client() as client:
        got = client.post(CHAT, content=padded(b'"' + b"x" * 5 * MB + b'"'))
    assert (got.status_code, got.json()["error"]["code"]) == (413, "request_too_large")


def test_requests_that_wait_hold_their_bytes(tight: GatewayProcess, engine: FakeEngine, mark: str) -> None:
    """The request at the engine and those in its queue take space. Requests without space are rejected."""
    first: dict[str, Any] = {"messages": MESSAGES, "stream": True, "user": mark}
    first["script"] = [["token", "A"], ["gate", mark], ["finish", "stop"], ["done"], ["end"]]
    statuses: list[int] = []

    def ask() -> None:
        with tight.client() as client:
            statuses.append(client.post(CHAT, content=padded(b'"' + b"x" * MB + b'"')).status_code)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    with tight.client() as client, client.stream("POST", CHAT, json=first) as response:
        lines = response.iter_lines()
        assert next(lines)
        for thread in threads:
            thread.start()
        wait_for(lambda: 503 in statuses)
        with tight.client() as other:  # small requests have room, be it in the queue
            got = other.post(CHAT, json={"messages": MESSAGES}, headers={"x-stack-queue-timeout": "0.1"})
            assert got.json()["error"]["code"] == "queue_timeout", got.text
        engine.release(mark)
        assert "[DONE]" in "".join(lines)
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 503}


@pytest.mark.parametrize(
    "what", ["a model that is unknown", "JSON that is broken", "a field that steers", "a header that is wrong"]
)
def test_a_refused_body_gives_its_room_back(tight: GatewayProcess, what: str) -> None:
    text = b'"' + b"x" * MB + b'"'
    body, headers, status = padded(text), {}, 400
    if what == "a model that is unknown":
        body, status = b'{"model":"nope","messages":[{"role":"user","content":' + text + b"}]}", 404
    elif what == "JSON that is broken":
        body = body[:-1]
    elif what == "a field that steers":
        body = body[:-1] + b',"cache_salt":"x"}'
    else:
        headers = {"x-stack-strict": "maybe"}
    with tight.client() as client:
        for _ in range(20):
            assert client.post(CHAT, content=body, headers=headers).status_code == status


def unread(gateway: GatewayProcess, size: int) -> socket.socket:
    """Return a connection whose client has asked for a blocking answer of `size` bytes, and reads only its head."""
    choice = {"index": 0, "message": {"role": "assistant", "content": "x" * size}, "finish_reason": "stop"}
    whole = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    body = json.dumps({"messages": MESSAGES, "script": [["json", [200, whole]]]}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEY}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    raw = connect(gateway)
    raw.settimeout(30)
    raw.sendall(head.encode() + body)
    assert raw.recv(12).startswith(b"HTTP/1.1 ")
    return raw


def test_answers_that_are_not_read_take_little_memory(tight: GatewayProcess) -> None:
    """What waits for a client that does not read counts as its request's bytes, and no slot is held meanwhile. The
    gateway has room for 8 MB of requests, and twice as much of answers."""
    with ExitStack() as stack:
        stack.enter_context(unread(tight, 2 * MB))
        with tight.client() as other:  # there is one slot
            assert other.post(CHAT, json={"messages": MESSAGES}, headers=SECOND).status_code == 200
        before = rss(tight)
        for _ in range(30):
            stack.enter_context(unread(tight, 2 * MB))
        assert rss(tight) - before < 40 * MB
    with tight.client() as client:  # their room is free again
        wait_for(lambda: client.post(CHAT, content=padded(b'"' + b"x" * 2 * MB + b'"')).status_code == 200)


def test_a_large_answer_comes_whole_to_a_slow_reader(roomy: GatewayProcess) -> None:
    with unread(roomy, MB // 4) as raw, raw.makefile("rb") as file:
        head = b"".join(iter(file.readline, b"\r\n"))
        size = re.search(rb"content-length: (\d+)", head)
        assert size
        body = file.read(int(size[1]))
    assert json.loads(body)["choices"][0]["message"]["content"] == "x" * (MB // 4)


def test_a_key_is_asked_for_before_the_body(tight: GatewayProcess) -> None:
    """The same holds for a client that waits for 100 Continue."""
    for key, answer in ((KEY, b"HTTP/1.1 100 "), ("sk-nobody", b"HTTP/1.1 401 ")):
        with socket.create_connection(("127.0.0.1", tight.port), timeout=30) as raw:
            raw.sendall(
                f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {key}\r\n"
                "expect: 100-continue\r\ncontent-type: application/json\r\ncontent-length: 100000\r\n\r\n".encode()
            )
            assert raw.recv(65536).startswith(answer)


# ── Stored responses ─────────────────────────────────────────────────────────────────────────────────────────────────


def respond(gateway: GatewayProcess, values: int, status: int = 200, **fields: Any) -> dict[str, Any]:
    """Return the answer to a request of the Responses API whose input has this many empty objects."""
    hosted = {"type": "web_search_call", "action": [{}] * values}
    body = {"model": "fake-model", "input": [{"role": "user", "content": "Hello"}, hosted]} | fields
    with gateway.client() as client:
        got = client.post("/v1/responses", json=body)
    assert got.status_code == status, got.text[:500]
    answer: dict[str, Any] = got.json()
    return answer


@pytest.mark.parametrize(("field", "path"), [("instructions", ""), ("input", "/input_items")])
def test_stored_responses_that_are_not_read_take_little_memory(tight: GatewayProcess, field: str, path: str) -> None:
    made = respond(tight, 0, **{field: "x" * MB})
    asks = f"GET /v1/responses/{made['id']}{path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEY}\r\n\r\n"
    with ExitStack() as stack:
        told = []
        for _ in range(10):
            raw = stack.enter_context(connect(tight, asks.encode()))
            raw.settimeout(30)
            told.append(raw.recv(12))
        assert told[0] == b"HTTP/1.1 200"
        assert told[2:] == [b"HTTP/1.1 503"] * 8
    with tight.client() as client:  # their room is free again
        wait_for(lambda: client.get(f"/v1/responses/{made['id']}{path}").status_code == 200)


def test_what_a_request_continues_counts_by_its_values(tight: GatewayProcess) -> None:
    """90 kB of JSON with 30,000 objects are more than 4 MB in memory, with a translation of them. There is room for
    8 MB."""
    first = respond(tight, 30_000)
    respond(tight, 30_000, 413, previous_response_id=first["id"])
    assert respond(tight, 0, previous_response_id=first["id"])["previous_response_id"] == first["id"]


def test_a_conversation_may_have_as_many_values_as_a_body(roomy: GatewayProcess) -> None:
    first = respond(roomy, 60_000)
    second = respond(roomy, 60_000, previous_response_id=first["id"])
    refused = respond(roomy, 0, 400, previous_response_id=second["id"])["error"]
    assert (refused["code"], refused["param"]) == ("too_many_values", "previous_response_id")
    items = [{"type": "item_reference", "id": it["output"][0]["id"]} for it in (first, second)]
    refused = respond(roomy, 0, 400, input=items)["error"]
    assert (refused["code"], refused["param"]) == ("too_many_values", "input")


# ── Connections ──────────────────────────────────────────────────────────────────────────────────────────────────────


def connect(gateway: GatewayProcess, first: bytes = b"") -> socket.socket:
    """Return a connection that has sent `first`, as far as the gateway takes it, and reads nothing."""
    raw = socket.create_connection(("127.0.0.1", gateway.port), timeout=30)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.settimeout(0.2)
    with suppress(OSError):
        raw.sendall(first)
    return raw


def is_open(raw: socket.socket) -> bool:
    raw.setblocking(False)
    try:
        while raw.recv(65536):
            pass
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


@pytest.mark.parametrize(
    "first",
    [b"", b"GET /livez HTTP/1.1\r\n", b"GET /docs HTTP/1.1\r\nhost: localhost\r\n\r\n"],
    ids=["silent ones", "half a head", "kept after an answer"],
)
def test_a_stranger_s_connection_makes_room_for_a_new_one(
    tight: GatewayProcess, engine: FakeEngine, mark: str, first: bytes
) -> None:
    """A known key's stream continues, however many connections come, and new requests are answered."""
    body: dict[str, Any] = {"messages": MESSAGES, "stream": True, "user": mark}
    body["script"] = [["token", "A"], ["gate", mark], ["token", "B"], ["finish", "stop"], ["done"], ["end"]]
    with ExitStack() as stack, tight.client() as client, client.stream("POST", CHAT, json=body) as response:
        lines = response.iter_lines()
        assert next(lines)
        strangers = [stack.enter_context(connect(tight, first)) for _ in range(150)]
        with tight.client() as other:
            assert other.get("/v1/models").status_code == 200
        wait_for(lambda: sum(map(is_open, strangers)) <= 32)
        assert is_open(strangers[-1])
        engine.release(mark)
        assert "[DONE]" in "".join(lines)


@pytest.mark.parametrize(
    ("path", "most"), [("/openapi.json", 25), ("/docs/static/swagger-ui-bundle.js", 60), ("/livez", 25)]
)
def test_what_strangers_send_ahead_and_do_not_read_takes_little_memory(
    roomy: GatewayProcess, path: str, most: int
) -> None:
    with roomy.client() as client:
        client.get(path)
    before = rss(roomy)
    ahead = f"GET {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 60000\r\n\r\n".encode() + b"x" * 60_000
    with ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(connect(roomy, ahead * 8))
        with roomy.client() as client:
            assert client.get("/v1/models").status_code == 200
        assert rss(roomy) - before < most * MB


def test_a_body_of_a_stranger_is_not_read(roomy: GatewayProcess) -> None:
    before = rss(roomy)
    with ExitStack() as stack:
        head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 19000000\r\n\r\n".encode()
        for _ in range(200):
            raw = stack.enter_context(connect(roomy, head + b"x" * MB))
            with suppress(OSError):  # a reset, as it goes on sending
                assert raw.recv(12) == b"HTTP/1.1 401"
        assert rss(roomy) - before < 60 * MB


# ── Refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_refusals_are_counted_and_neither_rowed_nor_all_logged(
    tight: GatewayProcess, engine: FakeEngine, mark: str
) -> None:
    """Each refusal has at most one line, and those without a line are counted. Only a request for which an engine was
    asked has a row."""
    many, since = 400, len(tight.log())
    body: dict[str, Any] = {"messages": MESSAGES, "stream": True, "user": mark}
    body["script"] = [["token", "A"], ["gate", mark], ["finish", "stop"], ["done"], ["end"]]
    with tight.client() as client, client.stream("POST", CHAT, json=body, headers={"x-request-id": mark}) as response:
        lines = response.iter_lines()
        assert next(lines)
        with tight.client() as other:
            for _ in range(many):
                got = other.post(CHAT, json={"messages": MESSAGES}, headers={"x-stack-queue-timeout": "0"})
                assert got.status_code in (429, 503), got.text
        engine.release(mark)
        assert "[DONE]" in "".join(lines)
    tight.lines(mark)

    def told() -> int:
        """How many of them the log tells of."""
        new = tight.log()[since:]
        refused = [line for line in new if line["msg"] == "request" and line["status"] != 200]
        assert all(line["code"].startswith("queue_") for line in refused), refused
        return len(refused) + sum(line["count"] for line in new if line["msg"] == "requests_not_logged")

    wait_for(lambda: told() == many, message=f"{told()} of {many}")
    new = tight.log()[since:]
    refused = {line["request_id"] for line in new if (line.get("code") or "").startswith("queue_")}
    assert not [line for line in new if line.get("request_id") in refused and line["msg"] != "request"]
    rows = Rows({"STACK_DATA_DIR": str(tight.log_path.parent)})
    wait_for(lambda: any(row["request_id"] == mark for row in rows.all()))
    assert not [row for row in rows.all() if row["outcome"].startswith("queue_")]
    rows.close()
