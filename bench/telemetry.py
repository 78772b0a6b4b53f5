"""What a request pays for its log lines, metrics and spans: `python -m bench.telemetry [--rounds N]`.

The gateway without any of them, and then with one more each time, in turn on one core. Two minutes with eight rounds.
"""

import argparse
import tempfile
from collections import defaultdict
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from statistics import median

from bench import chat, quick, service

TOKENS = len(chat.TOKENS)  # of the stream
LOADS = {"blocking": quick.blocking, "stream": quick.streams}
STEPS = ("without", "logs", "metrics", "traces")


def settings(engine: int) -> dict[str, dict[str, str]]:
    """What is set for each step, beside what the step before has. The mock engine is the collector too."""
    added = {
        "without": {"STACK_LOG_LEVEL": "ERROR"},
        "logs": {"STACK_LOG_LEVEL": "INFO"},
        "metrics": {"STACK_METRICS_BIND": f"127.0.0.1:{service.free_port()}"},
        "traces": {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{engine}"},
    }
    so_far: dict[str, str] = {}
    return {step: dict(so_far := so_far | added[step]) for step in STEPS}


def measure(rounds: int) -> dict[str, dict[str, list[float]]]:
    """CPU in µs for each answer: by load, then by step."""
    load_core, test_core = quick.cores()
    found: dict[str, dict[str, list[float]]] = {load: defaultdict(list) for load in LOADS}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        mock = stack.enter_context(service.mock(load_core))
        subjects = []
        for step, its in settings(mock.port).items():
            (scratch / step).mkdir()
            running = service.gateway(test_core, mock.port, scratch / step, name=step, **its)
            subjects.append(stack.enter_context(running))
        for number in range(rounds + 1):
            for load, run in LOADS.items():
                for subject in subjects[:: 1 if number % 2 else -1]:
                    cpu_ms = run(subject, seconds=1)[f"{load}_cpu_ms"]
                    if number:  # the first round warms up
                        found[load][subject.name].append(cpu_ms * 1e3)
    return found


def main() -> None:
    """Measure, and print a line for each load."""
    parser = argparse.ArgumentParser(prog="python -m bench.telemetry", description=__doc__)
    parser.add_argument("--rounds", type=int, default=8, help="how often to measure each (default: 8)")
    more = {}
    for load, by_step in measure(parser.parse_args().rounds).items():
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
