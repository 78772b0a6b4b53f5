"""The README is true: its examples are run against the real stack, and each command in it is run by some test."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.settings import Settings
from tests.support.processes import KEY, ROOT
from tests.support.stack import Stack

README = (ROOT / "README.md").read_text()

# Commands of the README's `sh` blocks, and the test that runs each.
RUN_BY = {
    "make up": "tests/bundle/test_up.py",
    "make test": ".ci/run",
    "make doctor": "tests/bundle/test_preflight.py",
    "ENGINE=vllm make doctor": "tests/bundle/test_preflight.py",
    "ENGINE=vllm make up": "tests/bundle/test_vllm.py",
    "ENGINE=tiny make up": "tests/bundle/test_up.py",
    "make dev": "tests/bundle/test_dev.py",
    "LLM_BASE_URL=http://127.0.0.1:11434 make dev": "tests/bundle/test_dev.py",
    'make chat Q="Why is the sky blue?"': "tests/bundle/test_up.py",
    "make logs": "tests/bundle/test_up.py",
    "make down": "tests/bundle/test_up.py",
    "make check": "scripts/test",
    "make bench-quick": "tests/test_bench.py",
    "make soak": "tests/flows/test_soak.py",
    "TLS=on make up": "tests/bundle/test_tls.py",
    "make tls-root": "tests/bundle/test_tls.py",
    "make models": "tests/bundle/test_models.py",
    "make models PULL=qwen3:4b": "tests/bundle/test_models.py",
    "make models REMOVE=qwen3:4b": "tests/bundle/test_models.py",
}


LIMITED = [
    ('"messages": [', '"max_tokens": 100, "messages": ['),  # curl
    ("messages=question", "messages=question, max_tokens=100"),  # Python
    ("messages: [", "max_tokens: 100, messages: ["),  # JavaScript
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def run(stack: Stack, command: list[str], text: str) -> str:
    """Run an example as it is but for the address, the key, and a limit: the tiny model may count to the end of its
    context, some 4000 tokens."""
    text = text.replace("http://127.0.0.1:9000", stack.url).replace("dev-key", KEY)
    for asked, limited in LIMITED:
        text = text.replace(asked, limited)
    assert "max_tokens" in text
    done = subprocess.run([*command, text], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_curl_example(stack: Stack) -> None:
    (example,) = blocks("bash")
    assert run(stack, ["bash", "-euc"], example).rstrip().endswith("data: [DONE]")


def test_the_python_example(stack: Stack) -> None:
    (example,) = blocks("python")
    assert run(stack, [sys.executable, "-c"], example).strip()


def test_the_javascript_example(stack: Stack) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node is not installed here")
    (example,) = blocks("js")
    assert run(stack, [node, "--input-type=module", "-e"], example).strip()


def test_every_command_is_run_by_a_test() -> None:
    commands = {line for block in blocks("sh") for line in block.splitlines() if line}
    assert commands == set(RUN_BY)
    for command, where in RUN_BY.items():
        target = re.sub(r"^(\w+=\S+ )+", "", command).split(" Q=")[0]
        verb = target.split()[1]
        words = [target, f"scripts/{verb}", f'"{verb}"']
        assert any(word in (ROOT / where).read_text() for word in words), (command, where)


def test_every_setting_in_the_table_exists_with_that_default() -> None:
    rows = re.findall(r"^\| `((?:LLM|STACK)_\w+)` \| ([^|]*)\|", README, re.MULTILINE)
    assert len(rows) > 5
    known = (ROOT / ".env.example").read_text()
    for name, default in rows:
        assert f"\n#{name}=" in known
        if name in ("LLM_MODELS", "LLM_CONTEXT"):  # `make up` reads them, and tells the gateway and the engine
            continue
        field = Settings.model_fields[name.lower()]
        if re.fullmatch(r"`[\d.:]+` ?", default) and field.default is not None:
            assert default.strip(" `") == str(field.default).removesuffix(".0"), name


def test_the_commands_of_stack(stack: Stack, tmp_path: Path) -> None:
    """As a newcomer types them, from top to bottom; ID is that of the key the first one makes."""
    lines = [line for line in README.splitlines() if line.startswith("scripts/stack ")]
    assert len(lines) >= 13
    (tmp_path / "prompt.txt").write_text("You help {{ key_name }}.")
    key_id = "ID"
    for line in lines:
        command = line.replace("scripts/stack", str(ROOT / "scripts/stack")).replace("ID", key_id)
        done = subprocess.run(
            ["bash", "-euc", command], cwd=tmp_path, env=stack.environment(), stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (line, done.stderr)
        if key_id == "ID":
            key_id = done.stdout.split()[0]
    stack.container("gateway").exec_run(["stack", "limits", "--requests-per-minute", "default"])
    assert (tmp_path / "stack.backup").stat().st_mode & 0o777 == 0o600
