"""Keys for a team, in containers: a newcomer's walk with the `stack` command, and a store that can't be written."""

import json
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from docker.models.containers import Container

from gateway.keys import secret
from tests.support.processes import ROOT, wait_for
from tests.support.stack import Stack


def run(container: Container, *words: str) -> tuple[int, str]:
    status, output = container.exec_run(["stack", *words])
    return status, output.decode()


def made(container: Container, *words: str) -> Any:
    status, output = run(container, "keys", *words, "--json")
    assert status == 0, output
    return json.loads(output)


def answered(stack: Stack, key: str) -> bool:
    """Whether that key has a question answered."""
    client = openai.OpenAI(base_url=stack.url + "/v1", api_key=key, max_retries=0)
    try:
        answer = client.chat.completions.create(
            model="llama3.1:8b", messages=[{"role": "user", "content": "Hello"}], max_tokens=3
        )
    except openai.AuthenticationError:
        return False
    return bool(answer.choices)


def test_a_key_is_created_rotated_disabled_and_deleted_in_the_container(stack: Stack) -> None:
    gateway = stack.container("gateway")
    new = made(gateway, "create", "billing", "--owner", "Ann", "--expires", "90d")
    key_id, first = new["key"]["id"], new["secret"]
    assert answered(stack, first)

    gateway.restart(timeout=20)
    stack.wait_until_ready()
    assert answered(stack, first)  # the volume keeps it

    second = made(gateway, "rotate", key_id, "--grace", "1h")["secret"]
    assert answered(stack, second)
    assert answered(stack, first)
    assert run(gateway, "keys", "disable", key_id)[0] == 0
    for key in (first, second):
        wait_for(lambda it=key: not answered(stack, it), deadline=5)  # type: ignore[misc]
    logs = gateway.logs().decode()
    assert first not in logs
    assert second not in logs
    assert run(gateway, "keys", "delete", key_id, "--yes")[0] == 0


def test_a_backup_is_a_file_of_this_machine(stack: Stack, tmp_path: Path) -> None:
    def command(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [ROOT / "scripts/stack", *words], cwd=tmp_path, env=stack.environment(), stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    gateway = stack.container("gateway")
    kept = made(gateway, "create", "kept")
    done = command("backup", "stack.backup")
    assert (done.returncode, "The backup holds" in done.stderr) == (0, True), done.stderr
    assert stat.S_IMODE((tmp_path / "stack.backup").stat().st_mode) == 0o600

    gone = made(gateway, "create", "made since")
    assert run(gateway, "keys", "delete", kept["key"]["id"], "--yes")[0] == 0
    wait_for(lambda: not answered(stack, kept["secret"]), deadline=5)
    refused = command("restore", "stack.backup")
    assert (refused.returncode, "use --yes" in refused.stderr) == (1, True)
    for words in (["restore", "nowhere", "--yes"], ["backup", "nowhere/x"]):
        refused = command(*words)
        assert (refused.returncode, "nowhere" in refused.stderr) == (1, True), refused.stderr
    refused = command("backup", ".")
    assert (refused.returncode, "is a directory" in refused.stderr) == (1, True), refused.stderr
    assert command("restore", "stack.backup", "--yes").returncode == 0
    wait_for(lambda: answered(stack, kept["secret"]), deadline=5)
    wait_for(lambda: not answered(stack, gone["secret"]), deadline=5)
    assert [it.name for it in tmp_path.iterdir()] == ["stack.backup"]

    (tmp_path / "prompt").write_text("Be polite.")
    assert command("prompts", "set", "polite", "prompt").stdout == "polite version 1\n"
    assert run(gateway, "prompts", "show", "polite") == (0, "Be polite.")
    for words in (["prompts", "delete", "polite"], ["keys", "delete", kept["key"]["id"], "--yes"]):
        assert run(gateway, *words)[0] == 0


@pytest.fixture
def small(stack: Stack) -> Iterator[Container]:
    """A gateway with little room for its store."""
    container = stack.docker.containers.run(
        f"{stack.project}-gateway",
        detach=True,
        read_only=True,
        tmpfs={"/tmp": "", "/var/lib/stack": "size=2m,uid=10001,gid=10001,mode=0700"},
        environment={"STACK_PUBLISH": "127.0.0.1:9000"},
        ports={"9000/tcp": ("127.0.0.1", None)},
    )
    try:
        yield container
    finally:
        container.remove(force=True)


def test_a_store_without_room_and_one_that_is_read_only(small: Container) -> None:
    small.reload()
    url = f"http://127.0.0.1:{small.ports['9000/tcp'][0]['HostPort']}/v1/models"

    def status(key: str) -> int:
        try:
            return httpx.get(url, headers={"authorization": f"Bearer {key}"}).status_code
        except httpx.TransportError:
            return 0

    wait_for(lambda: status("dev-key") == 200)
    known = made(small, "create", "known")["secret"]
    wait_for(lambda: status(known) == 200)

    small.exec_run(["dd", "if=/dev/zero", "of=/var/lib/stack/fill", "bs=4k"])
    code, said = run(small, "keys", "create", "x", "--label", f"long={'x' * 200}")
    assert (code, "full" in said) == (1, True), said
    assert (status(known), status(secret.new_secret("0123456789"))) == (200, 401)
    small.exec_run(["rm", "/var/lib/stack/fill"])
    assert status(made(small, "create", "y")["secret"]) == 200

    small.exec_run(["sh", "-c", "chmod 0400 /var/lib/stack/stack.db* && chmod 0500 /var/lib/stack"])
    code, said = run(small, "keys", "create", "x")
    assert (code, "/var/lib/stack/stack.db: " in said, "readonly" in said) == (1, True, True), said
    assert (status(known), status(secret.new_secret("0123456789"))) == (200, 401)
    small.exec_run(["sh", "-c", "chmod 0700 /var/lib/stack && chmod 0600 /var/lib/stack/stack.db*"])
    assert status(made(small, "create", "z")["secret"]) == 200
