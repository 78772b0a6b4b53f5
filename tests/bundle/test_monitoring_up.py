"""MONITORING=on: Prometheus, Alertmanager and a program in Grafana's place beside the tiny stack, from a fresh clone
made under umask 077."""

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import yaml

from tests.support.clone import Tree, clone
from tests.support.containers import build
from tests.support.processes import MESSAGES, ROOT, wait_for

RULES = yaml.safe_load((ROOT / "monitoring/prometheus/rules.yml").read_text())["groups"][0]["rules"]
IMAGES = ("PROMETHEUS_IMAGE", "ALERTMANAGER_IMAGE", "GRAFANA_IMAGE")
# As Docker's client configuration can set it in every container. Nothing listens there.
PROXIED = """
services:
  prometheus: { environment: &proxy { HTTP_PROXY: "http://127.0.0.1:9", http_proxy: "http://127.0.0.1:9" } }
  alertmanager: { environment: *proxy }
  grafana: { environment: *proxy }
"""
PUBLISHED = ("STACK_PUBLISH", "PROMETHEUS_PUBLISH", "GRAFANA_PUBLISH")


@pytest.fixture
def monitored(tmp_path_factory: pytest.TempPathFactory, python_image: str) -> Iterator[tuple[Tree, dict[str, str]]]:
    build("monitoring", "tests/bundle/monitoring")
    tree = clone(tmp_path_factory.mktemp("monitoring") / "clone")
    (tree.path / "proxied.yaml").write_text(PROXIED)
    tree.dotenv.write_text("COMPOSE_FILE=compose.yaml:compose.tiny.yaml:proxied.yaml\n")
    settings = dict.fromkeys(IMAGES, "stack-test-monitoring") | dict.fromkeys(PUBLISHED, "127.0.0.1:0")
    try:
        yield tree, settings | {"ENGINE": "tiny", "MONITORING": "on", "PYTHON_IMAGE": python_image}
    finally:
        tree.remove_everything()


def test_make_up_brings_up_prometheus_alertmanager_and_the_dashboard(monitored: tuple[Tree, dict[str, str]]) -> None:
    tree, settings = monitored
    ran = tree.run("scripts/up", **settings)
    assert ran.returncode == 0, ran.stdout
    stack, grafana, prometheus = re.findall(r"(?:base URL|Grafana|Prometheus) +(http://\S+?)(?:/v1)?\s", ran.stdout)
    question = {"messages": MESSAGES, "max_tokens": 2}
    httpx.post(f"{stack}/v1/chat/completions", json=question, headers={"x-api-key": "dev-key"}).raise_for_status()

    def told(path: str) -> Any:
        answer = httpx.get(f"{prometheus}/api/v1/{path}")
        return answer.json()["data"]

    (target,) = wait_for(lambda: [it for it in told("targets")["activeTargets"] if it["health"] == "up"], deadline=100)
    assert target["labels"]["job"] == "stack"
    assert len(wait_for(lambda: told("alertmanagers")["activeAlertmanagers"])) == 1
    rules = [rule["name"] for group in told("rules")["groups"] for rule in group["rules"]]
    assert rules == [it["alert"] for it in RULES]
    results = httpx.get(f"{grafana}/api/dashboard", timeout=60).json()
    assert len(results) > 10
    assert set(results.values()) == {"success"}
    finished = 'query?query=stack_requests_total{outcome="finished",model="SmolLM2-135M-Instruct"}'
    wait_for(lambda: [it for it in told(finished)["result"] if it["value"][1] == "1"], deadline=100)
