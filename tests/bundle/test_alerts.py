"""Alerts: a real Prometheus reads a real gateway, and a real Alertmanager tells a webhook that an engine is away, and
that it is back. Grafana is not there."""

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
import yaml

from tests.support.clone import merged
from tests.support.containers import build, container
from tests.support.keys import status
from tests.support.processes import (
    KEY,
    MESSAGES,
    ROOT,
    GatewayProcess,
    fake_engine,
    free_port,
    running_gateway,
    wait_for,
)

FOLDER = ROOT / "monitoring"
RULES = yaml.safe_load((FOLDER / "prometheus/rules.yml").read_text())["groups"][0]["rules"]
INTERVALS = {"scrape_interval", "evaluation_interval", "group_wait", "group_interval"}


def hurried(told: Any) -> Any:
    """The same configuration with intervals of a second, and the alert EngineAway after a second."""
    if isinstance(told, dict):
        short = INTERVALS | ({"for"} if told.get("alert") == "EngineAway" else set())
        return {name: "1s" if name in short else hurried(it) for name, it in told.items()}
    return [hurried(it) for it in told] if isinstance(told, list) else told


class Webhook(ThreadingHTTPServer):
    """What gets the alerts: a group of them at a time."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Taker)
        self.groups: list[dict[str, Any]] = []
        self.url = f"http://127.0.0.1:{self.server_port}/alerts/of-the-stack"

    def told(self, status: str) -> list[dict[str, Any]]:
        """The alerts of that name that it was told of with this status."""
        alerts = [it for group in self.groups for it in group["alerts"]]
        return [it for it in alerts if it["status"] == status and it["labels"]["alertname"] == "EngineAway"]


class _Taker(BaseHTTPRequestHandler):
    server: Webhook

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/alerts/of-the-stack":
            self.server.groups.append(body)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def listening() -> Iterator[Webhook]:
    with Webhook() as webhook:
        threading.Thread(target=webhook.serve_forever, daemon=True).start()
        yield webhook
        webhook.shutdown()


@contextmanager
def running_alertmanager(directory: Path, port: int, webhook: str) -> Iterator[None]:
    """Alertmanager as the compose file starts it, but for its address."""
    service = merged("ollama", "compose.monitoring.yaml", STACK_ALERT_WEBHOOK_FILE="hook")["services"]["alertmanager"]
    folder, hook = directory / "alertmanager/webhook", directory / "hook"
    folder.mkdir(parents=True)
    there = yaml.safe_load((FOLDER / "alertmanager/webhook/alertmanager.yml").read_text())
    (folder / "alertmanager.yml").write_text(yaml.safe_dump(hurried(there)))
    hook.write_text(webhook + "\n")
    options = ["--network=host", "--read-only", f"--user={service['user']}", "--cap-drop=ALL"]
    options += ["--tmpfs=/alertmanager:mode=1777", f"--volume={folder.parent}:/etc/alertmanager:ro"]
    options += [f"--volume={hook}:{service['secrets'][0]['target']}:ro"]
    image = build("alertmanager", "tests/bundle/alertmanager")
    command = [*service["command"], f"--web.listen-address=127.0.0.1:{port}"]
    with container(f"stack-test-{uuid4().hex[:8]}", *options, image, *command):
        yield


class Prometheus:
    """Prometheus, with its address."""

    def __init__(self, port: int) -> None:
        self._port = port

    def ask(self, path: str, **parameters: str) -> Any:
        """What it answers; None as long as it does not."""
        try:
            answer = httpx.get(f"http://127.0.0.1:{self._port}/api/v1/{path}", params=parameters)
        except httpx.TransportError:
            return None
        return answer.json()["data"] if answer.status_code == 200 else None

    def rules(self) -> list[dict[str, Any]]:
        """The rules that it has read, once each could be evaluated."""
        told = self.ask("rules")
        rules = [rule for group in told["groups"] for rule in group["rules"]] if told else []
        return rules if all(rule["health"] == "ok" for rule in rules) else []


@contextmanager
def running_prometheus(directory: Path, metrics: int, alertmanager: int) -> Iterator[Prometheus]:
    for name in ("prometheus.yml", "rules.yml"):
        config = hurried(yaml.safe_load((FOLDER / "prometheus" / name).read_text()))
        if name == "prometheus.yml":
            config["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{metrics}"]}]
            managers = config["alerting"]["alertmanagers"][0]
            managers["static_configs"] = [{"targets": [f"127.0.0.1:{alertmanager}"]}]
        (directory / name).write_text(yaml.safe_dump(config))
    port = free_port()
    command = ["prometheus", f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data"]
    with (
        (directory / "said").open("wb") as said,
        subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=said, stderr=said) as process,
    ):
        try:
            yield Prometheus(port)
        finally:
            process.terminate()


@dataclass
class Watched:
    gateway: GatewayProcess
    metrics: int
    prometheus: Prometheus
    webhook: Webhook


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[tuple[Watched, ExitStack, int]]:
    """All of them; what ends the engine when it is closed; and the engine's port."""
    if shutil.which("prometheus") is None:
        pytest.fail("prometheus is missing: install it (on Debian 'apt-get install prometheus')", pytrace=False)
    metrics, manager, port = free_port(), free_port(), free_port()
    with ExitStack() as all_of_it, ExitStack() as its_engine:
        webhook = all_of_it.enter_context(listening())
        all_of_it.enter_context(running_alertmanager(tmp_path, manager, webhook.url))
        engine = its_engine.enter_context(fake_engine(port))
        settings = {"STACK_METRICS_BIND": f"127.0.0.1:{metrics}"}
        gateway = all_of_it.enter_context(running_gateway(tmp_path / "log", engine.url, **settings))
        prometheus = all_of_it.enter_context(running_prometheus(tmp_path, metrics, manager))
        yield Watched(gateway, metrics, prometheus, webhook), its_engine, port


def test_prometheus_reads_the_gateway_and_a_webhook_gets_its_alerts(
    watched: tuple[Watched, ExitStack, int],
) -> None:
    it, its_engine, port = watched
    with it.gateway.client() as client:
        client.post("/v1/chat/completions", json={"messages": MESSAGES, "stream": True}).raise_for_status()
    text = httpx.get(f"http://127.0.0.1:{it.metrics}/metrics").text
    subprocess.run(["promtool", "check", "metrics"], input=text, text=True, check=True, timeout=60)
    query = 'sum(stack_requests_total{job="stack", outcome="finished"})'
    found = wait_for(lambda: (it.prometheus.ask("query", query=query) or {}).get("result"))
    assert found[0]["value"][1] == "1"
    rules = wait_for(it.prometheus.rules)
    assert {rule["name"] for rule in rules} == {rule["alert"] for rule in RULES}
    assert "firing" not in {rule["state"] for rule in rules}

    its_engine.close()
    for _ in range(3):  # each worker finds that it is away
        assert status(it.gateway, KEY) <= {502, 503, 504}
    alert = wait_for(lambda: it.webhook.told("firing"), deadline=60)[0]
    assert alert["labels"] == {"alertname": "EngineAway", "severity": "critical", "upstream": "engine"}
    rule = next(rule for rule in RULES if rule["alert"] == "EngineAway")
    assert alert["annotations"]["summary"] == rule["annotations"]["summary"].replace("{{ $labels.upstream }}", "engine")
    before = len(it.webhook.told("resolved"))  # one, if a reading was late on a busy machine
    with fake_engine(port):
        over = wait_for(lambda: it.webhook.told("resolved")[before:], deadline=60)
        assert over[0]["labels"] == alert["labels"]
