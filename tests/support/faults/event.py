"""Event: a fault that befalls all requests at once, and how each of them may end."""

from collections.abc import Callable
from dataclasses import dataclass
from uuid import uuid4

import httpx

from tests.support.faults.outcome import Outcome
from tests.support.faults.scene import Scene
from tests.support.faults.scripts import ANSWER, FINISH, START, http
from tests.support.processes import NO_TLS, wait_for

Happens = Callable[[Scene], list[Outcome]]


@dataclass(frozen=True)
class Event:
    """A row: how each request under way may end, streaming and blocking. `happens` asks them, and settles."""

    number: int
    what: str
    streaming: set[Outcome]
    blocking: set[Outcome]
    happens: Happens
    log: str
    config: str
    settings: dict[str, str]

    @property
    def name(self) -> str:
        """Its number in the list of faults, and what happens."""
        return f"{self.number} {self.what}"


def event(
    number: int,
    what: str,
    *,
    streaming: set[Outcome],
    blocking: set[Outcome],
    log: str = "log",
    config: str = "",
    **settings: str,
) -> Callable[[Happens], Event]:
    """Make a row of a function. `log` names the file that the gateway logs to; `config` is a stack.yaml."""

    def row(happens: Happens) -> Event:
        return Event(number, what, streaming, blocking, happens, log, config, settings)

    return row


def under_way(here: Scene, count: int = 5) -> str:
    """So many streams in the midst of their answers, and as many blocking calls; returns the gate they wait at."""
    gate = uuid4().hex
    for _ in range(count):
        here.ask(stream=True, script=[*START, ["gate", gate], *FINISH, ["end"]])
        here.ask(stream=False, script=[["gate", gate], http(ANSWER)])
    wait_for(lambda: here.engine.running() == 2 * count)
    wait_for(lambda: all(b" two" in call.got for call, _ in here.calls if call.stream))
    return gate


def status(here: Scene, path: str) -> int:
    return httpx.get(here.gateway.url + path, verify=NO_TLS).status_code
