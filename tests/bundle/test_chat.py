"""The chat window: what CHAT=on adds to the stack, and that its users reach the gateway and are told apart."""

import json
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.clone import OVERRIDES, Config, Tree, clone, merged
from tests.support.containers import build
from tests.support.processes import free_port, wait_for

TASKS = """
. scripts/lib/say.sh
. scripts/lib/docker.sh
. scripts/lib/dotenv.sh
. scripts/lib/chat.sh
has_part() { true; }
models=($MODELS)
name_task_model
dotenv CHAT_TASK_MODEL
"""


def with_chat(engine: str = "ollama", **env: str) -> Config:
    return merged(engine, "compose.chat.yaml", **env)


# ── The compose file ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("engine", sorted(OVERRIDES))
def test_it_changes_nothing_of_the_stack(engine: str) -> None:
    config, alone = with_chat(engine), merged(engine)
    assert {name: it for name, it in config["services"].items() if name != "chat"} == alone["services"]
    assert config["networks"] == alone["networks"]


def test_it_is_confined_and_does_not_meet_the_engine() -> None:
    chat = with_chat()["services"]["chat"]
    assert (chat["cap_drop"], chat["security_opt"]) == (["ALL"], ["no-new-privileges:true"])
    assert chat["read_only"] is True
    assert chat["pids_limit"] > 0
    assert set(chat["networks"]) == {"edge"}
    assert re.search(r":v\d+\.\d+\.\d+$", chat["image"])


def test_it_is_published_on_loopback_unless_something_else_is_said() -> None:
    for env, where, origin in (
        ({}, ("127.0.0.1", "3001"), "http://127.0.0.1:3001;http://localhost:3001"),
        ({"CHAT_PUBLISH": "10.0.0.1:80"}, ("10.0.0.1", "80"), "http://10.0.0.1:80;http://localhost:3001"),
        ({"CHAT_ORIGIN": "https://chat.example"}, ("127.0.0.1", "3001"), "https://chat.example"),
    ):
        chat = with_chat(**env)["services"]["chat"]
        assert (chat["ports"][0]["host_ip"], chat["ports"][0]["published"]) == where
        assert chat["environment"]["CORS_ALLOW_ORIGIN"] == origin


def test_behind_caddy_it_has_no_port_of_its_own() -> None:
    both = ("compose.tls.yaml", "compose.chat.yaml", "compose.chat-tls.yaml")
    config = merged("ollama", *both, STACK_TLS_NAME="llm.lan", CHAT_PUBLISH="0.0.0.0:3001")
    chat, caddy = (config["services"][it] for it in ("chat", "caddy"))
    assert "ports" not in chat
    ports = {it["target"]: (it["host_ip"], it["published"]) for it in caddy["ports"]}
    assert ports == {8443: ("127.0.0.1", "9000"), 8444: ("0.0.0.0", "3001")}
    assert chat["environment"]["CORS_ALLOW_ORIGIN"] == "https://llm.lan:3001;https://llm.lan"
    assert set(chat["networks"]) & set(caddy["networks"]) == {"edge"}


def test_it_asks_questions_of_its_own_only_of_a_small_model() -> None:
    for env, model, asks in (({}, "", ""), ({"CHAT_TASK_MODEL": "qwen3:0.6b"}, "qwen3:0.6b", "true")):
        told = with_chat(**env)["services"]["chat"]["environment"]
        assert told["TASK_MODEL_EXTERNAL"] == model
        assert {it: value for it, value in told.items() if it.endswith("_GENERATION")} == dict.fromkeys(
            (f"ENABLE_{it}_GENERATION" for it in ("TITLE", "TAGS", "FOLLOW_UP", "SEARCH_QUERY", "RETRIEVAL_QUERY")),
            asks,
        )


def test_its_secrets_are_in_a_file_and_in_no_setting() -> None:
    config = with_chat()
    chat = config["services"]["chat"]
    assert config["secrets"]["chat"]["file"].endswith("/.secrets/chat")
    assert [it["source"] for it in chat["secrets"]] == ["chat"]
    assert "/run/secrets/chat" in chat["command"][2]
    assert (
        not {"OPENAI_API_KEY", "WEBUI_SECRET_KEY", "FORWARD_USER_INFO_HEADER_JWT_SECRET"} & chat["environment"].keys()
    )


# ── make up ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("models", "line", "expected"),
    [
        ("qwen3:8b nomic-embed-text qwen3:0.6b", "", "qwen3:0.6b"),
        ("Qwen/Qwen3-8B Qwen/Qwen3-Embedding-0.6B Qwen/Qwen2.5-1.5B-Instruct", "", "Qwen/Qwen2.5-1.5B-Instruct"),
        ("qwen3:8b llama3.1:70b gemma3:12b", "", ""),
        ("qwen3:0.6b", "", ""),
        ("qwen3:8b bge-m3:567m all-minilm:33m gemma3:270m", "", "gemma3:270m"),
        ("qwen3:8b qwen3:0.6b", "CHAT_TASK_MODEL=\n", ""),
        ("qwen3:8b qwen3:0.6b", "CHAT_TASK_MODEL=qwen3:8b\n", "qwen3:8b"),
    ],
)
def test_a_small_model_is_chosen_unless_the_user_has_chosen(
    tmp_path: Path, models: str, line: str, expected: str
) -> None:
    tree = clone(tmp_path / "clone")
    tree.dotenv.write_text(line)
    ran = tree.run("bash", "-euc", TASKS, MODELS=models)
    assert (ran.returncode, ran.stdout.strip()) == (0, expected), ran.stdout


def test_a_registry_that_does_not_answer_is_told_before_anything_is_changed(tmp_path: Path) -> None:
    tree = clone(tmp_path / "clone")
    image = f"127.0.0.1:{free_port()}/open-webui:v0.0.1"
    ran = tree.run("scripts/up", ENGINE="tiny", CHAT="on", CHAT_IMAGE=image, STACK_PUBLISH="127.0.0.1:0")
    assert ran.returncode == 1, ran.stdout
    last = ran.stdout.rstrip().splitlines()[-1]
    assert f"No registry answers for {image} (" in last
    assert "'CHAT=off make up'" in last
    assert not tree.dotenv.exists()


@contextmanager
def window(output: str, cookie: str = "") -> Iterator[httpx.Client]:
    """The chat window whose address `make up` printed, for somebody with that cookie."""
    found = re.search(r"^    Chat +(http://\S+)", output, re.MULTILINE)
    assert found, output
    with httpx.Client(base_url=found[1], headers={"cookie": cookie} if cookie else {}, timeout=60) as client:

        def healthy() -> bool:
            try:
                return client.get("/health").status_code == 200
            except httpx.TransportError:  # it has just started
                return False

        wait_for(healthy)
        yield client


def account(client: httpx.Client, action: str, person: str) -> httpx.Response:
    body = {"email": f"{person}@people.example", "password": "secret"}
    return client.post(f"/api/v1/auths/{action}", json=body)


def cookie(answer: httpx.Response) -> str:
    return f"token={answer.raise_for_status().cookies['token']}"


def chat(client: httpx.Client) -> int:
    body = {"model": "chat", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
    return client.post("/api/chat/completions", json=body).status_code


def usage(tree: Tree, key: str) -> list[Any]:
    """The requests of each user for each model, the user with the fewest ones first."""
    rows = json.loads(tree.run("scripts/stack", "usage", "--by", "user,model", "--key", key, "--json").stdout)
    users = {it["user"] for it in rows if it["user"]}
    return sorted([sorted((it["model"], it["requests"]) for it in rows if it["user"] == user) for user in users])


def key_of(text: str) -> str:
    found = re.search(r"^OPENAI_API_KEY=sk-stack-(\w+)-\w+$", text, re.MULTILINE)
    assert found, text
    return found[1]


CONFIG = """
engines: { engine: { dialect: llamacpp, base_url: "http://engine:8080/v1" } }
models:
  chat: { targets: [{ engine: engine, model: SmolLM2-135M-Instruct }] }
  small: { targets: [{ engine: engine, model: SmolLM2-135M-Instruct }] }
default_model: chat
"""


def test_make_up_gives_it_a_key_that_tells_its_users_apart(tree: Tree, python_image: str) -> None:
    """Its own questions go to the small model, in the name of the user whose chat they are about."""
    build("chat", "tests/bundle/chat")
    (tree.path / "config/stack.yaml").write_text(CONFIG)
    tree.dotenv.write_text(f"COMPOSE_FILE=compose.yaml:compose.tiny.yaml:compose.chat.yaml\n"
                           f"PYTHON_IMAGE={python_image}\nCHAT_IMAGE=stack-test-chat\n"
                           "STACK_PUBLISH=127.0.0.1:0\nCHAT_PUBLISH=127.0.0.1:0\n"
                           "CHAT_TASK_MODEL=small\n")  # fmt: skip
    up = tree.run("scripts/up")
    assert up.returncode == 0, up.stdout
    file = tree.path / ".secrets/chat"
    assert (stat.S_IMODE(file.stat().st_mode), stat.S_IMODE(file.parent.stat().st_mode)) == (0o444, 0o700)
    text = file.read_text()
    with window(up.stdout) as nobody:
        ann = cookie(account(nobody, "signup", "ann"))
    with window(up.stdout, ann) as client:
        assert [account(client, "add", "bob").status_code, chat(client), chat(client)] == [200] * 3
    with window(up.stdout) as nobody:
        assert [account(nobody, "signup", "eve").status_code, chat(nobody)] == [403, 401]
        bob = cookie(account(nobody, "signin", "bob"))
    with window(up.stdout, bob) as client:
        assert chat(client) == 200
    bobs, anns = [("chat", 1), ("small", 3)], [("chat", 2), ("small", 6)]
    wait_for(lambda: usage(tree, key_of(text)) == [bobs, anns])
    container = tree.run("docker", "compose", "ps", "--quiet", "chat").stdout.strip()
    inspected = tree.run("docker", "inspect", container).stdout
    assert not any(line.partition("=")[2] in inspected for line in text.splitlines())

    assert tree.run("scripts/stack", "keys", "delete", key_of(text), "--yes").returncode == 0
    again = tree.run("scripts/up")
    assert again.returncode == 0, again.stdout
    renewed = file.read_text()
    assert key_of(renewed) != key_of(text)
    with window(again.stdout, bob) as client:  # he is still signed in
        assert chat(client) == 200
    wait_for(lambda: usage(tree, key_of(renewed)) == [bobs])
