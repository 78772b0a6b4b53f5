"""`make dev`: gateway and engine as plain processes without a container. A saved file is in force a moment later."""

import os
import re
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import MagicMock

import httpx
import pytest

from tests.support.clone import Tree, clean_environment
from tests.support.processes import MESSAGES, ROOT, FakeEngine, free_port, wait_for

AUTH = {"Authorization": "Bearer dev-key"}


@pytest.fixture
def clone(tree: Tree) -> Tree:
    """With the environment that these tests run in, which is what `make dev` would make anew."""
    (tree.path / ".venv").symlink_to(ROOT / ".venv")
    return tree


@contextmanager
def dev(tree: Tree, log: Path, **env: str) -> Iterator[str]:
    """`scripts/dev` once its gateway answers, as the gateway's address; in the end it is told to stop."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    environment = clean_environment(STACK_BIND=f"127.0.0.1:{port}", **env)
    with (
        log.open("wb") as out,
        subprocess.Popen(["scripts/dev"], cwd=tree.path, env=environment, stdout=out, stderr=out) as process,
    ):
        try:
            wait_for(lambda: process.poll() is not None or answers(url + "/livez"), deadline=200)
            assert process.poll() is None, log.read_text()
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(20)


def answers(url: str) -> httpx.Response | None:
    try:
        return httpx.get(url, headers=AUTH)
    except httpx.TransportError:
        return None


def listens(url: str) -> bool:
    found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)(/v1)?", url)
    assert found
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(found[1]))) == 0


def test_the_tiny_engine_answers_and_goes_with_the_gateway(clone: Tree, tmp_path: Path) -> None:
    """From nothing: it makes the engine's environment itself."""
    with dev(clone, tmp_path / "log") as url:
        ready = wait_for(lambda: (it := answers(url + "/readyz")) and it.status_code == 200, deadline=30)
        assert ready
        body = {"model": "llama3.1:8b", "messages": MESSAGES, "max_tokens": 5}
        answer = httpx.post(url + "/v1/chat/completions", headers=AUTH, json=body, timeout=60)
        assert answer.json()["choices"][0]["message"]["content"]
        engine = httpx.get(url + "/health").json()["backend"]
        assert listens(engine)
    assert not listens(url)
    assert not listens(engine)


def test_a_saved_file_is_in_force_a_moment_later(clone: Tree, engine: FakeEngine, tmp_path: Path) -> None:
    """In front of an engine that already runs; a file that can't be run is survived until it is put right."""
    settings = {"LLM_BASE_URL": engine.url, "LLM_BACKEND": "llamacpp", "LLM_MODEL": "fake-model"}
    with dev(clone, tmp_path / "log", **settings) as url:
        assert answers(url + "/readyz")
        answer = httpx.post(url + "/v1/chat/completions", headers=AUTH, json={"messages": MESSAGES})
        assert answer.json()["choices"][0]["message"]["content"] == "one two three"
        file = clone.path / "gateway/__init__.py"
        before = file.read_text()
        file.write_text(before + "\nthis is no Python\n")
        wait_for(lambda: answers(url + "/health") is None)
        file.write_text(re.sub(r'__version__ = ".*"', '__version__ = "9.9.9"', before))
        wait_for(lambda: (it := answers(url + "/health")) and it.json()["version"] == "9.9.9")
    assert not listens(url)


def test_the_port_is_taken(clone: Tree) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        ran = clone.run("scripts/dev", STACK_BIND=f"127.0.0.1:{port}")
    assert ran.returncode == 1
    assert f"Port {port} is taken by" in ran.stdout
    assert f"STACK_BIND=127.0.0.1:{port + 1} make dev" in ran.stdout


def test_the_tiny_engine_counts_its_cores_where_there_is_no_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS. The library is not needed to count."""
    monkeypatch.setitem(sys.modules, "xllamacpp", MagicMock())
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert runpy.run_path(str(ROOT / "engine/llamacpp/serve.py"))["threads"]() == 3
