"""Reloads lose nothing, and a stop is noticed. (Answers during a stop: test_events.py.)"""

import signal
import threading
from pathlib import Path

import httpx

from gateway.admission.retry_after import ENGINES
from tests.support.processes import AUTH, MESSAGES, FakeEngine, running_gateway, wait_for
from tests.support.streams import gated

CHAT = "/v1/chat/completions"
MOST_ENGINES = 32  # that a stack.yaml may name
RELOADS = ENGINES // MOST_ENGINES  # one more than their names have room for


def test_a_stop_is_heard_by_workers_that_are_still_starting(engine: FakeEngine, tmp_path: Path) -> None:
    """The signal was lost if it hit a finalizer, or came between the fork and the worker's own handlers."""
    settings = {"STACK_WORKERS": "8", "STACK_GRACE": "60"}
    with running_gateway(tmp_path / "log", engine.url, **settings) as gateway:
        assert gateway.stop(deadline=30) == 0


def test_sighup_takes_new_keys_and_keeps_streams(engine: FakeEngine, tmp_path: Path, mark: str) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# ours\nfirst-key-0123456789\n")
    settings = {"STACK_API_KEYS": "", "STACK_API_KEYS_FILE": str(keys)}
    with running_gateway(tmp_path / "log", engine.url, **settings) as gateway:

        def status(key: str) -> int:
            return httpx.get(gateway.url + "/v1/models", headers={"authorization": f"Bearer {key}"}).status_code

        assert (status("first-key-0123456789"), status("second-key-0123456789")) == (200, 401)
        old = gateway.workers()
        body = {"messages": MESSAGES, "stream": True, "user": mark, "script": gated(mark)}
        headers = {"authorization": "Bearer first-key-0123456789"}
        with httpx.stream("POST", gateway.url + CHAT, json=body, headers=headers, timeout=60) as answer:
            lines = answer.iter_lines()
            assert any("before" in line for line in lines)
            keys.write_text("second-key-0123456789\n")
            gateway.process.send_signal(signal.SIGHUP)
            wait_for(lambda: len(set(gateway.workers()) - set(old)) == 2)
            wait_for(lambda: status("second-key-0123456789") == 200 and status("first-key-0123456789") == 401)
            engine.release(mark)
            rest = list(lines)
        assert any("after" in line for line in rest)
        assert "data: [DONE]" in rest

        keys.write_text("bad key with spaces\n")
        gateway.process.send_signal(signal.SIGHUP)
        wait_for(lambda: any("the old ones stay in force" in line["msg"] for line in gateway.log()))
        assert status("second-key-0123456789") == 200


def test_reloads_under_load_lose_no_request(engine: FakeEngine, tmp_path: Path) -> None:
    """Each request has a connection of its own, because the critical one is a connection that a stopping worker has
    just accepted."""
    with running_gateway(tmp_path / "log", engine.url) as gateway:
        stop = threading.Event()
        outcomes: list[int | str] = []

        def load() -> None:
            with httpx.Client(base_url=gateway.url, headers={"connection": "close"}) as client:
                while not stop.is_set():
                    try:
                        outcomes.append(client.get("/livez").status_code)
                    except httpx.TransportError as exc:
                        outcomes.append(repr(exc))

        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(5):
            old, before = set(gateway.workers()), len(outcomes)
            gateway.process.send_signal(signal.SIGHUP)
            wait_for(lambda old=old: len(gateway.workers()) == 2 and not old & set(gateway.workers()))
            wait_for(lambda before=before: len(outcomes) > before + 50)
        stop.set()
        for thread in threads:
            thread.join()
        assert set(outcomes) == {200}


def renamed(engine: FakeEngine, generation: int) -> str:
    """Return a stack.yaml with the largest number of engines, whose names no other generation has."""
    names = [f"generation-{generation}-engine-{number}" for number in range(MOST_ENGINES)]
    engines = "".join(f"  {name}: {{dialect: vllm, slots: 1, base_url: '{engine.url}'}}\n" for name in names)
    models = "".join(
        f"  model-{number}: {{targets: [{{engine: {name}, model: fake-model}}]}}\n" for number, name in enumerate(names)
    )
    return f"engines:\n{engines}models:\n{models}default_model: model-0\n"


def test_reloads_with_every_engine_renamed_leave_a_gateway_that_serves(engine: FakeEngine, tmp_path: Path) -> None:
    """There are more names in all than there is space for."""
    config = tmp_path / "stack.yaml"
    config.write_text(renamed(engine, 0))
    with (
        running_gateway(tmp_path / "log", engine.url, STACK_CONFIG=str(config)) as gateway,
        httpx.Client(base_url=gateway.url, headers={**AUTH, "connection": "close"}, timeout=60) as client,
    ):
        for generation in range(RELOADS + 1):
            if generation:
                old = set(gateway.workers())
                config.write_text(renamed(engine, generation))
                gateway.process.send_signal(signal.SIGHUP)
                wait_for(lambda old=old: len(gateway.workers()) == 2 and not old & set(gateway.workers()), deadline=100)
            for number in (0, MOST_ENGINES // 2, MOST_ENGINES - 1):
                answer = client.post(CHAT, json={"model": f"model-{number}", "messages": MESSAGES})
                assert answer.status_code == 200, answer.text
        assert gateway.process.poll() is None
