"""Which parser vLLM is started with, for which model: the program that starts it, as a plain process, with a program
`vllm` that says its arguments; and `make doctor` says the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.clone import Tree, clean_environment, write_program
from tests.support.machine import Machine
from tests.support.processes import ROOT

PARSERS = {
    "Qwen/Qwen2.5-0.5B-Instruct": "hermes",
    "Qwen/Qwen3-8B": "hermes",
    "someone/qwen3-8b-awq": "hermes",
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": "qwen3_coder",
    "meta-llama/Llama-3.1-8B-Instruct": "llama3_json",
    "meta-llama/Meta-Llama-3.1-70B-Instruct": "llama3_json",
    "unsloth/Llama-3.3-70B-Instruct": "llama3_json",
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": "llama4_pythonic",
    "mistralai/Mistral-7B-Instruct-v0.3": "mistral",
    "openai/gpt-oss-20b": "openai",
    "deepseek-ai/DeepSeek-V3-0324": "deepseek_v3",
    "deepseek-ai/DeepSeek-V3.1": "deepseek_v31",
    "NousResearch/Hermes-3-Llama-3.1-8B": "hermes",
    "ibm-granite/granite-3.1-8b-instruct": "granite",
    "ibm-granite/granite-4.0-h-small": "granite4",
    "microsoft/Phi-4-mini-instruct": "phi4_mini_json",
    "google/gemma-4-e4b-it": "gemma4",
    "google/gemma-3-4b-it": None,
    "meta-llama/Meta-Llama-3-8B-Instruct": None,
    "Qwen/Qwen3-Embedding-0.6B": None,
    "org/unheard-of-1B": None,
}


def started(directory: Path, model: str, *words: str, **env: str) -> list[str]:
    """The arguments that vLLM is started with."""
    (directory / "provisioned").write_text(model + "\n")
    write_program(directory / "vllm", 'printf "%s\\n" "$@" >"$HOME/arguments"\n')
    own = {"HOME": str(directory), "PATH": f"{directory}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "engine")}
    command = [sys.executable, str(ROOT / "engine/vllm/serve.py"), *words]
    subprocess.run(command, env=clean_environment() | own | {"LLM_MODEL": model} | env, timeout=60, check=True)
    return (directory / "arguments").read_text().splitlines()


def tools_of(arguments: list[str]) -> list[str]:
    return [it for it in arguments if "tool" in it or "reasoning" in it]


@pytest.mark.parametrize(("model", "parser"), PARSERS.items())
def test_the_parser_is_chosen_by_the_models_name(tmp_path: Path, model: str, parser: str | None) -> None:
    expected = ["--enable-auto-tool-choice", f"--tool-call-parser={parser}"] if parser else []
    assert tools_of(started(tmp_path, model)) == expected


def test_a_setting_comes_before_the_table(tmp_path: Path) -> None:
    named = started(tmp_path, "org/unheard-of-1B", TOOL_PARSER="xlam", REASONING_PARSER="qwen3")
    assert tools_of(named) == ["--enable-auto-tool-choice", "--tool-call-parser=xlam", "--reasoning-parser=qwen3"]
    assert tools_of(started(tmp_path, "Qwen/Qwen3-8B", TOOL_PARSER="none")) == []


def test_further_options_come_last(tmp_path: Path) -> None:
    extra = """--dtype=half --hf-overrides '{"a": 1}'"""
    arguments = started(tmp_path, "org/unheard-of-1B", "--max-model-len=8192", EXTRA_ARGS=extra)
    assert arguments[:2] == ["serve", f"{tmp_path}/weights/org--unheard-of-1B/files"]
    assert arguments[-4:] == ["--max-model-len=8192", "--dtype=half", "--hf-overrides", '{"a": 1}']


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("Qwen/Qwen3-8B", "tools: vLLM reads tool calls with its parser hermes (VLLM_TOOL_PARSER=auto)"),
        ("org/some-1B", "tools: no parser is known for org/some-1B, so requests with tools will be refused (400)"),
    ],
)
def test_doctor_names_the_tool_parser(tree: Tree, machine: Machine, model: str, said: str) -> None:
    ran = tree.run("scripts/doctor", ENGINE="vllm", LLM_MODEL=model, **machine.environment)
    assert ran.returncode == 0, ran.stdout
    assert said in ran.stdout


def test_doctor_and_the_engine_choose_the_same_parser(tree: Tree) -> None:
    script = "model=$1; . scripts/lib/preflight.sh; tool_parser"
    for model, parser in PARSERS.items():
        found = tree.run("bash", "-euc", script, "tool_parser", model).stdout.strip()
        assert found == (parser or found), model
        assert parser or found in ("none", "-"), model
