"""LLM_MODELS: several models in one stack. One is added and one removed while the others answer; `make models` lists,
fetches and removes them."""

import re
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.clone import Tree, refuses
from tests.support.engines import Engine, ask, engine_image, error_of, running_up
from tests.support.machine import Machine
from tests.support.processes import wait_for

CHAT, SMOL, MINI = "/v1/chat/completions", "SmolLM2-135M-Instruct", "all-MiniLM-L6-v2"
TEXTS = ["How old are you?", "What is your age?", "The stock market fell today."]


def up(tree: Tree, settings: dict[str, str], models: str) -> str:
    ran = tree.run("scripts/up", **settings, LLM_MODELS=models)
    assert ran.returncode == 0, ran.stdout
    return ran.stdout


def loaded(tree: Tree, settings: dict[str, str]) -> dict[str, Any]:
    """The listed models that are not aliases, and whether each is loaded."""
    models = ask(tree, "/v1/models", **settings)[1]["data"]
    return {it["id"]: it.get("loaded") for it in models if "parent" not in it}


class Story(threading.Thread):
    """A long stream of the chat model, read in a thread."""

    def __init__(self, port: str) -> None:
        super().__init__(daemon=True)
        self.url, self.lines, self.stopped = f"http://127.0.0.1:{port}{CHAT}", 0, False
        self.trouble, self.last = "", ""
        self.start()

    def run(self) -> None:
        body = {"model": SMOL, "stream": True, "ignore_eos": True, "max_tokens": 8000, "temperature": 0,
                "messages": [{"role": "user", "content": "Write a very long story."}]}  # fmt: skip
        headers = {"Authorization": "Bearer dev-key", "x-stack-resume": "off"}
        try:
            with httpx.stream("POST", self.url, json=body, headers=headers, timeout=120) as answer:
                for line in answer.iter_lines():
                    if self.stopped:
                        return
                    self.lines += '"content"' in line
                    self.trouble += line if '"error"' in line else ""
                    self.last = line or self.last
        except httpx.HTTPError as exc:
            self.trouble += repr(exc)

    def goes_on(self) -> bool:
        """Wait for a few more tokens, unless all have come."""
        before = self.lines
        wait_for(lambda: self.lines > before + 3 or not self.is_alive(), deadline=60)
        assert not self.trouble
        return self.is_alive() or self.last == "data: [DONE]"


@pytest.mark.timeout(600)  # three times `make up`, with two images, on a machine that does other things too
def test_a_model_comes_and_goes_while_another_streams(tree: Tree, python_image: str) -> None:
    """With the real engine and two real models, each of which answers by its name."""
    settings = {"ENGINE": "tiny", "STACK_PUBLISH": "127.0.0.1:0", "PYTHON_IMAGE": python_image, "LLM_CONTEXT": "32768"}
    settings |= {"STACK_GRACE": "1"}
    up(tree, settings, SMOL)
    assert loaded(tree, settings) == {SMOL: True}
    asked = {"model": MINI, "input": TEXTS}
    assert ask(tree, "/v1/embeddings", asked, **settings)[0] == 404
    port = tree.run("docker", "compose", "port", "gateway", "9000", **settings).stdout.rpartition(":")[2].strip()
    story = Story(port)
    try:
        assert story.goes_on()
        said = up(tree, settings, f"{SMOL},{MINI}")
        assert f"{MINI}: context: 512 tokens of each text" in said
        assert story.goes_on()
        status, answer = ask(tree, "/v1/embeddings", asked, **settings)
        assert status == 200, answer
        age, same, other = (it["embedding"] for it in answer["data"])
        assert (len(age), answer["model"]) == (384, MINI)
        assert dot(age, same) > 0.7
        assert dot(age, other) < 0.2
        wait_for(lambda: loaded(tree, settings) == {SMOL: True, MINI: True})
        # Neither model can read as much as LLM_CONTEXT says.
        windows = {it["id"]: it["context_length"] for it in ask(tree, "/v1/models", **settings)[1]["data"]}
        assert (windows[SMOL], windows[MINI]) == (8192, 512)

        up(tree, settings, SMOL)
        assert story.goes_on()
        wait_for(lambda: ask(tree, "/v1/embeddings", asked, **settings)[0] == 404)
        assert loaded(tree, settings) == {SMOL: True}
        assert MINI not in tree.run("docker", "compose", "ps", "--all", **settings).stdout
    finally:
        story.stopped = True
    assert not tree.dotenv.read_text().count(".models/")


def dot(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def ollama(python_image: str) -> Iterator[Engine]:
    with engine_image("ollama", "smollm2:135m", python_image) as engine:
        yield engine


@pytest.mark.timeout(600)
def test_all_models_are_fetched_and_each_answers_as_soon_as_it_is_there(
    tree: Tree, ollama: Engine, python_image: str
) -> None:
    if ollama.real:
        pytest.skip("a real download can't be held")
    settings = {"OLLAMA_IMAGE": ollama.image, "STACK_PUBLISH": "127.0.0.1:0", "STACK_DRAIN_DELAY": "0",
                "PYTHON_IMAGE": python_image}  # fmt: skip
    question = {"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 20}
    with running_up(tree, LLM_MODELS="some:1b,held:1", **settings) as upping:
        upping.wait_said("==> waiting: model: held:1: 2.00 of 5.00 GB (40%)")
        assert ask(tree, CHAT, question, **settings)[1]["model"] == "some:1b"
        far = "The model held:1 is being fetched: 2.00 of 5.00 GB (40%)."
        assert error_of(tree, CHAT, question | {"model": "held:1"}, **settings) == (503, "5", "model_loading", far)
        engine = tree.run("docker", "compose", "ps", "--quiet", "engine", **settings).stdout
        tree.run("docker", "compose", "exec", "-T", "provision", "touch", "/tmp/go", **settings)
        assert upping.ended() == 0, upping.said
    assert ask(tree, CHAT, question | {"model": "held:1"}, **settings)[0] == 200
    assert loaded(tree, settings) == {"some:1b": False, "held:1": True}

    said = tree.run("scripts/up", LLM_MODELS="some:1b,missing:1", **settings)
    assert said.returncode == 1
    assert (
        "The model missing:1 could not be fetched: Ollama's library has no such model" in said.stdout.splitlines()[-1]
    )
    assert ask(tree, CHAT, question, **settings)[0] == 200
    assert error_of(tree, CHAT, question | {"model": "missing:1"}, **settings)[2] == "model_unavailable"
    assert ask(tree, CHAT, question | {"model": "held:1"}, **settings)[0] == 404  # it is no longer in the setting
    assert (
        tree.run("docker", "compose", "ps", "--quiet", "engine", **settings).stdout == engine
    )  # the same all the time

    settings |= {"LLM_MODELS": "some:1b"}
    listed = tree.run("make", "--silent", "models", **settings).stdout
    assert rows(listed) == [
        ["held:1", "0.51 GB", "only kept: not in LLM_MODELS"],
        ["some:1b", "0.51 GB", "served, default"],
    ]
    assert "some:1b is served: take it out" in tree.run("scripts/models", "remove", "some:1b", **settings).stdout
    assert "held:1: removed" in tree.run("make", "--silent", "models", "REMOVE=held:1", **settings).stdout
    assert "other:1: success" in tree.run("make", "--silent", "models", "PULL=other:1", **settings).stdout


def rows(text: str) -> list[list[str]]:
    return sorted(re.split(r"  +", line.strip()) for line in text.splitlines() if " GB " in line)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"ENGINE": "tiny", "LLM_MODELS": "qwen3:8b"}, ("the tiny engine has only SmolLM2-135M-Instruct and",)),
        ({"ENGINE": "tiny", "LLM_MODELS": MINI}, ("put that one first",)),
        ({"ENGINE": "ollama", "LLM_MODELS": "a b;c"}, ("LLM_MODELS has 'b;c', which is not the name of a model",)),
        (
            {"ENGINE": "ollama", "LLM_MODELS": "qwen3:8b,qwen3:32b"},
            ("qwen3:32b needs about", "GB of disk", "before it"),
        ),
    ],
)
def test_models_that_cannot_be_served_are_refused(
    tree: Tree, machine: Machine, settings: dict[str, str], parts: tuple[str, ...]
) -> None:
    machine.disk(free=24 * 10**9)
    refuses(tree, *parts, **settings, **machine.environment)
