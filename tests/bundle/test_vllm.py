"""The unaltered compose.gpu.yaml, the GPU reservation aside, with stand-ins for vLLM's image and for the model hub: the
model is fetched, waited for, served, and kept. With ENGINE=vllm `make test`, the real image on real GPUs, reservation
included."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clone import Tree
from tests.support.engines import Engine, ask, engine_image, error_of, log_of, running_up, wait_until_healthy
from tests.support.processes import wait_for

CHAT = "/v1/chat/completions"
TOOLS = {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]}
QUESTION = {"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 20}
# What VLLM_SERVER_DEV_MODE=1 adds to vLLM.
DEVELOPMENT = [
    ("/is_sleeping", None),
    ("/sleep?level=1", {}),
    ("/wake_up", {}),
    ("/collective_rpc", {"method": "x"}),
    ("/reset_prefix_cache", {}),
    ("/v1/sleep", {}),
    ("/server_info", None),
]
# Docker refuses a reservation of GPUs on a machine that has none. Nobody may ask the proxy, which
# Docker's client configuration can set in every container. And the model hub is a container on the way out.
HERE_AND_NOW = """
services:
  engine: { deploy: !reset null, environment: { http_proxy: "http://127.0.0.1:9" } }
  provision: { environment: { HF_ENDPOINT: "http://hub:8080" }, depends_on: [hub] }
  hub: { image: "${VLLM_IMAGE}", entrypoint: [hub, "8080"], init: true, networks: [egress] }
"""


@pytest.fixture(scope="module")
def vllm(python_image: str) -> Iterator[Engine]:
    with engine_image("vllm", "Qwen/Qwen2.5-0.5B-Instruct", python_image) as engine:
        yield engine


@pytest.fixture
def settings(tree: Tree, vllm: Engine, python_image: str) -> dict[str, str]:
    # The gateway is started anew for each change: no load balancer has to hear of it before.
    common = {"VLLM_IMAGE": vllm.image, "STACK_PUBLISH": "127.0.0.1:0", "STACK_DRAIN_DELAY": "0"}
    if vllm.real:
        return common | {"COMPOSE_FILE": "compose.yaml:compose.gpu.yaml"}
    (tree.path / "here.yaml").write_text(HERE_AND_NOW)
    files = "compose.yaml:compose.gpu.yaml:here.yaml"
    return common | {"COMPOSE_FILE": files, "PYTHON_IMAGE": python_image}


def test_make_up_fetches_the_model_once_and_the_second_run_fetches_nothing(
    tree: Tree, vllm: Engine, settings: dict[str, str]
) -> None:
    settings |= {"LLM_MODEL": vllm.model}
    ran = tree.run("scripts/up", **settings)
    assert ran.returncode == 0, ran.stdout
    assert f"COMPOSE_FILE={settings['COMPOSE_FILE']}" in tree.dotenv.read_text().splitlines()
    assert ask(tree, "/readyz", **settings)[0] == 200
    status, answer = ask(tree, CHAT, QUESTION, **settings)
    assert status == 200, answer
    assert answer["choices"][0]["message"]["content"]

    if not vllm.real:  # no parser is known for its name
        assert "requests with tools will be refused (400); set VLLM_TOOL_PARSER to one of" in ran.stdout
        status, answer = ask(tree, CHAT, QUESTION | TOOLS, **settings)
        assert (status, answer["error"]["param"]) == (400, "tools"), answer
        assert "Ask its operator to set VLLM_TOOL_PARSER" in answer["error"]["message"]

    who = tree.run("docker", "compose", "exec", "-T", "engine", "id", "-u", **settings)
    assert who.stdout.strip() == "2000"
    wait_until_healthy(tree, "engine", **settings)

    down = tree.run("scripts/down", **settings)
    assert down.returncode == 0, down.stdout
    assert f"disk: {vllm.model} is already on this machine" in tree.run("scripts/doctor", **settings).stdout
    again = tree.run("scripts/up", VLLM_TOOL_PARSER="hermes", **settings)
    assert again.returncode == 0, again.stdout
    assert "tools: vLLM reads tool calls with its parser hermes" in again.stdout
    assert ask(tree, CHAT, QUESTION | TOOLS, **settings)[0] == 200
    assert log_of(tree, "provision", **settings) == f"{vllm.model}: already here\n"
    assert ask(tree, CHAT, QUESTION, **settings)[0] == 200
    if not vllm.real:
        assert "compiled kernels found" in log_of(tree, "engine", **settings)


def test_progress_is_reported_everywhere_and_an_interrupted_download_continues(
    tree: Tree, vllm: Engine, settings: dict[str, str]
) -> None:
    if vllm.real:
        pytest.skip("a real download can't be held")
    settings |= {"LLM_MODEL": "org/held"}
    far = "0.02 of 0.05 GB (40%)"
    with running_up(tree, **settings) as up:
        up.wait_said(f"==> waiting: model: org/held: {far}")
        loading = (503, "5", "model_loading", f"The model org/held is being fetched: {far}.")
        wait_for(lambda: error_of(tree, "/readyz", **settings) == loading)  # its answers are repeated for a second
        assert error_of(tree, CHAT, QUESTION, **settings) == loading
        tree.run("docker", "compose", "kill", "provision", **settings)
        assert up.ended() == 1
    with running_up(tree, "docker", "compose", "up", **settings) as up:
        up.wait_said("org/held: 0.04 of 0.05 GB (80%)")
        tree.run("docker", "compose", "exec", "-T", "hub", "touch", "/tmp/go", **settings)
        up.wait_said("provision-1 exited with code 0")
        wait_for(lambda: ask(tree, "/readyz", **settings)[0] == 200)
        up.process.terminate()
        up.ended()
    assert "from byte 20971520 of 52428800" in log_of(tree, "hub", **settings)
    assert "waiting for the model org/held: see the log of 'provision'" in log_of(tree, "engine", **settings)


def test_a_gated_model_needs_a_token(tree: Tree, vllm: Engine, settings: dict[str, str], tmp_path: Path) -> None:
    """Without a token a sentence, in readyz too; with it, from a file that is mounted as a secret, an answer."""
    if vllm.real:
        pytest.skip("needs a token of somebody's")
    settings |= {"LLM_MODEL": "org/gated"}
    ran = tree.run("scripts/up", **settings)
    assert ran.returncode == 1
    sentence = error_of(tree, "/readyz", **settings)[3]
    assert sentence.startswith("The model org/gated could not be fetched: the model needs its owner's permission")
    assert f"stack: {sentence}" in ran.stdout.splitlines()[-1]

    token = tmp_path / "token"
    token.write_text("hf_right\n")
    ran = tree.run("scripts/up", HF_TOKEN_FILE=str(token), **settings)
    assert ran.returncode == 0, ran.stdout
    assert "hf_right" not in ran.stdout


@pytest.mark.timeout(900)  # `make up` three times
def test_each_of_several_models_has_a_vllm_with_its_share_of_the_gpu(
    tree: Tree, vllm: Engine, settings: dict[str, str]
) -> None:
    """Also beside one that fails again and again; one is removed and one added while the first goes on."""
    if vllm.real:
        pytest.skip("the stand-in shows its arguments, and fails when it is told to")
    settings |= {"STACK_RESUME_WAIT": "3"}  # so long, a request waits for the one that fails
    running = settings | {"COMPOSE_FILE": settings["COMPOSE_FILE"] + ":.models/compose.yaml"}  # as in .env
    ran = tree.run("scripts/up", LLM_MODELS="org/some-4B,org/broken-1B", **settings)
    assert ran.returncode == 1, ran.stdout
    assert "The engine-org-broken-1b stops again and again" in ran.stdout.splitlines()[-1]
    # 0.9 is divided as 8 + 0.8 + 2 GB (weights, 8192 tokens, room) are to 2 + 0.4 + 2.
    assert arguments(tree, "engine", running)["gpu-memory-utilization"] == "0.639"
    broken = arguments(tree, "engine-org-broken-1b", running)
    assert (broken["gpu-memory-utilization"], broken["max-model-len"]) == ("0.26", "auto")
    tree.run("docker", "compose", "restart", "--timeout", "1", "engine", **running)
    wait_for(lambda: answers(tree, running) == {"org/some-4B": 200, "org/broken-1B": 503}, deadline=60)

    first, gateway = container(tree, "engine", running), container(tree, "gateway", running)
    settings |= {"LLM_MODELS": "org/some-4B,org/other-1B"}
    ran = tree.run("scripts/up", **settings)
    assert ran.returncode == 0, ran.stdout
    assert answers(tree, running) == {"org/some-4B": 200, "org/other-1B": 200}
    assert container(tree, "engine", running) == first  # its share is the same
    listed = tree.run("scripts/models", **settings).stdout
    assert re.findall(r"(\S+) +0.05 GB +(.+)", listed) == [
        ("org/broken-1B", "only kept: not in LLM_MODELS"),
        ("org/other-1B", "served"),
        ("org/some-4B", "served, default"),
    ]

    both = ("engine", "engine-org-other-1b")
    tree.run("docker", "compose", "exec", "engine", "touch", "/models/wait", **running)
    with running_up(tree, VLLM_GPU_SHARES="0.5,0.3", VLLM_TOOL_PARSER="auto,hermes", **settings) as up:
        up.wait_said(f"==> stopping {' '.join(both)}: ")
        # The last line, because the log of a container that is about to be replaced has the words too.
        turn = "waiting until another model is loaded\n"
        wait_for(lambda: any(log_of(tree, it, **running).endswith(turn) for it in both), deadline=60)
        tree.run("docker", "compose", "exec", "engine", "rm", "/models/wait", **running)
        assert up.ended() == 0, up.said
    assert [arguments(tree, it, running)["gpu-memory-utilization"] for it in both] == ["0.5", "0.3"]
    assert arguments(tree, "engine-org-other-1b", running)["tool-call-parser"] == "hermes"
    assert answers(tree, running) == {"org/some-4B": 200, "org/other-1B": 200}
    assert container(tree, "gateway", running) == gateway  # requests wait there meanwhile
    assert not [it for it in both if "BlockingIOError" in log_of(tree, it, **running)]  # it fails if two load at once


@pytest.mark.timeout(300)
def test_models_of_which_only_one_fits_take_turns(tree: Tree, vllm: Engine, settings: dict[str, str]) -> None:
    """Also after a restart of one that sleeps: it cannot load while the other one is awake."""
    if vllm.real:
        pytest.skip("the stand-in fails if two are awake")
    settings |= {"LLM_MODELS": "org/some-4B,org/other-1B", "VLLM_SLEEP": "on"}
    ran = tree.run("scripts/up", **settings)
    assert ran.returncode == 0, ran.stdout
    running = settings | {"COMPOSE_FILE": settings["COMPOSE_FILE"] + ":.models/compose.yaml"}
    assert ask(tree, "/readyz", **running)[0] == 200  # all sleep
    assert [answers(tree, running) for _ in range(2)] == [{"org/some-4B": 200, "org/other-1B": 200}] * 2
    both = ("engine", "engine-org-other-1b")
    for service in both:
        log = log_of(tree, service, **running)
        assert log.count("POST /wake_up") == 2, log
        assert "no memory" not in log
        assert arguments(tree, service, running)["gpu-memory-utilization"] == "0.9"
    closed = [ask(tree, path, body, **running)[0] for path, body in DEVELOPMENT]
    assert closed == [404] * len(DEVELOPMENT)

    environment = json.loads(tree.run("docker", "compose", "config", "--format", "json", **running).stdout)
    assert environment["services"]["gateway"]["environment"]["STACK_RESUME_WAIT"] == "300"
    assert ask(tree, CHAT, QUESTION | {"model": "org/other-1B"}, **running)[0] == 200
    tree.run("docker", "compose", "restart", "--timeout", "1", "engine", **running)
    wait_for(lambda: "no memory" in log_of(tree, "engine", **running), deadline=60)
    assert ask(tree, CHAT, QUESTION | {"model": "org/some-4B"}, **running)[0] == 200


def container(tree: Tree, service: str, settings: dict[str, str]) -> str:
    return tree.run("docker", "compose", "ps", "--quiet", service, **settings).stdout


def arguments(tree: Tree, service: str, settings: dict[str, str]) -> dict[str, str]:
    """Return the options that the service's vLLM was started with."""
    started = [line for line in log_of(tree, service, **settings).splitlines() if line.startswith("serve ")]
    return dict(re.findall(r"--([a-z-]+)=(\S+)", started[-1]))


def answers(tree: Tree, settings: dict[str, str]) -> dict[str, int]:
    """Return for each listed model the status of an answer by its name."""
    names = [it["id"] for it in ask(tree, "/v1/models", **settings)[1]["data"]]
    return {name: ask(tree, CHAT, QUESTION | {"model": name}, **settings)[0] for name in names}
