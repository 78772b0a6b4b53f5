"""LLM_CONTEXT is one word for every engine: what each is started with, what `make up` chooses by itself, what
`make doctor` counts for it, and what /v1/models says. The tiny engine itself is in test_models.py."""

import re
from pathlib import Path

import httpx
import pytest

from tests.support.clone import Tree, merged, refuses
from tests.support.machine import GB, Machine
from tests.support.processes import AUTH, fake_engine, running_gateway, wait_for


def contexts(engine: str, **env: str) -> set[str]:
    """Every number of tokens in the merged configuration of an engine with these settings."""
    services = merged(engine, **env)["services"]
    found = [services["gateway"]["environment"]["LLM_CONTEXT"]]
    found += [services["engine"]["environment"].get(it) for it in ("OLLAMA_CONTEXT_LENGTH", "LLM_CONTEXT")]
    found += re.findall(r"--max-model-len=(\d+)", " ".join(services["engine"].get("command") or ()))
    return {str(it) for it in found if it is not None}


@pytest.mark.parametrize(("engine", "own"), [("ollama", "OLLAMA_CONTEXT_LENGTH"), ("vllm", "VLLM_MAX_MODEL_LEN")])
def test_one_setting_reaches_every_engine_and_the_engines_own_wins(engine: str, own: str) -> None:
    assert contexts(engine, LLM_CONTEXT_CHOSEN="8192") == {"8192"}
    assert contexts(engine, LLM_CONTEXT_CHOSEN="8192", LLM_CONTEXT="32768") == {"32768"}
    assert contexts(engine, LLM_CONTEXT="32768", **{own: "12288"}) == {"12288"}
    assert contexts("tiny", LLM_CONTEXT="8192") == {"8192"}


@pytest.mark.parametrize(
    ("memory", "model", "tokens"),
    [
        (16, "llama3.1:8b", 32768),  # 10.2 GB, in the three quarters that other programs leave
        (8, "llama3.1:8b", 4096),
        (64, "smollm2:135m", 8192),  # the model's own
    ],
)
def test_the_largest_context_that_fits_is_chosen_for_ollama(
    tree: Tree, machine: Machine, memory: int, model: str, tokens: int
) -> None:
    machine.docker(memory=memory * GB)
    said = doctor(tree, machine, ENGINE="ollama", LLM_MODEL=model)
    assert f"ok: context: {tokens} tokens for each of 1 conversation(s) at a time" in said


@pytest.mark.parametrize(
    ("gpu", "model", "tokens"),
    [
        (24576, "Qwen/Qwen3-8B", 16384),
        (81920, "org/unheard-of-8B", 8192),  # with more tokens than it can read, vLLM would not start
    ],
)
def test_the_largest_context_that_fits_is_chosen_for_vllm(
    tree: Tree, machine: Machine, gpu: int, model: str, tokens: int
) -> None:
    machine.gpus(gpu)
    assert f"ok: context: {tokens} tokens" in doctor(tree, machine, ENGINE="vllm", LLM_MODEL=model)


def test_vllm_without_a_reservation_has_no_bound(tree: Tree, machine: Machine) -> None:
    (tree.path / "here.yaml").write_text("services: { engine: { deploy: !reset null } }")
    files = "compose.yaml:compose.gpu.yaml:here.yaml"
    said = doctor(tree, machine, COMPOSE_FILE=files, LLM_MODEL="org/unheard-of-8B", LLM_CONTEXT="32768")
    assert "ok: context: 32768 tokens for each of 1 conversation(s) at a time, 4.5 GB" in said
    assert "would fit" not in said
    assert ": line " not in said, "the shell's own messages"


def test_the_tiny_engines_own_setting_is_the_sum_of_its_slots(tree: Tree, machine: Machine) -> None:
    said = doctor(tree, machine, ENGINE="tiny", LLM_CONTEXT="8192", LLAMA_ARG_CTX_SIZE="12288")
    assert "ok: context: 3072 tokens for each of 4 conversation(s) at a time" in said
    wrong = {"LLAMA_ARG_CTX_SIZE": "16k"} | machine.environment
    refuses(tree, "LLAMA_ARG_CTX_SIZE=16k is not a number of tokens", ENGINE="tiny", **wrong)


def doctor(tree: Tree, machine: Machine, **env: str) -> str:
    ran = tree.run("scripts/doctor", **env, **machine.environment)
    assert ran.returncode == 0, ran.stdout
    assert not tree.dotenv.exists()
    return ran.stdout


def test_the_memory_is_counted_for_each_slot(tree: Tree, machine: Machine) -> None:
    machine.docker(memory=16 * GB)
    settings = {"ENGINE": "ollama", "LLM_CONTEXT": "16384", "OLLAMA_NUM_PARALLEL": "4"}
    said = doctor(tree, machine, **settings)
    # 4 slots of 16384 tokens of 131 kB; and 10.1 GB hold four times 18432.
    assert "context: 16384 tokens for each of 4 conversation(s) at a time, 8.6 GB of memory (known size)" in said
    assert "up to 18432 tokens would fit" in said
    assert "about 14.5 GB needed for ollama with llama3.1:8b" in said
    refuses(
        tree, "needs about 17.2 GB of memory", "11.3 GB for 21504 tokens of context in each of 4 slot(s)",
        "set LLM_CONTEXT=18432 or less, or set LLM_MODEL to a smaller one",
        **settings | {"LLM_CONTEXT": "21504"}, **machine.environment,
    )  # fmt: skip


def test_a_context_that_the_gpu_or_the_model_cannot_hold_is_refused(tree: Tree, machine: Machine) -> None:
    machine.gpus(22528)
    settings = {"ENGINE": "vllm", "LLM_MODEL": "Qwen/Qwen3-8B"} | machine.environment
    refuses(
        tree, "4.8 GB for 32768 tokens of context", "set LLM_CONTEXT=19456 or less", LLM_CONTEXT="32768", **settings
    )
    machine.gpus(81920)
    refuses(
        tree, "LLM_CONTEXT=65536 is more than Qwen/Qwen3-8B can read", "at most 40960", LLM_CONTEXT="65536", **settings
    )
    refuses(tree, "LLM_CONTEXT=32k is not a number of tokens", "LLM_CONTEXT=32768", LLM_CONTEXT="32k", **settings)


def test_a_number_of_the_users_is_kept_and_a_small_one_is_pointed_out(tree: Tree, machine: Machine) -> None:
    tree.dotenv.write_text("LLM_CONTEXT_CHOSEN=32768\nLLM_CONTEXT=8192\n")
    ran = tree.run("scripts/doctor", ENGINE="ollama", **machine.environment)
    tree.dotenv.unlink()
    assert "ok: context: 8192 tokens" in ran.stdout
    assert "Coding agents need 16384 or more: set LLM_CONTEXT=16384" in ran.stdout


@pytest.mark.parametrize(
    ("engine", "setting", "values"),
    [
        ("tiny", "LLAMA_ARG_THREADS", ["abc", "0", "-1", "513", "2.5"]),
        ("tiny", "LLAMA_ARG_CTX_SIZE", ["0", "1000", "99999999999999999999"]),
        ("vllm", "VLLM_TENSOR_PARALLEL_SIZE", ["two", "0"]),
        ("vllm", "VLLM_MAX_NUM_SEQS", ["-1", "1k"]),
        ("vllm", "VLLM_MAX_NUM_QUEUED_REQS", ["0"]),
        ("vllm", "VLLM_GPU_MEMORY_UTILIZATION", ["90", "0,9", "0", "0.0", "1.1"]),
    ],
)
def test_a_number_with_which_the_engine_would_not_start(
    tree: Tree, machine: Machine, engine: str, setting: str, values: list[str]
) -> None:
    """It would take the place of the engine that runs."""
    for value in values:
        refuses(
            tree,
            f"{setting}={value} is ",
            f"use for example {setting}=",
            ENGINE=engine,
            **machine.environment,
            **{setting: value},
        )


def test_numbers_with_which_the_engine_starts(tree: Tree, machine: Machine) -> None:
    for number in ("1", "08", "512"):
        assert doctor(tree, machine, ENGINE="tiny", LLAMA_ARG_THREADS=number, LLAMA_ARG_CTX_SIZE="1024")
    for number in ("1", "1.0", "0.90", ".9", ""):
        said = doctor(
            tree,
            machine,
            ENGINE="vllm",
            LLM_MODEL="Qwen/Qwen3-8B",
            VLLM_GPU_MEMORY_UTILIZATION=number,
            VLLM_MAX_NUM_SEQS="16",
        )
        assert "VLLM_GPU_MEMORY_UTILIZATION=" not in said


def test_agents_are_told_to_take_another_model_or_engine_if_no_setting_helps(tree: Tree, machine: Machine) -> None:
    assert "Coding agents need 16384 or more: take another engine" in doctor(tree, machine, ENGINE="tiny")
    machine.docker(memory=8 * GB)
    said = doctor(tree, machine, ENGINE="ollama", LLM_CONTEXT="8192")
    assert "16384 or more (LLM_CONTEXT), so take a smaller model" in said


def told(url: str) -> dict[str, int]:
    return dict(httpx.get(url + "/v1/models", headers=AUTH).json()["data"][0])


def test_models_tell_the_configured_context_before_ollama_has_loaded_them(tmp_path: Path) -> None:
    """And the model's own, if that is smaller (8192 here)."""
    with fake_engine(dialect="ollama") as engine:
        engine.set(loaded=False)
        for number, context in (("4096", 4096), ("32768", 8192)):
            settings = {"LLM_BACKEND": "ollama", "LLM_CONTEXT": number, "STACK_WORKERS": "1"}
            with running_gateway(tmp_path / "log", engine.url, **settings) as gateway:
                assert wait_for(lambda it=gateway: told(it.url).get("context_length")) == context  # type: ignore[misc]
