"""Measure what log lines, metrics and spans cost for each request: `python -m bench.telemetry [--rounds N]`.

The gateway without any of them, and then with one more each time, runs in turn on one core. Eight rounds take two
minutes.
"""

import argparse
from collections.abc import Iterator
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from statistics import median

from bench import service
from bench.service import Service
from bench.turns import TOKENS, measure

STEPS = ("without", "logs", "metrics", "traces")


def settings(engine: int) -> dict[str, dict[str, str]]:
    """Return the environment of each step, which includes that of the step before.

    `engine` is the port of the mock engine, which is the collector too."""
    added = {
        "without": {"STACK_LOG_LEVEL": "ERROR"},
        "logs": {"STACK_LOG_LEVEL": "INFO"},
        "metrics": {"STACK_METRICS_BIND": f"127.0.0.1:{service.free_port()}"},
        "traces": {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{engine}"},
    }
    so_far: dict[str, str] = {}
    return {step: dict(so_far := so_far | added[step]) for step in STEPS}


def subjects(core: int, engine: int, scratch: Path) -> Iterator[AbstractContextManager[Service]]:
    """Yield a gateway for each step."""
    for step, its in settings(engine).items():
        (scratch / step).mkdir()
        yield service.gateway(core, engine, scratch / step, name=step, **its)


def main() -> None:
    """Measure, and print a line for each load."""
    parser = argparse.ArgumentParser(prog="python -m bench.telemetry", description=__doc__)
    parser.add_argument("--rounds", type=int, default=8, help="how often to measure each (default: 8)")
    more = {}
    for load, by_step in measure(parser.parse_args().rounds, subjects).items():
        added = {}
        for before, step in pairwise(STEPS):
            added[step] = median(b - a for a, b in zip(by_step[before], by_step[step], strict=True))
        more[load] = added
        told = ", ".join(f"{step} {it:+.1f}" for step, it in added.items())
        print(f"{load}, µs: without {median(by_step['without']):.1f}, {told}, together {sum(added.values()):+.1f}")
    each = {step: (more["stream"][step] - more["blocking"][step]) / TOKENS for step in STEPS[1:]}
    print(f"each of a stream's {TOKENS} tokens, µs:", ", ".join(f"{step} {it:+.2f}" for step, it in each.items()))


if __name__ == "__main__":
    main()
