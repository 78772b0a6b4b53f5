"""Kill workers under load (SIGKILL), and compare the usage rows, the counts of keys, and the slots and queues of
engines with what was sent.

    python -m tests.support.kills [--kills N] [--seed N]

It runs once with SQLite and once with PostgreSQL, with real processes on 127.0.0.1.
"""

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.support.command import Command
from tests.support.containers import running_postgres
from tests.support.processes import (
    KEY,
    MESSAGES,
    NO_TLS,
    FakeEngine,
    GatewayProcess,
    fake_engine,
    running_gateway,
    wait_for,
)
from tests.support.rows import Rows
from tests.support.soak import CASES, CUT_OFF, Case, Client

CHAT = "/v1/chat/completions"

SLOW = [
    ["role"],
    ["token", "one"],
    ["pause", 0.03],
    ["token", " two"],
    ["finish", "stop"],
    ["usage"],
    ["done"],
    ["end"],
]
SENT = [CASES["stream"], CASES["blocking"], Case(1, 200, "finished", {"stream": True}, SLOW)]
CALLERS = 12
# The key's concurrent requests: more than the callers have, plus those of dead workers for ten seconds with PostgreSQL
AT_A_TIME = 80
QUEUE_CONFIG = """
engines: {{engine: {{dialect: vllm, slots: {slots}, base_url: "{url}"}}}}
models: {{fake-model: {{targets: [{{engine: engine, model: fake-model}}]}}}}
default_model: fake-model
retries: {{attempts: 1}}
"""
WORKERS = 2  # workers of the gateway
PATIENCE = 300  # seconds until a wait fails; the machine may be busy
BETWEEN = 25  # the least number of complete answers between two kills


@dataclass
class Load:
    """The requests that were sent while workers were killed."""

    sent: list[str] = field(default_factory=list)
    answered: dict[str, int] = field(default_factory=dict)  # statuses by request id; requests without one broke off

    def whole(self) -> int:
        return sum(status == 200 for status in self.answered.values())


async def kill_under_load(
    gateway: GatewayProcess, kills: int, seed: int, key: str, cases: Sequence[Case] = SENT
) -> Load:
    """Send requests, and kill one worker after another while they are answered."""
    load, rng, over = Load(), random.Random(seed), asyncio.Event()

    async def call() -> None:
        client = Client(gateway.port, key)
        while not over.is_set():
            name = f"kill-{len(load.sent)}"
            load.sent.append(name)
            try:
                async with asyncio.timeout(PATIENCE):
                    status, body = await client.ask(rng.choice(cases), name)
                if body.endswith(CUT_OFF):
                    raise EOFError  # noqa: TRY301  as the client itself raises where not even a head came
                load.answered[name] = status
            except (OSError, EOFError, ValueError):
                await client.close()
        await client.close()

    async def kill() -> None:
        for _ in range(kills):
            answered = load.whole()
            await _until(lambda: load.whole() >= answered + BETWEEN)  # noqa: B023  it is over before the next turn
            victim = await _kill_one(gateway, rng)
            await _until(lambda: len(set(gateway.workers()) - {victim}) == WORKERS)  # noqa: B023  as above
        over.set()

    async with asyncio.TaskGroup() as group:
        group.create_task(kill())
        for _ in range(CALLERS):
            group.create_task(call())
    return load


async def _kill_one(gateway: GatewayProcess, rng: random.Random) -> int:
    """Kill a worker that is alive, and return its pid. A listed worker may have ended by itself meanwhile."""
    while True:
        await _until(lambda: len(gateway.workers()) == WORKERS)
        victim = rng.choice(gateway.workers())
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
            return victim


async def _until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not what():  # noqa: ASYNC110  other processes don't set events
            await asyncio.sleep(0.005)


def differences(load: Load, engine: FakeEngine, rows: list[dict[str, Any]]) -> list[str]:
    """Return the differences between what was sent, what the engine saw, and the usage."""
    found = Counter(row["request_id"] for row in rows)
    by_id = {row["request_id"]: row for row in rows}
    asked = {it["body"].get("user") for it in engine.seen()}
    wrong = [f"{name}: {count} rows" for name, count in found.items() if count > 1]
    wrong += [f"{name}: an engine was asked, and there is no row" for name in asked - set(found)]
    wrong += [f"{name}: a row for what nobody sent" for name in set(found) - set(load.sent)]
    for name, status in load.answered.items():
        row = by_id.get(name, {})
        if status == 200 and (row.get("outcome"), row.get("tokens_out")) != ("finished", 3):
            wrong.append(f"{name}: it was answered, and its row says {row}")
    wrong += [f"{name}: a row without an end" for name, row in by_id.items() if row["outcome"] is None]
    return wrong


async def all_at_a_time(gateway: GatewayProcess, key: str, load: Load) -> bool:
    """Return whether the key may have exactly as many concurrent requests as its limit says."""
    body = {"messages": MESSAGES, "stream": True, "script": [["role"], ["hang"]]}
    headers = {"authorization": f"Bearer {key}"}
    async with (
        httpx.AsyncClient(base_url=gateway.url, headers=headers, timeout=60, verify=NO_TLS) as client,
        AsyncExitStack() as stack,
    ):
        for _ in range(AT_A_TIME):
            load.sent.append(f"hang-{len(load.sent)}")
            named = body | {"user": load.sent[-1]}
            asked = client.stream("POST", CHAT, json=named, headers={"x-request-id": load.sent[-1]})
            if (await stack.enter_async_context(asked)).status_code != 200:
                return False
        assert (await client.post(CHAT, json=body)).status_code == 429
        return True


def kills(directory: Path, count: int, seed: int, **settings: str) -> tuple[dict[str, Any], list[str]]:
    """Run the kills, check that the dead workers' resources came back, kill the whole gateway at last, and start it
    again. Returns figures and failures."""
    settings = {"STACK_DATA_DIR": str(directory / "data"), **settings}
    with fake_engine() as engine:
        with running_gateway(directory / "log", engine.url, **settings) as gateway:
            started = time.monotonic()
            key = Command(**settings).json("keys", "create", "x", "--concurrent", str(AT_A_TIME))["secret"]
            load = asyncio.run(kill_under_load(gateway, count, seed, key))
            seconds = time.monotonic() - started
            # With SQLite at once, with PostgreSQL within seconds (database.PATIENCE).
            wait_for(lambda: asyncio.run(all_at_a_time(gateway, key, load)), deadline=75)
            for pid in (gateway.process.pid, *gateway.workers()):
                os.kill(pid, signal.SIGKILL)
        with running_gateway(directory / "log", engine.url, **settings):
            pass  # left-over records are saved first
        with closing(Rows(settings)) as rows:
            saved = rows.all()
        figures = {
            "kills": count,
            "seconds": round(seconds, 1),
            "requests": len(load.sent),
            "answered": dict(Counter(load.answered.values())),
            "outcomes": dict(Counter(row["outcome"] for row in saved)),
        }
        return figures, differences(load, engine, saved)


QUEUED = Case(
    1,
    200,
    "finished",
    {"stream": True},
    [["role"], ["pause", 0.02], ["token", "x"], ["finish", "stop"], ["done"], ["end"]],
)
SLOTS = 2  # slots of the engine; there are more callers


def queue_kills(directory: Path, count: int, seed: int, **settings: str) -> tuple[dict[str, Any], list[str]]:
    """Kill workers that hold slots of an engine, and places in its queue. Returns figures and failures."""
    config = directory / "stack.yaml"
    with fake_engine() as engine:
        config.write_text(QUEUE_CONFIG.format(url=engine.url, slots=SLOTS))
        settings = {"STACK_CONFIG": str(config), "STACK_DATA_DIR": str(directory / "data"), **settings}
        with running_gateway(directory / "log", engine.url, **settings) as gateway:
            began = time.monotonic()
            load = asyncio.run(kill_under_load(gateway, count, seed, KEY, [QUEUED]))
            seconds = time.monotonic() - began
            asked = Counter(it["body"].get("user") for it in engine.seen())
            wrong = [f"{name}: the engine was asked {often} times" for name, often in asked.items() if often > 1]
            wait_for(lambda: engine.running() == 0, deadline=PATIENCE)
            free = [asyncio.run(all_slots(gateway, engine)) for _ in range(5)]
            if set(free) != {SLOTS}:
                wrong.append(f"of {SLOTS} slots could be had: {free}")
    figures = {"kills": count, "seconds": round(seconds, 1), "answered": len(load.answered), "sent": len(load.sent)}
    return figures, wrong


async def all_slots(gateway: GatewayProcess, engine: FakeEngine) -> int:
    """Return how many of many requests the engine works on at a time. No slot may be lost or stuck."""
    engine.peak()

    async def call() -> None:
        client = Client(gateway.port)
        for number in range(5):
            status, _ = await client.ask(QUEUED, f"after-{number}")
            assert status == 200
        await client.close()

    async with asyncio.timeout(PATIENCE):
        await asyncio.gather(*(call() for _ in range(SLOTS * 3)))
    return engine.peak()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.support.kills")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    args = parser.parse_args()
    print(f"{args.kills} kills, seed {args.seed}, with SQLite")
    _run(args.kills, args.seed)
    print(f"{args.kills} kills, seed {args.seed}, with PostgreSQL")
    with running_postgres() as postgres:
        _run(args.kills, args.seed, STACK_STORE_URL=postgres.new_database())
    print("every request has its one row, and nothing is held by the dead")


def _run(count: int, seed: int, **settings: str) -> None:
    with tempfile.TemporaryDirectory(prefix="stack-kills-") as directory:
        figures, failures = kills(Path(directory), count, seed, **settings)
        more, wrong = queue_kills(Path(directory), count, seed) if not settings else ({}, [])
    figures |= {f"queue: {name}": value for name, value in more.items()}
    failures += wrong
    for name, value in figures.items():
        print(f"{name:>20}  {value}")
    for failure in failures[:50]:
        print("FAILED:", failure)
    if failures:
        sys.exit(f"{len(failures)} things were not as they should be")


if __name__ == "__main__":
    main()
