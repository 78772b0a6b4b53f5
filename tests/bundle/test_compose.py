"""What the compose files come to for each engine: who is published, who reaches whom, how containers are confined."""

import json
import re
import subprocess
from typing import Any

import pytest

from gateway.settings import Settings
from tests.bundle.conftest import OVERRIDES, ROOT, clean_environment

ENGINES = sorted(OVERRIDES)
Config = dict[str, Any]


def merged(engine: str, **env: str) -> Config:
    """The configuration as in a fresh clone: no .env, nothing set."""
    files = [option for file in ["compose.yaml", *OVERRIDES[engine]] for option in ("-f", file)]
    command = ["docker", "compose", "--env-file", "/dev/null", *files, "config", "--format", "json"]
    answer = subprocess.run(command, cwd=ROOT, env=clean_environment(**env), capture_output=True, check=True)
    config: Config = json.loads(answer.stdout)
    return config


@pytest.fixture(scope="module", params=ENGINES)
def config(request: pytest.FixtureRequest) -> Config:
    return merged(request.param)


def test_only_the_gateway_is_published_and_on_loopback(config: Config) -> None:
    published = {name: service["ports"] for name, service in config["services"].items() if "ports" in service}
    assert list(published) == ["gateway"]
    (port,) = published["gateway"]
    assert (port["host_ip"], port["published"], port["target"]) == ("127.0.0.1", "9000", 9000)


def test_one_variable_tells_docker_and_the_gateway_where_it_is_published() -> None:
    gateway = merged("ollama", STACK_PUBLISH="0.0.0.0:9100")["services"]["gateway"]
    assert gateway["environment"]["STACK_PUBLISH"] == "0.0.0.0:9100"
    assert (gateway["ports"][0]["host_ip"], gateway["ports"][0]["published"]) == ("0.0.0.0", "9100")


def test_the_engine_is_only_on_the_private_network_and_the_provisioner_only_on_the_way_out(config: Config) -> None:
    networks = {name: set(service["networks"]) for name, service in config["services"].items()}
    assert networks["gateway"] == {"edge", "backend", "metrics"}
    assert networks["engine"] == {"backend"}
    assert networks.get("provision", {"egress"}) == {"egress"}
    for name in ("backend", "metrics"):
        network = config["networks"][name]
        assert network["internal"] is True
        assert network["driver_opts"] == {"com.docker.network.bridge.inhibit_ipv4": "true"}


def test_metrics_listen_at_the_address_of_their_own_network_alone(config: Config) -> None:
    """On all addresses they would be readable at the container's: for the host, the engine, and neighbours on edge."""
    gateway = config["services"]["gateway"]
    (alias,) = gateway["networks"]["metrics"]["aliases"]
    assert gateway["environment"]["STACK_METRICS_BIND"] == f"{alias}:9090"


def test_metrics_can_be_switched_off() -> None:
    environment = merged("ollama", STACK_METRICS_BIND="")["services"]["gateway"]["environment"]
    assert environment["STACK_METRICS_BIND"] == ""


def test_every_service_is_confined(config: Config) -> None:
    for name, service in config["services"].items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["read_only"] is True, name
        assert service["tmpfs"], name
        assert service["init"] is True, name
        assert service["pids_limit"] > 0, name
        assert service["logging"]["options"]["max-size"], name
        assert "privileged" not in service, name
        assert "network_mode" not in service, name
    assert int(config["services"]["gateway"]["mem_limit"]) > 0


def test_every_image_runs_as_a_numbered_user_that_is_not_root(config: Config) -> None:
    for name, service in config["services"].items():
        build = service["build"]
        dockerfile = (ROOT / build["context"] / build["dockerfile"]).read_text()
        users = re.findall(r"^USER (.+)$", dockerfile.rpartition("\nFROM ")[2], re.MULTILINE)
        assert re.fullmatch(r"[1-9]\d+:\d+", users[-1]), name


def test_images_are_pinned_and_ours_are_never_pulled(config: Config) -> None:
    for name, service in config["services"].items():
        assert service["pull_policy"] == "build", name
        assert "image" not in service, name
        for image in service["build"]["args"].values():
            assert re.search(r":v?\d+\.\d+\.\d+(-[a-z-]+)?$", image), image


def test_the_dockerfiles_own_defaults_are_those_of_the_compose_files() -> None:
    said: dict[str, set[str]] = {}
    for engine in ENGINES:
        for service in merged(engine)["services"].values():
            for name, image in service["build"]["args"].items():
                said.setdefault(name, set()).add(image)
    for dockerfile in [ROOT / "Dockerfile", *ROOT.glob("engine/*/Dockerfile")]:
        for name, image in re.findall(r"^ARG (\w+)=(.+)$", dockerfile.read_text(), re.MULTILINE):
            said[name].add(image)
    assert {name: len(images) for name, images in said.items()} == dict.fromkeys(said, 1), said


def test_the_gateway_is_given_longer_to_stop_than_it_may_take(config: Config) -> None:
    period = config["services"]["gateway"]["stop_grace_period"]
    minutes, seconds = re.fullmatch(r"(\d+)m(\d+)s", period).groups()  # type: ignore[union-attr]
    longest = sum(_upper_bound(name) for name in ("stack_drain_delay", "stack_grace"))
    assert int(minutes) * 60 + int(seconds) > longest


def _upper_bound(name: str) -> float:
    bounds = [rule.le for rule in Settings.model_fields[name].metadata if hasattr(rule, "le")]
    return float(bounds[0])


def test_the_gateway_goes_before_the_engine_and_does_not_wait_for_its_health(config: Config) -> None:
    """`down` stops dependents first: running answers end while the engine still makes them."""
    depends = config["services"]["gateway"]["depends_on"]
    assert {name: rule["condition"] for name, rule in depends.items()} == {"engine": "service_started"}


def test_every_setting_reaches_the_gateway(config: Config) -> None:
    passed = set(config["services"]["gateway"]["environment"])
    fields = {name.upper() for name in Settings.model_fields}
    # The key file is mounted where the gateway looks for it; its path on the host means nothing inside.
    assert passed == fields - {"STACK_API_KEYS_FILE", "STACK_CONFIG"}
    assert config["services"]["gateway"]["secrets"][0]["target"] == "/run/secrets/stack_api_keys"


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        ("ollama", ("ollama", "http://engine:11434/v1", "llama3.1:8b")),
        ("vllm", ("vllm", "http://engine:8000/v1", "meta-llama/Llama-3.1-8B-Instruct")),
        ("tiny", ("llamacpp", "http://engine:8080/v1", "SmolLM2-135M-Instruct")),
    ],
)
def test_each_engine_has_its_backend_address_and_default_model(engine: str, expected: tuple[str, str, str]) -> None:
    environment = merged(engine)["services"]["gateway"]["environment"]
    assert (environment["LLM_BACKEND"], environment["LLM_BASE_URL"], environment["LLM_MODEL"]) == expected


@pytest.mark.parametrize("engine", ["ollama", "vllm"])
def test_engine_and_provisioner_get_the_model_the_gateway_asks_for(engine: str) -> None:
    services = merged(engine, LLM_MODEL="some/model:tag")["services"]
    assert {service["environment"]["LLM_MODEL"] for service in services.values()} == {"some/model:tag"}


def test_the_tiny_engine_answers_to_the_other_engines_default_models() -> None:
    aliases = merged("tiny")["services"]["gateway"]["environment"]["STACK_MODEL_ALIASES"]
    assert {pair.partition("=")[0] for pair in aliases.split(",")} == {
        merged(engine)["services"]["gateway"]["environment"]["LLM_MODEL"] for engine in ("ollama", "vllm")
    }


@pytest.mark.parametrize("engine", ["vllm", "tiny"])
def test_nothing_of_ollama_is_left_under_another_engine(engine: str) -> None:
    assert "ollama" not in json.dumps(merged(engine)).lower()


def test_the_tiny_stack_has_no_provisioner_and_no_way_out() -> None:
    config = merged("tiny")
    assert set(config["services"]) == {"gateway", "engine"}
    assert set(config["networks"]) == {"edge", "backend", "metrics"}
    assert not config.get("volumes")


def test_vllm_reserves_the_gpus_it_splits_the_model_over() -> None:
    engine = merged("vllm", VLLM_GPU_COUNT="2")["services"]["engine"]
    (device,) = engine["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 2, "capabilities": ["gpu"]}
    assert "--tensor-parallel-size=2" in engine["command"]
    assert engine["environment"]["HF_HUB_OFFLINE"] == "1"
