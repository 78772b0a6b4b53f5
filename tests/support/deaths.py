"""Engines and workers killed at random (SIGKILL) under load, and then every request must be accounted for: it was
answered whole, or with an honest error. A request with an Idempotency-Key is sent again until it is whole.

    python -m tests.support.deaths [--requests N] [--concurrency N] [--seed N]

Real processes, 127.0.0.1 only.
"""

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

from tests.support.death_kinds import KINDS, PACE, PATHS, Kind, verdict
from tests.support.processes import GatewayProcess, Undying, running_gateway, undying_engine, wait_for
from tests.support.rows import Rows
from tests.support.soak import Client

CONFIG = """
engines:
  vllm-1: {{dialect: vllm, base_url: '{0}'}}
  vllm-2: {{dialect: vllm, base_url: '{1}'}}
  llamacpp-1: {{dialect: llamacpp, slots: 64, base_url: '{0}'}}
  llamacpp-2: {{dialect: llamacpp, slots: 64, base_url: '{1}'}}
  ollama-1: {{dialect: ollama, slots: 64, base_url: '{0}'}}
  ollama-2: {{dialect: ollama, slots: 64, base_url: '{1}'}}
models:
  vllm: {{targets: [{{engine: vllm-1, model: fake-model}}, {{engine: vllm-2, model: fake-model}}]}}
  llamacpp: {{targets: [{{engine: llamacpp-1, model: fake-model}}, {{engine: llamacpp-2, model: fake-model}}]}}
  ollama: {{targets: [{{engine: ollama-1, model: fake-model}}, {{engine: ollama-2, model: fake-model}}]}}
  llamacpp-thinker: {{targets: [{{engine: llamacpp-1, model: thinker}}, {{engine: llamacpp-2, model: thinker}}]}}
  ollama-thinker: {{targets: [{{engine: ollama-1, model: thinker}}, {{engine: ollama-2, model: thinker}}]}}
default_model: vllm
breaker: {{failures: 1000}}
retries: {{budget: 1}}
"""
TRIES = 60  # of one request with a key
PATIENCE = 300  # seconds until anything here is called stuck
CODES = {"engine_error", "engine_broken_stream", "engine_unavailable", "engine_failed", "engine_timeout", "answer_lost"}
FINAL = {"engine_failed"}  # the same body is refused for a while


class Deaths:
    """One run. `failures` says in sentences what was not as it should be."""

    def __init__(self, gateway: GatewayProcess, engines: list[Undying], requests: int, seed: int) -> None:
        self._gateway = gateway
        self._engines = engines
        self._rng = random.Random(seed)
        names = list(KINDS)
        chosen = self._rng.choices(names, [KINDS[it].weight for it in names], k=requests)
        self.plan = {f"d{number}": name for number, name in enumerate(chosen)}
        self.keyed = {name for name in self.plan if self._rng.random() < 0.7}
        self._left = iter(self.plan.items())
        self.verdicts: dict[str, list[str]] = {}
        self.killed: Counter[str] = Counter()
        self.failures: list[str] = []

    @property
    def whole(self) -> int:
        return sum(it[-1] == "whole" for it in self.verdicts.values() if it)

    async def run(self, concurrency: int, between: int) -> None:
        """Send everything, and kill a worker and an engine, each after so many whole answers."""
        killers = [
            asyncio.create_task(it) for it in (self._kill(self._worker, between), self._kill(self._engine, between))
        ]
        try:
            async with asyncio.timeout(PATIENCE + len(self.plan)):
                await asyncio.gather(*(self._caller() for _ in range(concurrency)))
        finally:
            for task in killers:
                task.cancel()
            await asyncio.gather(*killers, return_exceptions=True)

    async def _caller(self) -> None:
        client = Client(self._gateway.port)
        for name, kind in self._left:
            found = self.verdicts[name] = []
            while not found or (name in self.keyed and found[-1] not in {"whole", *FINAL} and len(found) < TRIES):
                found.append(await self._ask(client, name, KINDS[kind], len(found)))
        await client.close()

    async def _ask(self, client: Client, name: str, kind: Kind, number: int) -> str:
        key = f"idempotency-key: {name}\r\n" if name in self.keyed else ""
        off = "" if kind.on else "x-stack-resume: off\r\n"
        try:
            async with asyncio.timeout(PATIENCE):
                answer = await client.post(
                    PATHS[kind.path], kind.body(name), f"x-request-id: {name}-{number}\r\n{key}{off}"
                )
            return verdict(kind, *answer)
        except (OSError, EOFError, ValueError):
            await client.close()
            return "cut off"

    async def _kill(self, one: Callable[[], tuple[str, Callable[[], bool]]], between: int) -> None:
        while True:
            whole = self.whole
            await _until(lambda: self.whole >= whole + between)  # noqa: B023  it is over before the next turn
            await asyncio.sleep(self._rng.uniform(0, 10 * PACE))
            what, over = one()
            self.killed[what] += 1
            await _until(over)

    def _worker(self) -> tuple[str, Callable[[], bool]]:
        victim = self._rng.choice(self._gateway.workers())
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        return "workers", lambda: len(set(self._gateway.workers()) - {victim}) == 2

    def _engine(self) -> tuple[str, Callable[[], bool]]:
        engine = self._rng.choice(self._engines)
        deaths = engine.deaths
        with suppress(ProcessLookupError):
            engine.process.kill()
        return "engines", lambda: engine.deaths > deaths and engine.process.poll() is None

    def check(self, rows: list[dict[str, Any]]) -> None:
        """Compare what was seen, and what was written down."""
        wrong = self.failures
        by_name: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in rows:
            by_name[row["request_id"].partition("-")[0]].append(row)
        often = Counter(row["request_id"] for row in rows)
        wrong += [f"{name}: {count} rows" for name, count in often.items() if count > 1]
        for name, found in self.verdicts.items():
            kind, last = self.plan[name], found[-1]
            strange = set(found) - CODES - {"whole", "cut off"}
            wrong += [f"{name} ({kind}): {it}" for it in strange]
            if name in self.keyed and last not in {"whole", *FINAL}:
                wrong.append(f"{name} ({kind}): not whole after {len(found)} times: {found[-3:]}")
            if last != "whole":
                continue
            finished = [it for it in by_name[name] if it["outcome"] == "finished"]
            lost = [it for it in by_name[name] if it["outcome"] == "worker_lost"]
            if (
                len(finished) != 1
                or finished[0]["tokens_out"] - KINDS[kind].tokens not in (0, KINDS[kind].marks)
                or lost
            ):
                wrong.append(f"{name} ({kind}): whole, and its rows say {by_name[name]}")

    def figures(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """What is told at the end."""
        return {
            "killed": dict(self.killed),
            "ended": dict(Counter(it[-1] for it in self.verdicts.values())),
            "on the way": dict(Counter(code for it in self.verdicts.values() for code in it[:-1])),
            "repeated": sum(len(it) > 1 for it in self.verdicts.values()),
            "rows": dict(Counter(row["outcome"] for row in rows)),
            "resumed": sum(bool(row["resumes"]) for row in rows),
            "taken over": dict(Counter(it["way"] for it in self._gateway.log() if it["msg"] == "answer_taken_over")),
        }


async def _until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not what():  # noqa: ASYNC110  other processes don't set events
            await asyncio.sleep(0.01)


def deaths(
    directory: Path, requests: int, concurrency: int, seed: int, between: int
) -> tuple[dict[str, Any], list[str]]:
    """Run it. Returns figures and failures. The log stays in `directory`."""
    with ExitStack() as stack:
        engines = [stack.enter_context(undying_engine()) for _ in range(2)]
        config = directory / "stack.yaml"
        config.write_text(CONFIG.format(*(it.url for it in engines)))
        settings = {"STACK_CONFIG": str(config), "STACK_DATA_DIR": str(directory / "data"), "STACK_RESUME": "5"}
        settings |= {"STACK_IDEMPOTENCY_BYTES": str(1 << 30)}
        with running_gateway(directory / "log", engines[0].url, **settings) as gateway, closing(Rows(settings)) as rows:
            run, started = Deaths(gateway, engines, requests, seed), time.monotonic()
            asyncio.run(run.run(concurrency, between))
            seconds = time.monotonic() - started
            wait_for(lambda: all(map(_rests, engines)), message="an engine is still at work")
            wait_for(lambda: _told(rows, run), message="rows are missing")
            run.check(rows.all())
            return {"requests": requests, "seconds": round(seconds, 1)} | run.figures(rows.all()), run.failures


def _rests(engine: Undying) -> bool:
    with suppress(OSError):  # it is started again just now
        return engine.running() == 0
    return False


def _told(rows: Rows, run: Deaths) -> bool:
    names = {it["request_id"].partition("-")[0] for it in rows.all() if it["outcome"] == "finished"}
    return {name for name, found in run.verdicts.items() if found[-1] == "whole"} <= names


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.support.deaths")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=24)
    parser.add_argument("--between", type=int, default=40, help="whole answers from one kill to the next, at least")
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    args = parser.parse_args()
    print(f"{args.requests} requests, {args.concurrency} at a time, engines and workers killed, seed {args.seed}")
    with tempfile.TemporaryDirectory(prefix="stack-deaths-") as directory:
        figures, failures = deaths(Path(directory), args.requests, args.concurrency, args.seed, args.between)
    for name, value in figures.items():
        print(f"{name:>20}  {value}")
    for failure in failures[:50]:
        print("FAILED:", failure)
    if failures:
        sys.exit(f"{len(failures)} things were not as they should be")
    print("every request was answered whole or with an honest error, and has its rows")


if __name__ == "__main__":
    main()
