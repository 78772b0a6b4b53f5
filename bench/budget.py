"""Measure what limits of every kind and usage cost for each request: `python -m bench.budget [--rounds N]`.

The gateway, and the gateway without both (without.py), run in turn on one core, beside nginx. Ten rounds take two
minutes.
"""

import argparse
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median

from bench import service
from bench.service import Service
from bench.turns import TOKENS, measure


def subjects(core: int, engine: int, scratch: Path) -> Iterator[AbstractContextManager[Service]]:
    """Yield nginx, the gateway without limits and usage, and the gateway. `engine` is the port of the mock engine."""
    yield service.nginx(core, engine, scratch)
    for module in ("bench.without", "gateway"):
        (scratch / module).mkdir()
        yield service.gateway(core, engine, scratch / module, module)


def main() -> None:
    """Measure, and print a line for each load."""
    parser = argparse.ArgumentParser(prog="python -m bench.budget", description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="how often to measure each (default: 10)")
    more = {}
    for load, by_subject in measure(parser.parse_args().rounds, subjects).items():
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
