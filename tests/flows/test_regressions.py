"""Bugs that were found once, each named by its behaviour."""

import json
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.relay.tap import Tap
from tests.support.processes import (
    AUTH,
    MESSAGES,
    FakeEngine,
    GatewayProcess,
    descriptors,
    events,
    post,
    running_gateway,
    text_of,
    wait_for,
)

CHAT = "/v1/chat/completions"


def test_a_connection_whose_request_is_still_being_written_is_not_used_again(tmp_path: Path) -> None:
    """An engine that refuses a large body without reading it, and keeps the connection, would read the next request
    behind that body."""
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        ended = threading.Event()
        refusal = b"HTTP/1.1 413 X\r\ncontent-length: 2\r\ncontent-type: application/json\r\n\r\n{}"

        def serve() -> int:
            posts = 0
            with ExitStack() as stack:
                while posts < 2:
                    connection = stack.enter_context(server.accept()[0])
                    if connection.recv(1000).startswith(b"POST"):  # not a health probe
                        posts += 1
                        connection.sendall(refusal)
                wait_for(ended.is_set)
            return posts

        served = pool.submit(serve)
        with (
            running_gateway(tmp_path / "log", url, STACK_WORKERS="1", LLM_TIMEOUT="20") as gateway,
            gateway.client() as client,
        ):
            big = [{"role": "user", "content": "x" * 15_000_000}]
            assert client.post(CHAT, json={"messages": big}).status_code == 413
            assert client.post(CHAT, json={"messages": MESSAGES}).status_code == 413
            ended.set()
            assert served.result(30) == 2


def test_a_request_that_kills_connections_is_not_replayed_on_every_idle_one(
    engine: FakeEngine, tmp_path: Path, mark: str
) -> None:
    with running_gateway(tmp_path / "log", engine.url, STACK_WORKERS="1") as gateway:
        held = {"messages": MESSAGES, "user": mark, "script": [["gate", mark], ["json", [200, {"choices": []}]]]}
        with ThreadPoolExecutor(10) as pool:  # ten idle connections
            jobs = [pool.submit(httpx.post, gateway.url + CHAT, json=held, headers=AUTH, timeout=30) for _ in range(10)]
            wait_for(lambda: len(engine.seen(mark)) == 10)
            engine.release(mark)
            assert all(job.result().status_code == 200 for job in jobs)
        poison = {"messages": MESSAGES, "user": mark + "!", "script": [["close"]]}
        with gateway.client() as client:
            assert client.post(CHAT, json=poison).status_code == 502
        assert len(engine.seen(mark + "!")) <= 4  # a dead idle connection, a new one; and both once more


def test_a_client_that_reads_slowly_does_not_look_like_a_silent_engine(gateway: GatewayProcess, mark: str) -> None:
    """The idle timeout is 2 s here; the client pauses for longer while the engine has more to say."""
    body = {
        "messages": MESSAGES,
        "stream": True,
        "script": [["tokens", [300, 50_000]], ["finish", "stop"], ["done"], ["end"]],
    }
    content = json.dumps(body).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\nauthorization: {AUTH['authorization']}\r\nx-request-id: {mark}\r\n"
    )
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(("127.0.0.1", gateway.port))
        raw.sendall(
            f"{head}content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content
        )
        time.sleep(3)  # the pause itself is what is tested
        raw.settimeout(30)
        end = b""
        while b"[DONE]" not in end and (data := raw.recv(1 << 16)):
            end = (end + data)[-100:]
    assert b"[DONE]" in end
    assert gateway.lines(mark)[1]["outcome"] == "finished"


@pytest.mark.parametrize("size", [100, 100_000, 500_000])
def test_a_client_that_leaves_after_a_large_body_is_noticed(
    gateway: GatewayProcess, engine: FakeEngine, mark: str, size: int
) -> None:
    """Reading stops for a large body and must continue after it, because only reading notices a disconnect."""
    script = [["gate", mark], ["json", [200, {"choices": []}]]]
    body = {"messages": [{"role": "user", "content": "x" * size}], "user": mark, "script": script}
    content = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\nauthorization: {AUTH['authorization']}\r\n"
    head += f"x-request-id: {mark}\r\nexpect: 100-continue\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(content)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=30) as raw:
        raw.sendall(head.encode())
        assert b" 100 " in raw.recv(100)
        raw.sendall(content)
        engine.wait_seen(mark)
    engine.wait_seen(mark, "hung_up")
    started, finished, request = wait_for(lambda: lines if len(lines := gateway.lines(mark)) == 3 else None)
    assert (started["msg"], finished["outcome"], request["status"]) == ("chat_started", "client_left", 499)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_ctrl_c_stops_at_once(engine: FakeEngine, tmp_path: Path, number: int) -> None:
    with running_gateway(tmp_path / "log", engine.url, STACK_GRACE="300") as gateway:
        gateway.process.send_signal(number)
        assert gateway.process.wait(30) == 0
        assert not any("SIGKILL" in line["msg"] for line in gateway.log())


def test_the_body_cap_holds_for_a_single_chunk(engine: FakeEngine, tmp_path: Path) -> None:
    with (
        running_gateway(tmp_path / "log", engine.url, STACK_MAX_BODY_BYTES="1024") as gateway,
        gateway.client() as client,
    ):
        body = json.dumps({"messages": [{"role": "user", "content": "x" * 3000}]}).encode()
        assert client.post(CHAT, content=iter([body])).status_code == 413


def test_a_large_event_in_small_pieces_is_linear() -> None:
    """8 MB in pieces of 1 KB once took 55 s of CPU."""
    for newline in (b"", b"\r", b"\ndata:"):
        tap = Tap(hide_usage=True)
        began = time.process_time()
        tap.feed(b'data: {"x": "')
        for _ in range(6000):
            tap.feed(b"y" * 1000 + newline)
        assert time.process_time() - began < 10


def test_callers_do_not_queue_for_a_silent_engines_list_of_models(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=100) as hole, ThreadPoolExecutor(8) as pool:
        url = f"http://127.0.0.1:{hole.getsockname()[1]}"
        with running_gateway(tmp_path / "log", url, STACK_WORKERS="1") as gateway:
            began = time.monotonic()
            ask = [pool.submit(httpx.get, gateway.url + "/v1/models", headers=AUTH, timeout=60) for _ in range(8)]
            assert all(job.result().status_code == 200 for job in ask)
            assert time.monotonic() - began < 25  # one control call takes 5 s, eight in a row 40


@pytest.mark.parametrize("url", ["http://engine.invalid:1/v1", "http://127.0.0.1:1/v1"])
def test_an_engine_that_cannot_be_found_is_503(tmp_path: Path, url: str) -> None:
    with running_gateway(tmp_path / "log", url, STACK_WORKERS="1") as gateway, gateway.client() as client:
        answer = client.post(CHAT, json={"messages": MESSAGES})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
        assert gateway.lines(answer.headers["x-request-id"])[-2]["cause"]  # the operator is told why
        assert client.get("/readyz").status_code == 503


@pytest.mark.parametrize("key", ["a\r\nx-evil: 1", "schlüssel", "a b"])
def test_an_engines_key_that_would_break_a_header_is_refused(tmp_path: Path, key: str) -> None:
    with (
        pytest.raises(AssertionError, match="LLM_API_KEY"),
        running_gateway(tmp_path / "log", "http://x:1", LLM_API_KEY=key),
    ):
        pass


def test_a_chunk_after_the_finish_reason_does_not_reopen_the_answer(gateway: GatewayProcess) -> None:
    late: Any = ["event", {"choices": [{"index": 0, "delta": {}, "finish_reason": None}], "usage": {"total_tokens": 1}}]
    script = [["role"], ["token", "x"], ["finish", "stop"], late, ["done"], ["end"]]
    with gateway.client() as client:
        chunks = events(client.post(CHAT, json={"messages": MESSAGES, "stream": True, "script": script}).text)
    assert text_of(chunks) == "x"
    assert "error" not in chunks[-2]


def test_a_stream_that_is_cut_before_the_second_choice_is_incomplete(gateway: GatewayProcess) -> None:
    body = {"messages": MESSAGES, "stream": True, "n": 2, "script": [["token", "x"], ["finish", "stop"], ["end"]]}
    with gateway.client() as client:
        assert events(post(client, CHAT, json=body).text)[-1]["error"]["code"] == "engine_broken_stream"


def test_stream_means_nothing_to_embeddings(gateway: GatewayProcess) -> None:
    with gateway.client() as client:
        assert client.post("/v1/embeddings", json={"input": "x", "stream": True}).json()["data"]


def test_health_can_be_asked_with_head(gateway: GatewayProcess) -> None:
    with gateway.client() as client:
        assert client.head("/livez").status_code == 200
        assert client.head("/readyz").status_code == 200


def test_idle_connections_to_the_engine_do_not_pile_up(engine: FakeEngine, tmp_path: Path, mark: str) -> None:
    """After a burst of 20 requests come single ones. Connections that are no longer needed are closed."""
    with running_gateway(tmp_path / "log", engine.url, STACK_WORKERS="1") as gateway, ThreadPoolExecutor(20) as pool:
        held = {"messages": MESSAGES, "user": mark, "script": [["gate", mark], ["json", [200, {"choices": []}]]]}
        jobs = [pool.submit(httpx.post, gateway.url + CHAT, json=held, headers=AUTH, timeout=30) for _ in range(20)]
        wait_for(lambda: len(engine.seen(mark)) == 20)
        engine.release(mark)
        assert all(job.result().status_code == 200 for job in jobs)
        (worker,) = gateway.workers()

        def few() -> bool:
            httpx.post(gateway.url + CHAT, json={"messages": MESSAGES}, headers=AUTH).raise_for_status()
            return sum("socket" in it for it in descriptors(worker)) < 15

        wait_for(few, deadline=60)
