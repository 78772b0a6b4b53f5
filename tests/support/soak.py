"""The soak: send tens of thousands of requests, many of them with a fault, and account for every one of them.

    python -m tests.support.soak [--requests N] [--concurrency N] [--seed N]

Each request has one outcome that is known beforehand: the client sees it, the log says it once, and /metrics counts it
once. Memory and file descriptors of the workers are compared between an early and a late part of the run. All processes
are real, on 127.0.0.1.
"""

import argparse
import asyncio
import json
import random
import socket
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from tests.support.processes import (
    KEY,
    MESSAGES,
    FakeEngine,
    GatewayProcess,
    descriptors,
    events,
    fake_engine,
    free_port,
    running_gateway,
    scrape,
    text_of,
    wait_for,
)

PATHS = {"chat": "/v1/chat/completions", "completion": "/v1/completions", "embedding": "/v1/embeddings"}
START = [["role"], ["token", "one"], ["token", " two"]]
FINISH = [["finish", "stop"], ["usage"], ["done"], ["end"]]
CUT = {"dialect": "vllm", "pieces": ["one", " two", " three"], "cuts": [3]}  # cut after the role and two pieces
IDLE = 2.0  # LLM_IDLE_TIMEOUT in this run, in seconds

CONFIG = """
engines:
  engine: {{dialect: vllm, base_url: "{url}"}}
  other: {{dialect: vllm, base_url: "{url}"}}
models:
  fake-model: {{targets: [{{engine: engine, model: fake-model}}]}}
  resumed:
    targets: [{{engine: engine, model: fake-model}}, {{engine: other, model: fake-model}}]
    resume: {{most: 3}}
default_model: fake-model
breaker: {{failures: 1000}}
"""


@dataclass(frozen=True)
class Case:
    """A kind of request. `outcome` is its outcome in log and metrics; `broken`: its stream ends with an error event."""

    weight: float
    status: int
    outcome: str
    fields: dict[str, Any] = field(default_factory=dict)
    script: Sequence[Any] | None = None
    kind: str = "chat"
    leaves: bytes | None = None  # the client disconnects when it has seen this; b"": after a moment
    key: bool = True

    @property
    def stream(self) -> bool:
        return bool(self.fields.get("stream"))

    @property
    def resumed(self) -> bool:
        return self.fields.get("model") == "resumed"

    @property
    def broken(self) -> bool:
        return self.status == 200 and self.outcome not in ("finished", "client_left")


STREAM = {"stream": True}
CASES = {
    "stream": Case(30, 200, "finished", STREAM),
    "stream with usage": Case(5, 200, "finished", STREAM | {"stream_options": {"include_usage": True}}),
    "blocking": Case(25, 200, "finished"),
    "completion": Case(3, 200, "finished", {"prompt": "x"}, kind="completion"),
    "embedding": Case(5, 200, "finished", {"input": "x"}, kind="embedding"),
    "a long stream": Case(1, 200, "finished", STREAM, [["role"], ["tokens", [500, 100]], *FINISH]),
    "a short stall": Case(2, 200, "finished", STREAM, [*START, ["pause", 0.2], ["token", " three"], *FINISH]),
    "a slow answer": Case(1, 200, "finished", {}, [["pause", 0.2], ["json", [200, {"choices": []}]]]),
    "no [DONE]": Case(1, 200, "finished", STREAM, [*START, ["finish", "stop"], ["close"]]),
    "a dead idle connection": Case(2, 200, "finished", STREAM, [*START, *FINISH[:-1], ["end_and_close"]]),
    "cut": Case(3, 200, "engine_broken_stream", STREAM, [*START, ["end"]]),
    "closed": Case(2, 200, "engine_broken_stream", STREAM, [*START, ["close"]]),
    "reset": Case(2, 200, "engine_broken_stream", STREAM, [*START, ["reset"]]),
    "malformed": Case(2, 200, "engine_broken_stream", STREAM, [*START, ["text", "data: {]\n\n"], ["hang"]]),
    "bad UTF-8": Case(1, 200, "engine_broken_stream", STREAM, [*START, ["hex", "646174613a20ff0a0a"], ["hang"]]),
    "cut and continued": Case(2, 200, "finished", STREAM | {"model": "resumed"}, [["answer", CUT]]),
    "error event": Case(2, 200, "engine_error", STREAM, [*START, ["event", {"error": {"code": 500}}], ["hang"]]),
    "a long stall": Case(0.2, 200, "engine_timeout", STREAM, [*START, ["hang"]]),
    "error first": Case(2, 503, "server_is_overloaded", STREAM, [["event", {"error": {"code": 503}}], ["hang"]]),
    "closed at once": Case(1, 502, "engine_error", STREAM, [["close"]]),
    "reset at once, blocking": Case(1, 502, "engine_error", {}, [["reset"]]),
    "500": Case(1, 502, "engine_error", {}, [["json", [500, {"error": {"message": "CUDA"}}]]]),
    "429": Case(1, 503, "server_is_overloaded", {}, [["json", [429, {"error": {"message": "full"}}]]]),
    "refused": Case(1, 422, "engine_refused", {}, [["json", [422, {"error": {"message": "m", "code": "x"}}]]]),
    "not JSON": Case(1, 502, "engine_error", {}, [["raw", "HTTP/1.1 200 X\r\ncontent-length: 2\r\n\r\nhi"], ["close"]]),
    "short of its length": Case(
        1, 502, "engine_broken_stream", {}, [["raw", "HTTP/1.1 200 X\r\ncontent-length: 9\r\n\r\n{"], ["close"]]
    ),
    "leaves early": Case(1, 499, "client_left", STREAM, [["hang"]], leaves=b""),
    "leaves in mid-stream": Case(2, 499, "client_left", STREAM, [*START, ["hang"]], leaves=b" two"),
    "leaves a long stream": Case(1, 499, "client_left", STREAM, [["role"], ["tokens", [20_000, 500]]], leaves=b"xx"),
    "leaves, blocking": Case(1, 499, "client_left", {}, [["hang"]], leaves=b""),
    "bad field": Case(1, 400, "bad_request", {"messages": 3}),
    "unknown model": Case(1, 404, "model_not_found", {"model": "nobody-has-this"}),
    "no key": Case(1, 401, "invalid_api_key", key=False),
}


class Client:
    """One keep-alive connection to the gateway, without an HTTP library, which would take more CPU than the gateway."""

    def __init__(self, port: int, key: str = KEY) -> None:
        self._port = port
        self._key = key
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, case: Case, request_id: str) -> tuple[int, bytes]:
        """Return the answer's status and body. Raises if the connection breaks."""
        return await self._answer(await self._send(case, request_id))

    async def post(self, path: str, body: bytes, headers: str) -> tuple[int, bytes]:
        """The same for any request. `headers` are lines, each with its end."""
        return await self._answer(await self._write(path, body, headers))

    async def _answer(self, reader: asyncio.StreamReader) -> tuple[int, bytes]:
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.lower().split(b"\r\n")
        status = int(head[9:12])
        length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), None)
        body = await reader.readexactly(length) if length is not None else await _chunks(reader)
        if b"connection: close" in lines or reader.at_eof():
            await self.close()
        return status, body

    async def leave(self, case: Case, request_id: str, rng: random.Random) -> None:
        """Ask, wait for what the case names, and disconnect: with a close or a reset."""
        await self.close()
        reader = await self._send(case, request_id)
        seen = b""
        if not case.leaves:
            await asyncio.sleep(rng.uniform(0, 0.05))
        while case.leaves and case.leaves not in seen:
            data = await reader.read(65536)
            assert data, f"{request_id}: the answer ended early: {seen[-200:]!r}"
            seen += data
        await self.close(reset=rng.random() < 0.5)

    async def _send(self, case: Case, request_id: str) -> asyncio.StreamReader:
        # The mark by which the engine finds the request, also for the second part of its answer
        fields = case.fields | {"user": request_id}
        body = json.dumps({"messages": MESSAGES, "script": case.script} | fields).encode()
        return await self._write(PATHS[case.kind], body, f"x-request-id: {request_id}\r\n", key=case.key)

    async def _write(self, path: str, body: bytes, headers: str, *, key: bool = True) -> asyncio.StreamReader:
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        said = f"authorization: Bearer {self._key}\r\n" if key else ""
        head = (
            f"POST {path} HTTP/1.1\r\nhost: localhost\r\n{said}{headers}"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        self._writer.write(head.encode() + body)
        return self._reader

    async def close(self, *, reset: bool = False) -> None:
        if self._writer is None:
            return
        if reset:
            linger = struct.pack("ii", 1, 0)
            self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._writer.close()
        self._writer = None


CUT_OFF = b"(cut off)"


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    """Read a body to its last chunk, or to the end of the connection, with CUT_OFF added."""
    parts = []
    while line := await reader.readline():
        if not (size := int(line, 16)):
            await reader.readline()
            return b"".join(parts)
        parts.append((await reader.readexactly(size + 2))[:-2])
    return b"".join([*parts, CUT_OFF])


def _differs(case: Case, status: int, body: bytes) -> str | None:
    """Return what is wrong with an answer; None if nothing is."""
    if status != case.status:
        return f"status {status} instead of {case.status}: {body[:200]!r}"
    if status != 200:
        error = json.loads(body)["error"]
        return None if set(error) == {"message", "type", "param", "code"} else f"error {error}"
    if not case.stream:
        json.loads(body)
        return None
    chunks = events(body.removesuffix(CUT_OFF).decode())
    if case.broken:
        error = chunks[-1].get("error") if body.endswith(CUT_OFF) and chunks[-1] != "[DONE]" else None
        return None if error and error["code"] == case.outcome else f"ends with {body[-100:]!r}"
    if chunks[-1] != "[DONE]" or body.endswith(CUT_OFF):
        return f"ends with {body[-100:]!r}"
    whole = text_of(chunks) == "one two three" or (case.script is not None and not case.resumed)
    return None if whole and not any("error" in it for it in chunks) else f"is not whole: {body[:300]!r}"


@dataclass
class Sample:
    done: int
    rss: list[float]  # MB, by worker
    fds: list[int]


class Soak:
    """One run. `failures` has a sentence for everything that went wrong."""

    def __init__(self, gateway: GatewayProcess, metrics: int, engine: FakeEngine, requests: int, seed: int) -> None:
        self._gateway = gateway
        self._metrics = metrics
        self._engine = engine
        self._workers = gateway.workers()
        rng = self._rng = random.Random(seed)
        names = list(CASES)
        chosen = rng.choices(names, [CASES[name].weight for name in names], k=requests)
        self._plan = {f"soak-{number}": name for number, name in enumerate(chosen)}
        self._left = iter(self._plan.items())
        self._done = 0
        self._samples: list[Sample] = []
        self._before = self._sample()
        self.failures: list[str] = []

    async def run(self, concurrency: int) -> float:
        """Send everything, and return the seconds that it took."""
        started = time.monotonic()
        watch = asyncio.create_task(self._watch())
        await asyncio.gather(*(self._caller() for _ in range(concurrency)))
        watch.cancel()
        self._samples.append(self._sample())
        return time.monotonic() - started

    async def _caller(self) -> None:
        client = Client(self._gateway.port)
        for request_id, name in self._left:
            case = CASES[name]
            try:
                if case.leaves is not None:
                    await client.leave(case, request_id, self._rng)
                else:
                    async with asyncio.timeout(60):
                        status, body = await client.ask(case, request_id)
                    if trouble := _differs(case, status, body):
                        self.failures.append(f"{request_id} ({name}): {trouble}")
            except (OSError, EOFError, TimeoutError, ValueError, AssertionError, LookupError) as exc:
                self.failures.append(f"{request_id} ({name}): {exc!r}")
                await client.close(reset=True)
            self._done += 1
        await client.close()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            self._samples.append(self._sample())

    def _sample(self) -> Sample:
        rss = [_rss(pid) for pid in self._workers]
        return Sample(self._done, rss, [len(descriptors(pid)) for pid in self._workers])

    def check(self) -> dict[str, Any]:
        """Wait until the gateway is idle, compare everything, and return the figures."""
        expected = Counter(CASES[name].outcome for name in self._plan.values())
        self._expect(self._engine_rests(), "the engine is still working on something")
        self._expect(self._gateway.workers() == self._workers, "a worker was replaced")
        wait_for(lambda: self._logged("request") >= len(self._plan), deadline=30, message="'request' lines are missing")
        self._check_log()
        metrics = scrape(self._metrics)
        counted = metrics.by("stack_requests_total", "outcome")
        self._expect(counted == dict(expected), f"metrics count {counted} instead of {dict(expected)}")
        broken = sum(CASES[name].broken for name in self._plan.values())
        told = metrics.total("stack_broken_streams_total")
        self._expect(told == broken, f"{told} broken streams are counted instead of {broken}")
        resumed = sum(CASES[name].resumed for name in self._plan.values())
        told = metrics.total("stack_resumes_total", route="resumed", outcome="resumed")
        self._expect(told == resumed, f"{told} resumes are counted instead of {resumed}")
        self._expect(metrics.total("stack_requests_in_flight") == 0, "metrics say that something is in flight")
        self._expect(metrics.total("stack_log_lines_dropped_total") == 0, "log lines were dropped")
        early = [it for it in self._samples if 0.2 <= it.done / len(self._plan) <= 0.4]
        late = [it for it in self._samples if it.done / len(self._plan) >= 0.8]
        rss = median(sum(it.rss) for it in early), median(sum(it.rss) for it in late)
        fds = max(sum(it.fds) for it in early), max(sum(it.fds) for it in late)
        self._expect(rss[1] <= rss[0] * 1.05 + 4, f"the workers' memory grew from {rss[0]:.1f} to {rss[1]:.1f} MB")
        self._expect(fds[1] <= fds[0] + 16, f"the workers' file descriptors grew from {fds[0]} to {fds[1]}")
        rest = sum(self._sample().fds)
        return {
            "outcomes": dict(sorted(expected.items())),
            "retries": metrics.total("stack_retries_total"),
            "resumes": told,
            "memory": f"{sum(self._before.rss):.0f} MB before, {rss[0]:.1f} early, {rss[1]:.1f} late",
            "descriptors": f"{sum(self._before.fds)} before, at most {fds[0]} early, {fds[1]} late, {rest} at rest",
        }

    def _check_log(self) -> None:
        finished: dict[str, list[str]] = {}
        statuses: dict[str, list[int]] = {}
        for line in self._gateway.log():
            if line["msg"] == "request":
                statuses.setdefault(line["request_id"], []).append(line["status"])
            elif "_finished" in line["msg"]:
                finished.setdefault(line["request_id"], []).append(line["outcome"])
            elif line["level"] == "error" and "logger" in line:
                self.failures.append(f"the log says: {line}")
        for request_id, name in self._plan.items():
            case, outcomes = CASES[name], finished.get(request_id, [])
            # A request that was refused before it became an exchange, or whose client was gone by then, has only a
            # `request` line.
            begun = outcomes or case.status not in (400, 401, 404, 499)
            if begun and outcomes != [case.outcome]:
                self.failures.append(f"{request_id} ({name}): logged outcomes {outcomes}")
            if statuses.get(request_id) != [case.status]:
                self.failures.append(f"{request_id} ({name}): logged statuses {statuses.get(request_id)}")

    def _logged(self, event: str) -> int:
        needle = f'"msg":"{event}","request_id":"soak-'
        with self._gateway.log_path.open() as lines:
            return sum(needle in line for line in lines)

    def _engine_rests(self) -> bool:
        try:
            wait_for(lambda: httpx.get(self._engine.url + "/_running").json()["running"] == 0, deadline=10)
        except AssertionError:
            return False
        return True

    def _expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.failures.append(otherwise)


def _rss(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise LookupError(pid)


def soak(directory: Path, requests: int, concurrency: int = 32, seed: int = 1) -> tuple[dict[str, Any], list[str]]:
    """Run it; returns figures and failures. The log stays in `directory`."""
    metrics = free_port()
    with fake_engine() as engine:
        config = directory / "stack.yaml"
        config.write_text(CONFIG.format(url=engine.url))
        settings = {
            "STACK_CONFIG": str(config),
            "STACK_METRICS_BIND": f"127.0.0.1:{metrics}",
            "LLM_IDLE_TIMEOUT": str(IDLE),
            "STACK_HOLD": "30",
        }
        with running_gateway(directory / "log", engine.url, **settings) as gateway:
            wait_for(lambda: scrape(metrics).total("stack_upstream_workers", upstream="engine") == 2)
            run = Soak(gateway, metrics, engine, requests, seed)
            seconds = asyncio.run(run.run(concurrency))
            figures = {"requests": requests, "seconds": round(seconds, 1), "per_second": round(requests / seconds)}
            return figures | run.check(), run.failures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.support.soak")
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    args = parser.parse_args()
    print(f"{args.requests} requests, {args.concurrency} at a time, seed {args.seed}")
    with tempfile.TemporaryDirectory(prefix="stack-soak-") as directory:
        figures, failures = soak(Path(directory), args.requests, args.concurrency, args.seed)
    for name, value in figures.items():
        print(f"{name:>20}  {value}")
    for failure in failures[:50]:
        print("FAILED:", failure)
    if failures:
        sys.exit(f"{len(failures)} things were not as they should be")
    print("every request had its one outcome; memory and file descriptors stayed flat")


if __name__ == "__main__":
    main()
