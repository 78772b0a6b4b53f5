"""Crowd: many callers of a busy engine behind the gateway, and what happens to them.

    python -m tests.support.crowd [--seconds N]

This measures whether the engine is shared fairly and kept busy, how quickly requests are rejected, and whether
Retry-After is right. The real gateway runs with two workers in front of the scripted engine, whose slots it counts.
Nothing leaves 127.0.0.1.
"""

import argparse
import asyncio
import json
import math
import random
import tempfile
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

from tests.support.processes import MESSAGES, FakeEngine, fake_engine, running_gateway

CHAT = "/v1/chat/completions"
SLOTS = 8
GENERATION = 0.2  # seconds that a generation takes
KEYS = [f"sk-caller-{number:02}-0123456789" for number in range(20)]
PATIENT = {"STACK_QUEUE": "512", "STACK_QUEUE_TIMEOUT": "60"}
SHORT_QUEUE = {"STACK_QUEUE": "32", "STACK_QUEUE_TIMEOUT": "60"}
SHORT_WAIT = {"STACK_QUEUE": "512", "STACK_QUEUE_TIMEOUT": "2"}


@dataclass(frozen=True)
class Answer:
    """The answer that a client got, and the seconds until it was complete."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float

    @property
    def queued(self) -> float:
        """The seconds in the queue."""
        return int(self.headers["x-stack-queue-ms"]) / 1000


def settings(**more: str) -> dict[str, str]:
    """Return the settings of a gateway with KEYS."""
    return {"STACK_API_KEYS": ",".join(KEYS), "LLM_SLOTS": str(SLOTS), "STACK_LOG_LEVEL": "INFO", **more}


async def ask(port: int, key: str, generation: float = GENERATION, user: str = "", **headers: str) -> Answer:
    """Send one request on a connection of its own. The engine takes `generation` seconds for it."""
    script = [["pause", generation], ["json", [200, {"choices": []}]]]
    body = json.dumps({"model": "fake-model", "messages": MESSAGES, "user": user, "script": script}).encode()
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    head = (
        f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {key}\r\n{lines}"
        f"connection: close\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    began = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head.encode() + body)
        first, *rest = (await reader.readuntil(b"\r\n\r\n")).decode().rstrip().split("\r\n")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in rest)}
        text = await reader.readexactly(int(fields["content-length"]))
        return Answer(int(first.split()[1]), fields, text, time.monotonic() - began)
    finally:
        writer.close()


async def fairness(port: int, flooder: str, other: str, *, flood: int = 200, asked: int = 20) -> list[float]:
    """Let one key flood the queue while another sends one request at a time. Return the waits of the second, in
    generations."""
    callers = [asyncio.create_task(ask(port, flooder)) for _ in range(flood)]
    try:
        await asyncio.wait(callers, return_when=asyncio.FIRST_COMPLETED)  # the queue and the slots are full
        return [(await ask(port, other)).queued / GENERATION for _ in range(asked)]
    finally:
        for it in callers:
            it.cancel()
        await asyncio.gather(*callers, return_exceptions=True)


@dataclass
class Overload:
    """The results of many more requests than an engine can serve."""

    seconds: float
    answers: list[Answer] = field(default_factory=list)

    @property
    def served(self) -> list[Answer]:
        return [it for it in self.answers if it.status == 200]

    @property
    def rejections(self) -> list[float]:
        """The seconds that each rejection took, sorted."""
        return sorted(it.seconds for it in self.answers if it.status in (429, 503))


async def overload(port: int, keys: Sequence[str], seconds: float, times: float = 10) -> Overload:
    """For `seconds`, send `times` as many requests as the slots can serve, each with some key."""
    pause, rng = GENERATION / SLOTS / times, random.Random(1)
    callers = []
    began = time.monotonic()
    while (now := time.monotonic()) < began + seconds:
        while len(callers) * pause < now - began:
            callers.append(asyncio.create_task(ask(port, rng.choice(keys))))
        await asyncio.sleep(0.002)
    answers = await asyncio.gather(*callers)
    return Overload(time.monotonic() - began, list(answers))


async def own_rate(port: int, seconds: float) -> float:
    """Return the requests per second that are answered if there are as many at a time as slots."""
    ends, served = time.monotonic() + seconds, 0

    async def caller() -> None:
        nonlocal served
        while time.monotonic() < ends:
            await ask(port, KEYS[0])
            served += 1

    began = time.monotonic()
    await asyncio.gather(*(caller() for _ in range(SLOTS)))
    return served / (time.monotonic() - began)


async def obeyed(
    port: int, keys: Sequence[str], seconds: float, clients: int = 120, *, enough: float = math.inf
) -> tuple[int, int]:
    """Run clients that obey Retry-After, until they have returned `enough` times. Return how often they returned, and
    how often they were then admitted."""
    returns = admitted = 0
    stop = asyncio.Event()

    async def client(name: int, key: str) -> None:
        nonlocal returns, admitted
        told, number = False, 0
        while True:
            answer = await ask(port, key, user=f"{name}-{number}")
            number += answer.status == 200
            if told:
                returns += 1
                admitted += answer.status == 200
                if returns >= enough:
                    stop.set()
            told = answer.status in (429, 503)
            if told:
                await asyncio.sleep(int(answer.headers["retry-after-ms"]) / 1000)

    await _for(seconds, [stop.wait(), *(client(number, keys[number % len(keys)]) for number in range(clients))])
    return returns, admitted


async def _for(seconds: float, what: Sequence[Coroutine[Any, Any, Any]]) -> None:
    """Run these coroutines for that many seconds, or until one ends."""
    tasks = [asyncio.create_task(it) for it in what]
    done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for it in tasks:
        it.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for it in done:
        it.result()


def engine_port(engine: FakeEngine) -> int:
    return int(urlsplit(engine.url).port or 0)


def percentile(values: Sequence[float], share: float) -> float:
    return values[min(len(values) - 1, int(len(values) * share))] if values else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.support.crowd")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each part")
    seconds = parser.parse_args().seconds

    def told(name: str, value: str) -> None:
        print(f"{name:<66}{value}", flush=True)

    with tempfile.TemporaryDirectory(prefix="stack-bench-") as directory, fake_engine() as engine:
        log = Path(directory) / "log"
        with running_gateway(log, engine.url, **settings(**PATIENT)) as gateway:
            waits = asyncio.run(fairness(gateway.port, KEYS[0], KEYS[1]))
            told(
                "a key beside a flood of 200: median wait, generations", f"{median(waits):.2f} (worst {max(waits):.2f})"
            )
        with running_gateway(log, engine.url, **settings(**SHORT_WAIT)) as gateway:
            own = asyncio.run(own_rate(engine_port(engine), seconds / 3))
            asyncio.run(own_rate(gateway.port, 2))  # afterwards the gateway knows the engine's pace
            run = asyncio.run(overload(gateway.port, KEYS, seconds))
            refused = run.rejections
            told("ten times the load: rejected, of", f"{len(refused)} of {len(run.answers)}")
            told(
                "a rejection, ms: p50, p99",
                f"{percentile(refused, 0.5) * 1e3:.1f}, {percentile(refused, 0.99) * 1e3:.1f}",
            )
            told("goodput of the engine's own", f"{len(run.served) / run.seconds / own:.1%} of {own:.1f}/s")
            late = sum(it.queued > 2.0 for it in run.served)
            told(
                "admitted past the deadline",
                f"{late} of {len(run.served)} (longest wait {max(it.queued for it in run.served):.2f} s)",
            )
        for name, more in (("a short queue", SHORT_QUEUE), ("a short deadline", SHORT_WAIT)):
            for keys in (KEYS, KEYS[:1]):
                with running_gateway(log, engine.url, **settings(**more)) as gateway:
                    returns, admitted = asyncio.run(obeyed(gateway.port, keys, seconds))
                    share = f"{admitted / returns:.1%} of {returns}" if returns else "nobody was sent away"
                    told(f"came back as told and were admitted, {name}, {len(keys)} keys", share)


if __name__ == "__main__":
    main()
