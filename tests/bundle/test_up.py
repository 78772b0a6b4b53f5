"""`make up` on real containers: what it decides, what it writes down, what it prints, and that all of it works."""

import json
import os
import re
import shutil
import stat
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.clone import Tree, clone, refuses, write_program
from tests.support.processes import free_port, wait_for

HI: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}


def post(base_url: str, key: str, path: str, **body: Any) -> tuple[int, str]:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(base_url + path, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def said_by(output: str) -> tuple[str, str]:
    """The base URL and the key that `make up` printed."""
    found = re.search(r"^    base URL +(\S+)\n    key +(\S+)$", output, re.MULTILINE)
    assert found, output
    return found[1], found[2]


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, python_image: str) -> Iterator[Tree]:
    """The tiny stack, started by Compose itself in a fresh clone: no .env, nothing set but the port and the base."""
    tree = clone(tmp_path_factory.mktemp("up") / "clone", mask=0)
    files = ("-f", "compose.yaml", "-f", "compose.tiny.yaml")
    try:
        settings = {"STACK_PUBLISH": f"127.0.0.1:{free_port()}", "PYTHON_IMAGE": python_image}
        ran = tree.run("docker", "compose", *files, "up", "--wait", **settings)
        assert ran.returncode == 0, ran.stdout
        assert not tree.dotenv.exists()
        yield tree
    finally:
        tree.remove_everything()


def port_of(tree: Tree) -> int:
    return int(tree.run("docker", "compose", "port", "gateway", "9000").stdout.rpartition(":")[2])


def test_the_stack_needs_no_dotenv(up: Tree) -> None:
    base_url = f"http://127.0.0.1:{port_of(up)}/v1"
    status, text = post(base_url, "dev-key", "/chat/completions", **HI)
    assert status == 200, text


def test_make_chat_prints_the_answer(up: Tree) -> None:
    ran = up.run("make", "--silent", "chat", "Q=What is 2+2?")
    assert ran.returncode == 0, ran.stdout
    assert ran.stdout.strip()


def test_an_answer_ends_when_make_chat_is_interrupted(up: Tree) -> None:
    """Nothing in the container sees that: it would go on to the end, and keep the engine's slot."""

    def asks() -> bool:
        return "gateway.cli.chat" in up.run("docker", "top", f"{up.project}-gateway-1").stdout

    with up.running("scripts/chat", "Write a very long story about a dragon."):
        wait_for(asks, deadline=60)
    wait_for(lambda: not asks(), deadline=30)


def test_make_logs_follows_every_service(up: Tree) -> None:
    """The script itself, which `make logs` runs: make would not hand a signal on."""
    waited_for = {"gateway-1", "engine-1"}
    with up.running("scripts/logs") as lines:
        while waited_for:
            waited_for -= set(next(lines).replace("\x1b[2K", "").split()[:1])


def test_the_port_is_taken_by_another_stack(up: Tree, tree: Tree) -> None:
    ran = tree.run("scripts/up", STACK_PUBLISH=f"127.0.0.1:{port_of(up)}")
    assert ran.returncode == 1
    assert f"is taken by the container {up.project}-gateway-1" in ran.stdout


def test_settings_with_which_the_gateway_would_not_start_replace_nothing(up: Tree, python_image: str) -> None:
    one = "docker", "compose", "ps", "--quiet", "gateway"
    before = up.run(*one).stdout
    env = {"ENGINE": "tiny", "STACK_PUBLISH": f"127.0.0.1:{port_of(up)}", "PYTHON_IMAGE": python_image}
    ran = up.run("scripts/up", STACK_GRACE="5m", STACK_QUEUE="-1", **env)
    up.dotenv.unlink()
    last = ran.stdout.splitlines()[-1]
    assert (ran.returncode, up.run(*one).stdout) == (1, before), ran.stdout
    assert all(it in last for it in ("STACK_GRACE: ", "STACK_QUEUE: ", "then run 'make up'.")), ran.stdout


def test_make_doctor_for_another_engine_creates_nothing(up: Tree) -> None:
    """The check of the gateway's settings made the volumes and networks of an engine that this stack does not have."""

    def there() -> list[str]:
        mine = "--format={{.Name}}", f"--filter=label=com.docker.compose.project={up.project}"
        return [up.run("docker", kind, "ls", *mine).stdout for kind in ("volume", "network")]

    before = there()
    checks = up.run("scripts/doctor", ENGINE="vllm", STACK_PUBLISH=f"127.0.0.1:{port_of(up)}").stdout
    assert ("checking the stack that runs here" in checks, there()) == (True, before), checks


CONFIG = """
engines: { engine: { dialect: llamacpp, base_url: "http://engine:8080/v1" } }
models: { mine: { targets: [{ engine: engine, model: SmolLM2-135M-Instruct }] } }
default_model: mine
"""


def test_the_command_that_is_printed_names_the_default_model_of_stack_yaml(up: Tree, python_image: str) -> None:
    """`make up` has the gateway read the file again, whether it was written or removed, and does not restart it."""
    file = up.path / "config/stack.yaml"
    env = {"ENGINE": "tiny", "STACK_PUBLISH": f"127.0.0.1:{port_of(up)}", "PYTHON_IMAGE": python_image}
    containers = []
    try:
        for text, model in (CONFIG, "mine"), (CONFIG.replace("mine", "yours"), "yours"), ("", "SmolLM2-135M-Instruct"):
            if text:
                file.write_text(text)
                file.chmod(0o644)
            else:
                file.unlink()
            ran = up.run("scripts/up", **env)
            assert re.findall(r'"model": "(.*?)"', ran.stdout) == [model], ran.stdout
            assert post(*said_by(ran.stdout), "/chat/completions", model=model, **HI)[0] == 200
            containers.append(up.run("docker", "compose", "ps", "--quiet", "gateway").stdout)
        assert len(set(containers)) == 1
    finally:
        file.unlink(missing_ok=True)
        up.dotenv.unlink()


def test_two_clones_with_the_same_name_do_not_share_a_stack(up: Tree, tree: Tree) -> None:
    """Their directories may have the same name. The engine and the port of the second one are its own."""
    said = f"The stack with the name {up.project} was started from {up.path}", "set COMPOSE_PROJECT_NAME in .env"
    other = Tree(tree.path, up.project)
    refuses(other, *said, "'make down' there", ENGINE="tiny")
    down = other.run("scripts/down")
    assert (down.returncode, all(it in down.stdout for it in said)) == (1, True), down.stdout
    doctor = other.run("scripts/doctor", ENGINE="tiny", STACK_PUBLISH="127.0.0.1:0")
    assert (said[0] in doctor.stdout, "checking the stack that runs" in doctor.stdout) == (True, False), doctor.stdout
    for words in ("scripts/stack keys list", "scripts/models", "scripts/chat Hi", "scripts/logs"):
        ran = other.run(*words.split(), ENGINE="tiny")
        assert (ran.returncode, all(it in ran.stdout for it in said)) == (1, True), ran.stdout
    assert port_of(up)


def test_a_clone_that_this_user_cannot_see_is_not_taken_for_gone(up: Tree, tree: Tree) -> None:
    """As in another user's home. Root without its capabilities takes the place of a user who is not root."""
    words = ["scripts/down"]
    if os.geteuid() == 0:
        os.chown(up.path.parent, 65534, -1)
        words = ["setpriv", "--inh-caps=-all", "--bounding-set=-all", *words]
    up.path.parent.chmod(0)
    try:
        ran = Tree(tree.path, up.project).run(*words)
    finally:
        up.path.parent.chmod(0o700)
        os.chown(up.path.parent, os.geteuid(), -1)
    assert (ran.returncode, f"was started from {up.path}" in ran.stdout) == (1, True), ran.stdout


def test_a_symbolic_link_to_a_clone_is_the_same_clone(up: Tree, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(up.path)
    script = "cd $0; for it in say docker; do . scripts/lib/$it.sh; done; need_own_project; docker compose ps"
    ran = up.run("bash", "-euc", script, str(tmp_path / "link"), COMPOSE_FILE="compose.yaml:compose.tiny.yaml")
    assert (ran.returncode, f"{up.project}-gateway-1" in ran.stdout) == (0, True), ran.stdout


RESTARTED = """
case "$*" in
  "compose port "*) echo "no port 9000/tcp for container" >&2; exit 1 ;;
  *) exec {docker} "$@" ;;
esac
"""


def test_the_port_of_a_gateway_that_is_just_restarted_is_its_own(up: Tree, tmp_path: Path) -> None:
    """Docker says that it has none, and a moment later it holds the port."""
    write_program(tmp_path / "docker", RESTARTED.format(docker=shutil.which("docker")))
    path = f"{tmp_path}:{os.environ['PATH']}"
    libraries = " ".join(f". scripts/lib/{it}.sh;" for it in ("say", "docker", "dotenv", "parts", "stack", "address"))
    ran = up.run(
        "bash",
        "-euc",
        libraries + "choose_engine; need_free_port",
        ENGINE="tiny",
        STACK_PUBLISH=f"127.0.0.1:{port_of(up)}",
        PATH=path,
    )
    assert (ran.returncode, ran.stdout) == (0, "")


def test_a_registry_that_hangs_is_one_that_does_not_answer(tree: Tree, black_hole: str) -> None:
    """From a fresh clone to an answer, the default engine's registry a black hole; then once more, in seconds."""
    silent = {"OLLAMA_IMAGE": f"{black_hole}/ollama/ollama:0.0.1", "PYTHON_IMAGE": f"{black_hole}/python:3.13.0"}
    began = time.monotonic()
    ran = tree.run("scripts/up", STACK_PUBLISH="127.0.0.1:0", **silent)
    if os.geteuid() != 0:
        assert "Load the images ('docker load')" in ran.stdout
        return
    assert ran.returncode == 0, ran.stdout
    assert time.monotonic() - began < 150
    assert "no image registry answers (no answer within 10 seconds), so the stack uses the tiny engine" in ran.stdout
    base_url, key = said_by(ran.stdout)
    assert key == "dev-key"
    status, text = post(base_url, key, "/chat/completions", model="llama3.1:8b", **HI)
    assert (status, json.loads(text)["model"]) == (200, "SmolLM2-135M-Instruct"), text

    assert "COMPOSE_FILE=compose.yaml:compose.tiny.yaml" in tree.dotenv.read_text().splitlines()
    assert "PYTHON_IMAGE=stack-base:trixie" in tree.dotenv.read_text().splitlines()
    assert stat.S_IMODE(tree.dotenv.stat().st_mode) == 0o600
    assert "engine" in tree.run("docker", "compose", "ps", "--services").stdout

    began = time.monotonic()
    again = tree.run("scripts/up", STACK_PUBLISH="127.0.0.1:0")
    assert again.returncode == 0, again.stdout
    assert said_by(again.stdout) == (base_url, key)
    assert "registry" not in again.stdout
    assert time.monotonic() - began < 75


def use_another_key(tree: Tree, file: Path, old: str) -> str:
    """Write another key into its file, once as an editor does and once in place. `make up` puts each into force, and a
    further one starts nothing anew."""

    def replace(text: str) -> None:
        edited = file.with_name("edited")
        edited.write_text(text)
        edited.chmod(0o444)
        edited.rename(file)

    def edit(text: str) -> None:
        file.chmod(0o644)
        file.write_text(text)

    for key, change in (("sk-a-strong-key-replaced", replace), ("sk-a-strong-key-edited", edit)):
        change(f"{key}\n")
        ran = tree.run("scripts/up")
        base_url, said = said_by(ran.stdout)
        assert (said, f"starting gateway anew, because it read {file} before" in ran.stdout) == (key, True), ran.stdout
        assert [post(base_url, it, "/chat/completions", **HI)[0] for it in (key, old)] == [200, 401]
        old = key
    gateway = "docker", "compose", "ps", "--quiet", "gateway"
    before = tree.run(*gateway).stdout
    assert tree.run("scripts/up").returncode == 0
    assert tree.run(*gateway).stdout == before
    return old


def test_beyond_loopback_it_makes_a_strong_key(tree: Tree, python_image: str) -> None:
    """And keeps every other line of .env. The clone is one made under umask 077, and containers run as other users. An
    override that Compose reads by itself stays in force."""
    (tree.path / "compose.override.yaml").write_text("services: { gateway: { labels: { mine: 'yes' } } }\n")
    kept = "# mine\nexport STACK_LOG_LEVEL='DEBUG'\n\nSTACK_PUBLISH=0.0.0.0:0\nCOMPOSE_FILE=compose.yaml\n"
    tree.dotenv.write_text(kept + f"PYTHON_IMAGE={python_image}")
    ran = tree.run("scripts/up", ENGINE="tiny")
    assert ran.returncode == 0, ran.stdout
    base_url, key = said_by(ran.stdout)
    assert len(key) >= 40
    assert "chmod a+rx config\n" in ran.stdout
    assert ran.stdout.count("compose.override.yaml belongs to the stack: adding it to COMPOSE_FILE") == 1
    mine = "docker", "ps", "--quiet", "--filter", f"name={tree.project}-gateway", "--filter", "label=mine=yes"
    assert tree.run(*mine).stdout

    files = "compose.yaml:compose.tiny.yaml:compose.override.yaml"
    kept = kept.replace("COMPOSE_FILE=compose.yaml\n", f"COMPOSE_FILE={files}\n")
    assert tree.dotenv.read_text() == (kept + f"PYTHON_IMAGE={python_image}\nSTACK_API_KEYS_FILE=.secrets/api_keys\n")
    file = tree.path / ".secrets/api_keys"
    assert file.read_text().strip() == key
    assert (stat.S_IMODE(file.stat().st_mode), stat.S_IMODE(file.parent.stat().st_mode)) == (0o444, 0o700)

    assert post(base_url, key, "/chat/completions", **HI)[0] == 200
    assert post(base_url, "dev-key", "/chat/completions", **HI)[0] == 401
    key = use_another_key(tree, file, key)

    down = tree.run("scripts/down")
    assert down.returncode == 0, down.stdout
    assert not tree.run("docker", "ps", "--all", "--quiet", "--filter", f"name={tree.project}").stdout
    (tree.path / "compose.override.yaml").unlink()
    assert said_by(tree.run("scripts/up").stdout)[1] == key
    assert "COMPOSE_FILE=compose.yaml:compose.tiny.yaml" in tree.dotenv.read_text().splitlines()
