"""The models of LLM_MODELS, as `make up` lists them in models.yaml: they alone can be used, the first is the default,
and a change of the list is in force after SIGHUP while streams go on. While one is fetched, the engine that does not
have it yet is not blamed."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.processes import MESSAGES, FakeEngine, GatewayProcess, fake_engine, running_gateway, wait_for

CHAT = "/v1/chat/completions"
SCRIPT = [["token", "one"], ["gate", "go"], ["token", " two"], ["finish", "stop"], ["done"], ["end"]]
HELD = [{"role": "user", "content": f"script:{json.dumps(SCRIPT)}"}]


def write(directory: Path, *models: str) -> None:
    lines = "".join(f'  - {{ model: "{it}", engine: "engine" }}\n' for it in models)
    (directory / "models.yaml").write_text(f"# Written by make up\nmodels:\n{lines}")


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with fake_engine(dialect="ollama") as engine:
        yield engine


@pytest.fixture
def gateway(engine: FakeEngine, tmp_path: Path) -> Iterator[GatewayProcess]:
    write(tmp_path, "fake-model")
    settings = {
        "LLM_BACKEND": "ollama",
        "LLM_MODEL": "not-listed",
        "STACK_WORKERS": "1",
        "STACK_GRACE": "1",  # it does not end what a reload leaves running
        "STACK_MODEL_ALIASES": "nick=fake-model",
        "STACK_CONFIG": str(tmp_path / "stack.yaml"),
        "STACK_PROGRESS_FILE": str(tmp_path / "model.json"),
    }
    with running_gateway(tmp_path / "log", engine.url, **settings) as gateway:
        yield gateway


def asked(gateway: GatewayProcess, **body: object) -> httpx.Response:
    with gateway.client() as http:
        return http.post(CHAT, json={"messages": MESSAGES, **body})


def names(gateway: GatewayProcess) -> set[str]:
    with gateway.client() as http:
        return {it["id"] for it in http.get("/v1/models").json()["data"]}


def test_the_list_is_what_can_be_used_and_its_change_interrupts_nothing(
    gateway: GatewayProcess, engine: FakeEngine, tmp_path: Path
) -> None:
    assert asked(gateway).json()["model"] == "fake-model"  # the first of the list, whatever LLM_MODEL is
    assert names(gateway) == {"fake-model", "nick"}
    assert asked(gateway, model="later").status_code == 404
    with (
        gateway.client() as http,
        http.stream("POST", CHAT, json={"messages": HELD, "stream": True}) as stream,
    ):
        lines = stream.iter_lines()
        assert "one" in next(lines)
        write(tmp_path, "fake-model", "later")
        gateway.process.send_signal(signal.SIGHUP)
        wait_for(lambda: names(gateway) == {"fake-model", "later", "nick"}, deadline=60)
        grace = time.monotonic() + 3
        wait_for(lambda: time.monotonic() > grace)
        engine.release("go")
        assert "data: [DONE]" in [*lines]

    write(tmp_path, "fake-model", "nick")  # a name and an alias
    gateway.process.send_signal(signal.SIGHUP)
    wait_for(lambda: "'nick' is the name of the model itself" in gateway.log_path.read_text())
    assert names(gateway) == {"fake-model", "later", "nick"}  # the old list stays in force


def test_a_model_that_is_still_fetched_is_told_as_such(gateway: GatewayProcess, tmp_path: Path) -> None:
    """The engine runs, and answers 404 for the model."""
    write(tmp_path, "fake-model", "missing", "lost")
    gateway.process.send_signal(signal.SIGHUP)
    wait_for(lambda: "lost" in names(gateway), deadline=60)
    states = [
        {"model": "fake-model", "state": "ready"},
        {"model": "missing", "state": "fetching", "completed": 10**9, "total": 4 * 10**9},
        {"model": "lost", "state": "failed", "message": "There is no such model."},
    ]
    (tmp_path / "model.json").write_text(json.dumps({"models": states}))
    for name, code, message in (
        ("missing", "model_loading", "The model missing is being fetched: 1.00 of 4.00 GB (25%)."),
        ("lost", "model_unavailable", "There is no such model."),
    ):
        answer = asked(gateway, model=name)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["message"]) == (503, code, message)
    assert asked(gateway).status_code == 200
