"""The set-up pages of clients in docs/clients/: what they say to set is run as it stands there.

`.venv` and `.venv-clients` have the packages that requirements/dev.txt and requirements/clients.txt pin. Every run
runs their pages. The other packages are too large for that, and their pages are skipped. To run those by hand, name an
environment that has the packages: `TEST_CLIENTS=/tmp/clients scripts/test tests/flows/test_client_pages.py`. The table
in docs/clients.md says which pages were run, and how.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import Distribution
from pathlib import Path

import pytest
import yaml

from tests.support.face_setting import Setting
from tests.support.processes import KEY, ROOT

PAGES = {it.stem: it for it in sorted((ROOT / "docs/clients").glob("*.md"))}
TABLE = (ROOT / "docs/clients.md").read_text()
ANSWER = "one two three"  # the scripted engine's
# The package that a page's Python or commands need, and the client's name in the table.
PACKAGES = {
    "openai-python": ("openai", "openai (Python)"),
    "anthropic": ("anthropic", "anthropic (Python)"),
    "langchain": ("langchain-openai", "LangChain"),
    "llamaindex": ("llama-index-llms-openai-like", "LlamaIndex"),
    "pydantic-ai": ("pydantic-ai-slim", "Pydantic AI"),
    "instructor": ("instructor", "instructor"),
    "litellm": ("litellm", "LiteLLM"),
    "smolagents": ("smolagents", "smolagents"),
    "llm": ("llm", "llm"),
    "aider": ("aider-chat", "aider"),
}
COMMANDS = ("llm", "aider")  # pages of programs
TIMES = {"anthropic": 2, "openai-python": 4, "langchain": 2, "llamaindex": 2}  # the answers that it prints
BY_HAND = os.environ.get("TEST_CLIENTS")
CLIENTS = ROOT / (BY_HAND or ".venv-clients")
PERSON = {"role": "assistant", "content": '{"name": "Ann", "age": 30}'}
PERSON_SCRIPT = [["json", [200, {"id": "x", "object": "chat.completion", "created": 1, "model": "m",
                                 "choices": [{"index": 0, "message": PERSON, "finish_reason": "stop"}]}]]]  # fmt: skip


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGES[page].read_text(), re.MULTILINE | re.DOTALL)


def here(text: str, setting: Setting) -> str:
    """A page's text for this gateway: with its address, its key and its model."""
    for theirs, ours in (
        ("http://127.0.0.1:9000", setting.gateway.url),
        ("dev-key", KEY),
        ("llama3.1:8b", "fake-model"),
        ('"Ann is 30 years old."', json.dumps("script:" + json.dumps(PERSON_SCRIPT))),
    ):
        text = text.replace(theirs, ours)
    return text


def pinned(lock: str) -> dict[str, str]:
    """The version of each package that requirements/{lock}.txt pins."""
    return dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / f"requirements/{lock}.txt").read_text(), re.MULTILINE))


def python_for(page: str) -> Path:
    """The Python of the environment that has the page's package.

    The test fails if a pinned package is missing, or has another version than its pin. It is skipped if only an
    environment made by hand would have the package.
    """
    package, _ = PACKAGES[page]
    if package in pinned("dev"):
        return Path(sys.executable)
    folders = [str(folder) for folder in CLIENTS.glob("lib/python*/site-packages")]
    present = [found.version for found in Distribution.discover(name=package, path=folders)]
    if not present and (BY_HAND or package not in pinned("clients")):
        pytest.skip(f"{CLIENTS} has no {package}: TEST_CLIENTS may name an environment that has it.")
    if not BY_HAND and present != [pinned("clients")[package]]:
        pytest.fail(f"{CLIENTS} lacks the {package} of requirements/clients.txt: run scripts/test, which installs it.")
    return CLIENTS / "bin/python"


def environment(home: Path, python: Path) -> dict[str, str]:
    """The environment of a page's program: nothing that is set here, and a home of its own."""
    kept = {name: os.environ[name] for name in ("LANG", "SSL_CERT_FILE", "SSL_CERT_DIR") if name in os.environ}
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    offline = {"HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    return kept | offline | {"PATH": path, "HOME": str(home), "LLM_USER_PATH": str(home)}


def run(command: list[str], home: Path, python: Path = Path(sys.executable)) -> str:
    done = subprocess.run(
        command, cwd=home, env=environment(home, python), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("page", [page for page in PACKAGES if page not in COMMANDS])
def test_the_python_of_a_page_works(faced: Setting, tmp_path: Path, page: str) -> None:
    python = python_for(page)
    (code,) = blocks(page, "python")
    told = run([str(python), "-c", here(code, faced)], tmp_path, python)
    if page == "instructor":
        assert told == "name='Ann' age=30\n"
    else:
        assert told.count(ANSWER) == TIMES.get(page, 1), told


@pytest.mark.parametrize("page", COMMANDS)
def test_the_commands_of_a_page_work(faced: Setting, tmp_path: Path, page: str) -> None:
    python = python_for(page)
    *_, commands = blocks(page, "sh")
    assert ANSWER in run(["sh", "-ec", here(commands, faced)], tmp_path, python)


def test_the_settings_of_the_pages_are_well_formed() -> None:
    (codex,) = blocks("codex", "toml")
    provider = tomllib.loads(codex)["model_providers"]["stack"]
    assert (provider["wire_api"], provider["base_url"]) == ("responses", "http://127.0.0.1:9000/v1")
    (model,) = yaml.safe_load(blocks("continue", "yaml")[0])["models"]
    assert (model["provider"], model["apiBase"]) == ("openai", "http://127.0.0.1:9000/v1")
    (proxied,) = yaml.safe_load(blocks("litellm", "yaml")[0])["model_list"]
    assert proxied["litellm_params"]["api_base"] == "http://127.0.0.1:9000/v1"
    assert "ANTHROPIC_BASE_URL=http://127.0.0.1:9000 " in blocks("claude-code", "sh")[0]  # without /v1


@pytest.mark.parametrize("page", ["openai-javascript", "vercel-ai-sdk"])
def test_the_javascript_of_a_page_is_well_formed(tmp_path: Path, page: str) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed here")
    (code,) = blocks(page, "js")
    (tmp_path / "page.mjs").write_text(code)
    run([node, "--check", "page.mjs"], tmp_path)


def test_each_page_is_one_screen_and_stands_in_both_tables() -> None:
    assert set(re.findall(r"\(clients/([\w-]+)\.md\)", TABLE)) == PAGES.keys()
    rows = re.findall(r"^\| .*$", TABLE.partition("## What was run")[2], re.MULTILINE)
    for name, page in PAGES.items():
        title, *lines = page.read_text().splitlines()
        assert title.startswith("# ")
        assert len(lines) < 50
        assert any(title.removeprefix("# ") in row for row in rows), f"{name} is not in the table of what was run"


@pytest.mark.parametrize("page", PACKAGES)
def test_the_table_says_which_version_every_run_uses(page: str) -> None:
    package, title = PACKAGES[page]
    (row,) = re.findall(rf"^\| {re.escape(title)} \|.*$", TABLE, re.MULTILINE)
    _, _, version, ran, _ = row.split("|", 4)
    if runs := (pinned("clients") | pinned("dev")).get(package):
        assert re.search(rf"(^| ){re.escape(runs)}($|[ ;])", version.strip()), f"{version} is not {runs}"
        assert "every `make test`" in ran
    else:
        assert "by hand" in ran
