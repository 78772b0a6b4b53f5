"""Measure what log lines, metrics and spans cost for each request: `python -m bench.telemetry [--rounds N]`.

The calls that a blocking request makes for them are made here by themselves. Two whole gateways, one with and one
without them, differ more from one measurement to the next than by these calls. The threads that write lines and send
spans count too. Beside them: what the whole request takes, and what it takes nginx.
"""

import argparse
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from statistics import median

from bench import service
from bench.service import Service
from bench.turns import measure
from gateway import logs
from gateway.exchange import Ending, Exchange, Try, Usage
from gateway.metrics import Metrics
from gateway.server.scrape import Board
from gateway.traces.attributes import Reached
from gateway.traces.export import Exporter
from gateway.traces.spans import Traces

REQUESTS = 2000  # in each round; their lines and spans fit into the backlogs
PATH = "/v1/chat/completions"
HEADERS = [(b"host", b"localhost"), (b"authorization", b"Bearer key"), (b"content-type", b"application/json")]
FIRST = {"request_id": "req-0123456789abcdef", "key": "0123456789", "api": "chat_completions", "model": "model"}
LAST = {"request_id": "req-0123456789abcdef", "method": "POST", "path": PATH, "status": 200, "elapsed_ms": 812.3}


def ending() -> Ending:
    """Return the end of a blocking request, for which one engine was asked."""
    now = time.monotonic()
    fields = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64}
    it = Exchange(
        request_id=FIRST["request_id"], kind="chat", key_id="0123456789", stream=False, wants_usage=False, size=1,
        choices=1, resume=True, fields=fields, started=now - 0.8, queue_timeout=10.0,
    )  # fmt: skip
    asked = Try("engine", "model", now - 0.8, span=b"12345678", engine_id="chatcmpl-0123456789", worked=0.8, ended=now)
    told = Ending(
        exchange=it, route="model", arm=None, engine="engine", attempts=1, resumes=0, error=None, begun=True,
        usage=Usage(12, 64), estimated=12, counted=64, first_token_at=None, finish_reason="stop", ended=now,
    )  # fmt: skip
    return replace(told, tries=[asked])


def lines(told: Ending) -> None:
    """Do what Record and RequestLog do for the log."""
    logs.event("chat_started", FIRST | {"messages": 1} | {"stream": False})
    logs.event("chat_finished", told.fields(), told.level)
    logs.event("request", LAST | {})


def counts(metrics: Metrics, told: Ending) -> None:
    """Do what they do for the metrics."""
    metrics.started(told.exchange, "model", None)
    metrics.finished(told)
    metrics.responded(200)


def spans(traces: Traces, told: Ending) -> None:
    """Do what they do for the traces."""
    trace = traces.begin(HEADERS, told.exchange.started)
    trace.lines(b"12345678")
    traces.answered(trace, told, broken=False, answer=())
    traces.responded(trace, "POST", PATH, PATH, FIRST["request_id"], 200, "")


def cost(call: Callable[[], None], finish: Callable[[], None] = lambda: None) -> float:
    """Return the CPU time in µs for each call. `finish` waits for the work that other threads do for it."""
    began = time.process_time()
    for _ in range(REQUESTS):
        call()
    finish()
    return (time.process_time() - began) / REQUESTS * 1e6


def parts(rounds: int) -> dict[str, float]:
    """Return the CPU time in µs of each part for a request: the least of all rounds."""
    told = ending()
    board = Board()
    board.reserve(0)
    board.take(0)
    metrics = Metrics(["model"])
    logging.getLogger("stack").setLevel(logging.INFO)
    output = os.dup(1)
    with service.mock(min(os.sched_getaffinity(0))) as collector, Path(os.devnull).open("wb") as nowhere:

        def of_spans() -> float:
            exporter = Exporter(f"http://127.0.0.1:{collector.port}", {}, {}, "bench", metrics.spans_dropped)
            traces = Traces(exporter, 1.0, {"engine": Reached("vllm", "http://engine:8000/v1")}, content=False)
            return cost(lambda: spans(traces, told), exporter.close)

        os.dup2(nowhere.fileno(), 1)
        try:
            found = [
                {
                    "logs": cost(lambda: lines(told), logs.flush),
                    "metrics": cost(lambda: counts(metrics, told)),
                    "traces": of_spans(),
                }
                for _ in range(rounds)
            ]
        finally:
            os.dup2(output, 1)
            board.remove()
    return {name: min(it[name] for it in found) for name in found[0]}


def subjects(core: int, engine: int, scratch: Path) -> Iterator[AbstractContextManager[Service]]:
    """Yield nginx and the gateway. `engine` is the port of the mock engine."""
    yield service.nginx(core, engine, scratch)
    yield service.gateway(core, engine, scratch)


def main() -> None:
    """Measure, and print a line for the parts and one for the whole."""
    parser = argparse.ArgumentParser(prog="python -m bench.telemetry", description=__doc__)
    parser.add_argument("--rounds", type=int, default=8, help="how often to measure each (default: 8)")
    rounds = parser.parse_args().rounds
    whole = {name: median(them) for name, them in measure(rounds, subjects)["blocking"].items()}
    found = parts(rounds)
    told = ", ".join(f"{name} {it:.1f}" for name, it in found.items())
    together = sum(found.values())
    print(f"a blocking request, µs: {told}, together {together:.1f}")
    print(
        f"the whole request, µs: {whole['gateway']:.1f}, nginx {whole['nginx']:.1f}; together they are "
        f"{together / whole['gateway']:.1%} of it, and {together / whole['nginx']:.1f}x nginx"
    )


if __name__ == "__main__":
    main()
