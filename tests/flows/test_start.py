"""Invalid settings stop the start with a message, and valid ones take effect."""

import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.support import forkserver
from tests.support.processes import (
    KEY,
    MESSAGES,
    ROOT,
    FakeEngine,
    descriptors,
    environment,
    free_port,
    running_gateway,
    wait_for,
)

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
    ({"STACK_PROXY_NETWORK": "a..b"}, "STACK_PROXY_NETWORK: 'a..b' must be an address or a name"),
    ({"STACK_WORKERS": "many"}, "STACK_WORKERS: Input should be a valid integer"),
    ({"STACK_WORKERS": "0"}, "STACK_WORKERS: Input should be greater than or equal to 1"),
    ({"LLM_BACKEND": "tgi"}, "LLM_BACKEND: Input should be 'ollama', 'vllm' or 'llamacpp'"),
    ({"LLM_BASE_URL": "engine:8080"}, "LLM_BASE_URL: must look like http://host:port/v1"),
    ({"LLM_BASE_URL": "http://u:p@engine"}, "LLM_API_KEY"),
    ({"LLM_BASE_URL": "http://the..engine:8080"}, "LLM_BASE_URL: must look like http://host:port/v1"),
    (
        {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{'a' * 64}.b:4318"},
        "OTEL_EXPORTER_OTLP_ENDPOINT: must look like http://",
    ),
    ({"LLM_TIMEOUT": "nan"}, "LLM_TIMEOUT"),
    ({"STACK_MODEL_ALIASES": "a"}, "'a' must have the form alias=model"),
    ({"STACK_MODEL_ALIASES": "a=b,a=c"}, "appears twice"),
    ({"STACK_MODEL_ALIASES": "a=b,b=c"}, "an alias itself"),
    ({"STACK_MODEL_ALIASES": "a=" + "m" * 201}, "STACK_MODEL_ALIASES: a model's name must have 1 to 200 characters"),
    ({"STACK_MODEL_ALIASES": "a" * 201 + "=m"}, "STACK_MODEL_ALIASES: a model's name must have 1 to 200 characters"),
    ({"LLM_MODEL": "m" * 201}, "LLM_MODEL: a model's name must have 1 to 200 characters"),
    ({"STACK_LOG_LEVELS": "DEBUG"}, "STACK_LOG_LEVELS: 'DEBUG' must have the form name=level"),
    ({"OTEL_RESOURCE_ATTRIBUTES": "a=1,a=2"}, "OTEL_RESOURCE_ATTRIBUTES: the name 'a' appears twice"),
    ({"STACK_ALLOWED_HOSTS": "https://llm.example"}, "STACK_ALLOWED_HOSTS: 'https://llm.example' must be a host name"),
    ({"STACK_ALLOWED_HOSTS": "*.example"}, "STACK_ALLOWED_HOSTS: '*.example' must be a host name"),
    ({"STACK_CORS_ORIGINS": "app.example"}, "STACK_CORS_ORIGINS: 'app.example' must be an origin"),
    ({"STACK_STORE_URL": "mysql://u:p@host/db"}, "STACK_STORE_URL: must look like postgresql://"),
    ({"STACK_STORE_URL": "postgresql://u:p@host:port/db"}, "STACK_STORE_URL: must look like postgresql://"),
    ({"STACK_STORE_URL": "postgresql://u:p%pass@host/db"}, "STACK_STORE_URL: PostgreSQL cannot read this URL"),
    ({"STACK_STORE_URL": "postgresql://u:p pass@host/db"}, "STACK_STORE_URL: PostgreSQL cannot read this URL"),
    ({"STACK_STORE_URL": "postgresql://u:p@pass@host/db"}, "STACK_STORE_URL: PostgreSQL cannot read this URL"),
    ({"STACK_STORE_URL": "postgresql://u:12/pass@host/db"}, "STACK_STORE_URL: PostgreSQL cannot read this URL"),
    ({"STACK_STORE_URL": "postgresql://u:p@host/db?pass=1"}, "STACK_STORE_URL: PostgreSQL cannot read this URL"),
    ({"STACK_DATA_DIR": "/proc/stack"}, "STACK_DATA_DIR: /proc/stack is not writable"),
    ({"STACK_ADMIN_KEYS": "short", "STACK_PUBLISH": "0.0.0.0:9000"}, "STACK_ADMIN_KEYS: a key is too short"),
    ({"STACK_ADMIN_KEYS": "fifteen-letters"}, "STACK_ADMIN_KEYS: a key is too short"),
    ({"STACK_ADMIN_KEYS": KEY}, "a key is in STACK_API_KEYS too"),
    ({"STACK_API_KEYS": "schlüssel-0123456789"}, "printable ASCII"),
]


@pytest.mark.parametrize(("settings", "sentence"), REFUSED, ids=[str(settings) for settings, _ in REFUSED])
def test_an_invalid_setting_is_refused_with_a_message(settings: dict[str, str], sentence: str) -> None:
    env = environment("http://127.0.0.1:1", **({"STACK_BIND": f"127.0.0.1:{free_port()}"} | settings))
    done = forkserver.run([sys.executable, "-m", "gateway"], stdin="", cwd=ROOT, env=env)
    assert done.returncode == 1
    assert done.stdout == ""
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert "u:p" not in done.stderr
    assert "pass" not in done.stderr.replace("password", "")


def test_the_settings_can_be_checked_without_a_start(tmp_path: Path) -> None:
    """`make up` does that before it replaces a gateway. No data directory is needed."""
    (tmp_path / "stack.yaml").write_text("engines: {}\n")
    cases = [
        ({"STACK_DATA_DIR": "/proc/stack"}, ""),
        ({"STACK_GRACE": "5m", "STACK_QUEUE": "-1"}, "STACK_GRACE: Input should be a valid number"),
        ({"STACK_CONFIG": str(tmp_path / "stack.yaml")}, "stack.yaml:1: engines: "),
    ]
    for settings, sentence in cases:
        env = environment("http://127.0.0.1:1", **settings)
        command = [sys.executable, "-m", "gateway", "--check"]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, sentence in done.stderr) == (bool(sentence), "", True), done.stderr
        assert ("STACK_QUEUE: " in done.stderr) == ("STACK_QUEUE" in settings)


def test_an_unknown_argument_is_refused() -> None:
    for word, status in (("--help", 0), ("start", 2)):
        command = [sys.executable, "-m", "gateway", word]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert (done.returncode, "usage: python -m gateway" in done.stdout + done.stderr) == (status, True), word


def test_the_placeholder_works_on_loopback_with_a_warning(engine: FakeEngine, tmp_path: Path) -> None:
    with running_gateway(tmp_path / "log", engine.url, STACK_API_KEYS="") as gateway:
        headers = {"authorization": "Bearer dev-key"}
        assert httpx.get(gateway.url + "/v1/models", headers=headers).status_code == 200
        wait_for(lambda: any(it["level"] == "warning" and "dev-key" in it["msg"] for it in gateway.log()))


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


def test_more_clients_than_the_soft_limit_of_open_files_allows(engine: FakeEngine, tmp_path: Path) -> None:
    settings = {"under": ("prlimit", "--nofile=64:4096"), "STACK_WORKERS": "1"}
    with running_gateway(tmp_path / "log", engine.url, **settings) as gateway, ExitStack() as held:
        for _ in range(100):
            held.enter_context(socket.create_connection(("127.0.0.1", gateway.port)))
        (worker,) = gateway.workers()
        wait_for(lambda: len(descriptors(worker)) > 100)
        with gateway.client() as client:
            assert client.post("/v1/chat/completions", json={"messages": MESSAGES}).status_code == 200


CAPABILITIES = "-dac_override,-dac_read_search"  # by which root may read everything
NOT_ALMIGHTY = ("setpriv", f"--bounding-set={CAPABILITIES}", f"--inh-caps={CAPABILITIES}")


def unreadable(directory: Path) -> list[Path]:
    """Return places for a stack.yaml that no user can read."""
    loop, pipe, folder = directory / "loop", directory / "pipe", directory / "folder"
    loop.symlink_to(loop)
    os.mkfifo(pipe)
    folder.mkdir()
    return [loop, loop / "stack.yaml", pipe, folder, Path("/dev/zero"), directory / ("x" * 300)]


def test_a_configuration_that_cannot_be_read_ends_with_a_message(tmp_path: Path) -> None:
    for path in unreadable(tmp_path):
        assert refusal(STACK_CONFIG=str(path)).startswith(f"stack cannot start:\n{path} "), path


def test_a_configuration_that_is_not_for_the_gateways_user_says_what_to_do(tmp_path: Path) -> None:
    """An unreadable directory, as `umask 077` makes it: nobody can say whether a stack.yaml is there."""
    folder = tmp_path / "config"
    folder.mkdir(mode=0)
    said = refusal(*(NOT_ALMIGHTY if os.geteuid() == 0 else ()), STACK_CONFIG=str(folder / "stack.yaml"))
    assert f"{folder}/stack.yaml cannot be read (Permission denied)" in said
    assert "uid 10001" in said
    assert "chmod a+rX" in said
    assert "chcon -t container_file_t" in said  # a mode changes nothing for SELinux


def refusal(*under: str, **settings: str) -> str:
    """Return the message with which the gateway refuses to start, run by that command."""
    env = environment("http://127.0.0.1:1", STACK_BIND=f"127.0.0.1:{free_port()}", **settings)
    done = forkserver.run([*under, sys.executable, "-m", "gateway"], stdin="", cwd=ROOT, env=env)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize("key", ["", "sk-one\r\nx-injected: 1", "sk-€"])
def test_an_engines_key_file_that_has_no_key_is_refused(tmp_path: Path, key: str) -> None:
    """It was sent as it was: further headers, an empty key, or a 500 for each request."""
    secret, file = tmp_path / "secret", tmp_path / "stack.yaml"
    secret.write_text(key, newline="")
    file.write_text(
        f"engines:\n  a: {{dialect: vllm, base_url: 'http://x:1', api_key_file: {secret}}}\n"
        "models:\n  m: {targets: [{engine: a, model: m}]}\ndefault_model: m\n"
    )
    said = refusal(STACK_CONFIG=str(file))
    assert f"{file}:2: engines.a.api_key_file: {secret} must have one line, the key" in said
    assert "sk-" not in said


@pytest.mark.parametrize("name", ["STACK_API_KEYS_FILE", "STACK_ADMIN_KEYS_FILE", "STACK_STORE_URL_FILE"])
@pytest.mark.parametrize("device", ["", "/dev/zero"])
def test_a_secret_in_a_pipe_or_a_device_is_refused(tmp_path: Path, name: str, device: str) -> None:
    """The gateway would wait for it, or read without an end."""
    file = tmp_path / "secret"
    if device:
        file.symlink_to(device)
    else:
        os.mkfifo(file)
    env = environment("http://127.0.0.1:1", **{name: str(file)})
    done = forkserver.run([sys.executable, "-m", "gateway"], stdin="", cwd=ROOT, env=env)
    assert done.returncode == 1
    assert name in done.stderr
    assert "not a regular file" in done.stderr
