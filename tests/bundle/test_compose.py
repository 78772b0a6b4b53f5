"""What the compose files come to, for every documented combination of files and settings: who is published, who reaches
whom, how containers are confined, and that nothing of another engine is left over."""

import json
import re

import pytest

from gateway.settings import Settings
from tests.support.clone import OVERRIDES, Config, merged
from tests.support.processes import ROOT

ENGINES = sorted(OVERRIDES)

# Chosen GPUs: the override of the README, word for word.
(CHOSEN_GPUS,) = (
    it
    for it in re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    if "device_ids" in it
)

# Settings that .env.example describes, each group away from its defaults.
SETTINGS = {
    "defaults": {},
    "published": {"STACK_PUBLISH": "0.0.0.0:9100", "STACK_API_KEYS_FILE": ".secrets/api_keys", "STACK_MEMORY": "2g"},
    "model": {"LLM_MODEL": "some/model:tag", "STACK_MODEL_ALIASES": "a=some/model:tag", "HF_TOKEN_FILE": "token"},
    "engine": {
        "OLLAMA_NUM_PARALLEL": "4",
        "OLLAMA_CONTEXT_LENGTH": "8192",
        "OLLAMA_KEEP_ALIVE": "-1",
        "LLAMA_ARG_THREADS": "2",
        "VLLM_GPU_COUNT": "4",
        "VLLM_TENSOR_PARALLEL_SIZE": "2",
        "VLLM_MAX_MODEL_LEN": "4096",
        "VLLM_GPU_MEMORY_UTILIZATION": "0.5",
        "VLLM_MAX_NUM_SEQS": "16",
        "VLLM_MAX_NUM_QUEUED_REQS": "32",
        "VLLM_SHM_SIZE": "16g",
        "VLLM_TOOL_PARSER": "hermes",
        "VLLM_REASONING_PARSER": "qwen3",
        "VLLM_EXTRA_ARGS": "--dtype=half",
    },
    "mirrors": {
        "PYTHON_IMAGE": "mirror.example/python:3.13.16",
        "OLLAMA_IMAGE": "mirror.example:5000/ollama:0.32.15",
        "VLLM_IMAGE": "mirror.example/vllm:v0.32.0",
    },
}
COMBINATIONS = [*((engine, name) for engine in ENGINES for name in SETTINGS), ("vllm", "chosen GPUs")]


@pytest.fixture(scope="module", params=COMBINATIONS, ids=" ".join)
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Config:
    engine, settings = request.param
    if settings == "chosen GPUs":
        override = tmp_path_factory.mktemp("override") / "compose.mine.yaml"
        override.write_text(CHOSEN_GPUS)
        return merged(engine, str(override)) | {"engine": engine}
    return merged(engine, **SETTINGS[settings]) | {"engine": engine}


def test_only_the_gateway_is_published(config: Config) -> None:
    published = {name: service["ports"] for name, service in config["services"].items() if "ports" in service}
    assert list(published) == ["gateway"]
    (port,) = published["gateway"]
    said = config["services"]["gateway"]["environment"]["STACK_PUBLISH"]
    assert (f"{port['host_ip']}:{port['published']}", port["target"]) == (said, 9000)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_gateway_is_published_on_loopback_by_default(engine: str) -> None:
    (port,) = merged(engine)["services"]["gateway"]["ports"]
    assert (port["host_ip"], port["published"]) == ("127.0.0.1", "9000")


def test_an_override_leaves_no_volume_secret_or_network_unused(config: Config) -> None:
    """Every declared one is used, and nothing names an engine that is not there."""
    for kind in ("networks", "volumes", "secrets"):
        used: set[str] = set()
        for service in config["services"].values():
            entries = service.get(kind) or ()
            named = [
                it if isinstance(it, str) else it["source"]
                for it in entries
                if isinstance(it, str) or it.get("type") != "bind"
            ]
            used |= set(named)
        assert set(config.get(kind) or ()) == used, kind
    text = json.dumps({name: value for name, value in config.items() if name != "engine"}).lower()
    for other, words in {
        "ollama": ["ollama"],
        "vllm": ["vllm", "nvidia", "hf_"],
        "tiny": ["llamacpp", "smollm"],
    }.items():
        assert other == config["engine"] or not [word for word in words if word in text], other


def test_gpus_are_reserved_for_vllm_alone(config: Config) -> None:
    reserving = {name for name, service in config["services"].items() if "deploy" in service}
    assert reserving == ({"engine"} if config["engine"] == "vllm" else set())
    if reserving:
        (device,) = config["services"]["engine"]["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
        assert ("count" in device) != ("device_ids" in device)


def test_the_gateway_reads_progress_and_only_the_provisioner_writes_it(config: Config) -> None:
    if config["engine"] == "tiny":
        return
    mounts = {
        (name, mount["target"], mount.get("read_only", False))
        for name, service in config["services"].items()
        for mount in service["volumes"]
        if mount["source"] == "progress"
    }
    assert mounts == {("gateway", "/run/progress", True), ("provision", "/progress", False)}


def test_a_secret_from_another_file_recreates_its_container(config: Config) -> None:
    """Compose itself does not compare the files of secrets."""
    files = {name: secret["file"].rpartition("/")[2] for name, secret in config["secrets"].items()}
    for service in config["services"].values():
        for secret in service.get("secrets", ()):
            assert any(label.endswith(files[secret["source"]]) for label in service["labels"].values())


def test_one_variable_tells_docker_and_the_gateway_where_it_is_published() -> None:
    gateway = merged("ollama", STACK_PUBLISH="0.0.0.0:9100")["services"]["gateway"]
    assert gateway["environment"]["STACK_PUBLISH"] == "0.0.0.0:9100"
    assert (gateway["ports"][0]["host_ip"], gateway["ports"][0]["published"]) == ("0.0.0.0", "9100")


def test_the_engine_has_only_the_private_network_and_the_provisioner_only_the_one_with_a_route_out(
    config: Config,
) -> None:
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


def test_docker_waits_longer_than_the_gateway_may_take_to_stop(config: Config) -> None:
    period = config["services"]["gateway"]["stop_grace_period"]
    minutes, seconds = re.fullmatch(r"(\d+)m(\d+)s", period).groups()  # type: ignore[union-attr]
    longest = sum(_upper_bound(name) for name in ("stack_drain_delay", "stack_grace"))
    assert int(minutes) * 60 + int(seconds) > longest


def _upper_bound(name: str) -> float:
    bounds = [rule.le for rule in Settings.model_fields[name].metadata if hasattr(rule, "le")]
    return float(bounds[0])


def test_the_gateway_stops_before_the_engine_and_does_not_wait_for_its_health(config: Config) -> None:
    """`down` stops dependents first: running answers end while the engine still makes them."""
    depends = config["services"]["gateway"]["depends_on"]
    assert {name: rule["condition"] for name, rule in depends.items()} == {"engine": "service_started"}


def test_every_setting_reaches_the_gateway(config: Config) -> None:
    passed = set(config["services"]["gateway"]["environment"])
    fields = {name.upper() for name in Settings.model_fields}
    # The key file is mounted where the gateway looks for it; its path on the host means nothing inside.
    assert passed == fields - {
        "STACK_API_KEYS_FILE",
        "STACK_ADMIN_KEYS_FILE",
        "STACK_STORE_URL_FILE",
        "STACK_CONFIG",
        "STACK_DATA_DIR",
    }
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
    asked = {name: service["environment"].get("LLM_MODEL") for name, service in services.items()}
    # Ollama serves every model on its volume.
    assert asked == dict.fromkeys(services, "some/model:tag") | ({"engine": None} if engine == "ollama" else {})


def test_the_tiny_engine_answers_to_the_other_engines_default_models() -> None:
    aliases = merged("tiny")["services"]["gateway"]["environment"]["STACK_MODEL_ALIASES"]
    assert {pair.partition("=")[0] for pair in aliases.split(",")} == {
        merged(engine)["services"]["gateway"]["environment"]["LLM_MODEL"] for engine in ("ollama", "vllm")
    }


def test_the_tiny_stack_has_no_provisioner_and_no_network_with_a_route_out() -> None:
    config = merged("tiny")
    assert set(config["services"]) == {"gateway", "engine"}
    assert set(config["networks"]) == {"edge", "backend", "metrics"}
    assert set(config["volumes"]) == {"data"}  # the gateway's own


def test_vllm_reserves_the_gpus_it_splits_the_model_over() -> None:
    engine = merged("vllm", VLLM_GPU_COUNT="2")["services"]["engine"]
    (device,) = engine["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 2, "capabilities": ["gpu"]}
    assert "--tensor-parallel-size=2" in engine["command"]
    assert engine["environment"]["HF_HUB_OFFLINE"] == "1"


def test_vllms_own_settings_reach_it() -> None:
    engine = merged("vllm", **SETTINGS["engine"])["services"]["engine"]
    assert engine["command"] == [
        "--max-model-len=4096",
        "--gpu-memory-utilization=0.5",
        "--tensor-parallel-size=2",
        "--max-num-seqs=16",
        "--max-num-queued-reqs=32",
    ]
    assert int(engine["shm_size"]) == 16 << 30


def test_ollamas_own_settings_reach_it() -> None:
    environment = merged("ollama", **SETTINGS["engine"])["services"]["engine"]["environment"]
    assert (
        SETTINGS["engine"].items()
        >= {name: value for name, value in environment.items() if name in SETTINGS["engine"]}.items()
    )
    assert {name for name in SETTINGS["engine"] if name.startswith("OLLAMA")} <= set(environment)


@pytest.mark.parametrize(
    ("engine", "slots", "context"),
    [("ollama", "4", "8192"), ("vllm", "16", "4096"), ("tiny", "", None), ("outside", "", "")],
)
def test_the_gateway_is_told_the_slots_and_the_context_of_its_own_engine_alone(
    engine: str, slots: str, context: str | None
) -> None:
    outside = ("compose.outside.yaml",) if engine == "outside" else ()
    settings = SETTINGS["engine"] | {"LLM_BASE_URL": "http://engine.example"}
    config = merged("ollama" if outside else engine, *outside, **settings)
    environment = config["services"]["gateway"]["environment"]
    assert (environment["LLM_SLOTS"], environment["LLM_CONTEXT"]) == (slots, context)


def test_a_directory_is_mounted_as_one_whatever_its_path(config: Config) -> None:
    """The short form would split the path of the clone at a colon, and make a directory that is missing."""
    services = merged("ollama", "compose.monitoring.yaml")["services"] | config["services"]
    mounts = [mount for it in services.values() for mount in it.get("volumes", ()) if mount["type"] == "bind"]
    assert {it["target"] for it in mounts} >= {"/etc/stack", "/etc/prometheus", "/etc/alertmanager"}
    assert [it for it in mounts if it["bind"].get("create_host_path") or not it["read_only"]] == []


def test_only_the_provisioner_gets_the_token() -> None:
    services = merged("vllm", HF_TOKEN_FILE="token")["services"]
    holding = {
        name for name, it in services.items() if any(secret["source"] == "hf_token" for secret in it.get("secrets", ()))
    }
    assert holding == {"provision"}
    assert not any("HF_TOKEN" in name for it in services.values() for name in it["environment"])


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_has_the_same_shape(engine: str) -> None:
    services = merged(engine)["services"]
    assert services["engine"]["healthcheck"]["test"] == ["CMD", "/opt/engine/health"]
    assert services.get("provision", {"entrypoint": ["/opt/engine/provision"]})["entrypoint"] == [
        "/opt/engine/provision"
    ]
    dockerfile = ROOT / services["engine"]["build"]["context"] / services["engine"]["build"]["dockerfile"]
    assert 'ENTRYPOINT ["/opt/engine/serve"]' in dockerfile.read_text()
