"""The real engine is killed, restarted, paused and cut off under ten concurrent streams: every client gets a whole
answer or an honest error, and the next request works."""

import time
from collections.abc import Callable
from uuid import uuid4

import pytest

from tests.support.processes import events, wait_for
from tests.support.stack import Stack, Stream

CLIENTS = 10
WITHIN = 5 * 20  # seconds: 15 of silence at most (LLM_IDLE_TIMEOUT here) and the rest of an answer, five times


def kill(stack: Stack) -> None:
    stack.container("engine").kill()
    stack.container("engine").start()


def restart(stack: Stack) -> None:
    stack.container("engine").restart(timeout=1)


def pause(stack: Stack) -> None:
    engine = stack.container("engine")
    engine.pause()
    with stack.client() as client:  # a paused engine is noticed: the probes find it silent
        wait_for(lambda: client.get("/readyz").status_code == 503, deadline=60)
    engine.unpause()


def disconnect(stack: Stack) -> None:
    network = stack.docker.networks.get(f"{stack.project}_backend")
    engine = stack.container("engine")
    network.disconnect(engine)
    network.connect(engine, aliases=["engine"])


@pytest.mark.parametrize("fault", [kill, restart, pause, disconnect])
def test_ten_streams_under_a_fault(stack: Stack, fault: Callable[[Stack], None]) -> None:
    streams = [Stream(stack, 30, begun=False) for _ in range(CLIENTS)]
    wait_for(lambda: any('"content":"' in stream.text for stream in streams), deadline=100)
    began = time.monotonic()
    fault(stack)
    for stream in streams:
        text = stream.wait()
        assert time.monotonic() - began < WITHIN
        if text.startswith('{"error"'):  # it had not begun: an error with a status of its own
            continue
        chunks = events(text)
        assert "error" in chunks[-1] or (
            chunks[-1] == "[DONE]" and chunks[-2]["choices"][0]["finish_reason"] == "length"
        )
    assert wait_for(lambda: answers(stack), deadline=60)


def test_an_engine_gone_and_back_with_another_address(stack: Stack) -> None:
    """While it is gone its name does not resolve. A request that may not wait for it is told so at once."""
    engine = stack.container("engine")
    before = stack.address("engine", "backend")
    engine.stop(timeout=5)
    other = stack.docker.containers.run(  # takes the old address, where addresses are used again at once
        stack.container("gateway").image.id,
        ["600"],
        entrypoint="sleep",
        network=f"{stack.project}_backend",
        detach=True,
        init=True,
    )
    try:
        for stream in (True, False):
            with stack.client() as client:
                body = {"messages": [{"role": "user", "content": "Hi"}], "stream": stream}
                answer = client.post("/v1/chat/completions", json=body, headers={"x-stack-resume": "off"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
        engine.start()
        assert wait_for(lambda: answers(stack), deadline=60)
        assert stack.address("engine", "backend") != before
    finally:
        engine.start()
        other.remove(force=True)


def answers(stack: Stack) -> bool:
    """Whether both workers do: each finds out by itself, within seconds, that the engine is back."""
    stack.wait_until_ready()
    with stack.client() as client:
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
        asked = [body | {"user": uuid4().hex} for _ in range(4)]  # each a request of its own, as in Stream
        return all(client.post("/v1/chat/completions", json=it).status_code == 200 for it in asked)


def test_a_disconnected_engine_leaves_no_client_hanging(stack: Stack) -> None:
    """No FIN and no RST reaches the gateway: only the idle timeout tells (it is set to 15 s for these tests)."""
    network = stack.docker.networks.get(f"{stack.project}_backend")
    engine = stack.container("engine")
    stream = Stream(stack, 300)  # few, because the engine makes them all
    network.disconnect(engine)
    try:
        assert events(stream.wait())[-1]["error"]["code"] in ("engine_timeout", "engine_broken_stream")
    finally:
        network.connect(engine, aliases=["engine"])
    assert wait_for(lambda: answers(stack), deadline=60)
