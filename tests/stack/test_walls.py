"""The walls: who can reach what, and what a container may do. Each wall has a control beside it, so that a test which
can't fail is noticed."""

import json
import socket
import subprocess
from typing import Any

import httpx

from tests.processes import wait_for
from tests.stack.conftest import Stack

TRY = """
import socket
try:
    socket.create_connection(({host!r}, {port}), timeout=3)
    print("connected")
except OSError as exc:
    print("refused", type(exc).__name__, exc)
"""


def reaches(stack: Stack, service: str, host: str, port: int) -> bool:
    return stack.python(service, TRY.format(host=host, port=port)) == "connected"


def host_reaches(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=3).close()
    except OSError:
        return False
    return True


def test_the_host_reaches_the_gateway_but_not_the_engine_by_its_address(stack: Stack) -> None:
    assert host_reaches(stack.address("gateway", "edge"), 9000)  # the control: this host does route to containers
    assert reaches(stack, "gateway", stack.address("engine", "backend"), 8080)  # …and the engine does listen there
    assert not host_reaches(stack.address("engine", "backend"), 8080)
    assert not host_reaches(stack.address("gateway", "backend"), 9000)


def test_nobody_else_on_the_edge_reaches_the_engine(stack: Stack) -> None:
    image = stack.container("gateway").image
    for host, port, expected in [
        ("gateway", 9000, "connected"),  # the control
        ("engine", 8080, "refused"),
        (stack.address("engine", "backend"), 8080, "refused"),
    ]:
        output = stack.docker.containers.run(
            image,
            entrypoint=["python", "-c", TRY.format(host=host, port=port)],
            network=f"{stack.project}_edge",
            remove=True,
        )
        assert output.decode().startswith(expected), (host, output)


def test_the_engine_has_no_way_out(stack: Stack) -> None:
    """Neither to the world nor to services of the host at the bridge's address."""
    network = stack.docker.networks.get(f"{stack.project}_backend")
    bridge = network.attrs["IPAM"]["Config"][0]["Gateway"].split("/")[0]
    edge = stack.docker.networks.get(f"{stack.project}_edge").attrs["IPAM"]["Config"][0]["Gateway"]
    with socket.create_server(("0.0.0.0", 0)) as listener:
        port = listener.getsockname()[1]
        assert reaches(stack, "gateway", edge, port)  # the control: the listener is there, and containers reach it
        assert not reaches(stack, "engine", bridge, port)
        assert not reaches(stack, "engine", edge, port)
        host_address = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split()[0]
        assert not reaches(stack, "engine", host_address, port)
    assert (
        stack.python("engine", "print(open('/proc/net/route').read().count('00000000\\t'))") == "0"
    )  # no default route
    assert not reaches(stack, "engine", "deb.debian.org", 80)


def test_only_the_gateway_publishes_and_only_on_loopback(stack: Stack) -> None:
    assert not stack.container("engine").attrs["HostConfig"]["PortBindings"]
    (binding,) = stack.container("gateway").attrs["HostConfig"]["PortBindings"]["9000/tcp"]
    assert binding["HostIp"] == "127.0.0.1"


def test_containers_are_hardened(stack: Stack) -> None:
    for service in ("gateway", "engine"):
        attrs: dict[str, Any] = stack.container(service).attrs
        host = attrs["HostConfig"]
        assert host["ReadonlyRootfs"]
        assert host["CapDrop"] == ["ALL"]
        assert not host["CapAdd"]
        assert "no-new-privileges:true" in host["SecurityOpt"]
        assert host["PidsLimit"] > 0
        assert not host["Privileged"]
        assert attrs["Config"]["User"].split(":")[0] not in ("", "0", "root")
        assert stack.python(service, "import os; print(os.getuid())") != "0"
        assert stack.python(service, WRITE) == "read-only"
        status = stack.python(service, "print(open('/proc/self/status').read())")
        assert "CapEff:\t0000000000000000" in status
        assert "NoNewPrivs:\t1" in status
    assert stack.container("gateway").attrs["HostConfig"]["Memory"] > 0


WRITE = """
import errno
try:
    open("/opt/x", "w")
except OSError as exc:
    print("read-only" if exc.errno in (errno.EROFS, errno.EACCES) else exc)
"""


def test_logs_of_the_container_are_json_and_whole(stack: Stack) -> None:
    answer = httpx.get(stack.url + "/health", headers={"x-request-id": "walls-1"})
    assert answer.headers["x-request-id"] == "walls-1"

    def logged() -> bool:
        lines = stack.container("gateway").logs(stdout=True, stderr=True).decode().splitlines()
        return any(json.loads(line).get("request_id") == "walls-1" for line in lines)

    assert wait_for(logged)
