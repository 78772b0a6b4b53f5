"""A check that `make doctor` could not make is not one that passed: it is `skipped`, or null in JSON, and says why."""

import json
from typing import Any

import pytest

from tests.support.clone import Tree
from tests.support.machine import Machine

SEVERAL = {"LLM_MODELS": "Qwen/Qwen3-8B,Qwen/Qwen3-0.6B"}


def doctor(tree: Tree, env: dict[str, str]) -> dict[str, dict[str, Any]]:
    ran = tree.run("scripts/doctor", "--json", **env)
    checks = json.loads(ran.stdout)["checks"]
    assert all(it["finding"] for it in checks), checks
    return {it["name"].removeprefix("machine."): it for it in checks}


@pytest.mark.parametrize(
    ("settings", "skipped"),
    [
        ({"LLM_MODEL": "Qwen/Qwen3-8B"}, {"gpu_memory", "context"}),
        ({"LLM_MODEL": "org/mystery"}, {"gpu_memory", "context", "ram", "disk"}),
        (SEVERAL, {"shared_memory", "context"}),
        (SEVERAL | {"VLLM_GPU_SHARES": "0.6,0.3"}, {"shared_memory", "context"}),
    ],
)
def test_without_a_driver_the_memory_of_the_gpu_is_unknown(
    tree: Tree, machine: Machine, settings: dict[str, str], skipped: set[str]
) -> None:
    """It also said that 0 tokens of context would fit, and that several models have 0.0 GB."""
    (machine.programs / "nvidia-smi").unlink()
    checks = doctor(tree, {"ENGINE": "vllm"} | settings | machine.environment)
    assert {name for name, it in checks.items() if it["ok"] is None} == skipped
    assert {name for name, it in checks.items() if it["ok"] is False} == {"gpu"}


def test_without_a_reservation_no_gpu_is_checked(tree: Tree, machine: Machine) -> None:
    (tree.path / "here.yaml").write_text("services: { engine: { deploy: !reset null } }")
    files = {"COMPOSE_FILE": "compose.yaml:compose.gpu.yaml:here.yaml", "LLM_MODEL": "Qwen/Qwen3-8B"}
    checks = doctor(tree, files | machine.environment)
    assert {name for name, it in checks.items() if it["ok"] is None} == {"gpu", "gpu_runtime", "gpu_memory"}


def test_without_a_size_in_its_name_a_model_is_not_weighed(tree: Tree, machine: Machine) -> None:
    settings = {"ENGINE": "ollama", "LLM_MODEL": "mystery:latest"} | machine.environment
    checks = doctor(tree, settings)
    assert {name for name, it in checks.items() if it["ok"] is None} == {"ram", "context", "disk"}
    said = tree.run("scripts/doctor", **settings)
    assert "    skipped: the size of mystery:latest is unknown, and its name has no number\n" in said.stdout


def test_the_disk_of_dockers_virtual_machine_is_not_checked(tree: Tree, machine: Machine) -> None:
    program = machine.programs / "docker"
    program.write_text(program.read_text().replace("echo / ;;", "echo /in/the/virtual/machine ;;"))
    machine.lacks("ollama/ollama:*")
    checks = doctor(tree, {"ENGINE": "ollama"} | machine.environment | {"OLLAMA_IMAGE": ""})
    assert {name for name, it in checks.items() if it["ok"] is None} == {"image_disk", "disk"}
