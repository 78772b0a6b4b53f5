"""The unaltered compose.yaml with a stand-in for Ollama's image, or the real one: the model is fetched, waited for,
served, and kept."""

import json
from collections.abc import Iterator

import pytest

from tests.support.clone import Tree
from tests.support.engines import Engine, ask, engine_image, error_of, log_of, running_up, send, wait_until_healthy
from tests.support.processes import events

CHAT = "/v1/chat/completions"
QUESTION = {"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 20}


@pytest.fixture(scope="module")
def ollama(python_image: str) -> Iterator[Engine]:
    with engine_image("ollama", "smollm2:135m", python_image) as engine:
        yield engine


@pytest.fixture
def settings(ollama: Engine, python_image: str) -> dict[str, str]:
    image = {} if ollama.real else {"PYTHON_IMAGE": python_image}
    # The gateway is started anew for each change: no load balancer has to hear of it before.
    return {"OLLAMA_IMAGE": ollama.image, "STACK_PUBLISH": "127.0.0.1:0", "STACK_DRAIN_DELAY": "0", **image}


def test_make_up_fetches_the_model_once_and_the_second_run_fetches_nothing(
    tree: Tree, ollama: Engine, settings: dict[str, str]
) -> None:
    """Up, ask, down, up: the second time nothing is fetched. Then ENGINE=tiny takes over."""
    settings |= {"LLM_MODEL": ollama.model}
    ran = tree.run("scripts/up", **settings)
    assert ran.returncode == 0, ran.stdout
    assert "COMPOSE_FILE=compose.yaml" in tree.dotenv.read_text().splitlines()
    assert ask(tree, "/readyz", **settings)[0] == 200
    status, answer = ask(tree, CHAT, QUESTION, **settings)
    assert status == 200, answer
    assert answer["choices"][0]["message"]["content"]
    if not ollama.real:
        crash = QUESTION | {"stream": True, "messages": [{"role": "user", "content": "Do crash."}]}
        status, _, text = send(tree, CHAT, crash, **settings)
        # It is made anew, and kills the model's process once more.
        assert (status, events(text)[-1]["error"]["code"]) == (200, "engine_failed")

    for service, uid in (("engine", "10002"), ("gateway", "10001")):
        who = tree.run("docker", "compose", "exec", "-T", service, "id", "-u", **settings)
        assert who.stdout.strip() == uid
        wait_until_healthy(tree, service, **settings)

    down = tree.run("scripts/down", **settings)
    assert down.returncode == 0, down.stdout
    assert f"disk: {ollama.model} is already on this machine" in tree.run("scripts/doctor", **settings).stdout
    again = tree.run("scripts/up", **settings)
    assert again.returncode == 0, again.stdout
    assert log_of(tree, "provision", **settings) == f"{ollama.model}: already here\n"
    assert ask(tree, CHAT, QUESTION, **settings)[0] == 200

    tiny = tree.run("scripts/up", ENGINE="tiny", **{name: settings[name] for name in settings if "LLM" not in name})
    assert tiny.returncode == 0, tiny.stdout
    running = tree.run("docker", "ps", "--all", "--filter", f"name={tree.project}", "--format", "{{.Names}}").stdout
    assert set(running.split()) == {f"{tree.project}-engine-1", f"{tree.project}-gateway-1"}
    assert "COMPOSE_FILE=compose.yaml:compose.tiny.yaml" in tree.dotenv.read_text().splitlines()


def test_progress_is_reported_everywhere_and_an_interrupted_pull_continues(
    tree: Tree, ollama: Engine, settings: dict[str, str]
) -> None:
    """The pull is held after two of five parts, stopped, and taken up by the next `make up`."""
    if ollama.real:
        pytest.skip("a real download can't be held")
    settings |= {"LLM_MODEL": "held:1"}
    far = "2.00 of 5.00 GB (40%)"
    with running_up(tree, **settings) as up:
        up.wait_said(f"==> waiting: model: held:1: {far}")
        loading = (503, "5", "model_loading", f"The model held:1 is being fetched: {far}.")
        assert error_of(tree, "/readyz", **settings) == loading
        assert error_of(tree, CHAT, QUESTION, **settings) == loading
        assert error_of(tree, CHAT, QUESTION | {"stream": True}, **settings) == loading
        assert ask(tree, "/livez", **settings)[0] == 200
        networks = "{{range $name, $_ := .NetworkSettings.Networks}}{{$name}} {{end}}"
        provision = tree.run("docker", "compose", "ps", "--quiet", "provision", **settings).stdout.strip()
        assert tree.run("docker", "inspect", "--format", networks, provision).stdout.split() == [
            f"{tree.project}_egress"
        ]
        tree.run("docker", "compose", "stop", "provision", **settings)
        assert up.ended() == 1
    assert f"stack: The download of the model was stopped (held:1: {far}). Run 'make up' again" in up.lines[-1]

    with running_up(tree, **settings) as up:
        up.wait_said("==> waiting: model: held:1: 3.00 of 5.00 GB (60%)")
        tree.run("docker", "compose", "exec", "-T", "provision", "touch", "/tmp/go", **settings)
        assert up.ended() == 0, up.said
    log = log_of(tree, "provision", **settings)
    first, second = log.split("held:1: pulling manifest\n")[1:]
    assert first.startswith("held:1: 1.00 of 5.00 GB (20%)\n")
    assert second.startswith("held:1: 3.00 of 5.00 GB (60%)\n")
    assert ask(tree, CHAT, QUESTION, **settings)[0] == 200
    assert "waiting for the first model: see the log of 'provision'" in log_of(tree, "engine", **settings)
    mounted = tree.run("docker", "compose", "exec", "-T", "gateway", "cat", "/run/progress/model.json", **settings)
    assert json.loads(mounted.stdout) == {"model": "held:1", "state": "ready"}
    denied = tree.run("docker", "compose", "exec", "-T", "gateway", "touch", "/run/progress/mine", **settings)
    assert "Read-only file system" in denied.stdout


def test_a_model_that_cannot_be_fetched_is_reported_everywhere(
    tree: Tree, ollama: Engine, settings: dict[str, str]
) -> None:
    """Changing the model is changing one setting and `make up`, after a failure too."""
    reasons = {
        "missing:8f2c": "Ollama's library has no such model: correct LLM_MODEL",
        "newer:1": "the model needs a newer Ollama: set OLLAMA_IMAGE to a newer version",
    }
    for model in list(reasons)[: 1 if ollama.real else 2]:
        settings |= {"LLM_MODEL": model}
        ran = tree.run("scripts/up", **settings)
        assert ran.returncode == 1
        sentence = f"The model {model} could not be fetched: {reasons[model]}, then run 'make up' again."
        assert f"stack: {sentence}" in ran.stdout.splitlines()[-1]
        assert sentence in log_of(tree, "provision", **settings)
        failed = (503, "5", "model_unavailable", sentence)
        assert error_of(tree, "/readyz", **settings) == failed
        assert error_of(tree, CHAT, QUESTION, **settings) == failed
    settings |= {"LLM_MODEL": ollama.model}
    ran = tree.run("scripts/up", **settings)
    assert ran.returncode == 0, ran.stdout
    assert ask(tree, CHAT, QUESTION, **settings)[0] == 200
