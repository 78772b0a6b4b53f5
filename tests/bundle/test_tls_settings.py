"""TLS: what TLS=on changes in the stack, and which settings are refused before anything is changed."""

import json
import re

import pytest

from gateway.cli.doctor import walls
from gateway.settings import Settings
from tests.support.clone import OVERRIDES, Config, Tree, clone, merged, refuses


def with_tls(engine: str = "ollama", **env: str) -> Config:
    return merged(engine, "compose.tls.yaml", **env)


@pytest.mark.parametrize("engine", sorted(OVERRIDES))
def test_it_changes_the_gateways_surroundings_and_nothing_else(engine: str) -> None:
    config, alone = with_tls(engine), merged(engine)
    assert set(config["services"]) - set(alone["services"]) == {"caddy"}
    ours, before = config["services"].pop("gateway"), alone["services"].pop("gateway")
    assert {name: config["services"][name] for name in alone["services"]} == alone["services"]
    changed = {name for name in ours | before if ours.get(name) != before.get(name)}
    assert changed == {"ports", "networks", "environment", "depends_on"}
    told = {name for name, value in ours["environment"].items() if value != before["environment"][name]}
    assert told == {"STACK_ALLOWED_HOSTS", "STACK_PROXY_NETWORK"}


def test_caddy_has_the_address_and_the_gateway_none() -> None:
    services = with_tls(STACK_PUBLISH="0.0.0.0:443")["services"]
    assert {name for name, it in services.items() if "ports" in it} == {"caddy"}
    (port,) = services["caddy"]["ports"]
    assert (port["host_ip"], port["published"], port["target"]) == ("0.0.0.0", "443", 8443)
    assert services["gateway"]["environment"]["STACK_PUBLISH"] == "0.0.0.0:443"  # so weak keys are refused
    (port,) = with_tls()["services"]["caddy"]["ports"]
    assert (port["host_ip"], port["published"]) == ("127.0.0.1", "9000")


@pytest.mark.parametrize(
    ("service", "port", "state", "finding"),
    [
        ("caddy", "8444/tcp", "ok", "only caddy at 127.0.0.1:443; the chat window by TLS at 0.0.0.0:3001"),
        ("caddy", "8443/tcp", "failed", "caddy is published at 0.0.0.0:3001, and STACK_PUBLISH says only this machine"),
        ("chat", "8080/tcp", "failed", "chat is published at 0.0.0.0:3001"),
    ],
)
def test_doctor_tells_the_chat_window_behind_caddy_from_other_published_ports(
    service: str, port: str, state: str, finding: str
) -> None:
    ports = {"caddy": {"8443/tcp": [{"HostIp": "127.0.0.1", "HostPort": "443"}]}}
    ports.setdefault(service, {}).setdefault(port, []).append({"HostIp": "0.0.0.0", "HostPort": "3001"})
    shared = {"hash": "", "mode": "edge", "networks": {"edge": {}}}
    lines = [json.dumps({"container": shared | {"service": it, "ports": its}}) for it, its in ports.items()]
    found = walls.published(walls.read(lines), Settings(stack_publish="127.0.0.1:443"))
    assert (found.state, found.finding) == (state, finding)


def test_caddy_is_the_gateways_only_neighbour_on_a_network_without_a_route_out() -> None:
    config = with_tls("tiny")
    assert {name for name, it in config["services"].items() if "tls" in it["networks"]} == {"caddy", "gateway"}
    assert set(config["services"]["caddy"]["networks"]) == {"edge", "tls"}
    assert config["networks"]["tls"]["internal"] is True
    assert config["networks"]["tls"]["driver_opts"] == {"com.docker.network.bridge.inhibit_ipv4": "true"}
    gateway = config["services"]["gateway"]
    assert gateway["networks"]["tls"]["aliases"] == [gateway["environment"]["STACK_PROXY_NETWORK"]]


def test_caddy_is_confined() -> None:
    caddy = with_tls()["services"]["caddy"]
    assert (caddy["cap_drop"], caddy["read_only"], caddy["init"]) == (["ALL"], True, True)
    assert caddy["security_opt"] == ["no-new-privileges:true"]
    assert caddy["pids_limit"] > 0
    assert re.fullmatch(r"caddy:\d+\.\d+\.\d+", caddy["build"]["args"]["CADDY_IMAGE"])


def test_the_names_of_the_setting_are_added_to_the_name_of_the_certificate() -> None:
    gateway = with_tls(STACK_TLS_NAME="llm.example.org", STACK_ALLOWED_HOSTS="a.test,b.test")["services"]["gateway"]
    assert gateway["environment"]["STACK_ALLOWED_HOSTS"] == "llm.example.org,a.test,b.test"


NEED_TLS = """
for it in say docker dotenv parts stack address preflight; do . scripts/lib/$it.sh; done
choose_engine
need_secret_files >/dev/null
need_tls
"""


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return clone(tmp_path_factory.mktemp("clone"))


PUBLIC = {"STACK_TLS": "acme", "STACK_TLS_NAME": "llm.example.org", "STACK_PUBLISH": "0.0.0.0:443"}
FILES = {"STACK_TLS": "files", "STACK_TLS_CERTIFICATE_FILE": "cert.pem"}


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({}, "TLS: localhost, with STACK_TLS=local"),
        ({"STACK_TLS_NAME": "192.168.1.10"}, "TLS: 192.168.1.10, with STACK_TLS=local"),
        (PUBLIC, "TLS: llm.example.org, with STACK_TLS=acme"),
        (PUBLIC | {"STACK_PUBLISH": ""}, "STACK_PUBLISH=127.0.0.1:9000 is this machine alone: set STACK_PUBLISH="),
        (PUBLIC | {"STACK_TLS_NAME": "llm"}, "STACK_TLS_NAME=llm is not one: set a name that leads to this machine"),
        (PUBLIC | {"STACK_TLS_NAME": "llm.lan"}, "STACK_TLS_NAME=llm.lan is not one"),
        (PUBLIC | {"STACK_TLS_NAME": "203.0.113.7"}, "STACK_TLS_NAME=203.0.113.7 is not one"),
        ({"STACK_TLS_NAME": "a.test {"}, "STACK_TLS_NAME=a.test { is not a host name"),
        ({"STACK_TLS_NAME": "https://a.test"}, "STACK_TLS_NAME=https://a.test is not a host name"),
        ({"STACK_TLS": "on"}, "STACK_TLS=on is not known: use local"),
        (FILES, "set STACK_TLS_CERTIFICATE_FILE and STACK_TLS_KEY_FILE."),
        (FILES | {"STACK_TLS_KEY_FILE": "key.pem"}, "'chown 10003 "),
        (FILES | {"STACK_TLS_KEY_FILE": "none.pem"}, "STACK_TLS_KEY_FILE names "),
    ],
)
def test_a_wrong_setting_is_named_before_anything_is_changed(checked: Tree, env: dict[str, str], said: str) -> None:
    for name, mode in (("cert.pem", 0o644), ("key.pem", 0o600)):
        (checked.path / name).touch()
        (checked.path / name).chmod(mode)
    ran = checked.run("bash", "-euc", NEED_TLS, TLS="on", **env)
    assert said in ran.stdout.splitlines()[-1], ran.stdout
    assert ran.returncode == (0 if said.startswith("TLS: ") else 1)


def test_a_registry_that_does_not_answer_is_told_before_anything_is_changed(tree: Tree, closed_port: str) -> None:
    image = f"{closed_port}/caddy:1.2.3"
    said = (
        f"No registry answers for {image} (",
        "connection refused): load",
        "set CADDY_IMAGE to",
        "run 'TLS=off make up'",
    )
    refuses(tree, *said, ENGINE="tiny", TLS="on", CADDY_IMAGE=image)
