"""The walls: who can reach what, and what a container may do. Each wall has a control beside it, so that a test which
can't fail is noticed."""

import ipaddress
import json
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from docker.models.containers import Container

from tests.support.processes import wait_for
from tests.support.stack import Stack

# Somebody must answer as the service would: some networks have a proxy that accepts any connection.
TRY = """
import urllib.request
try:
    print("answered", urllib.request.urlopen("http://{host}:{port}/health", timeout=3).status)
except OSError as exc:
    print("nobody", type(exc).__name__, exc)
"""


def reaches(stack: Stack, service: str, host: str, port: int) -> bool:
    return stack.python(service, TRY.format(host=host, port=port)) == "answered 200"


def host_routes_to(address: str) -> bool:
    """Whether one of this host's own networks holds the address. Where none does, a packet for it would leave by the
    default route for some stranger, so it isn't sent."""
    number = int.from_bytes(ipaddress.ip_address(address).packed, "little")
    routes = [line.split() for line in Path("/proc/net/route").read_text().splitlines()[1:]]
    masks = [(int(route[1], 16), int(route[7], 16)) for route in routes]
    return any(mask and number & mask == destination for destination, mask in masks)


def host_reaches(host: str, port: int) -> bool:
    if not host_routes_to(host):
        return False
    try:
        return httpx.get(f"http://{host}:{port}/health", timeout=3, headers={"host": "localhost"}).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture
def service_of_the_host() -> Iterator[int]:
    """A web server of this machine on all its addresses, answering 200."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("0.0.0.0", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_the_host_reaches_the_gateway_but_not_the_engine_by_its_address(stack: Stack) -> None:
    assert host_reaches(stack.address("gateway", "edge"), 9000)  # the control: this host does route to containers
    assert reaches(stack, "gateway", stack.address("engine", "backend"), 8080)  # …and the engine does answer there
    assert not host_reaches(stack.address("engine", "backend"), 8080)
    assert not host_reaches(stack.address("gateway", "backend"), 9000)


def test_no_other_container_on_the_edge_network_reaches_the_engine(stack: Stack) -> None:
    """By its name; by its address they would have to go through the host, which has no route to it (above)."""
    image = stack.container("gateway").image
    for host, port, expected in [("gateway", 9000, "answered 200"), ("engine", 8080, "nobody")]:
        output = stack.docker.containers.run(
            image,
            entrypoint=["python", "-c", TRY.format(host=host, port=port)],
            network=f"{stack.project}_edge",
            remove=True,
        )
        assert output.decode().startswith(expected), (host, output)


def test_the_engine_has_no_route_out(stack: Stack, service_of_the_host: int) -> None:
    """Neither to services of the host, at whichever address, nor to a name."""
    backend, edge = (stack.docker.networks.get(f"{stack.project}_{name}") for name in ("backend", "edge"))
    host_on_backend, host_on_edge = (it.attrs["IPAM"]["Config"][0]["Gateway"].split("/")[0] for it in (backend, edge))
    host_outside = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split()[0]
    assert reaches(stack, "gateway", host_on_edge, service_of_the_host)  # the control: containers can reach it
    assert reaches(stack, "gateway", host_outside, service_of_the_host)
    for address in (host_on_backend, host_on_edge, host_outside):
        assert not reaches(stack, "engine", address, service_of_the_host)
    resolve = "import socket\ntry: print(socket.getaddrinfo('example.com', 80))\nexcept OSError: print('no')"
    assert stack.python("engine", resolve) == "no"


@pytest.fixture
def keyless(stack: Stack) -> Iterator[Container]:
    """One more gateway on the same networks, whose key is the placeholder."""
    settings = [it for it in stack.container("gateway").attrs["Config"]["Env"] if not it.startswith("STACK_API_KEYS=")]
    container = stack.docker.containers.create(
        f"{stack.project}-gateway",
        environment=[*settings, "STACK_METRICS_BIND=", "STACK_DATA_DIR=/tmp/stack"],
        network=f"{stack.project}_edge",
        ports={"9000/tcp": ("127.0.0.1", None)},
    )
    try:
        stack.docker.networks.get(f"{stack.project}_backend").connect(container)
        container.start()
        container.reload()
        yield container
    finally:
        container.remove(force=True)


AUTHENTICATE = """
import urllib.request
url, key = "http://{host}:9000/v1/models", "Bearer {key}"
for host in ("localhost", "127.0.0.1", "gateway"):
    try:
        request = urllib.request.Request(url, headers={{"authorization": key, "host": host}})
        print(urllib.request.urlopen(request).status)
    except urllib.error.HTTPError as exc:
        print(exc.code, exc.read().decode())
"""


def test_the_placeholder_is_a_key_on_this_machine_and_not_in_the_engines_container(
    stack: Stack, keyless: Container
) -> None:
    url = f"http://127.0.0.1:{keyless.ports['9000/tcp'][0]['HostPort']}"

    def status(key: str) -> int:
        try:
            return httpx.get(url + "/v1/models", headers={"authorization": f"Bearer {key}"}).status_code
        except httpx.TransportError:
            return 0

    wait_for(lambda: status("dev-key") == 200, deadline=150)
    assert status("no-key") == 401
    address = keyless.attrs["NetworkSettings"]["Networks"][f"{stack.project}_backend"]["IPAddress"]
    answers = stack.python("engine", AUTHENTICATE.format(host=address, key="dev-key")).splitlines()
    assert len(answers) == 3
    for answer in answers:
        assert answer.startswith("401 ")
        assert "the placeholder 'dev-key' works only on this machine" in answer
    # The control: a key of its own is one from there, too.
    code, made = keyless.exec_run(["stack", "keys", "create", "engine", "--json"])
    assert code == 0, made
    allowed = AUTHENTICATE.format(host=address, key=json.loads(made)["secret"])
    wait_for(lambda: stack.python("engine", allowed).splitlines()[0] == "200")


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
