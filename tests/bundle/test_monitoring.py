"""Monitoring: what MONITORING=on adds to the stack, and that a real Prometheus accepts all that it is told."""

import json
import re
import subprocess
from pathlib import Path
from typing import get_args

import pytest
import yaml

from gateway import metrics
from gateway.admission.memory import Reason
from gateway.limits.near import QUOTAS, SHARES
from tests.support.clone import OVERRIDES, Config, Tree, clone, merged
from tests.support.processes import ROOT, free_port

FOLDER = ROOT / "monitoring"
OURS = {"prometheus", "alertmanager", "grafana"}
DASHBOARD = json.loads((FOLDER / "grafana/dashboards/stack.json").read_text())
RULES = yaml.safe_load((FOLDER / "prometheus/rules.yml").read_text())["groups"][0]["rules"]
EXPRESSIONS = [it["expr"] for panel in DASHBOARD["panels"] for it in panel["targets"]] + [it["expr"] for it in RULES]


def promtool(*arguments: str | Path, given: str | None = None) -> None:
    ran = subprocess.run(
        ["promtool", *map(str, arguments)], input=given, text=True, capture_output=True, check=False, timeout=60
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


# ── What Prometheus, Alertmanager and Grafana are told ───────────────────────────────────────────────────────────────


def test_prometheus_accepts_its_configuration_and_rules() -> None:
    promtool("check", "config", FOLDER / "prometheus/prometheus.yml")


def test_every_alert_fires_when_it_has_to_and_only_then() -> None:
    promtool("test", "rules", FOLDER / "prometheus/rules_test.yml")


def test_every_alert_has_a_test_and_a_line_in_the_documentation() -> None:
    names = {it["alert"] for it in RULES}
    tests = yaml.safe_load((FOLDER / "prometheus/rules_test.yml").read_text())["tests"]
    fired = {it["alertname"] for test in tests for it in test["alert_rule_test"] if it["exp_alerts"]}
    silent = {it["alertname"] for test in tests for it in test["alert_rule_test"] if not it["exp_alerts"]}
    documented = set(re.findall(r"^\| `([A-Z]\w+)` \|", (ROOT / "docs/monitoring.md").read_text(), re.MULTILINE))
    assert names == fired == silent == documented


def test_rules_and_dashboard_name_metrics_that_exist() -> None:
    known = set(re.findall(r"^\| (stack_\w+) ", str(metrics.__doc__), re.MULTILINE))
    named = {it for text in EXPRESSIONS for it in re.findall(r"\bstack_\w+", text)}
    assert {re.sub(r"_(bucket|count|sum)$", "", it) for it in named} - known == set()


def test_rules_and_their_tests_use_label_values_that_exist() -> None:
    known = {"state": {*metrics.STATES}, "reason": {*get_args(Reason), "timeout"}, "quota": {*QUOTAS}}
    known |= {"percent": {str(it) for it in SHARES}, "kind": {"chat"}}
    known["outcome"] = {"finished", "client_left", "engine_broken_stream"}
    texts = [*EXPRESSIONS, (FOLDER / "prometheus/rules_test.yml").read_text()]
    named = {it for text in texts for it in re.findall(r'\b(\w+)\s*(?:=|!=)\s*"([^"]+)"', text) if it[0] in known}
    assert {label for label, _ in named} == set(known)
    assert {it for it in named if it[1] not in known[it[0]]} == set()


def test_the_dashboard_shows_every_metric() -> None:
    known = set(re.findall(r"^\| (stack_\w+) ", str(metrics.__doc__), re.MULTILINE))
    shown = {re.sub(r"_(bucket|count|sum)$", "", it) for text in EXPRESSIONS for it in re.findall(r"\bstack_\w+", text)}
    assert known == shown


def test_prometheus_can_read_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    plain = [it.replace("$__rate_interval", "5m").replace("$model", ".*") for it in EXPRESSIONS]
    rules = [{"record": f"it:{number}", "expr": text} for number, text in enumerate(plain)]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", file)


def test_the_dashboard_uses_the_data_source_that_is_provisioned() -> None:
    (source,) = yaml.safe_load((FOLDER / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((FOLDER / "grafana/provisioning/dashboards/stack.yml").read_text())["providers"]
    assert source["url"] == "http://prometheus:9090"
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} == {source["uid"]}
    mounts = with_monitoring()["services"]["grafana"]["volumes"]
    assert provider["options"]["path"] in {it["target"] for it in mounts}


# ── The compose file ─────────────────────────────────────────────────────────────────────────────────────────────────


def with_monitoring(engine: str = "ollama", **env: str) -> Config:
    return merged(engine, "compose.monitoring.yaml", **env)


@pytest.fixture(params=sorted(OVERRIDES))
def config(request: pytest.FixtureRequest) -> Config:
    return with_monitoring(request.param)


def test_it_changes_nothing_of_the_stack(config: Config) -> None:
    engine = next(it for it in OVERRIDES if with_monitoring(it)["services"]["engine"] == config["services"]["engine"])
    alone = merged(engine)
    assert {name: it for name, it in config["services"].items() if name not in OURS} == alone["services"]
    assert {name: it for name, it in config["networks"].items() if name != "monitoring"} == alone["networks"]


def test_its_services_are_confined_and_do_not_meet_the_engine(config: Config) -> None:
    for name in OURS:
        service = config["services"][name]
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["read_only"] is True, name
        assert service["pids_limit"] > 0, name
        assert re.fullmatch(r"[1-9]\d+:\d+", service["user"]), name
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name
        assert set(service["networks"]) == ({"metrics", "monitoring"} if name == "prometheus" else {"monitoring"}), name


def test_it_is_published_on_loopback_unless_something_else_is_said() -> None:
    services = with_monitoring()["services"]
    ports = {name: it["ports"][0] for name, it in services.items() if name in OURS and "ports" in it}
    assert {name: (it["host_ip"], it["published"]) for name, it in ports.items()} == {
        "grafana": ("127.0.0.1", "3000"),
        "prometheus": ("127.0.0.1", "9091"),
    }
    moved = with_monitoring(GRAFANA_PUBLISH="0.0.0.0:3100")["services"]["grafana"]["ports"][0]
    assert (moved["host_ip"], moved["published"]) == ("0.0.0.0", "3100")


def test_alerts_go_to_a_webhook_if_there_is_one() -> None:
    for env, file in (({}, "alertmanager.yml"), ({"STACK_ALERT_WEBHOOK_FILE": "hook"}, "webhook/alertmanager.yml")):
        config = with_monitoring(**env)
        service = config["services"]["alertmanager"]
        assert service["command"][0] == f"--config.file=/etc/alertmanager/{file}"
        told = yaml.safe_load((FOLDER / "alertmanager" / file).read_text())
        assert told["route"]["receiver"] == told["receivers"][0]["name"]
        if env:
            (hook,) = told["receivers"][0]["webhook_configs"]
            assert hook["url_file"] == service["secrets"][0]["target"]
            assert config["secrets"]["alert_webhook"]["file"].endswith("/hook")


# ── The switch ───────────────────────────────────────────────────────────────────────────────────────────────────────


FILES = """
. scripts/lib/say.sh
. scripts/lib/docker.sh
. scripts/lib/dotenv.sh
. scripts/lib/parts.sh
. scripts/lib/stack.sh
. scripts/lib/address.sh
choose_engine
echo "$COMPOSE_FILE"
"""


BOTH = "compose.yaml:compose.monitoring.yaml:compose.chat.yaml"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    tree = clone(tmp_path_factory.mktemp("clone"))
    (tree.path / "a").mkdir()
    (tree.path / "a/mine.yaml").write_text("services: { gateway: { labels: { mine: 'yes' } } }\n")
    return tree


@pytest.mark.parametrize(
    ("recorded", "chosen", "expected"),
    [
        ("", {}, "compose.yaml"),
        ("", {"MONITORING": "on"}, "compose.yaml:compose.monitoring.yaml"),
        ("compose.yaml", {"MONITORING": "on"}, "compose.yaml:compose.monitoring.yaml"),
        ("compose.yaml:compose.monitoring.yaml", {}, "compose.yaml:compose.monitoring.yaml"),
        ("compose.yaml:compose.monitoring.yaml", {"MONITORING": "on"}, "compose.yaml:compose.monitoring.yaml"),
        ("compose.yaml:compose.monitoring.yaml", {"MONITORING": "off"}, "compose.yaml"),
        ("", {"WITH": "chat,monitoring"}, BOTH),
        ("compose.yaml:compose.chat.yaml", {"WITH": "monitoring"}, BOTH),
        (BOTH, {"WITH": "chat", "MONITORING": "off"}, "compose.yaml:compose.chat.yaml"),
        (
            "compose.yaml:compose.monitoring.yaml",
            {"ENGINE": "tiny"},
            "compose.yaml:compose.tiny.yaml:compose.monitoring.yaml",
        ),
        (
            "compose.yaml:compose.monitoring.yaml:compose.tiny.yaml",
            {"MONITORING": "off"},
            "compose.yaml:compose.tiny.yaml",
        ),
        ("compose.yaml:compose.gpu.yaml:a/mine.yaml", {"ENGINE": "tiny"}, "compose.yaml:compose.tiny.yaml:a/mine.yaml"),
        (
            "./compose.yaml:a/mine.yaml:compose.monitoring.yaml",
            {},
            "compose.yaml:compose.monitoring.yaml:a/mine.yaml",
        ),
    ],
)
def test_the_choice_is_kept_until_another_one_is_made(
    tree: Tree, recorded: str, chosen: dict[str, str], expected: str
) -> None:
    tree.dotenv.write_text(f"COMPOSE_FILE={recorded}\n" if recorded else "")
    ran = tree.run("bash", "-euc", FILES, **chosen)
    assert (ran.returncode, ran.stdout.strip()) == (0, expected), ran.stdout


def test_another_word_is_refused(tree: Tree) -> None:
    tree.dotenv.write_text("")
    ran = tree.run("bash", "-euc", FILES, MONITORING="yes")
    assert ran.returncode == 1
    assert "MONITORING=yes is not known: use on or off." in ran.stdout
    ran = tree.run("bash", "-euc", FILES, WITH="chat,grafana")
    assert ran.returncode == 1
    assert "WITH=chat,grafana: 'grafana' is not known: use monitoring tls chat, with commas" in ran.stdout


def test_a_registry_that_does_not_answer_is_told_before_anything_is_changed(tree: Tree) -> None:
    tree.dotenv.write_text("")
    image = f"127.0.0.1:{free_port()}/prometheus:v1.2.3"
    ran = tree.run("scripts/up", ENGINE="tiny", MONITORING="on", PROMETHEUS_IMAGE=image, STACK_PUBLISH="127.0.0.1:0")
    assert ran.returncode == 1, ran.stdout
    last = ran.stdout.rstrip().splitlines()[-1]
    assert last.startswith(f"stack: No registry answers for {image} ("), ran.stdout
    assert tree.dotenv.read_text() == ""
