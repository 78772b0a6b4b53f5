"""Preflight: each thing a machine can lack is planted, and `make up` says so in one sentence before any impact; `make
doctor` says all of it at once, with the numbers, and changes nothing."""

import json
import shutil
from pathlib import Path

import pytest

from tests.support.clone import Tree, refuses, write_program
from tests.support.machine import GB, Machine


def test_the_docker_engine_is_too_old(tree: Tree, machine: Machine) -> None:
    machine.docker(version="19.03.15")
    refuses(tree, "Docker 20.10 or newer is needed (19.03.15 is here)", "docs.docker.com", **machine.environment)


def test_memory_is_too_small_for_the_model(tree: Tree, machine: Machine) -> None:
    machine.docker(memory=4_100_000_000)
    refuses(
        tree,
        "llama3.1:8b needs about 6.4 GB of memory (4.9 GB of weights, known size, 0.5 GB for 4096 tokens of context in",
        "Docker has 4.1 GB: set LLM_MODEL to a smaller one, such as llama3.2:3b (2.0 GB)",
        ENGINE="ollama",
        **machine.environment,
    )


def test_a_locale_with_a_decimal_comma_changes_no_calculation(tree: Tree, tmp_path: Path) -> None:
    """The locale is made here, because few machines have it. Without localedef, only the setting itself is seen."""
    if shutil.which("localedef"):
        tree.run("localedef", "-i", "de_DE", "-f", "UTF-8", str(tmp_path / "de_DE.UTF-8"))
    source = "for it in say dotenv preflight; do . scripts/lib/$it.sh; done; "
    calculation = 'env | grep ^LC_ALL=; echo "$(calculate "$(calculate 0.5) * 3")"'
    said = tree.run("bash", "-euc", source + calculation, LC_ALL="de_DE.UTF-8", LOCPATH=str(tmp_path)).stdout
    assert said == "LC_ALL=C\n1.5\n"


@pytest.mark.parametrize(
    ("engine", "model", "weights"),
    [
        ("ollama", "unheard-of:70b", "49.0 GB of weights, estimated from its name"),
        ("ollama", "unheard-of:70b-instruct-q8_0", "77.0 GB"),
        ("ollama", "some/unheard-of:8x22b", "123.2 GB"),
        ("vllm", "org/Unheard-Of-70B-Instruct", "140.0 GB of weights, estimated from its name"),
        ("vllm", "org/Unheard-Of-405B-Instruct-AWQ", "283.5 GB"),
        ("vllm", "org/unheard-of-120b-FP8", "132.0 GB"),
    ],
)
def test_a_model_the_table_does_not_know_is_estimated_from_its_name(
    tree: Tree, machine: Machine, engine: str, model: str, weights: str
) -> None:
    machine.docker(memory=48 * GB)
    refuses(tree, f"{model} needs about", weights, ENGINE=engine, LLM_MODEL=model, **machine.environment)


def test_the_disk_is_too_small_for_the_model(tree: Tree, machine: Machine) -> None:
    machine.disk(free=3 * GB)
    refuses(
        tree,
        "llama3.1:8b needs about 4.9 GB of disk (known size), and 3.0 GB are free where Docker keeps its volumes (/)",
        "free some space there",
        "set LLM_MODEL to a smaller one, such as qwen3:4b (2.5 GB)",
        ENGINE="ollama",
        **machine.environment,
    )


@pytest.mark.parametrize(
    ("free", "said"),
    [
        (4, "The images that are not here yet (ollama/ollama:"),
        (4, ") need about 12 GB of disk, and 4.0 GB are free"),
        (15, "llama3.1:8b needs about 16.9 GB of disk (known size, with all that is fetched before it), and 15.0 GB"),
        (20, "ok: disk: about 16.9 GB needed for llama3.1:8b (known size), 20.0 GB free in /"),
    ],
)
def test_images_that_are_not_here_yet_need_disk_too(tree: Tree, machine: Machine, free: int, said: str) -> None:
    machine.disk(free=free * GB)
    machine.lacks("ollama/ollama:*", "ghcr.io/open-webui/*")
    settings = machine.environment | {"OLLAMA_IMAGE": "", "CHAT_PUBLISH": "127.0.0.1:0"}
    ran = tree.run("scripts/doctor", **settings, ENGINE="ollama", CHAT="on")
    assert said in ran.stdout
    assert ran.returncode == (0 if said.startswith("ok") else 1)


@pytest.mark.parametrize(("image", "built"), [("none.invalid/ollama:1", False), ("", True)])
def test_an_image_of_unknown_size_or_with_layers_in_the_build_cache_stops_nothing(
    tree: Tree, machine: Machine, python_image: str, image: str, built: bool
) -> None:
    machine.disk(free=5 * GB)  # enough for the model alone
    machine.lacks("ollama/ollama:*")
    if built:
        tree.run("docker", "tag", python_image, f"{tree.project}-engine")
    try:
        ran = tree.run("scripts/doctor", **machine.environment | {"OLLAMA_IMAGE": image}, ENGINE="ollama")
    finally:
        tree.run("docker", "rmi", f"{tree.project}-engine")
    assert (ran.returncode, "about 6 GB for " in ran.stdout) == (0, True), ran.stdout


def test_no_gpu_driver(tree: Tree, machine: Machine) -> None:
    (machine.programs / "nvidia-smi").unlink()
    refuses(
        tree,
        "there is no nvidia-smi",
        "install the driver",
        "ENGINE=ollama make up",
        ENGINE="vllm",
        **machine.environment,
    )


def test_a_gpu_driver_that_does_not_answer(tree: Tree, machine: Machine) -> None:
    complaint = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver"
    write_program(machine.programs / "nvidia-smi", f'echo "{complaint}"; exit 9\n')
    refuses(tree, "The NVIDIA driver does not answer", complaint, ENGINE="vllm", **machine.environment)


def test_docker_can_not_hand_out_gpus(tree: Tree, machine: Machine) -> None:
    machine.docker(runtimes='{"runc":{}}')
    refuses(tree, "NVIDIA Container Toolkit", "nvidia-ctk runtime configure", ENGINE="vllm", **machine.environment)


def test_fewer_gpus_than_asked_for(tree: Tree, machine: Machine) -> None:
    refuses(
        tree, "VLLM_GPU_COUNT asks for 2 GPUs, and this machine has 1: set VLLM_GPU_COUNT=1",
        ENGINE="vllm", VLLM_GPU_COUNT="2", **machine.environment,
    )  # fmt: skip


def test_gpu_memory_is_too_small_for_the_model(tree: Tree, machine: Machine) -> None:
    machine.gpus(16384)
    refuses(
        tree,
        "Qwen/Qwen3-8B needs about 19.0 GB on each of 1 GPU(s) (16.4 GB of weights, known size, 0.6 GB for 4096 tokens",
        "vLLM may take 15.5 GB (0.90 of the smallest, VLLM_GPU_MEMORY_UTILIZATION)",
        "such as Qwen/Qwen3-4B (8.0 GB)",
        "VLLM_GPU_COUNT",
        ENGINE="vllm",
        LLM_MODEL="Qwen/Qwen3-8B",
        **machine.environment,
    )


def test_two_gpus_hold_a_model_that_one_gpu_cannot(tree: Tree, machine: Machine) -> None:
    machine.gpus(16384, 16384)
    settings = {"ENGINE": "vllm", "LLM_MODEL": "Qwen/Qwen3-8B", "VLLM_GPU_COUNT": "2"}
    ran = tree.run("scripts/doctor", **settings, **machine.environment)
    assert "about 12.6 GB needed on each of 2 GPU(s) for Qwen/Qwen3-8B (known size), 15.5 GB available" in ran.stdout
    assert ran.returncode == 0, ran.stdout


BIG, SMALL = "Qwen/Qwen3-8B", "Qwen/Qwen3-0.6B"  # 16.4 and 1.5 GB of weights, 147 and 115 kB for each token


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (
            {"LLM_MODELS": f"{BIG},{SMALL},Qwen/Qwen3-4B"},
            (
                f"about 33.6 GB on each of 1 GPU(s) ({BIG} 19.0 GB, {SMALL} 4.0 GB, ",
                "may take 23.2 GB",
                "): let them take turns (VLLM_SLEEP=on), take one of",
            ),
        ),
        ({"LLM_CONTEXT": "32768"}, (f"{BIG} 23.2 GB", "): set LLM_CONTEXT=4096, or let them take turns")),
        ({"VLLM_GPU_SHARES": "0.7"}, ("VLLM_GPU_SHARES=0.7 is not one share for each of the 2 models", "0.6,0.3")),
        ({"VLLM_GPU_SHARES": "0.9,0.2"}, ("VLLM_GPU_SHARES=0.9,0.2 is not", "add up to at most 1")),
        ({"VLLM_GPU_SHARES": "0.85,0.1"}, ("Qwen/Qwen3-0.6B needs about 4.0 GB", "0.1, is 2.6 GB")),
        ({"LLM_MODELS": f"{BIG},org/mystery"}, ("the size of org/mystery is unknown: set VLLM_GPU_SHARES",)),
        ({"LLM_MODELS": f"{BIG},meta-llama/New-1B"}, ("meta-llama/New-1B needs its owner's permission",)),
        ({"VLLM_SLEEP": "1"}, ("VLLM_SLEEP=1 is not known: use on or off",)),
        ({"VLLM_SLEEP": "on", "VLLM_GPU_SHARES": "0.6,0.3"}, ("take turns: remove one of the two settings",)),
        (
            {"VLLM_SLEEP": "on", "LLM_MODELS": f"{SMALL},{BIG}", "VLLM_GPU_MEMORY_UTILIZATION": "0.8"},
            (f"{BIG} needs about 19.0 GB", "may take 18.6 GB while the others sleep (0.8 of", "less 2 GB for each"),
        ),
        (
            {"VLLM_SLEEP": "on", "LLM_MODELS": f"{BIG},org/a-8B,org/b-8B"},
            ("vLLM needs about 66.4 GB of memory for itself", "with the weights of those that sleep), and Docker"),
        ),
    ],
)
def test_several_models_do_not_get_the_gpu_memory_that_they_need(
    tree: Tree, machine: Machine, settings: dict[str, str], parts: tuple[str, ...]
) -> None:
    machine.gpus(24576)
    refuses(tree, *parts, ENGINE="vllm", **{"LLM_MODELS": f"{BIG},{SMALL}"} | settings, **machine.environment)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({}, (f"ok: GPU shares: {BIG} 0.685, {SMALL} 0.214", "about 30.5 GB needed", "77.3 GB available")),
        ({"LLM_MODELS": f"{BIG},org/mystery", "VLLM_GPU_SHARES": "0.7,.2"}, ("org/mystery .2", "as many tokens as")),
        (
            {"LLM_MODELS": f"{BIG},{SMALL},org/mystery", "VLLM_SLEEP": "on", "VLLM_GPU_MEMORY_UTILIZATION": "0.3"},
            (
                "org/mystery 0.253 (VLLM_SLEEP=on: they take turns)",
                f"{BIG} 20.8 GB, {SMALL} 5.4 GB, org/mystery unknown needed",
            ),
        ),
        ({"LLM_MODELS": "", "LLM_MODEL": BIG, "VLLM_SLEEP": "on"}, ("VLLM_SLEEP=on does nothing here: it",)),
    ],
)
def test_several_models_share_the_gpu(
    tree: Tree, machine: Machine, settings: dict[str, str], parts: tuple[str, ...]
) -> None:
    ran = tree.run(
        "scripts/doctor", **{"ENGINE": "vllm", "LLM_MODELS": f"{BIG},{SMALL}"} | settings | machine.environment
    )
    assert ran.returncode == 0, ran.stdout
    for part in parts:
        assert part in ran.stdout


def test_a_stack_yaml_has_to_say_that_the_models_take_turns(tree: Tree, machine: Machine) -> None:
    (tree.path / "config/stack.yaml").write_text("engines: {}\n")
    refuses(
        tree, "stack.yaml does not say that their engines share a GPU", "give each of them the same gpu there",
        ENGINE="vllm", LLM_MODELS=f"{BIG},{SMALL}", VLLM_SLEEP="on", **machine.environment,
    )  # fmt: skip


def test_chosen_gpus_are_counted_too(tree: Tree, machine: Machine) -> None:
    """The README's override for device ids."""
    (tree.path / "compose.mine.yaml").write_text(
        "services: { engine: { deploy: { resources: { reservations: { devices: !override [{ driver: nvidia, "
        'device_ids: ["0", "3"], capabilities: [gpu] }] } } } } }\n'
    )
    files = "compose.yaml:compose.gpu.yaml:compose.mine.yaml"
    ran = tree.run("scripts/doctor", COMPOSE_FILE=files, LLM_MODEL="Qwen/Qwen3-8B", **machine.environment)
    assert "VLLM_GPU_COUNT asks for 2 GPUs" in ran.stdout


def test_memory_is_too_small_for_vllm_itself(tree: Tree, machine: Machine) -> None:
    machine.docker(memory=4 * GB)
    refuses(
        tree, "vLLM needs about 6.0 GB of memory for itself (estimated, for 1 model(s) on 1 GPU(s)), and Docker has 4",
        ENGINE="vllm", LLM_MODEL="Qwen/Qwen3-8B", **machine.environment,
    )  # fmt: skip


@pytest.mark.parametrize("model", ["meta-llama/Llama-3.1-8B-Instruct", "google/gemma-3-4b-it", "meta-llama/New-1B"])
def test_a_gated_model_without_a_token(tree: Tree, machine: Machine, model: str) -> None:
    refuses(
        tree, f"{model} needs its owner's permission", "HF_TOKEN_FILE", "LLM_MODEL=Qwen/Qwen3-8B, which needs no token",
        ENGINE="vllm", LLM_MODEL=model, **machine.environment,
    )  # fmt: skip


def test_a_gated_model_with_a_token(tree: Tree, machine: Machine, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("hf_0123456789")
    ran = tree.run("scripts/doctor", ENGINE="vllm", HF_TOKEN_FILE=str(token), **machine.environment)
    assert ran.returncode == 0, ran.stdout
    assert "hf_0123456789" not in ran.stdout


def test_doctor_says_everything_at_once_and_changes_nothing(tree: Tree, machine: Machine) -> None:
    machine.docker(runtimes="{}", memory=GB)
    machine.disk(free=GB)
    machine.gpus(8192)
    files = sorted(tree.path.rglob("*"))
    ran = tree.run("scripts/doctor", ENGINE="vllm", **machine.environment)
    assert ran.returncode == 1
    for part in (
        "Container Toolkit",
        "on each of 1 GPU",
        "vLLM needs about",
        "needs its owner's permission",
        "GB of disk",
    ):
        assert sum(line.startswith("stack: ") and part in line for line in ran.stdout.splitlines()) == 1, ran.stdout
    assert "ok: GPUs: 1 here, 1 for vLLM" in ran.stdout
    assert ran.stdout.splitlines()[-1] == "stack: 5 of these checks failed. Fix each problem before 'make up'."
    assert sorted(tree.path.rglob("*")) == files


def test_doctor_tells_as_json_what_is_wrong_and_what_to_do(tree: Tree, machine: Machine) -> None:
    machine.docker(memory=GB)
    ran = tree.run("scripts/doctor", "--json", ENGINE="ollama", **machine.environment)
    told = {it["name"]: it for it in json.loads(ran.stdout)["checks"]}
    assert (ran.returncode, json.loads(ran.stdout)["ok"]) == (1, False)
    assert told["machine.port"]["ok"] is True
    assert (told["machine.ram"]["ok"], told["machine.ram"]["advice"][:10]) == (False, "set LLM_MO")
    assert "needs about 6.4 GB of memory" in told["machine.ram"]["finding"]

    tree.dotenv.write_text("STACK_WORKRES=3\n")
    ran = tree.run("scripts/doctor", "--json", ENGINE="ollama", **machine.environment)
    tree.dotenv.unlink()
    (check,) = json.loads(ran.stdout)["checks"]
    assert (ran.returncode, check["name"], check["ok"]) == (1, "machine.settings", False)
    assert "STACK_WORKRES" in check["finding"]


@pytest.mark.parametrize("words", [("--jsno",), ("--tls",), ("--tls", "llm.example")])
def test_doctor_says_how_it_is_used(tree: Tree, words: tuple[str, ...]) -> None:
    ran = tree.run("scripts/doctor", *words)
    assert (ran.returncode, ran.stdout[:45]) == (1, "stack: usage: scripts/doctor [--json] [--tls ")


@pytest.mark.parametrize("engine", ["ollama", "tiny"])
def test_doctor_finds_nothing_wrong(tree: Tree, machine: Machine, engine: str) -> None:
    make = shutil.which("make") or "make"
    ran = tree.run(make, "--silent", "doctor", ENGINE=engine, **machine.environment)
    assert ran.returncode == 0, ran.stdout
    assert ran.stdout.splitlines()[-1] == "==> this machine is ready for 'make up'"


def test_a_name_without_a_size_is_not_guessed_at(tree: Tree, machine: Machine) -> None:
    machine.docker(memory=GB)
    ran = tree.run("scripts/doctor", ENGINE="ollama", LLM_MODEL="mystery:latest", **machine.environment)
    assert ran.returncode == 0, ran.stdout
    assert "the size of mystery:latest is unknown, and its name has no number" in ran.stdout
