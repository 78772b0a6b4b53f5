"""ENGINE=outside: a gateway in a container before an engine of this machine. The stack has no engine of its own, `make
doctor` says by which network the gateway goes out, and what this engine cannot do."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.support.clone import Tree, clone, refuses
from tests.support.containers import docker
from tests.support.engines import ask
from tests.support.machine import Machine
from tests.support.processes import ROOT, free_port

HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
RECORDED = ["COMPOSE_FILE=compose.yaml:compose.outside.yaml", "LLM_BACKEND=vllm"]


@contextmanager
def engine_for_containers(python_image: str) -> Iterator[int]:
    """The scripted engine, at the address of this machine that Docker calls host-gateway."""
    words = "run", "--rm", "--add-host", "it:host-gateway", "--entrypoint", "cat", python_image, "/etc/hosts"
    (address,) = [line.split()[0] for line in docker(*words).splitlines() if line.endswith("\tit")]
    port = free_port()
    command = [sys.executable, "-m", "tests.support.fakes.engine", f"{address}:{port}", "vllm"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout
        try:
            assert process.stdout.readline() == b"ready\n"
            yield port
        finally:
            process.kill()


def doctor(tree: Tree, **settings: str) -> dict[str, Any]:
    ran = tree.run("make", "--silent", "doctor", "JSON=1", **settings)
    return {it["name"]: it for it in json.loads(ran.stdout.rpartition("}\n")[0] + "}")["checks"]}


@pytest.fixture
def readable(tree: Tree) -> Tree:
    """A clone whose images come from the cache, because its files have the modes of this tree."""
    return clone(tree.path.with_name("readable"), mask=0)


def test_an_engine_of_this_machine_answers_through_the_gateway(readable: Tree, python_image: str) -> None:
    settings = {"STACK_PUBLISH": "127.0.0.1:0", "PYTHON_IMAGE": python_image, "LLM_MODEL": "fake-model"}
    try:
        with engine_for_containers(python_image) as port:
            url = f"http://host.docker.internal:{port}"
            lacking = settings | {"LLM_MODEL": "another", "LLM_BASE_URL": url, "LLM_BACKEND": "vllm"}
            ran = readable.run("make", "up", ENGINE="outside", **lacking)
            assert f"the engine at {url} does not have the model another: set LLM_MODEL to" in ran.stdout, ran.stdout
            ready = doctor(readable, **lacking)["stack.ready"]
            assert (ready["ok"], "set LLM_MODEL to a model that the" in ready["advice"]) == (False, True), ready
            ran = readable.run("make", "up", ENGINE="outside", LLM_BASE_URL=url, LLM_BACKEND="vllm", **settings)
            assert ran.returncode == 0, ran.stdout
            written = readable.dotenv.read_text().splitlines()
            assert [it for it in (*RECORDED, f"LLM_BASE_URL={url}") if it not in written] == []
            assert readable.run("docker", "compose", "ps", "--all", "--services", **settings).stdout == "gateway\n"
            status, answer = ask(readable, "/v1/chat/completions", HELLO, **settings)
            assert (status, answer["choices"][0]["message"]["content"]) == (200, "one two three"), answer
            checks = doctor(readable, **settings)
            assert url in checks["machine.outside"]["finding"]
            assert checks["stack.outside"]["finding"].endswith(f"and elsewhere is the network {readable.project}_edge")
            assert checks["stack.chat"]["ok"]
            # It answers in words, whatever is asked for.
            for name, finding in (("forced_tool", "did not make the tool call"), ("json_schema", "does not keep to")):
                assert checks[f"stack.{name}"]["ok"] is False
                assert finding in checks[f"stack.{name}"]["finding"]

        (readable.path / "config/stack.yaml").write_text("engines: {}\n")
        told = docker("exec", f"{readable.project}-gateway-1", "stack", "doctor")  # the part of it that runs there
        assert "failed\tsettings\t/etc/stack/stack.yaml:1: engines" in told
        (readable.path / "config/stack.yaml").unlink()
        checks = doctor(readable, **settings)
        assert checks["stack.ready"]["ok"] is False
        assert "let it listen at an address that containers reach" in checks["stack.ready"]["advice"]
    finally:
        readable.remove_everything()


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("", "ENGINE=outside needs the address of the engine: set LLM_BASE_URL"),
        ("http://localhost:11434", "would be the gateway's own container"),
        ("http://127.0.0.1:11434/v1", "set LLM_BASE_URL=http://host.docker.internal:PORT"),
        ("http://[::1]:8000", "would be the gateway's own container"),
        ("host.docker.internal:11434", "is not the address of an engine"),
    ],
)
def test_an_address_that_no_container_reaches_is_refused(tree: Tree, machine: Machine, url: str, sentence: str) -> None:
    refuses(tree, sentence, ENGINE="outside", LLM_BASE_URL=url, **machine.environment)


def test_an_engine_outside_other_than_ollama_needs_the_name_of_its_model(tree: Tree, machine: Machine) -> None:
    env = machine.environment | {"ENGINE": "outside", "LLM_BASE_URL": "http://engine.example", "LLM_BACKEND": "vllm"}
    said = "ENGINE=outside with LLM_BACKEND=vllm needs the name of a model: set LLM_MODEL"
    refuses(tree, said, **env)
    assert said not in tree.run("scripts/doctor", **env, LLM_MODELS="one,two").stdout
    (tree.path / "config/stack.yaml").touch(mode=0o644)
    assert said not in tree.run("scripts/doctor", **env).stdout


def test_the_models_of_an_engine_outside_are_managed_there(tree: Tree, machine: Machine) -> None:
    ran = tree.run(
        "scripts/models", ENGINE="outside", LLM_BASE_URL="http://host.docker.internal:1", **machine.environment
    )
    assert ran.returncode == 1
    assert "list, fetch and remove its models there" in ran.stdout
