"""Settings that can't be used stop the start with a sentence; those that can are put to use."""

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.processes import KEY, ROOT, FakeEngine, environment, free_port, running_gateway

REFUSED = [
    ({"STACK_API_KEYS": "dev-key", "STACK_PUBLISH": "0.0.0.0:9000"}, "placeholder 'dev-key'"),
    ({"STACK_API_KEYS": "", "STACK_PUBLISH": "192.168.1.5:9000"}, "no key is set"),
    ({"STACK_API_KEYS": "short", "STACK_PUBLISH": "[::]:9000"}, "Use keys of 16 characters or more"),
    (
        {"STACK_API_KEYS": "", "STACK_BIND": "0.0.0.0:9000"},
        "no key is set",
    ),  # as in a container run without STACK_PUBLISH
    ({"STACK_PUBLISH": "9000"}, "STACK_PUBLISH: '9000' must be an IP address and a port"),
    ({"STACK_PUBLISH": "localhost:9000"}, "STACK_PUBLISH"),
    ({"STACK_WORKERS": "many"}, "STACK_WORKERS: Input should be a valid integer"),
    ({"STACK_WORKERS": "0"}, "STACK_WORKERS: Input should be greater than or equal to 1"),
    ({"LLM_BACKEND": "tgi"}, "LLM_BACKEND: Input should be 'ollama', 'vllm' or 'llamacpp'"),
    ({"LLM_BASE_URL": "engine:8080"}, "LLM_BASE_URL: must look like http://host:port/v1"),
    ({"LLM_BASE_URL": "http://u:p@engine"}, "LLM_API_KEY"),
    ({"LLM_TIMEOUT": "nan"}, "LLM_TIMEOUT"),
    ({"STACK_MODEL_ALIASES": "a"}, "'a' is not of the form alias=model"),
    ({"STACK_MODEL_ALIASES": "a=b,a=c"}, "given twice"),
    ({"STACK_MODEL_ALIASES": "a=b,b=c"}, "which is an alias itself"),
    ({"STACK_STORE_URL": "mysql://u:p@host/db"}, "STACK_STORE_URL: must look like postgresql://"),
    ({"STACK_STORE_URL": "postgresql://u:p@host:port/db"}, "STACK_STORE_URL: must look like postgresql://"),
    ({"STACK_DATA_DIR": "/proc/stack"}, "STACK_DATA_DIR: /proc/stack can't be written"),
    ({"STACK_ADMIN_KEYS": "short", "STACK_PUBLISH": "0.0.0.0:9000"}, "STACK_ADMIN_KEYS: holds a short key"),
    ({"STACK_ADMIN_KEYS": KEY}, "An admin key must be no other's"),
    ({"STACK_API_KEYS": "schlüssel-0123456789"}, "printable ASCII"),
]


@pytest.mark.parametrize(("settings", "sentence"), REFUSED, ids=[str(settings) for settings, _ in REFUSED])
def test_refused(settings: dict[str, str], sentence: str) -> None:
    env = environment("http://127.0.0.1:1", **({"STACK_BIND": f"127.0.0.1:{free_port()}"} | settings))
    done = subprocess.run(
        [sys.executable, "-m", "gateway"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert "u:p" not in done.stderr


def test_the_placeholder_works_on_loopback_with_a_warning(engine: FakeEngine, tmp_path: Path) -> None:
    with running_gateway(tmp_path / "log", engine.url, STACK_API_KEYS="") as gateway:
        headers = {"authorization": "Bearer dev-key"}
        assert httpx.get(gateway.url + "/v1/models", headers=headers).status_code == 200
        assert any(line["level"] == "warning" and "dev-key" in line["msg"] for line in gateway.log())


def test_a_strong_key_beyond_loopback(engine: FakeEngine, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("first-key-0123456789, second-key-0123456789\n")
    settings = {"STACK_API_KEYS": "", "STACK_API_KEYS_FILE": str(keys), "STACK_PUBLISH": "0.0.0.0:9000"}
    with running_gateway(tmp_path / "log", engine.url, **settings) as gateway:
        for key in ("first-key-0123456789", "second-key-0123456789"):
            answer = httpx.get(
                gateway.url + "/v1/models", headers={"authorization": f"Bearer {key}", "host": "any.example"}
            )
            assert answer.status_code == 200  # beyond loopback any Host is right unless a list is set
        assert not any("dev-key" in line["msg"] for line in gateway.log())
