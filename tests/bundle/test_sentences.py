"""If something is missing, `make up` stops before it changes anything, with one sentence that says what to do."""

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clone import Tree, clean_environment, refuses, write_program
from tests.support.machine import Machine


def test_docker_is_not_installed(tree: Tree, programs: Path) -> None:
    refuses(tree, "Docker is not installed", "https://docs.docker.com/get-docker/", PATH=str(programs))


def test_a_clone_made_by_git_for_windows_starts_in_wsl(tree: Tree, tmp_path: Path, programs: Path) -> None:
    """Git for Windows sets core.autocrlf, and Bash does not start a script whose lines end with CRLF."""
    for command in ("init --quiet", "add .", "-c user.name=it -c user.email=it@it.example commit --quiet -m it"):
        assert tree.run("git", *command.split()).returncode == 0
    words = ("clone", "--quiet", "-c", "core.autocrlf=true", ".", str(tmp_path / "windows"))
    assert tree.run("git", *words).returncode == 0
    refuses(Tree(tmp_path / "windows"), "Docker is not installed", PATH=str(programs))


@pytest.mark.parametrize("script", ["up", "doctor", "down"])
def test_a_dotenv_that_belongs_to_root(tree: Tree, script: str) -> None:
    """As after `sudo make up`. Root without its capabilities takes the place of a user who is not root."""
    tree.dotenv.write_text("A=1\n")
    tree.dotenv.chmod(0)
    words = f"scripts/{script}"
    if os.geteuid() == 0:
        os.chown(tree.dotenv, 65534, -1)
        words = f"setpriv --inh-caps=-all --bounding-set=-all {words}"
    ran = tree.run(*words.split())
    tree.dotenv.unlink()
    said = r"\.env belongs to \w+, and you may not read it: 'sudo chown -R \w+ \.env'"
    assert (ran.returncode, bool(re.search(said, ran.stdout))) == (1, True), ran.stdout


@pytest.mark.parametrize("script", ["up", "doctor", "chat Hi", "stack keys list"])
def test_a_directory_whose_name_has_no_latin_letter(tree: Tree, tmp_path: Path, script: str) -> None:
    """Compose would make an empty name of it. A name in .env helps."""
    tree.path.rename(tmp_path / "日本語")
    env = clean_environment(STACK_PUBLISH="127.0.0.1:0", ENGINE="tiny")
    command = f"scripts/{script}".split()
    said = subprocess.run(command, cwd=tmp_path / "日本語", env=env, capture_output=True, text=True, check=False).stderr
    assert "The stack has no name, because the name of its directory, 日本語, has no Latin letter and no digit" in said
    (tmp_path / "日本語/.env").write_text("COMPOSE_PROJECT_NAME=stack-test-no-latin-letter\n")
    run = subprocess.run(
        ["scripts/down"], cwd=tmp_path / "日本語", env=env, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("script", ["up", "down", "tls-root", "dev", "check", "chat"])
def test_a_script_that_is_asked_for_help_says_what_it_does_and_does_nothing(
    tree: Tree, programs: Path, script: str
) -> None:
    write_program(programs / "docker", "echo asked\n")
    ran = tree.run(f"scripts/{script}", "--help", PATH=str(programs))
    first = (tree.path / f"scripts/{script}").read_text().splitlines()[1].removeprefix("# ")
    assert (ran.returncode, ran.stdout.splitlines()[0], "asked" in ran.stdout) == (2, first, False)
    assert "set -euo" not in ran.stdout


def test_the_daemon_does_not_run(tree: Tree, tmp_path: Path) -> None:
    socket_path = f"unix://{tmp_path}/docker.sock"
    refuses(tree, "does not answer", socket_path, "systemctl start docker", DOCKER_HOST=socket_path)


def test_this_user_may_not_use_docker(tree: Tree, programs: Path) -> None:
    denied = "permission denied while trying to connect to the Docker daemon socket"
    write_program(programs / "docker", f"echo {denied} >&2; exit 1\n")
    refuses(tree, "not allowed to use the Docker daemon", "usermod -aG docker", PATH=str(programs))


@pytest.fixture
def not_root(programs: Path) -> str:
    """A PATH with this machine's docker, for a user who is not root and so can neither install packages nor build a
    base image."""
    write_program(programs / "id", "echo 1000\n")
    docker = shutil.which("docker")
    assert docker
    (programs / "docker").symlink_to(docker)
    return str(programs)


@pytest.mark.parametrize("version", ["v2.23.3", "2.24.3-desktop.1"])
def test_compose_is_too_old(tree: Tree, not_root: str, version: str) -> None:
    docker = Path(not_root) / "docker"
    real = docker.resolve()
    write_program(docker, f'[ "$1 $2" = "compose version" ] && echo {version} && exit\nexec {real} "$@"\n')
    refuses(tree, f"Docker Compose 2.24.4 or newer is needed ({version} is here)", PATH=not_root)


@pytest.mark.parametrize("version", ["v2.24.4", "2.24.6-desktop.1", "2.25.0", "2.40.3-desktop.1", "5.0.1"])
def test_compose_is_new_enough(tree: Tree, programs: Path, version: str) -> None:
    write_program(programs / "docker", f'[ "$1 $2" != "compose version" ] || echo {version}\n')
    assert "The stack is not running" in tree.run("scripts/chat", "Hello?", PATH=str(programs)).stdout


def test_no_registry_and_no_way_to_build_a_base_image(tree: Tree, not_root: str, closed_port: str) -> None:
    """With a Docker that does not have the base image yet."""
    docker = Path(not_root) / "docker"
    real = docker.resolve()
    write_program(docker, f'case "$*" in "image inspect stack-base"*) exit 1 ;; esac\nexec {real} "$@"\n')
    images = {"OLLAMA_IMAGE": f"{closed_port}/ollama:1.2.3", "PYTHON_IMAGE": f"{closed_port}/python:3.13.0"}
    said = "No image registry answers (", "connection refused), and only root", "docker load"
    refuses(tree, *said, "PYTHON_IMAGE", "OLLAMA_IMAGE", PATH=not_root, **images)


def test_an_unknown_engine(tree: Tree) -> None:
    refuses(tree, "ENGINE=llama is not known", "ollama, vllm, tiny or outside", ENGINE="llama")


@pytest.mark.parametrize(("engine", "variable"), [("ollama", "OLLAMA_IMAGE"), ("vllm", "VLLM_IMAGE")])
def test_the_engine_asked_for_has_no_registry(tree: Tree, closed_port: str, engine: str, variable: str) -> None:
    image = f"{closed_port}/{engine}:1.2.3"
    refuses(tree, image, "docker load", variable, "ENGINE=tiny make up", ENGINE=engine, **{variable: image})


def test_an_engine_chosen_earlier_is_not_replaced_by_the_tiny_one(tree: Tree, closed_port: str) -> None:
    tree.dotenv.write_text(f"COMPOSE_FILE=compose.yaml\nOLLAMA_IMAGE={closed_port}/ollama:1.2.3\n")
    refuses(tree, "No registry answers", "ENGINE=tiny make up")
    tree.dotenv.unlink()


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_the_port_is_taken_by_a_program(tree: Tree, taken_port: int, host: str) -> None:
    address = f"{host}:{taken_port}"
    another = f"STACK_PUBLISH={host}:{taken_port + 1}"
    refuses(tree, f"Port {taken_port} is taken by", "(pid ", another, STACK_PUBLISH=address)


@pytest.mark.parametrize(
    ("part", "setting"),
    [("MONITORING", "GRAFANA_PUBLISH"), ("MONITORING", "PROMETHEUS_PUBLISH"), ("CHAT", "CHAT_PUBLISH")],
)
def test_the_port_of_a_part_is_taken_by_a_program(
    tree: Tree, taken_port: int, python_image: str, part: str, setting: str
) -> None:
    images = dict.fromkeys(("PROMETHEUS_IMAGE", "ALERTMANAGER_IMAGE", "GRAFANA_IMAGE", "CHAT_IMAGE"), python_image)
    free = dict.fromkeys(("GRAFANA_PUBLISH", "PROMETHEUS_PUBLISH"), "127.0.0.1:0")
    where = free | {"ENGINE": "tiny", part: "on", setting: f"127.0.0.1:{taken_port}"}
    said = f"Port {taken_port} is taken by", "(pid ", f"such as {setting}=127.0.0.1:{taken_port + 1}"
    refuses(tree, *said, **images, **where)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"CHAT_PUBLISH": "127.0.0.1:3000"}, "CHAT_PUBLISH=127.0.0.1:3000 and GRAFANA_PUBLISH=127.0.0.1:3000 take the"),
        (
            {"STACK_PUBLISH": "0.0.0.0:9091"},
            "PROMETHEUS_PUBLISH=127.0.0.1:9091 and STACK_PUBLISH=0.0.0.0:9091 take the",
        ),
        (
            {"GRAFANA_PUBLISH": "3000"},
            "GRAFANA_PUBLISH=3000 is not an address and a port: use for example 127.0.0.1:3000",
        ),
    ],
)
def test_addresses_of_parts_that_cannot_be(
    tree: Tree, programs: Path, machine: Machine, settings: dict[str, str], said: str
) -> None:
    """Nothing listens on this machine: `ss` says so."""
    write_program(programs / "ss", "")
    ran = tree.run("scripts/doctor", **machine.environment | settings, ENGINE="tiny", WITH="monitoring,chat")
    assert (ran.returncode, said in ran.stdout) == (1, True), ran.stdout


def test_parts_at_one_port_of_two_addresses(tree: Tree, programs: Path, machine: Machine) -> None:
    write_program(programs / "ss", "")
    settings = machine.environment | {"CHAT_PUBLISH": "127.0.0.2:3000"}
    ran = tree.run("scripts/doctor", **settings, ENGINE="tiny", WITH="monitoring,chat")
    assert "ok: the ports of the parts" in ran.stdout, ran.stdout


@pytest.fixture
def network(programs: Path, machine: Machine) -> dict[str, str]:
    """A machine whose scripts ask the kernel for its addresses. Nothing listens there."""
    write_program(programs / "ss", "")
    for name in ("ip", "uname"):
        (programs / name).symlink_to(shutil.which(name) or name)
    return machine.environment | {"ENGINE": "tiny", "WITH": "monitoring,chat"}


@pytest.mark.parametrize("host", ["198.51.100.77", "[2001:db8::77]"])
@pytest.mark.parametrize("setting", ["STACK_PUBLISH", "GRAFANA_PUBLISH", "CHAT_PUBLISH"])
def test_an_address_that_this_machine_does_not_have(
    tree: Tree, network: dict[str, str], host: str, setting: str
) -> None:
    """Docker would take the running gateway down, and only then say that it cannot assign the address."""
    ran = tree.run("scripts/doctor", **network | {setting: f"{host}:9100"})
    said = f"{setting}={host}:9100 is not at an address of this machine"
    assert (ran.returncode, said in ran.stdout) == (1, True), ran.stdout


def test_addresses_of_this_machine(tree: Tree, network: dict[str, str]) -> None:
    listed = subprocess.run(["ip", "-o", "addr", "show", "scope", "global"], capture_output=True, text=True, check=True)
    own = [it.split()[3].partition("/")[0] for it in listed.stdout.splitlines()]
    for host in ["127.0.0.9", "[::]", *(f"[{it}]" if ":" in it else it for it in own)]:
        ran = tree.run("scripts/doctor", **network | {"STACK_PUBLISH": f"{host}:9100", "CHAT_PUBLISH": f"{host}:9200"})
        assert "ok: port 9100 is free" in ran.stdout, ran.stdout
        assert "ok: the ports of the parts" in ran.stdout, ran.stdout


@pytest.mark.parametrize("said", ["elsewhere [name=seccomp]", "$(uname -n) [name=rootless]"])
def test_the_addresses_of_another_machine_are_not_known(
    tree: Tree, programs: Path, network: dict[str, str], said: str
) -> None:
    """Of a remote Docker, Docker Desktop's virtual machine, or a Docker in a network namespace of its own."""
    program = programs / "docker"
    write_program(program, f'case "$*" in *SecurityOptions*) echo "{said}"; exit ;; esac\n' + program.read_text())
    assert (
        "ok: port 9100 is free"
        in tree.run("scripts/doctor", **network | {"STACK_PUBLISH": "198.51.100.77:9100"}).stdout
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "[::]"])
def test_the_address_of_a_running_gateway_is_one_that_the_scripts_take(tree: Tree, programs: Path, host: str) -> None:
    """Compose 2.26 prints it without the brackets of IPv6. Here there is no Caddy."""
    said = f"{host.strip('[]')}:9100"
    write_program(programs / "docker", f'case "$*" in *gateway*) echo {said} ;; *) echo no >&2; exit 1 ;; esac\n')
    script = ". scripts/lib/say.sh; . scripts/lib/address.sh; split_address $(published); echo $host $port"
    ran = tree.run("bash", "-euo", "pipefail", "-c", script, PATH=str(programs))
    assert (ran.returncode, ran.stdout) == (0, f"{host} 9100\n")


@pytest.mark.parametrize("address", ["9000", "127.0.0.1:09000", "localhost:9000", "127.0.0.1:http", "127.0.0.1:70000"])
def test_a_malformed_address(tree: Tree, address: str) -> None:
    refuses(tree, "127.0.0.1:9000", STACK_PUBLISH=address)


@pytest.mark.parametrize("setting", ["STACK_MEMORY", "VLLM_SHM_SIZE"])
@pytest.mark.parametrize("size", ["1 gig", "50%"])
def test_a_size_that_is_none(tree: Tree, setting: str, size: str) -> None:
    refuses(tree, f"{setting}={size} is not a size of memory: use for example {setting}=", **{setting: size})


def test_a_mistake_in_an_own_compose_file(tree: Tree) -> None:
    (tree.path / "compose.override.yaml").write_text("services: { gateway: { mem_limit: huge } }\n")
    refuses(
        tree, "Compose does not accept the settings (", "invalid size: 'huge'", "): correct that in .env or the shell"
    )


def test_a_secret_file_that_is_not_there(tree: Tree) -> None:
    refuses(tree, "STACK_API_KEYS_FILE names", "no/such/file, which does not exist", STACK_API_KEYS_FILE="no/such/file")


@pytest.mark.parametrize("name", ["STACK_API_KEYS_FILE", "STACK_ADMIN_KEYS_FILE", "STACK_STORE_URL_FILE"])
def test_a_secret_file_that_the_gateways_user_may_not_read(tree: Tree, tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret"
    secret.touch(mode=0o600)
    refuses(tree, f"{name} names {secret}", "user (10001) may not read: 'chmod a+r", **{name: str(secret)})


def test_a_configuration_that_the_gateways_user_may_not_read(tree: Tree, tmp_path: Path) -> None:
    """`make up` makes the clone's own config/ readable. A directory that a user has named, or a file that a user has
    put there, is refused."""
    file = tree.path / "config/stack.yaml"
    file.touch(mode=0o600)
    refuses(tree, f"may not read {file}: 'chmod a+r {file}'")
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    refuses(tree, f"STACK_CONFIG_DIR names {other}", f"'chmod a+x {other}'", STACK_CONFIG_DIR=str(other))


def test_a_configuration_directory_that_is_not_there(tree: Tree) -> None:
    """Docker would make one that belongs to root."""
    refuses(tree, f"STACK_CONFIG_DIR names {tree.path}/myconf, which is not a directory", STACK_CONFIG_DIR="myconf")


@pytest.mark.parametrize(
    ("line", "name", "meant"),
    [
        ("STACK_WORKRES=3", "STACK_WORKRES", "STACK_WORKERS"),
        ("export LLM_MODLE=qwen3:0.6b", "LLM_MODLE", "LLM_MODEL"),
        ("VLLM_MAX_NUM_SEQ=8", "VLLM_MAX_NUM_SEQ", "VLLM_MAX_NUM_SEQS"),
        ("HF_TOKEN=hf_0123456789", "HF_TOKEN", "HF_TOKEN_FILE"),
    ],
)
def test_a_setting_with_a_typo(tree: Tree, line: str, name: str, meant: str) -> None:
    tree.dotenv.write_text(f"STACK_LOG_LEVEL=DEBUG\n{line}\n")
    refuses(tree, f"sets {name}", f"did you mean {meant}?")
    tree.dotenv.unlink()


@pytest.mark.parametrize("recorded", ["compose.override.yaml", "./docker-compose.override.yml"])
def test_an_override_that_was_deleted_is_left_out(tree: Tree, recorded: str) -> None:
    """`make up` had recorded it. Compose stops at a file that does not exist."""
    (tree.path / "compose.mine.yaml").write_text("services: {}\n")
    tree.dotenv.write_text(f"COMPOSE_FILE=compose.yaml:compose.tiny.yaml:{recorded}:compose.mine.yaml\n")
    said = f"{recorded} is in COMPOSE_FILE and does not exist any more, so it is left out"
    down = tree.run("scripts/down")
    assert (down.returncode, down.stdout.count(said)) == (0, 1), down.stdout
    assert (logs := tree.run("scripts/logs")).returncode == 0, logs.stdout
    keys = tree.run("scripts/stack", "keys", "list").stdout.splitlines()
    assert [it[:20] for it in keys] == [f"==> {recorded}"[:20], "stack: The stack is "]
    assert recorded not in tree.run("scripts/doctor", ENGINE="tiny").stdout.split(said)[1]
    tree.dotenv.unlink()


def test_chat_without_a_question_and_without_a_stack(tree: Tree) -> None:
    assert 'make chat Q="' in tree.run("scripts/chat").stdout
    assert "The stack is not running: run 'make up' first." in tree.run("scripts/chat", "Hello?").stdout


def test_chat_hands_the_question_over_as_typed(tree: Tree, programs: Path) -> None:
    """Quotes, dollar signs and spaces have no meaning to make or the shell."""
    write_program(
        programs / "docker",
        """case "$1 $2" in
        "compose version") echo 2.40.0 ;;
        "compose ps") echo 0123abcd ;;
        "compose exec") for word; do last=$word; done; printf '%s\\n' "$last" ;;
        esac
        """,
    )
    question = """What's  2+2, if a "cup" costs $5 or `ten`?"""
    make = shutil.which("make") or "make"
    assert tree.run(make, "--silent", "chat", f"Q={question}", PATH=str(programs)).stdout == question + "\n"


def test_the_suite_many_times_ends_at_the_first_that_fails(tree: Tree) -> None:
    """A program takes the place of the suite. Its third run fails. The CPU load ends with the script."""
    write_program(tree.path / "scripts/test", 'echo run >>runs; [ "$(grep -c run runs)" -lt 3 ]\n')
    ran = tree.run("scripts/soak", "suite", "2", "--busy")
    assert (ran.returncode, ran.stdout.splitlines()[-1]) == (0, "==> checks and tests passed 2 times in a row")
    ran = tree.run("scripts/soak", "suite", "2")
    assert (ran.returncode, ran.stdout.splitlines()[-1]) == (1, "stack: Round 1 of 2 failed: see the messages above.")
