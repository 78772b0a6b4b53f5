"""While the model is being fetched, /readyz and the API report the progress, or the reason of a failure."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.processes import MESSAGES, FakeEngine, GatewayProcess, free_port, running_gateway, wait_for

CHAT = "/v1/chat/completions"
FETCHING = {"model": "fake-model", "state": "fetching", "completed": 1_230_000_000, "total": 4_920_000_000}
BEING_FETCHED = "The model fake-model is being fetched: 1.23 of 4.92 GB (25%)."


def write(path: Path, report: Any) -> None:
    new = path.with_suffix(".new")
    new.write_text(report if isinstance(report, str) else json.dumps(report))
    new.replace(path)


def error(answer: httpx.Response) -> tuple[int, str | None, str, str]:
    said = answer.json()["error"]
    return answer.status_code, answer.headers.get("retry-after"), said["code"], said["message"]


def readiness(gateway: GatewayProcess, code: str) -> tuple[int, str | None, str, str]:
    """Wait until /readyz has this code; return its answer. It asks the engine at most once a second."""

    def find() -> tuple[int, str | None, str, str] | None:
        said = error(httpx.get(gateway.url + "/readyz"))
        return said if said[2] == code else None

    found = wait_for(find, deadline=10)
    assert found
    return found


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("progress")


@pytest.fixture
def report(directory: Path) -> Iterator[Path]:
    path = directory / "model.json"
    yield path
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink()


@pytest.fixture(scope="module")
def lonely(directory: Path) -> Iterator[GatewayProcess]:
    """A gateway whose engine does not listen yet."""
    engine, report = f"http://127.0.0.1:{free_port()}", str(directory / "model.json")
    with running_gateway(directory / "log", engine, STACK_PROGRESS_FILE=report, STACK_WORKERS="1") as gateway:
        yield gateway


def test_the_error_follows_the_provisioners_report(lonely: GatewayProcess, report: Path) -> None:
    with lonely.client() as http:

        def ask(**extra: Any) -> tuple[int, str | None, str, str]:
            return error(http.post(CHAT, json={"messages": MESSAGES, **extra}))

        assert ask()[:3] == (503, "5", "engine_unavailable")
        readiness(lonely, "engine_unavailable")

        write(report, FETCHING)
        expected = (503, "5", "model_loading", BEING_FETCHED)
        assert ask() == expected
        assert ask(stream=True) == expected
        assert error(http.post("/v1/embeddings", json={"input": "text"})) == expected
        assert readiness(lonely, "model_loading") == expected

        # What isn't the engine's fault keeps its own error.
        assert httpx.post(lonely.url + CHAT, json={"messages": MESSAGES}).status_code == 401
        assert http.post(CHAT, json={}).status_code == 400
        assert ask(model="another")[0] == 404

        write(report, {"model": "fake-model", "state": "fetching"})
        assert ask()[3] == "The model fake-model is being fetched."

        sentence = "Ollama's library has no model fake-model: correct LLM_MODEL, then run 'make up' again."
        write(report, {"model": "fake-model", "state": "failed", "message": sentence})
        assert ask() == (503, "5", "model_unavailable", sentence)
        assert readiness(lonely, "model_unavailable")[3] == sentence

        write(report, FETCHING)
        long_ago = time.time() - 61
        os.utime(report, (long_ago, long_ago))
        _, _, code, sentence = ask()
        assert code == "model_unavailable"
        assert sentence.startswith(
            "The download of the model fake-model stopped at 1.23 of 4.92 GB (25%). Run 'make up'"
        )


@pytest.mark.parametrize(
    "useless",
    ["", "{", "[1]", "null", {"state": "fetching", "model": "older"}, {"state": "ready", "model": "fake-model"}],
)
def test_a_report_about_another_model_is_ignored(lonely: GatewayProcess, report: Path, useless: Any) -> None:
    write(report, useless)
    with lonely.client() as http:
        assert error(http.post(CHAT, json={"messages": MESSAGES}))[2] == "engine_unavailable"


def test_a_working_engine_overrides_the_report(engine: FakeEngine, tmp_path: Path, report: Path) -> None:
    write(report, FETCHING)
    with (
        running_gateway(tmp_path / "log", engine.url, STACK_PROGRESS_FILE=str(report)) as gateway,
        gateway.client() as http,
    ):
        assert http.get("/readyz").status_code == 200
        assert http.post(CHAT, json={"messages": MESSAGES}).status_code == 200


@pytest.mark.parametrize("what", ["a pipe", "a device", "a directory", "a large file"])
def test_a_report_that_is_not_a_small_file_is_ignored(lonely: GatewayProcess, report: Path, what: str) -> None:
    """The gateway continues: it does not wait for a pipe, and does not read a file without an end."""
    if what == "a pipe":
        os.mkfifo(report)
    elif what == "a device":
        report.symlink_to("/dev/zero")
    elif what == "a directory":
        report.mkdir()
    else:
        report.write_text(json.dumps(FETCHING) + " " * 100_000)
    with lonely.client() as http:
        for _ in range(3):
            assert error(http.post(CHAT, json={"messages": MESSAGES}))[2] == "engine_unavailable"
