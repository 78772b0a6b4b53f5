"""Measure what limits of every kind and usage cost for each request: `python -m bench.budget [--rounds N]`.

The gateway, and the gateway without both (without.py), run in turn on one core, beside nginx. Ten rounds take two
minutes.
"""

import argparse
import tempfile
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from bench import chat, quick, service

TOKENS = len(chat.TOKENS)  # tokens of the stream
LOADS = {"blocking": quick.blocking, "stream": quick.streams}


def measure(rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return the CPU time in µs for each answer: by load, then by subject."""
    load_core, test_core = quick.cores()
    found: dict[str, dict[str, list[float]]] = {load: defaultdict(list) for load in LOADS}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        mock = stack.enter_context(service.mock(load_core))
        subjects = [stack.enter_context(service.nginx(test_core, mock.port, scratch))]
        for module in ("bench.without", "gateway"):
            (scratch / module).mkdir()
            subjects.append(stack.enter_context(service.gateway(test_core, mock.port, scratch / module, module)))
        for number in range(rounds + 1):
            for load, step in LOADS.items():
                for subject in subjects[:: 1 if number % 2 else -1]:
                    cpu_ms = step(subject, seconds=1)[f"{load}_cpu_ms"]
                    if number:  # the first round warms up
                        found[load][subject.name].append(cpu_ms * 1e3)
    return found


def main() -> None:
    """Measure, and print a line for each load."""
    parser = argparse.ArgumentParser(prog="python -m bench.budget", description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="how often to measure each (default: 10)")
    more = {}
    for load, by_subject in measure(parser.parse_args().rounds).items():
        nginx, without, whole = (by_subject[name] for name in ("nginx", "bench.without", "gateway"))
        each = [b - a for a, b in zip(without, whole, strict=True)]
        more[load] = median(whole) - median(without)
        print(
            f"{load}, µs: nginx {median(nginx):.1f}, gateway {median(whole):.1f}, of that limits and usage "
            f"{more[load]:.1f} ({min(each):.1f} to {max(each):.1f}), {more[load] / median(nginx):.1f}x nginx"
        )
    print(f"each of a stream's {TOKENS} tokens, µs: {(more['stream'] - more['blocking']) / TOKENS:+.2f}")


if __name__ == "__main__":
    main()
