"""Endings: a stream is complete, or it ends in a way that no client takes for complete."""

import asyncio
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import openai
import pytest
import requests
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from gateway.llm import LLM, LLMConfig, LLMError
from tests.support.processes import (
    AUTH,
    JSON,
    KEY,
    MESSAGES,
    FakeEngine,
    GatewayProcess,
    free_port,
    running_gateway,
    text_of,
    wait_for,
)
from tests.support.streams import sse

CHAT = "/v1/chat/completions"
START = [["role"], ["token", "one"], ["token", " two"]]
FINISH = [["token", " three"], ["finish", "stop"], ["usage"], ["done"], ["end"]]
WHOLE = [*START, *FINISH]
DIES = [*START, ["reset"]]
HELD = [["gate", "never"]]  # the head goes out before the engine says anything

CONFIG = """
engines:
  engine: &engine {{dialect: vllm, base_url: "{url}"}}
  other: *engine
models:
  fake-model: &fake {{targets: [{{engine: engine, model: fake-model}}], timeouts: {{first_token: 2.5, idle: 1}}}}
  brief: {{<<: *fake, timeouts: {{total: 0.7}}}}
  resumed:
    targets: [{{engine: engine, model: fake-model}}, {{engine: other, model: fake-model}}]
    resume: {{most: 2, wait: 1}}
    timeouts: {{first_token: 0.5, idle: 0.5}}
default_model: fake-model
breaker: {{failures: 1000}}
retries: {{budget: 1, backoff: 0}}
"""


@pytest.fixture(scope="module")
def own(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    path = tmp_path_factory.mktemp("endings")
    (path / "stack.yaml").write_text(CONFIG.format(url=engine.url))
    with running_gateway(path / "log", engine.url, STACK_CONFIG=str(path / "stack.yaml"), STACK_HOLD="0.5") as gateway:
        yield gateway


def body_of(script: list[Any], **fields: Any) -> dict[str, Any]:
    return {"model": "fake-model", "messages": MESSAGES, "stream": True, "script": script, **fields}


# ── What leaves, to the byte ─────────────────────────────────────────────────────────────────────────────────────────


def read(url: str, body: dict[str, Any], **headers: str) -> tuple[int, str, bool]:
    """Return a response's status, its body as far as it came, and whether it was complete."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    connection.request("POST", CHAT, json.dumps(body), AUTH | JSON | headers)
    response = connection.getresponse()
    try:
        return response.status, response.read().decode(), True
    except http.client.IncompleteRead as cut:
        return response.status, cut.partial.decode(), False
    finally:
        connection.close()


def code_of_cut(answer: tuple[int, str, bool]) -> str:
    """Return the code of a stream's error event. Nothing may follow it: no [DONE], and no last chunk."""
    status, text, ends = answer
    *before, last = sse(text)
    assert (status, ends) == (200, False)
    assert "[DONE]" not in before
    assert text.endswith("\n\n")
    code: str = last["error"]["code"]
    return code


BROKEN = "engine_broken_stream"
CAUSES: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
    "the engine dies": (BROKEN, DIES, {}),
    "it closes its connection": (BROKEN, [*START, ["close"]], {}),
    "it ends without a finish_reason": (BROKEN, [*START, ["end"]], {}),
    "it says [DONE] without a finish_reason": (BROKEN, [*START, ["done"], ["end"]], {}),
    "its finish_reason is empty": (BROKEN, [*START, ["finish", ""], ["done"], ["end"]], {}),
    "one of two choices does not finish": (
        BROKEN,
        [["event", {"choices": [{"index": 1, "delta": {}}]}], *WHOLE],
        {"n": 2},
    ),
    "a frame is broken": (BROKEN, [*START, ["text", "data: {]\n\n"], ["hang"]], {}),
    "a frame is no object": (BROKEN, [*START, ["text", "data: 1\n\n"], ["hang"]], {}),
    "it sends an error event": ("engine_error", [*START, ["event", {"error": {"message": "x"}}], ["hang"]], {}),
    "it sends an event of the type error": (
        "engine_error",
        [*START, ["text", 'event: error\ndata: {"message": "x"}\n\n'], ["hang"]],
        {},
    ),
    "it stalls": ("engine_timeout", [*START, ["hang"]], {}),
    "the answer takes too long": ("engine_timeout", [*START, ["hang"]], {"model": "brief"}),
    "it dies after the head went out early": (
        "engine_error",
        [["pause", 1], ["reset"]],
        {"model": "fake-model"},
    ),
    "it is silent after the head went out early": ("engine_timeout", [["hang"]], {}),
    "it is overloaded after the head went out early": ("server_is_overloaded", [["pause", 1], ["json", [503, {}]]], {}),
}


@pytest.fixture(scope="module")
def failed(own: GatewayProcess) -> dict[tuple[str, bool], tuple[int, str, bool]]:
    """What `read` returned for each cause, without and with an Idempotency-Key. All are sent together, because some
    take seconds to fail."""

    def fails(cause: str, keyed: bool) -> tuple[int, str, bool]:
        _, script, fields = CAUSES[cause]
        headers = {"idempotency-key": uuid4().hex} if keyed else {}
        return read(own.url, body_of(script, **fields), **headers)

    with ThreadPoolExecutor(2 * len(CAUSES)) as pool:
        sent = {case: pool.submit(fails, *case) for case in product(CAUSES, (False, True))}
        return {case: answer.result() for case, answer in sent.items()}


@pytest.mark.parametrize("cause", CAUSES)
@pytest.mark.parametrize("keyed", [False, True], ids=["", "with an Idempotency-Key"])
def test_a_failed_stream_ends_with_its_error_event_and_a_cut(
    failed: dict[tuple[str, bool], tuple[int, str, bool]], cause: str, *, keyed: bool
) -> None:
    assert code_of_cut(failed[cause, keyed]) == CAUSES[cause][0]


def test_an_error_event_says_itself_when_to_come_back(own: GatewayProcess) -> None:
    _, text, _ = read(own.url, body_of([["pause", 1], ["json", [503, {}]]]))
    message = sse(text)[-1]["error"]["message"]
    assert message == "The engine is overloaded. Retry in 2 seconds."
    _, text, _ = read(own.url, body_of([["json", [503, {}]]]))  # with a status of its own, the header says it
    assert "Retry in" not in json.loads(text)["error"]["message"]


def test_a_failed_stream_is_not_kept_for_its_idempotency_key(
    own: GatewayProcess, engine: FakeEngine, mark: str
) -> None:
    for number in (1, 2):
        assert code_of_cut(read(own.url, body_of(DIES, user=mark), **{"idempotency-key": mark})) == BROKEN
        assert len(engine.seen(mark)) == number


def test_an_answer_is_whole_if_its_engine_falls_silent_behind_it(own: GatewayProcess) -> None:
    answer = read(own.url, body_of([*START, ["finish", "stop"], ["hang"]]))
    assert proper(answer), answer
    assert answer[1].endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [True, False])
def test_an_error_with_the_status_200_is_told_as_any_other(own: GatewayProcess, *, stream: bool) -> None:
    error = {"message": "'temperature' must be between 0 and 2", "type": "invalid_request_error", "code": 400}
    status, text, _ = read(own.url, body_of([["json", [200, {"error": error}]]]) | {"stream": stream})
    assert (status, json.loads(text)["error"]["param"]) == (400, "temperature")


# ── Clients of HTTP/1.0 ──────────────────────────────────────────────────────────────────────────────────────────────


def old(gateway: GatewayProcess, body: dict[str, Any]) -> Iterator[bytes]:
    """Yield the response to a client of HTTP/1.0, piece by piece. Raises ConnectionResetError at a reset."""
    data = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.0\r\nhost: localhost\r\nauthorization: {AUTH['authorization']}\r\n"
    head += "content-type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=60) as raw:
        raw.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
        while data := raw.recv(65536):
            yield data


def test_a_client_of_http_1_0_gets_a_body_that_ends_with_the_connection(own: GatewayProcess) -> None:
    got = b"".join(old(own, body_of(WHOLE)))
    head, _, body = got.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head
    assert b"connection: close" in head
    assert text_of(sse(body.decode())) == "one two three"
    assert body.endswith(b"data: [DONE]\n\n")
    head, _, body = b"".join(old(own, body_of(WHOLE) | {"stream": False, "script": None})).partition(b"\r\n\r\n")
    assert f"content-length: {len(body)}".encode() in head


def test_a_failed_stream_of_http_1_0_is_reset_once_its_error_event_is_there(own: GatewayProcess) -> None:
    answer, got = old(own, body_of(DIES)), b""
    while b"error" not in got or not got.endswith(b"\n\n"):
        got += next(answer)
    with pytest.raises(ConnectionResetError):
        next(answer)
    assert sse(got.partition(b"\r\n\r\n")[2].decode())[-1]["error"]["code"] == BROKEN


def test_a_stream_of_http_1_0_whose_worker_is_killed_is_reset(engine: FakeEngine, tmp_path: Path, mark: str) -> None:
    with running_gateway(tmp_path / "log", engine.url, STACK_WORKERS="1") as gateway:
        answer = old(gateway, body_of([*START, ["gate", mark]], user=mark))
        assert any(b" two" in piece for piece in answer)
        os.kill(gateway.workers()[0], signal.SIGKILL)
        with pytest.raises(ConnectionResetError):
            list(answer)


# ── Clients as users have them, directly and behind nginx ────────────────────────────────────────────────────────────

NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")  # scripts/test sees to it that it is there
BEHIND = {f"nginx, HTTP/{it[0]}, buffering {it[1]}": it for it in product(("1.0", "1.1"), ("on", "off"))}
WAYS = ["directly", *BEHIND]
SERVER = """
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://127.0.0.1:{gateway};
      proxy_http_version {version};
      proxy_set_header Connection "";
      proxy_buffering {buffering};
      proxy_ignore_headers X-Accel-Buffering;
    }}
  }}
"""


@contextmanager
def nginx(directory: Path, servers: list[str], port: int) -> Iterator[None]:
    assert NGINX, "nginx is not installed: run the tests with scripts/test, or install nginx-light"
    temp = "".join(f"{it}_temp_path {directory};" for it in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    conf = directory / "nginx.conf"
    conf.write_text(
        f"daemon off; pid {directory}/pid; error_log {directory}/error.log; worker_processes 1; events {{}}"
        f"http {{ access_log off; {temp} {''.join(servers)} }}"
    )
    with subprocess.Popen([NGINX, "-p", str(directory), "-e", f"{directory}/error.log", "-c", str(conf)]) as process:
        try:
            wait_for(lambda: process.poll() is None and _listens(port))
            yield
        finally:
            process.terminate()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def ways(own: GatewayProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """URLs by which the gateway is reached."""
    ports = {way: free_port() for way in BEHIND}
    servers = [
        SERVER.format(port=ports[way], gateway=own.port, version=version, buffering=buffering)
        for way, (version, buffering) in BEHIND.items()
    ]
    with nginx(tmp_path_factory.mktemp("nginx"), servers, ports[WAYS[-1]]):
        yield {"directly": own.url, **{way: f"http://127.0.0.1:{port}" for way, port in ports.items()}}


def by_openai(url: str, script: list[Any]) -> str:
    client = openai.OpenAI(base_url=url + "/v1", api_key=KEY, max_retries=0)
    body = body_of(script)
    extra = {"script": body.pop("script")}
    return "".join(it.choices[0].delta.content or "" for it in client.chat.completions.create(**body, extra_body=extra))


def by_async_openai(url: str, script: list[Any]) -> str:
    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=url + "/v1", api_key=KEY, max_retries=0) as client:
            body = body_of(script)
            extra = {"script": body.pop("script")}
            stream = await client.chat.completions.create(**body, extra_body=extra)
            return "".join([it.choices[0].delta.content or "" async for it in stream])

    return asyncio.run(ask())


def by_openai_helper(url: str, script: list[Any]) -> str:
    client = openai.OpenAI(base_url=url + "/v1", api_key=KEY, max_retries=0)
    with client.chat.completions.stream(
        model="fake-model",
        messages=MESSAGES,
        extra_body={"script": script},  # type: ignore[arg-type]
    ) as stream:
        return str(stream.get_final_completion().choices[0].message.content)


def by_llm(url: str, script: list[Any]) -> str:
    async def ask() -> str:
        with LLM(LLMConfig(url + "/v1", "fake-model", timeout=30, api_key=KEY)) as llm:
            return text_of([it async for it in llm.astream(MESSAGES, script=script)])

    return asyncio.run(ask())


# These read bytes and no events: that the stream failed they learn from the connection alone.


def by_httpx(url: str, script: list[Any]) -> str:
    return text_of(sse(httpx.post(url + CHAT, json=body_of(script), headers=AUTH, timeout=60).text))


def by_requests(url: str, script: list[Any]) -> str:
    return text_of(sse(requests.post(url + CHAT, json=body_of(script), headers=AUTH, timeout=60).text))


def by_urllib(url: str, script: list[Any]) -> str:
    request = urllib.request.Request(url + CHAT, json.dumps(body_of(script)).encode(), AUTH | JSON)
    with urllib.request.urlopen(request, timeout=60) as response:
        return text_of(sse(response.read().decode()))


CLIENTS: list[tuple[Callable[[str, list[Any]], str], type[Exception]]] = [
    (by_openai, openai.APIError),
    (by_async_openai, openai.APIError),
    (by_openai_helper, openai.APIError),
    (by_llm, LLMError),
    (by_httpx, httpx.RemoteProtocolError),
    (by_requests, requests.exceptions.ChunkedEncodingError),
    (by_urllib, http.client.IncompleteRead),
]


def test_no_client_takes_a_failed_stream_for_a_success(ways: dict[str, str]) -> None:
    def whole_and_failed(way: str, client: Callable[[str, list[Any]], str], error: type[Exception]) -> None:
        assert client(ways[way], WHOLE) == "one two three", way
        for script in (DIES, [["pause", 0.7], ["reset"]]):  # the second fails after the head went out early
            with pytest.raises(error) as failed:
                client(ways[way], script)
            # They show our words, where nginx does not drop what it holds when it is reset.
            if isinstance(failed.value, openai.APIError | LLMError) and way != "nginx, HTTP/1.0, buffering on":
                assert failed.value.code in (BROKEN, "engine_error"), (client, way)

    with ThreadPoolExecutor(len(WAYS) * len(CLIENTS)) as pool:
        for it in [pool.submit(whole_and_failed, way, *client) for way, client in product(WAYS, CLIENTS)]:
            it.result()


def test_a_client_whose_worker_is_killed_is_told_by_its_connection(
    own: GatewayProcess, ways: dict[str, str], mark: str
) -> None:
    """No process is left to send an error event."""
    script = [*START, ["tokens", [2000, 100]], ["gate", mark]]  # more than nginx buffers before it sends the head
    with ExitStack() as stack:
        answers = []
        for way in WAYS:
            asked = httpx.stream("POST", ways[way] + CHAT, json=body_of(script), headers=AUTH, timeout=60)
            answers.append(stack.enter_context(asked))
        for worker in own.workers():
            os.kill(worker, signal.SIGKILL)
        for answer in answers:
            with pytest.raises(httpx.RemoteProtocolError):
                answer.read()


# ── Whatever an engine does ──────────────────────────────────────────────────────────────────────────────────────────


def chunk(index: int, text: str, reason: str | None) -> list[Any]:
    return ["event", {"choices": [{"index": index, "delta": {"content": text}, "finish_reason": reason}]}]


STEPS: list[list[Any]] = [
    ["role"],
    ["token", "x"],
    ["token", " y"],
    ["finish", "stop"],
    ["finish", "length"],
    ["finish", ""],
    chunk(1, "z", None),
    chunk(1, "", "stop"),
    chunk(0, "w", None),
    ["usage"],
    ["done"],
    ["event", {}],
    ["event", {"choices": []}],
    ["event", {"choices": None}],
    ["event", {"error": "x"}],
    ["event", {"error": None, "choices": [{"index": 0, "delta": {}}]}],
    ["text", ": hi\n"],
    ["text", ": hi\n\n"],
    ["text", "id: 1\n\n"],
    ["text", "retry: 1\r\n\r\n"],
    ["text", "data:\n\n"],
    ["text", "data: null\n\n"],
    ["text", "\n"],
    ["text", "data: {"],
    ["text", "data: []\n\n"],
    ["hex", b'data: "\xff"\n\n'.hex()],
]
ENDS: list[list[Any]] = [["end"], ["close"], ["reset"], ["hang"]]
SCRIPTS = st.tuples(st.lists(st.sampled_from(STEPS), max_size=8), st.sampled_from(ENDS)).map(lambda it: [*it[0], it[1]])


def whatever() -> list[tuple[list[Any], int, str]]:
    """Return scripts of an engine, each with how many choices are asked for, and of which model."""
    found: list[tuple[list[Any], int, str]] = []

    @given(script=SCRIPTS, n=st.sampled_from([1, 1, 2]), model=st.sampled_from(["fake-model", "resumed"]))
    @settings(max_examples=50, phases=[Phase.generate], database=None)
    def draw(script: list[Any], n: int, model: str) -> None:
        found.append((script, n, model))

    draw()
    return found


def test_whatever_an_engine_does_a_stream_is_whole_or_ends_with_an_error_and_a_cut(own: GatewayProcess) -> None:
    """After an end without either, some clients retry for ever (opencode: 445 times in 75 seconds)."""
    cases = whatever()
    with ThreadPoolExecutor(16) as pool:  # many of them wait for a timeout
        answers = pool.map(lambda case: read(own.url, body_of(case[0], n=case[1], model=case[2])), cases)
        for case, answer in zip(cases, answers, strict=True):
            assert proper(answer), (case, answer)


def proper(answer: tuple[int, str, bool]) -> bool:
    """Return whether a client can tell if the answer is whole."""
    status, text, ends = answer
    if status != 200:
        return set(json.loads(text)["error"]) == {"message", "type", "param", "code"}
    if not ends:
        return bool(code_of_cut(answer))
    *chunks, done = sse(text)
    choices = [choice for it in chunks for choice in it["choices"]]
    finished = {it["index"] for it in choices if it.get("finish_reason")}
    sound = done == "[DONE]" and not any(it.get("error") for it in chunks)
    return sound and finished == {it["index"] for it in choices} != set()
