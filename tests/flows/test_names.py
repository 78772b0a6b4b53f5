"""A resolver that does not answer for one engine's name."""

import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.support.processes import AUTH, MESSAGES, FakeEngine, running_gateway

CONFIG = """
engines:
  lost: {{dialect: vllm, base_url: "http://engine.invalid:1"}}
  found: {{dialect: vllm, base_url: "http://localhost:{port}"}}
models:
  lost: {{targets: [{{engine: lost, model: x}}], timeouts: {{connect: 0.5}}}}
  found: {{targets: [{{engine: found, model: fake-model}}]}}
default_model: found
breaker: {{failures: 1000, probe_every: 0.2}}
retries: {{attempts: 1}}
"""


@pytest.fixture
def silent_resolver(tmp_path: Path) -> Iterator[tuple[str, ...]]:
    """How to run a program with a name server that says nothing, which is given up after five seconds."""
    file = tmp_path / "resolv.conf"
    file.write_text("nameserver 127.0.0.99\noptions timeout:5 attempts:1\n")
    with socket.socket(type=socket.SOCK_DGRAM) as server:
        try:
            server.bind(("127.0.0.99", 53))
        except PermissionError:
            pytest.skip("only root may answer at port 53")
        yield (
            "unshare",
            "--map-root-user",
            "--mount",
            "sh",
            "-c",
            f'mount --bind {file} /etc/resolv.conf; exec "$@"',
            "sh",
        )


def test_a_slow_name_lookup_delays_no_other_engine(
    engine: FakeEngine, silent_resolver: tuple[str, ...], tmp_path: Path
) -> None:
    """There are few threads for lookups, and one is held until its lookup is given up, long after the request was."""
    file = tmp_path / "stack.yaml"
    file.write_text(CONFIG.format(port=engine.url.rpartition(":")[2]))
    settings = {"STACK_CONFIG": str(file), "STACK_WORKERS": "1"}
    with (
        running_gateway(tmp_path / "log", engine.url, under=silent_resolver, **settings) as gateway,
        ThreadPoolExecutor(10) as pool,
    ):

        def ask(model: str) -> int:
            body = {"messages": MESSAGES, "model": model}
            return httpx.post(gateway.url + "/v1/chat/completions", json=body, headers=AUTH, timeout=30).status_code

        assert set(pool.map(ask, ["lost"] * 10)) == {504}
        assert ask("found") == 200
        for pid in (gateway.process.pid, *gateway.workers()):  # it would wait for its lookups
            os.kill(pid, signal.SIGKILL)
