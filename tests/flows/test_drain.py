"""Reloading loses nothing, and a stop is heard. (Answers while stopping: test_faults.py.)"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.processes import MESSAGES, FakeEngine, GatewayProcess, events, running_gateway, wait_for

CHAT = "/v1/chat/completions"


class Stream(threading.Thread):
    """A streaming request in a thread: what it has got so far, and how it ended."""

    def __init__(self, gateway: GatewayProcess, script: list[Any], mark: str) -> None:
        super().__init__(daemon=True)
        self.body = {"messages": MESSAGES, "stream": True, "user": mark, "script": script}
        self.gateway = gateway
        self.text = ""
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            with self.gateway.client() as client, client.stream("POST", CHAT, json=self.body) as answer:
                for piece in answer.iter_text():
                    self.text += piece
        except httpx.HTTPError as exc:
            self.error = exc

    def chunks(self) -> list[Any]:
        self.join(60)
        assert not self.is_alive()
        assert self.error is None, self.error
        return events(self.text)


def gated(mark: str) -> list[Any]:
    return [["role"], ["token", "before "], ["gate", mark], ["token", "after"], ["finish", "stop"], ["done"], ["end"]]


@contextmanager
def streams_under_way(gateway: GatewayProcess, mark: str, count: int = 10) -> Iterator[list[Stream]]:
    streams = [Stream(gateway, gated(mark), mark) for _ in range(count)]
    wait_for(lambda: all("before" in stream.text for stream in streams))
    yield streams


def test_a_stop_is_heard_by_workers_that_are_still_starting(engine: FakeEngine, tmp_path: Path) -> None:
    """Where it hit a finalizer, or came between the fork and the worker's own handlers, it was lost."""
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
    """Each request on a connection of its own: one that a stopping worker has just accepted is the dangerous one."""
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
