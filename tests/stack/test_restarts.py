"""Restarts under way. Last in the alphabet among the stack's tests that share it, and each leaves it running."""

import subprocess

from tests.support.processes import ROOT, text_of, wait_for
from tests.support.stack import LONG, Stack, Stream


def ask(stack: Stack) -> str:
    """The answer of whichever worker; a worker whose breaker is open finds within seconds that the engine is back."""

    def answer() -> str | None:
        with stack.client() as client:
            answer = client.post("/v1/chat/completions", json={"messages": LONG["messages"], "max_tokens": 5})
        content: str | None = answer.json()["choices"][0]["message"]["content"] if answer.status_code == 200 else None
        return content

    content = wait_for(answer, deadline=30)
    assert content
    return content


def test_engine_restart_under_a_stream(stack: Stack) -> None:
    stream = Stream(stack, 3000)
    stack.container("engine").restart(timeout=5)
    chunks = stream.chunks()
    assert chunks[-1]["error"]["code"] == "engine_broken_stream"  # an honest end, not a clean one
    stack.wait_until_ready()
    assert ask(stack)


def test_engine_gone_is_503_and_its_return_is_noticed(stack: Stack) -> None:
    engine = stack.container("engine")
    engine.stop(timeout=5)
    with stack.client() as client:
        briefly = {"x-stack-queue-timeout": "3"}  # otherwise it waits for half a minute for the engine to come back
        answer = client.post("/v1/chat/completions", json={"messages": LONG["messages"]}, headers=briefly)
        assert answer.status_code in (503, 504)
        wait_for(lambda: client.get("/readyz").status_code == 503)
        assert client.get("/livez").status_code == 200
    engine.start()
    stack.wait_until_ready()
    assert ask(stack)


def test_sigterm_during_a_stream_loses_nothing(stack: Stack) -> None:
    """`docker stop` of the gateway in the middle of an answer: the whole answer still arrives."""
    stream = Stream(stack, 60)
    stack.container("gateway").stop(timeout=120)
    chunks = stream.chunks()
    assert chunks[-1] == "[DONE]"
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert text_of(chunks)
    state = stack.container("gateway").attrs["State"]
    assert state["ExitCode"] == 0
    assert not state["OOMKilled"]
    stack.container("gateway").start()
    stack.wait_until_ready()
    assert ask(stack)


def test_a_gateway_made_anew_under_a_stream_loses_nothing(stack: Stack) -> None:
    """As `make up` does once a setting has changed."""
    stream = Stream(stack, 60)
    before = stack.container("gateway").id
    command = [*stack.compose.compose_command_property, "up", "--detach", "--force-recreate", "--no-deps", "gateway"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert stack.container("gateway").id != before
    assert stream.chunks()[-2]["choices"][0]["finish_reason"] == "length"
    stack.wait_until_ready()
    assert ask(stack)


def test_sighup_reloads_in_the_container(stack: Stack) -> None:
    """`docker compose kill -s HUP gateway`, as the README says: the init process passes it on, nothing restarts."""
    started = stack.container("gateway").attrs["State"]["StartedAt"]
    command = [*stack.compose.compose_command_property, "kill", "-s", "HUP", "gateway"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    wait_for(lambda: '"Handling signal: hup"' in stack.container("gateway").logs().decode())
    assert ask(stack)
    assert stack.container("gateway").attrs["State"]["StartedAt"] == started
