"""The fake engines and the stand-ins of tests/bundle answer as the real engines were recorded to: the same status, keys
and types, and the same order of a stream's events (tests/recordings/*/answers.json)."""

import importlib.machinery
import importlib.util
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

from tests.support.processes import NO_TLS, ROOT, FakeEngine, events, fake_engine

OPEN = {"model_info"}  # objects whose names depend on the model
# What a fake can't be asked for, by the names of the recordings.
WITHOUT_A_PARSER = "tools without a parser"
OF_CHAT = ("chat", "chat, stream", "chat, stream with usage", "unknown model")
OF_OLLAMAS_STAND_IN = (*OF_CHAT, "unknown model, stream", "models", "loaded", "tags", "version")
OF_VLLMS_STAND_IN = (*OF_CHAT, WITHOUT_A_PARSER, "models", "nothing there")
GENERATED = ("chat", "chat, stream", "chat, stream with usage", "completion", "completion, stream")


def recorded(engine: str) -> dict[str, dict[str, Any]]:
    rows = json.loads((ROOT / "tests/recordings" / engine / "answers.json").read_text())
    return {row["name"]: row for row in rows}


RECORDED = {engine: recorded(engine) for engine in ("ollama", "vllm")}


def shape(value: Any) -> Any:
    """The names and types of a value. A list has the shapes that occur in it."""
    if isinstance(value, dict):
        return {name: dict if name in OPEN else shape(item) for name, item in value.items()}
    if isinstance(value, list):
        return _each_once([shape(item) for item in value])
    return type(value)


def _each_once(shapes: list[Any]) -> list[Any]:
    return [it for number, it in enumerate(shapes) if it not in shapes[:number]]


def shape_of_stream(said: list[Any]) -> list[Any]:
    """The shapes of a stream's events, of equal ones in a row the first."""
    shapes = [it if it == "[DONE]" else shape(it) for it in said]
    return [it for number, it in enumerate(shapes) if not number or it != shapes[number - 1]]


def body_of(row: dict[str, Any]) -> Any:
    """A recording's request. Of a long prompt it says how many words there were."""
    text = json.dumps(row["body"])
    return json.loads(text.replace("<1500 x 'word '>", "word " * 1500))


def answers_as_recorded(url: str, row: dict[str, Any], **more: Any) -> None:
    """Ask what was recorded, and compare what is answered."""
    body = {"json": body_of(row) | more} if row["body"] is not None else {}
    answer = httpx.request(row["method"], url + row["path"], verify=NO_TLS, **body)
    assert answer.status_code == row["status"], answer.text
    assert answer.headers["content-type"].partition(";")[0] == row["type"].partition(";")[0]
    if "events" in row:
        assert shape_of_stream(events(answer.text)) == shape_of_stream(row["events"])
    else:
        assert shape(answer.json()) == shape(row["answer"])


@pytest.fixture(scope="module")
def ollama() -> Iterator[FakeEngine]:
    with fake_engine(dialect="ollama") as engine:
        engine.set(models=["smol:latest", "smolemb:latest"])
        yield engine


@pytest.fixture(scope="module")
def vllm() -> Iterator[FakeEngine]:
    with fake_engine(dialect="vllm") as engine:
        engine.set(model="smol", takes=8)
        yield engine


@pytest.mark.parametrize("name", RECORDED["ollama"])
def test_the_fake_ollama(ollama: FakeEngine, name: str) -> None:
    answers_as_recorded(ollama.url, RECORDED["ollama"][name])


@pytest.mark.parametrize("name", [it for it in RECORDED["vllm"] if it != WITHOUT_A_PARSER])
def test_the_fake_vllm(vllm: FakeEngine, name: str) -> None:
    answers_as_recorded(vllm.url, RECORDED["vllm"][name])


@pytest.mark.parametrize("name", GENERATED)
@pytest.mark.parametrize("engine", RECORDED)
def test_the_fake_that_only_counts_tokens(ollama: FakeEngine, vllm: FakeEngine, engine: str, name: str) -> None:
    url = {"ollama": ollama, "vllm": vllm}[engine].url
    script = [["generate", {"dialect": engine, "length": 5, "pace": 0, "usage": "exact"}]]
    if "stream" in name:
        answers_as_recorded(url, RECORDED[engine][name], script=script)
        return
    row = RECORDED[engine][name] | {"body": RECORDED[engine][name]["body"] | {"script": script, "user": "x"}}
    answers_as_recorded(url, row)


def program(path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in as a module: it is a script without a suffix, and finds frames.py beside itself."""
    monkeypatch.syspath_prepend(str(ROOT / "tests/support/fakes"))
    loader = importlib.machinery.SourceFileLoader(f"stand_in_{path.name}", str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@contextmanager
def serving(handler: Any) -> Iterator[str]:
    """A stand-in's address; it serves in a thread."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_the_stand_in_of_ollama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    stand_in = program(ROOT / "tests/bundle/ollama/ollama", monkeypatch)
    stand_in.MANIFESTS.mkdir(parents=True)
    (stand_in.MANIFESTS / "smol:latest").touch()
    with serving(stand_in.Handler) as url:
        for name in OF_OLLAMAS_STAND_IN:
            answers_as_recorded(url, RECORDED["ollama"][name])


def test_the_stand_in_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = program(ROOT / "tests/bundle/vllm/vllm", monkeypatch)
    stand_in.Handler.model = "smol"
    with serving(stand_in.Handler) as url:
        for name in OF_VLLMS_STAND_IN:
            answers_as_recorded(url, RECORDED["vllm"][name])
