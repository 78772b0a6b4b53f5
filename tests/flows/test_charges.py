"""What a request is charged, and when: a request before its body is read, tokens before its engine is asked, and in the
end never less than was made."""

import json
import select
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection
from typing import Any
from uuid import uuid4

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.support.fakes.generator import TOLD
from tests.support.keys import ADMIN
from tests.support.processes import (
    MESSAGES,
    NO_TLS,
    FakeEngine,
    GatewayProcess,
    fake_engine,
    running_gateway,
    wait_for,
    wait_read,
)

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
EMBEDDINGS, RERANK = "/v1/embeddings", "/v1/rerank"
ENGINES = ("ollama", "vllm", "llamacpp")
CONFIG = """
engines:
  ollama: {{dialect: ollama, slots: 256, base_url: "{url}"}}
  vllm: {{dialect: vllm, slots: 256, base_url: "{url}"}}
  llamacpp: {{dialect: llamacpp, slots: 256, base_url: "{url}"}}
models:
  ollama: {{targets: [{{engine: ollama, model: fake-model}}]}}
  vllm: {{targets: [{{engine: vllm, model: fake-model}}]}}
  llamacpp: {{targets: [{{engine: llamacpp, model: fake-model}}]}}
  brief: {{targets: [{{engine: vllm, model: fake-model}}], timeouts: {{total: 1}}}}
  brief-ollama: {{targets: [{{engine: ollama, model: fake-model}}], timeouts: {{total: 1}}}}
  brief-llamacpp: {{targets: [{{engine: llamacpp, model: fake-model}}], timeouts: {{total: 1}}}}
  dies-then-vllm:
    targets: [{{engine: vllm, model: dies}}]
    fallbacks: [{{engine: llamacpp, model: fake-model}}]
default_model: vllm
breaker: {{failures: 1000}}
"""


@pytest.fixture(scope="module")
def engine() -> Iterator[FakeEngine]:
    """An engine of this file's own, so that its concurrent requests can be counted."""
    with fake_engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def gateway(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    directory = tmp_path_factory.mktemp("charges")
    file = directory / "stack.yaml"
    file.write_text(CONFIG.format(url=engine.url))
    options = {"STACK_CONFIG": str(file), "STACK_ADMIN_KEYS": ADMIN, "LLM_TIMEOUT": "6", "LLM_FIRST_TOKEN_TIMEOUT": "5"}
    with running_gateway(directory / "log", engine.url, **options) as gateway:
        for count, limits in AHEAD:
            STOCK[str(limits)] = [create(gateway, limits) for _ in range(count)]
        yield gateway


# A new key is known within half a second. These keys are made before the tests, which therefore wait only once.
AHEAD: list[tuple[int, dict[str, int]]] = [
    (52, {}),
    (3, {"requests_per_minute": 1}),
    (1, {"tokens_per_day": 20}),
    (1, {"tokens_per_month": 20}),
    (1, {"tokens_per_minute": 60}),
    (1, {"concurrent": 1}),
    (7, {"tokens_per_day": 5000}),
    (2, {"tokens_per_minute": 10**6}),
    (30, {"tokens_per_minute": 10**9}),
]
STOCK: dict[str, list[tuple[str, str]]] = {}


@pytest.fixture(scope="module")
def any_key(gateway: GatewayProcess) -> str:
    return make_key(gateway)


def make_key(gateway: GatewayProcess, **limits: int) -> str:
    return make(gateway, **limits)[1]


def make(gateway: GatewayProcess, **limits: int) -> tuple[str, str]:
    """Return the id and the secret of a new key."""
    stock = STOCK.get(str(limits))
    return stock.pop() if stock else create(gateway, limits)


def create(gateway: GatewayProcess, limits: dict[str, int]) -> tuple[str, str]:
    with httpx.Client(base_url=gateway.url, headers={"authorization": f"Bearer {ADMIN}"}, verify=NO_TLS) as http:
        made = http.post("/admin/keys", json={"name": "limited", "limits": limits}).raise_for_status().json()
    return made["key"]["id"], made["secret"]


def used(gateway: GatewayProcess, key_id: str) -> int:
    """Return the tokens of a key's day, by its usage rows."""
    with httpx.Client(base_url=gateway.url, headers={"authorization": f"Bearer {ADMIN}"}, verify=NO_TLS) as http:
        return int(http.get(f"/admin/keys/{key_id}/limits").raise_for_status().json()["used"]["tokens_per_day"])


def ask(gateway: GatewayProcess, key: str, path: str = CHAT, name: str = "", **fields: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"} | ({"idempotency-key": name} if name else {})
    content = {"messages": MESSAGES} if path == CHAT else {}
    return httpx.post(gateway.url + path, json=content | fields, headers=headers, timeout=60, verify=NO_TLS)


def left(answer: httpx.Response, what: str) -> int:
    return int(answer.headers[f"x-ratelimit-remaining-{what}"])


def usage(tokens_in: int, tokens_out: int, text: str = "") -> list[list[Any]]:
    """Return the script of a blocking answer with this usage."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    told = {"prompt_tokens": tokens_in, "completion_tokens": tokens_out}
    return [["json", [200, {"choices": [choice], "usage": told}]]]


def finished(gateway: GatewayProcess, request_id: str) -> dict[str, Any]:
    """Return the log line of a request's end."""
    return next(it for it in gateway.lines(request_id) if "_finished" in it["msg"])


@contextmanager
def head(gateway: GatewayProcess, key: str, length: int, path: str = CHAT, *lines: str) -> Iterator[socket.socket]:
    """Yield a connection that has sent the head of a request, and nothing of its body."""
    told = [
        f"authorization: Bearer {key}",
        "host: localhost",
        "content-type: application/json",
        f"content-length: {length}",
        *lines,
    ]
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=30) as connection:
        connection.sendall(f"POST {path} HTTP/1.1\r\n{chr(10).join(it + chr(13) for it in told)}\n\r\n".encode())
        yield connection


def answer_of(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """Return the status and body of the next response on a connection."""
    data = b""
    while b"\r\n\r\n" not in data or len(data.split(b"\r\n\r\n", 1)[1]) < _length(data):
        piece = connection.recv(65536)
        assert piece, data
        data += piece
    start, body = data.split(b"\r\n\r\n", 1)
    return int(start[9:12]), json.loads(body)


def _length(data: bytes) -> int:
    lines = data.split(b"\r\n\r\n")[0].lower().split(b"\r\n")
    return next(int(it.split(b":")[1]) for it in lines if it.startswith(b"content-length"))


# -- before the body is read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, EMBEDDINGS])
def test_a_request_beyond_its_limit_is_refused_before_its_body_is_read(gateway: GatewayProcess, path: str) -> None:
    key = make_key(gateway, requests_per_minute=1)
    with head(gateway, key, 900_000, path) as first, head(gateway, key, 900_000, path) as second:
        first.sendall(b" ")
        refused, _, _ = select.select([first, second], [], [], 30)  # of the other one, the body is waited for
        assert [answer_of(it)[0] for it in refused] == [429]


@pytest.mark.parametrize(
    ("limits", "used", "code"),
    [
        ({"tokens_per_day": 20}, usage(7, 20), "insufficient_quota"),
        ({"tokens_per_month": 20}, usage(7, 20), "insufficient_quota"),
        ({"tokens_per_minute": 60}, usage(7, 200), "rate_limit_exceeded"),
    ],
)
def test_a_request_without_tokens_left_is_refused_before_its_body_is_read(
    gateway: GatewayProcess, limits: dict[str, int], used: list[list[Any]], code: str
) -> None:
    key = make_key(gateway, **limits)
    assert ask(gateway, key, max_tokens=5, script=used).status_code == 200
    with head(gateway, key, 900_000) as connection:
        status, body = answer_of(connection)
    assert (status, body["error"]["code"]) == (429, code)


WAITS = "expect: 100-continue"


def test_a_request_whose_body_is_still_being_sent_counts_as_concurrent(gateway: GatewayProcess) -> None:
    key = make_key(gateway, concurrent=1)
    whole = json.dumps({"messages": MESSAGES}).encode()

    def free() -> bool:
        return ask(gateway, key).status_code == 200

    def taken(connection: socket.socket) -> bool:
        # The gateway asks for a body once the request has its place. To probe before would take that place.
        assert connection.recv(65536).startswith(b"HTTP/1.1 100 ")
        return ask(gateway, key).status_code == 429

    with head(gateway, key, len(whole), CHAT, WAITS) as connection:
        assert taken(connection)
        connection.sendall(whole)
        assert answer_of(connection)[0] == 200
        wait_for(free, message="an answer gives it back")
    with head(gateway, key, 1000, CHAT, WAITS) as connection:
        assert taken(connection)
    wait_for(free, message="a client that leaves in its body gives it back")
    for broken in (b"{", b"[]", b'{"messages": 3}', whole[:-1] + b', "n": 99}', whole[:-1] + b', "model": "nobody"}'):
        with head(gateway, key, len(broken), CHAT, WAITS) as connection:
            assert taken(connection)
            connection.sendall(broken)
            assert answer_of(connection)[0] in (400, 404)
        wait_for(free, message="a refusal gives it back")
    with head(gateway, key, 10**9) as connection:
        assert answer_of(connection)[0] == 413
    wait_for(free)


def test_a_replay_is_charged_as_a_request_and_nothing_else(gateway: GatewayProcess, engine: FakeEngine) -> None:
    key, name = make_key(gateway, concurrent=1, requests_per_minute=4, tokens_per_day=1000), uuid4().hex
    body: dict[str, Any] = {"user": name, "script": [["gate", name], *usage(7, 900)], "max_tokens": 900}
    with ThreadPoolExecutor() as pool:
        first = pool.submit(ask, gateway, key, name=name, **body)
        engine.wait_seen(name)
        joins = HTTPConnection("127.0.0.1", gateway.port, timeout=60)
        headers = {"authorization": f"Bearer {key}", "idempotency-key": name, "content-type": "application/json"}
        joins.request("POST", CHAT, json.dumps({"messages": MESSAGES} | body, separators=(",", ":")), headers)
        wait_read(joins.sock)
        assert ask(gateway, key).status_code == 429, "the one that is made holds its place"
        engine.release(name)
        with closing(joins):
            joined = joins.getresponse()
            assert (joined.status, json.load(joined)) == (200, first.result().json())
        answers = [first.result(), ask(gateway, key, name=name, **body)]
    assert [it.status_code for it in answers] == [200] * 2
    assert len(engine.seen(name)) == 1
    assert ask(gateway, key, script=usage(7, 1)).status_code == 200, "907 tokens of 1000 were charged, once"
    refused = ask(gateway, key, name=name, **body)
    assert refused.json()["error"]["code"] == "rate_limit_exceeded", "a replay is a request"


# -- what is set aside ------------------------------------------------------------------------------------------------

LIMITS: list[tuple[dict[str, Any], int | None]] = [
    ({"max_tokens": 1, "max_completion_tokens": 4000}, 1),
    ({"max_tokens": 4000, "max_completion_tokens": 1}, 1),
    ({"max_tokens": 1, "n_predict": 4000}, 1),
    ({"n_predict": 1, "max_completion_tokens": 4000, "max_tokens": 50}, 1),
    ({"n_predict": 7}, 7),
    ({"max_completion_tokens": 7}, 7),
    ({"max_tokens": None, "max_completion_tokens": 7}, 7),
    ({"max_tokens": 6.0, "n_predict": 8}, 6),
    ({"max_tokens": None}, None),
    ({}, None),
    ({"max_tokens": 2**40}, 2**31 - 1),
]


@pytest.mark.parametrize("model", ENGINES)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(("said", "limit"), LIMITS)
def test_an_engine_gets_one_limit_the_smallest(
    gateway: GatewayProcess,
    engine: FakeEngine,
    any_key: str,
    mark: str,
    model: str,
    path: str,
    said: dict[str, Any],
    limit: int | None,
) -> None:
    content = {} if path == CHAT else {"prompt": "one"}
    assert ask(gateway, any_key, path, model=model, user=mark, **content, **said).status_code == 200
    body = engine.seen(mark)[-1]["body"]
    found = [body[name] for name in ("max_tokens", "max_completion_tokens", "n_predict") if name in body]
    assert found == ([] if limit is None else [limit])
    assert all(type(it) is int for it in found)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "n_predict"])
@pytest.mark.parametrize("value", [0, -1, -5, "6", True, 1.5, [], {}])
def test_a_limit_that_engines_read_differently_is_refused_by_name(
    gateway: GatewayProcess, any_key: str, name: str, value: Any
) -> None:
    refused = ask(gateway, any_key, **{name: value})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, name)


@pytest.mark.parametrize("model", ENGINES)
@pytest.mark.parametrize(
    ("path", "name"),
    [
        (CHAT, "max_tokens"),
        (CHAT, "max_completion_tokens"),
        (CHAT, "n_predict"),
        (COMPLETIONS, "max_completion_tokens"),
        (COMPLETIONS, "n_predict"),
        (EMBEDDINGS, "dimensions"),
    ],
)
def test_echo_allows_no_limit_of_0_but_the_max_tokens_of_a_completion(
    gateway: GatewayProcess, any_key: str, model: str, path: str, name: str
) -> None:
    """Ollama takes 0 for no limit, and nothing would be set aside for the answer."""
    content = {COMPLETIONS: {"prompt": "one"}, EMBEDDINGS: {"input": "one"}}.get(path, {})
    refused = ask(gateway, any_key, path, model=model, echo=True, **content, **{name: 0})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, name)


@pytest.mark.parametrize(
    "said",
    [
        {"max_tokens": 4000},
        {"max_completion_tokens": 4000},
        {"n_predict": 4000},
        {"max_tokens": 1000, "n": 4},
        {"min_tokens": 4000},
    ],
)
def test_the_tokens_of_all_choices_are_reserved_at_once(
    gateway: GatewayProcess, engine: FakeEngine, mark: str, said: dict[str, Any]
) -> None:
    """Of 5,000 tokens, two such requests may have a part; ten may not."""
    key = make_key(gateway, tokens_per_day=5000)
    with ThreadPoolExecutor() as pool:
        script = [["gate", mark], *usage(7, 3)]
        asked = [pool.submit(ask, gateway, key, user=mark, script=script, **said) for _ in range(10)]
        wait_for(lambda: sum(it.done() for it in asked) >= 8)
        assert 1 <= len(engine.seen(mark)) <= 2
        engine.release(mark)
        statuses = [it.result().status_code for it in asked]
    assert statuses.count(200) <= 2
    assert ask(gateway, key).status_code == 200, "what was set aside too much is there again"


# -- what is charged in the end ---------------------------------------------------------------------------------------


def test_padding_does_not_lower_the_estimated_price_of_a_prompt(gateway: GatewayProcess) -> None:
    key_id, key = make(gateway, tokens_per_minute=10**6)
    padded = b'{"model": "vllm", "script": %s, "messages": [%s]}' % (
        json.dumps(usage(9, 1)).encode(),
        b" " * 50_000 + json.dumps(MESSAGES[0]).encode(),
    )
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    with httpx.Client(base_url=gateway.url, headers=headers, verify=NO_TLS) as http:
        for _ in range(40):
            http.post(CHAT, content=padded).raise_for_status()
    text = "some words of a long question " * 300
    script = [["role"], ["token", "x"], ["hang"]]
    body = {"messages": [{"role": "user", "content": text}], "stream": True, "script": script}
    with (
        httpx.Client(base_url=gateway.url, headers=headers, verify=NO_TLS) as http,
        http.stream("POST", CHAT, json=body) as answer,
    ):
        lines = answer.iter_lines()
        while "x" not in next(lines):
            pass
    wait_for(lambda: used(gateway, key_id) >= 40 * 10 + len(text) / 8)


def test_a_client_that_leaves_a_blocking_answer_is_charged_for_what_may_have_been_made(gateway: GatewayProcess) -> None:
    def leave_twice(model: str) -> str:
        key = make_key(gateway, tokens_per_day=5000)
        for _ in range(2):
            body = {"model": model, "messages": MESSAGES, "max_tokens": 4000, "script": [["hang"]]}
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(
                    gateway.url + CHAT, json=body, headers={"authorization": f"Bearer {key}"}, timeout=1, verify=NO_TLS
                )
        spent = wait_for(lambda: it if (it := ask(gateway, key)).headers.get("x-should-retry") else None)
        return str(spent.json()["error"]["code"])

    with ThreadPoolExecutor() as pool:  # at the same time, as what may have been made is a matter of seconds
        assert list(pool.map(leave_twice, ["ollama", "vllm"])) == ["insufficient_quota"] * 2


def test_an_answer_beyond_the_total_timeout_is_charged_for_what_may_have_been_made(gateway: GatewayProcess) -> None:
    key = make_key(gateway)
    ask(gateway, key, model="brief", script=usage(7, 3000)).raise_for_status()  # a fast engine
    late = ask(gateway, key, model="brief", max_tokens=300, script=[["hang"]])
    assert late.json()["error"]["code"] == "engine_timeout"
    assert finished(gateway, late.headers["x-request-id"])["tokens_out"] == 300


@pytest.mark.parametrize("stream", [[["hang"]], [["role"], ["token", "x"], ["hang"]]], ids=["nothing", "a text"])
def test_a_tool_call_of_which_ollama_has_sent_nothing_yet_is_charged_for_what_may_have_been_made(
    gateway: GatewayProcess, stream: list[list[Any]]
) -> None:
    key = make_key(gateway)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]

    def charged(model: str, **more: Any) -> int:
        """The tokens of an answer that takes too long."""
        name = uuid4().hex
        headers = {"authorization": f"Bearer {key}", "x-request-id": name}
        body = {"model": model, "messages": MESSAGES, "stream": True, "max_tokens": 5, "script": stream, **more}
        with suppress(httpx.RemoteProtocolError):  # the stream is cut
            httpx.post(gateway.url + CHAT, json=body, headers=headers, timeout=30, verify=NO_TLS)
        return int(finished(gateway, name)["tokens_out"])

    seen = len(stream) // 2
    with ThreadPoolExecutor() as pool:
        asked = [("brief-ollama", {"tools": tools}), ("brief-ollama", {}), ("brief", {"tools": tools})]
        assert list(pool.map(lambda it: charged(it[0], **it[1]), asked)) == [seen + 5, seen, seen]


@pytest.mark.parametrize(
    ("model", "fields", "hidden"),
    [
        ("brief-llamacpp", {"stop": ["|", "count" * 100]}, 60),
        ("brief-ollama", {"stop": "count" * 4}, 5),
        ("brief-ollama", {"stop": "|"}, 0),
        ("brief", {"stop": "count" * 100}, 0),
        ("brief", {"include_reasoning": False}, 60),
        ("brief-llamacpp", {"include_reasoning": False}, 0),
    ],
)
def test_what_an_engine_may_hold_back_of_a_stream_is_charged_if_the_stream_is_cut(
    gateway: GatewayProcess, model: str, fields: dict[str, Any], hidden: int
) -> None:
    """llama.cpp and Ollama send nothing while the text may become a stop sequence, and vLLM sends nothing while a model
    reasons and the request does not want to see that."""
    assert cut(gateway, [["role"], ["token", "x"], ["hang"]], model=model, max_tokens=60, **fields) == 1 + hidden


@pytest.mark.parametrize(
    ("path", "content", "tokens"),
    [
        (EMBEDDINGS, {"input": [list(range(150))]}, 150),
        (RERANK, {"query": "x" * 40, "documents": ["a"] * 20}, (20 * 40 + len('"a",' * 20) + 1) // 4),
    ],
    ids=["embedding", "rerank"],
)
def test_a_client_that_leaves_is_charged_for_its_inputs_and_for_a_query_with_each_document(
    gateway: GatewayProcess, engine: FakeEngine, mark: str, path: str, content: dict[str, Any], tokens: int
) -> None:
    key_id, key = make(gateway)
    body = json.dumps({**content, "user": mark, "script": [["hang"]]}).encode()
    with head(gateway, key, len(body), path) as connection:
        connection.sendall(body)
        engine.wait_seen(mark, "running")
    assert wait_for(lambda: used(gateway, key_id)) == tokens


@pytest.mark.parametrize("told", [{}, {"usage": {"prompt_tokens": 7, "completion_tokens": 0}}, {"usage": "much"}])
def test_an_answer_without_reported_usage_is_charged_by_its_text(gateway: GatewayProcess, told: dict[str, Any]) -> None:
    key = make_key(gateway)
    choices = [{"index": 0, "message": {"role": "assistant", "content": "word " * 500}, "finish_reason": "stop"}]
    answer = ask(gateway, key, script=[["json", [200, {"choices": choices, **told}]]])
    assert 500 <= finished(gateway, answer.headers["x-request-id"])["tokens_out"] <= 700


def test_a_tool_call_in_one_event_is_more_than_one_token(gateway: GatewayProcess, mark: str) -> None:
    key = make_key(gateway, tokens_per_minute=10**6)
    call = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "word " * 400}}
    chunk = {"choices": [{"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": None}]}
    body = {"messages": MESSAGES, "stream": True, "user": mark, "script": [["role"], ["event", chunk], ["hang"]]}
    headers = {"authorization": f"Bearer {key}"}
    with (
        httpx.Client(base_url=gateway.url, headers=headers, verify=NO_TLS) as http,
        http.stream("POST", CHAT, json=body) as answer,
    ):
        lines = answer.iter_lines()
        while "arguments" not in next(lines):
            pass
        request_id = answer.headers["x-request-id"]
    assert finished(gateway, request_id)["tokens_out"] >= 400


def call(number: int, text: str) -> list[Any]:
    """Return the event with a whole tool call, whose arguments have this text."""
    function = {"name": "f", "arguments": json.dumps({"x": text})}
    piece = {"index": number, "id": f"c{number}", "type": "function", "function": function}
    return ["event", {"choices": [{"index": 0, "delta": {"tool_calls": [piece]}, "finish_reason": None}]}]


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
CALLS = [["role"], *(call(number, "word " * 100) for number in range(10))], 1250
WORDS = [["role"], *(["token", "word "] for _ in range(40))], 40
REQUIRED: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required"}
ONLY_ONE: dict[str, Any] = {"tools": TOOLS, "parallel_tool_calls": False}


def cut(
    gateway: GatewayProcess, *rounds: list[Any], model: str = "brief", outcome: str = "engine_timeout", **fields: Any
) -> int:
    """Return the tokens that are charged for a stream that the engine does not end. Each of its requests to the engine
    is answered with a script."""
    name = uuid4().hex
    tries = [{"script": it} for it in rounds]
    body = {"model": model, "messages": MESSAGES, "stream": True, "mark": name, "tries": tries, **fields}
    headers = {"authorization": f"Bearer {make_key(gateway)}", "x-request-id": name}
    with suppress(httpx.RemoteProtocolError):  # the stream is cut
        httpx.post(gateway.url + CHAT, json=body, headers=headers, timeout=30, verify=NO_TLS)
    line = finished(gateway, name)
    assert line["outcome"] == outcome, line
    return int(line["tokens_out"])


def test_a_client_that_leaves_is_charged_for_calls_that_were_not_passed_on(gateway: GatewayProcess) -> None:
    script, tokens = CALLS
    body = {"messages": MESSAGES, "stream": True, "tools": TOOLS, "tool_choice": "none"}
    headers = {"authorization": f"Bearer {make_key(gateway)}"}
    with (
        httpx.Client(base_url=gateway.url, headers=headers, verify=NO_TLS) as http,
        http.stream("POST", CHAT, json=body | {"script": [*script, ["token", "x"], ["hang"]]}) as answer,
    ):
        lines = answer.iter_lines()
        while '"x"' not in next(lines):
            pass
        request_id = answer.headers["x-request-id"]
    line = finished(gateway, request_id)
    assert line["outcome"] == "client_left"
    assert line["tokens_out"] > tokens


@pytest.mark.parametrize(
    ("made", "fields"),
    [
        (CALLS, ONLY_ONE),
        (CALLS, {"tools": TOOLS, "tool_choice": "none"}),
        (WORDS, REQUIRED),
        (WORDS, {**REQUIRED, "n": 2}),
        (WORDS, {**REQUIRED, "model": "brief-llamacpp"}),
    ],
    ids=["calls after the first", "calls that were not allowed", "text", "text of one of two", "text instead of JSON"],
)
def test_what_is_not_passed_on_of_an_answer_is_charged_like_the_rest(
    gateway: GatewayProcess, made: tuple[list[Any], int], fields: dict[str, Any]
) -> None:
    script, tokens = made
    assert cut(gateway, [*script, ["hang"]], **fields) >= tokens


@pytest.mark.parametrize("told", [[["usage"]], []], ids=["usage", "no usage"])
@pytest.mark.parametrize(
    ("made", "fields"),
    [
        (WORDS, REQUIRED),
        (WORDS, {**REQUIRED, "n": 2}),
        (WORDS, {**REQUIRED, "model": "brief-llamacpp"}),
        (CALLS, {**ONLY_ONE, "model": "brief-ollama", "n": 2}),
    ],
    ids=["a repair", "a repair of two choices", "a repair of JSON", "a second choice"],
)
def test_the_rounds_before_the_one_that_is_cut_are_charged_too(
    gateway: GatewayProcess, made: tuple[list[Any], int], fields: dict[str, Any], told: list[Any]
) -> None:
    script, tokens = made
    other = ["event", {"choices": [{"index": 1, "delta": {}, "finish_reason": "stop"}]}]
    ends = [other, ["finish", "stop"], *told, ["done"], ["end"]]
    second = [["role"], ["token", "{"], ["token", " "], ["hang"]]
    assert cut(gateway, [*script, *ends], second, **fields) >= tokens + 2


def test_a_wrong_answer_is_charged_too_if_the_engine_dies_while_it_makes_another(gateway: GatewayProcess) -> None:
    script, tokens = WORDS
    other = ["event", {"choices": [{"index": 1, "delta": {}, "finish_reason": "stop"}]}]
    wrong = [*script, other, ["finish", "stop"], ["done"], ["end"]]
    dies = [["role"], ["token", "{"], ["close"]]
    assert cut(gateway, wrong, dies, outcome="engine_broken_stream", **REQUIRED, n=2) == tokens + 1


TEXT = " ".join(f"word{number}" for number in range(300))
LAST = [*MESSAGES, {"role": "assistant", "content": TEXT}]
ECHOES = {
    "nothing": (COMPLETIONS, {"prompt": TEXT, "max_tokens": 0}, [""]),
    "a text": (COMPLETIONS, {"prompt": TEXT}, [" some"]),
    "two of each text": (COMPLETIONS, {"prompt": [TEXT, "one two"], "n": 2}, [" some"] * 4),
    "tokens": (COMPLETIONS, {"prompt": list(range(700)), "max_tokens": 0}, [""]),
    "lists of tokens": (COMPLETIONS, {"prompt": [list(range(700))] * 2}, [" some"] * 2),
    "a message": (CHAT, {"messages": LAST, "continue_final_message": True, "add_generation_prompt": False}, [" some"]),
    "a message with tools": (CHAT, {"messages": LAST, "tools": TOOLS, "parallel_tool_calls": False}, [" some"]),
}


def echo(path: str, prompts: list[str], made: list[str], tokens: int, *, stream: bool) -> list[list[Any]]:
    """Return the script of vLLM's answer with `echo`, which took 600 tokens and these."""
    chat, told = path == CHAT, {"prompt_tokens": 600, "completion_tokens": tokens, "total_tokens": 600 + tokens}
    head = {"id": "c", "created": 1, "model": "fake-model"}

    def choice(index: int, text: str, reason: str | None = None) -> dict[str, Any]:
        said = {"delta" if stream else "message": {"content": text}} if chat else {"text": text}
        return {"index": index, **said, "finish_reason": reason}

    texts = list(enumerate(zip(prompts, made, strict=True)))
    if not stream:
        whole = [choice(index, prompt + text, "length") for index, (prompt, text) in texts]
        return [["json", [200, head | {"choices": whole, "usage": told}]]]
    pieces = [(index, it) for index, both in texts for it in (both if chat else ["".join(both)])]
    choices = [*(choice(*it) for it in pieces), *(choice(index, "", "length") for index, _ in texts)]
    events = [["event", head | {"choices": [it]}] for it in choices]
    return [*events, ["event", head | {"choices": [], "usage": told}], ["done"], ["end"]]


@pytest.mark.parametrize("stream", [False, True], ids=["blocking", "stream"])
@pytest.mark.parametrize("name", ECHOES)
def test_a_prompt_that_the_answer_repeats_is_charged_once(gateway: GatewayProcess, name: str, stream: bool) -> None:
    path, fields, made = ECHOES[name]
    prompts = [TEXT, TEXT, "one two", "one two"] if len(made) == 4 else [TEXT] * len(made)
    tokens = sum(map(bool, made))
    script = echo(path, prompts, made, tokens, stream=stream)
    answer = ask(gateway, make_key(gateway), path, echo=True, stream=stream, script=script, **fields)
    line = finished(gateway, answer.raise_for_status().headers["x-request-id"])
    assert (line["outcome"], line["tokens_in"], line["tokens_out"]) == ("finished", 600, tokens)


@pytest.mark.parametrize("stream", [False, True], ids=["blocking", "stream"])
def test_an_answer_behind_a_repeated_prompt_is_charged_by_its_text_too(gateway: GatewayProcess, stream: bool) -> None:
    made = " more" * 500
    script = echo(COMPLETIONS, [TEXT], [made], 0, stream=stream)
    answer = ask(gateway, make_key(gateway), COMPLETIONS, echo=True, stream=stream, script=script, prompt=TEXT)
    assert 500 <= finished(gateway, answer.headers["x-request-id"])["tokens_out"] <= len(made) // 4


def test_a_retried_answer_is_charged_once(gateway: GatewayProcess, mark: str) -> None:
    key = make_key(gateway)
    whole = [["role"], ["token", "one"], ["finish", "stop"], ["usage"], ["done"], ["end"]]
    scripts = {"dies": [["close"]], "fake-model": whole}
    answer = ask(gateway, key, model="dies-then-vllm", stream=True, user=mark, script_for=scripts)
    line = finished(gateway, answer.headers["x-request-id"])
    assert (line["outcome"], line["tokens_in"], line["tokens_out"]) == ("finished", 7, 3)


# -- whatever a client combines ---------------------------------------------------------------------------------------

NAMES = st.sampled_from(["max_tokens", "max_completion_tokens", "n_predict"])
ONE = st.fixed_dictionaries(
    {
        "names": st.dictionaries(NAMES, st.sampled_from([1, 3, 20.0, 60, None]), max_size=3),
        "n": st.sampled_from([None, 1, 2, 3]),
        "stream": st.booleans(),
        "model": st.sampled_from(ENGINES),
        "padding": st.sampled_from([0, 0, 20_000]),
        "leaves": st.sampled_from([None, None, 0.0, 0.025, 0.075]),
        "usage": st.sampled_from(sorted(TOLD)),
    }
)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(ONE, min_size=1, max_size=6))
@example([{"names": {}, "n": 3, "stream": False, "model": "ollama", "padding": 0, "leaves": None, "usage": "a list"}])
def test_the_charge_is_at_most_one_answer_less_than_what_the_engine_made(
    gateway: GatewayProcess, engine: FakeEngine, requests: list[dict[str, Any]]
) -> None:
    (key_id, key), mark = make(gateway, tokens_per_minute=10**9), uuid4().hex
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda it: _send(gateway, key, mark, uuid4().hex, **it), requests))

    def charged() -> dict[str, int]:
        """Tokens of the answers whose ends are in the log."""
        ends = (it for it in gateway.log() if it.get("key") == key_id and it["msg"].startswith("chat_finished"))
        return {it["request_id"]: it["tokens_out"] for it in ends}

    def over() -> list[int] | None:
        """Tokens of each request to the engine (an Ollama has one for each of `n` choices), once all have ended."""
        seen = engine.seen(mark)
        asked = {it["body"]["script"][0][1]["request_id"] for it in seen}
        ended = all(it["state"] != "running" for it in seen) and asked <= charged().keys()
        return [0, *(it["made"] for it in seen)] if ended else None

    made = wait_for(over)
    assert sum(charged().values()) >= sum(made) - max(made)


def _send(gateway: GatewayProcess, key: str, mark: str, request_id: str, **it: Any) -> None:
    what = {"dialect": it["model"], "length": 30, "pace": 0.0015, "usage": it["usage"], "request_id": request_id}
    fields = {"model": it["model"], "messages": MESSAGES, "user": mark, "stream": it["stream"], **it["names"]}
    if it["n"] is not None:
        fields["n"] = it["n"]
    body = json.dumps(fields | {"script": [["generate", what]]})
    content = body[:-1] + " " * it["padding"] + "}"
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json", "x-request-id": request_id}
    timeout = httpx.Timeout(30, read=30 if it["leaves"] is None else it["leaves"] or 0.001)
    with (
        suppress(httpx.TransportError),
        httpx.Client(base_url=gateway.url, headers=headers, verify=NO_TLS, timeout=timeout) as http,
        http.stream("POST", CHAT, content=content) as answer,
    ):
        began = time.monotonic()
        for _ in answer.iter_lines():
            if it["leaves"] is not None and time.monotonic() - began > it["leaves"]:
                return
