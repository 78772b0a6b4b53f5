"""`make doctor` on the running stack: nothing is wrong with it, and each planted fault is named. The faults are planted
together wherever they do not hide one another, because each run calls the model."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from tests.support.certificates import tls_server
from tests.support.clone import write_program
from tests.support.containers import container, docker
from tests.support.processes import ROOT, wait_for
from tests.support.stack import Stack

FAULTY = """
services:
  gateway:
    ports: !override ["{bridge}::9000"]
    environment: {{ STACK_API_KEYS: "", STACK_LOG_CONTENT: "true", STACK_LOG_LEVEL: DEBUG }}
    volumes: !override ["{config}:/etc/stack:ro"]
    tmpfs: ["/tmp:mode=1777,size=256m", "/var/lib/stack:mode=0700,uid=10001,gid=10001,size=64m"]
"""


def settings(stack: Stack) -> dict[str, str]:
    """The settings with which the stack was started, for Compose and the scripts."""
    (file,) = list(stack.compose.env_file or ())
    lines = Path(file).read_text().splitlines()
    return stack.environment() | dict(line.split("=", 1) for line in lines)


def doctor(stack: Stack, *words: str, **env: str) -> tuple[int, dict[str, Any]]:
    """Its exit status and its checks, by their names."""
    done = subprocess.run(
        [ROOT / "scripts/doctor", "--json", *words], env=settings(stack) | env, capture_output=True, text=True,
        timeout=280, check=False,
    )  # fmt: skip
    told = json.loads(done.stdout)
    assert told["ok"] == (done.returncode == 0), done.stderr
    assert all(set(it) == {"name", "ok", "finding", "advice"} and it["finding"] for it in told["checks"])
    return done.returncode, {it["name"]: it for it in told["checks"]}


def names(checks: dict[str, Any], check: str, *parts: str) -> None:
    """Check that this check has failed, that its finding has these parts, and that it has advice."""
    assert checks[check]["ok"] is False, checks[check]
    assert checks[check]["advice"], checks[check]
    for part in parts:
        assert part in checks[check]["finding"], checks[check]


def compose(stack: Stack, *words: str, **env: str) -> None:
    command = ["docker", "compose", *words]
    done = subprocess.run(command, cwd=ROOT, env=settings(stack) | env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def bridge(stack: Stack) -> str:
    """This machine's address on the gateway's network, which nobody outside can reach."""
    network = stack.docker.networks.get(f"{stack.project}_edge")
    return str(network.attrs["IPAM"]["Config"][0]["Gateway"]).split("/")[0]


@pytest.fixture
def faulty(stack: Stack, tmp_path: Path, bridge: str) -> Iterator[None]:
    """The stack with faults: a gateway that is published beyond loopback and has the placeholder, logs contents, and
    has little disk; an engine on a network with a way out; and two more services, which are published."""
    override, files = tmp_path / "compose.faulty.yaml", settings(stack)["COMPOSE_FILE"]
    override.write_text(FAULTY.format(bridge=bridge, config=ROOT / "config"))
    engine, edge = f"{stack.project}-engine-1", f"{stack.project}_edge"

    def more(service: str, address: str) -> AbstractContextManager[str]:
        labels = f"--label=com.docker.compose.project={stack.project}", f"--label=com.docker.compose.service={service}"
        words = f"--publish={address}::3000", "--entrypoint=sleep", f"{stack.project}-gateway", "3600"
        return container(f"{stack.project}-{service}", *labels, *words)

    try:
        compose(stack, "up", "--detach", "gateway", COMPOSE_FILE=f"{files}:{override}")
        gateway = stack.container("gateway")
        check = gateway.attrs["Config"]["Healthcheck"]["Test"][1:]  # Docker makes it every ten seconds
        wait_for(lambda: gateway.exec_run(check).exit_code == 0, deadline=150)
        docker("network", "connect", edge, engine)
        docker("exec", f"{stack.project}-gateway-1", "stack", "keys", "create", "mine")
        with more("grafana", bridge), more("engine-spare", "127.0.0.1"):
            yield
    finally:
        docker("network", "disconnect", edge, engine)
        compose(stack, "up", "--detach", "--force-recreate", "gateway")
        stack.wait_until_ready()


def test_nothing_is_wrong_with_the_stack(stack: Stack, bridge: str) -> None:
    """And every check has been made. Nothing is left of the key with which it called."""
    docker("exec", f"{stack.project}-gateway-1", "stack", "backup", "/tmp/backup")
    with tls_server(bridge, bridge, days=300) as address:
        status, checks = doctor(stack, "--tls", address)
    assert status == 0, checks
    page = (ROOT / "docs/doctor.md").read_text()
    documented = set(re.findall(r"`(stack\.[^`]+)`[^`]*(?=\||, `stack)", page))
    quiet = {
        "stack.capabilities",
        "stack.checks",
        "stack.gateway",
        "stack.settings",
        "stack.outside",
    }  # they are said only of a fault, or of an engine outside
    assert {name for name in checks if name.startswith("stack.")} == documented - quiet
    assert all(it["ok"] for it in checks.values()), checks
    assert "ends in 300 days" in checks["stack.certificate"]["finding"]
    assert "the model called it" in checks["stack.forced_tool"]["finding"]
    assert "make doctor" not in docker("exec", f"{stack.project}-gateway-1", "stack", "keys", "list")


@pytest.mark.usefixtures("faulty")
def test_faults_of_a_running_gateway_are_named(stack: Stack, tmp_path: Path, bridge: str) -> None:
    write_program(tmp_path / "date", 'echo $(($(/bin/date "$@") - 3600))\n')
    path = f"{tmp_path}:{os.environ['PATH']}"
    with tls_server(bridge, bridge, days=3) as address:
        status, checks = doctor(stack, "--tls", address, PATH=path)
    assert status == 1
    names(checks, "stack.published", f"gateway is published at {bridge}:", "STACK_PUBLISH says only this machine")
    names(checks, "stack.published", f"grafana is published at {bridge}:", "engine-spare is published at 127.0.0.1:")
    names(checks, "stack.keys", "the placeholder 'dev-key' opens the gateway at", "beyond this machine")
    names(checks, "stack.engine", f"the network {stack.project}_edge has a route out")
    names(checks, "stack.engine", f"engine reaches this machine at {bridge}")
    names(checks, "stack.services", "gateway runs with other settings than .env")
    names(checks, "stack.disk", "0.1 GB are free where keys and usage are kept")
    names(checks, "stack.backup", "there was never a backup, and the store has 1 key(s)")
    names(checks, "stack.certificate", "ends in 3 days")
    names(checks, "stack.clock", "differs from this machine's by about 36")
    names(checks, "stack.canary", "a prompt or a key can be read in the logs of: gateway")
    assert checks["stack.chat"]["ok"]


def test_faults_of_the_engine_and_the_store_are_named(stack: Stack, bridge: str) -> None:
    gateway, engine = f"{stack.project}-gateway-1", f"{stack.project}-engine-1"
    key = json.loads(docker("exec", gateway, "stack", "keys", "create", "mine", "--json"))["key"]["id"]
    docker("exec", gateway, "touch", "-d", "9 days ago", "/var/lib/stack/last-backup")
    docker("stop", "--time", "1", engine)
    try:
        with tls_server(bridge, "llm.example", days=300) as address:
            status, checks = doctor(stack, "--tls", address, STACK_GRACE="5m")
        assert status == 1
        names(checks, "stack.settings", "STACK_GRACE: Input should be a valid number")
        names(checks, "stack.services", "engine does not run")
        names(checks, "stack.ready", "")
        names(checks, "stack.backup", "the last backup is 9 days old, and the store has")
        names(checks, "stack.certificate", f"is refused for {bridge}", "mismatch")
        assert checks["stack.capabilities"]["ok"] is None

        docker("exec", gateway, "chmod", "0400", "/var/lib/stack/stack.db")
        told = docker("exec", gateway, "stack", "doctor")  # the part of it that runs there
        assert "failed\tstore\tThe gateway's store cannot be used right now: /var/lib/stack/stack.db: " in told
    finally:
        docker("exec", gateway, "chmod", "0600", "/var/lib/stack/stack.db")
        docker("exec", gateway, "stack", "keys", "delete", "--yes", key)
        docker("start", engine)
        stack.wait_until_ready()


def test_a_gateway_that_does_not_run_is_named(stack: Stack) -> None:
    docker("stop", "--time", "1", f"{stack.project}-gateway-1")
    try:
        status, checks = doctor(stack)
    finally:
        docker("start", f"{stack.project}-gateway-1")
        stack.wait_until_ready()
    assert status == 1
    names(checks, "stack.gateway", "the gateway does not run (its last words: ")
