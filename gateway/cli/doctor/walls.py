"""Walls: judge what Docker tells of the stack's containers: what is published, and what an engine can reach."""

import ipaddress
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from gateway.cli.doctor.check import Check
from gateway.settings import MIN_KEY_LENGTH, PLACEHOLDER_KEY, Settings

FRONTS = ("gateway", "caddy")  # the services that callers use
WINDOW = "8444/tcp"  # where Caddy serves the chat window, which signs its users in (compose.chat-tls.yaml)
ONE_SHOT = "provision"  # it fetches the models and ends
CLOSED = "com.docker.network.bridge.inhibit_ipv4"


@dataclass(frozen=True, slots=True)
class Container:
    """A running container of the stack. `ports` are the addresses at which it is published, and `window` those of the
    chat window, if it is Caddy. `networks` are the names of its networks."""

    service: str
    ports: tuple[str, ...]
    networks: tuple[str, ...]
    window: tuple[str, ...] = ()

    @property
    def is_engine(self) -> bool:
        return self.service == "engine" or self.service.startswith("engine-")

    @property
    def exposed(self) -> tuple[str, ...]:
        """Its published addresses that other machines can reach."""
        return tuple(it for it in self.ports if not on_loopback(it))


@dataclass(slots=True)
class Facts:
    """What scripts/lib/deployment.sh tells of the running containers. `leaks` says of each network why it is no wall:
    nothing, if it is internal and the host has no address on it. `reached` are engines, each with an address of the
    host that answered it. `stale` are the services that run with other settings than .env has now, and `stopped` those
    that do not run. `certificate` is a name, and the address at which its certificate is shown."""

    containers: list[Container] = field(default_factory=list)
    leaks: dict[str, str] = field(default_factory=dict)
    reached: list[tuple[str, str]] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    certificate: tuple[str, str] | None = None


def read(lines: Iterable[str]) -> Facts:
    """Read the facts, one JSON object a line."""
    facts = Facts()
    running: dict[str, str] = {}
    for line in lines:
        match json.loads(line):
            case {"container": dict(it)}:
                facts.containers.append(_container(it))
                running[it["service"]] = it["hash"]
            case {"network": dict(it)}:
                facts.leaks[it["name"]] = _leak(it)
            case {"reached": str(address), "by": str(service)}:
                facts.reached.append((service, address))
            case {"settings": str(service), "hash": str(wanted)}:
                if service not in running:
                    facts.stopped.append(service)
                elif running[service] != wanted:
                    facts.stale.append(service)
            case {"certificate": str(name), "at": str(at)}:
                facts.certificate = name, at
    return facts


def _container(it: dict[str, Any]) -> Container:
    ports = dict(it["ports"] or {})
    window = _published(ports.pop(WINDOW, None)) if it["service"] == "caddy" else ()
    published = [address for bindings in ports.values() for address in _published(bindings)]
    if it["mode"] == "host":
        published.append("0.0.0.0:*")
    return Container(it["service"], tuple(published), tuple(it["networks"] or ()), tuple(window))


def _published(bindings: list[dict[str, str]] | None) -> Iterator[str]:
    for it in bindings or ():
        host = f"[{it['HostIp']}]" if ":" in it["HostIp"] else it["HostIp"] or "0.0.0.0"
        yield f"{host}:{it['HostPort']}"


def _leak(network: dict[str, Any]) -> str:
    if not network["internal"]:
        return "has a route out"
    return "" if (network["options"] or {}).get(CLOSED) == "true" else "gives this machine an address"


def on_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.rpartition(":")[0].strip("[]")).is_loopback


def published(facts: Facts, settings: Settings) -> Check:
    """Check that nothing but the gateway, and the chat window by TLS, can be reached from other machines, and the
    gateway only as the settings say."""
    faults, beside = [], []
    for it in facts.containers:
        if it.service in FRONTS:
            if it.exposed and settings.on_loopback:
                faults.append(f"{it.service} is published at {it.exposed[0]}, and STACK_PUBLISH says only this machine")
        elif it.ports and (it.is_engine or it.exposed):
            faults.append(f"{it.service} is published at {', '.join(it.ports)}")
        elif it.ports:
            beside.append(f"{it.service} at {it.ports[0]}")
    if faults:
        advice = (
            "correct 'ports' in the files of COMPOSE_FILE: engines nowhere, other services at 127.0.0.1, the gateway "
        )
        return Check("failed", "published", "; ".join(faults), advice + "at STACK_PUBLISH; then 'make up'")
    fronts = [f"{it.service} at {', '.join(it.ports)}" for it in facts.containers if it.ports and it.service in FRONTS]
    told = f"; on loopback besides: {', '.join(beside)}" if beside else ""
    windows = [address for it in facts.containers for address in it.window]
    window = f"; the chat window by TLS at {', '.join(windows)}" if windows else ""
    return Check("ok", "published", f"only {', '.join(fronts) or 'nothing'}{window}{told}")


def keys(facts: Facts, settings: Settings) -> Check:
    """Check that no key can be guessed by a machine that reaches the gateway."""
    exposed = [address for it in facts.containers if it.service in FRONTS for address in it.exposed]
    weak = [key for key in settings.accepted_keys() if len(key) < MIN_KEY_LENGTH]
    if weak and exposed:
        which = f"the placeholder '{PLACEHOLDER_KEY}'" if PLACEHOLDER_KEY in weak else "a short key"
        advice = "set STACK_API_KEYS to strong keys (openssl rand -hex 24), then 'make up'"
        return Check("failed", "keys", f"{which} opens the gateway at {exposed[0]}, beyond this machine", advice)
    if weak:
        return Check("ok", "keys", "there is a short key or the placeholder, which can be used from this machine only")
    return Check("ok", "keys", f"every key in the settings has {MIN_KEY_LENGTH} characters or more")


def engines(facts: Facts) -> Iterator[Check]:
    """Check that no engine of the stack has a way out, and that this machine cannot reach it."""
    for it in facts.containers:
        if not it.is_engine:
            continue
        faults = [f"the network {name} {leak}" for name in it.networks if (leak := facts.leaks.get(name, "is unknown"))]
        faults += [f"{it.service} reaches this machine at {there}" for by, there in facts.reached if by == it.service]
        if faults:
            advice = "leave it on the network backend alone, as compose.yaml has it, then 'make down' and 'make up'"
            yield Check("failed", it.service, "; ".join(faults), advice)
        else:
            yield Check("ok", it.service, f"no route out, and this machine has no address on {', '.join(it.networks)}")


def outside(facts: Facts, urls: Iterable[str]) -> Check | None:
    """Tell which engines are outside the stack, and by which network the gateway reaches them."""
    away = sorted({url for url in urls if urlsplit(url).hostname not in {it.service for it in facts.containers}})
    if not away:
        return None
    ways = [name for it in facts.containers if it.service == "gateway" for name in it.networks if facts.leaks.get(name)]
    if not ways:
        advice = "put the gateway on the network edge, as compose.yaml has it, then 'make up'"
        return Check("failed", "outside", f"the gateway has no network that leads to {', '.join(away)}", advice)
    told = f"the engine at {', '.join(away)} is outside this stack, and the gateway's way out to it and elsewhere is "
    return Check("ok", "outside", f"{told}the network {', '.join(ways)}")


def services(facts: Facts) -> Check:
    """Check that all services run, with the settings that .env has now."""
    if stopped := [it for it in facts.stopped if it != ONE_SHOT]:
        return Check("failed", "services", f"{', '.join(stopped)} does not run", "see 'make logs', then run 'make up'")
    if facts.stale:
        finding = f"{', '.join(facts.stale)} runs with other settings than .env and this shell have now"
        return Check("failed", "services", finding, "run 'make up', which applies them")
    return Check("ok", "services", "all run, with the present settings")
