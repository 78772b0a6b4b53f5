"""Metered: a gateway whose metrics can be read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.support.processes import (
    MESSAGES,
    GatewayProcess,
    Samples,
    free_port,
    post,
    running_gateway,
    scrape,
    wait_for,
)

CHAT = "/v1/chat/completions"


class Metered:
    """A gateway whose metrics can be read."""

    def __init__(self, gateway: GatewayProcess, port: int) -> None:
        self.gateway = gateway
        self.port = port

    def scrape(self) -> Samples:
        return scrape(self.port)

    def wait(self, name: str, expected: float, **labels: str) -> None:
        wait_for(lambda: self.scrape().total(name, **labels) == expected, message=f"{name} {labels} is not {expected}")

    def ask(self, **fields: Any) -> httpx.Response:
        """A request on a connection of its own, so that any worker may get it."""
        with self.gateway.client() as client:
            return post(client, CHAT, json={"messages": MESSAGES} | fields)

    def directory(self) -> Path:
        """Where the workers count, as the kernel sees it."""
        maps = Path(f"/proc/{self.gateway.workers()[0]}/maps").read_text()
        return next(Path(line.split()[-1]).parent for line in maps.splitlines() if line.endswith(".db"))

    def settled(self, old: set[int]) -> bool:
        """Whether two workers are at work, none of them of the old ones."""
        return len(self.gateway.workers()) == 2 and not old & set(self.gateway.workers())


@contextmanager
def metered(log: Path, engine_url: str, **settings: str) -> Iterator[Metered]:
    port = free_port()
    with running_gateway(log, engine_url, STACK_METRICS_BIND=f"127.0.0.1:{port}", **settings) as gateway:
        yield Metered(gateway, port)
