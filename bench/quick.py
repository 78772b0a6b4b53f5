"""Measure what the gateway costs, beside nginx (the floor) and the engine alone: `python -m bench.quick`.

The service under test has one core to itself; wrk, the paced client and the mock engine share another.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from http.client import HTTPException
from pathlib import Path
from typing import NoReturn

from bench import chat, load, report, service
from bench.service import BenchError, Service

SUBJECTS = ("nginx", "direct", "gateway")
ROUNDS = 3  # rounds, of which the median counts
CONNECTIONS = 32  # connections of wrk in the loads with several
PACED = {"connections": 100, "streams_each": 4}
GIVE_UP_S = 180  # seconds for the whole run
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)

Figures = dict[str, float]  # by the keys of report.FIGURES


def blocking(subject: Service, seconds: int = 2) -> Figures:
    lines, before = subject.log_lines, subject.cpu_s()
    done = load.run_wrk(subject.port, chat.BLOCKING, len(chat.BLOCKING_REPLY), connections=CONNECTIONS, seconds=seconds)
    return {
        "blocking_cpu_ms": _spent(subject, before) / done.requests * 1e3,
        "blocking_per_s": done.requests / done.seconds,
        "log_lines": (subject.log_lines - lines) / done.requests,
    }


def alone(subject: Service) -> Figures:
    done = load.run_wrk(subject.port, chat.BLOCKING, len(chat.BLOCKING_REPLY), connections=1, seconds=1)
    return {"alone_per_s": done.requests / done.seconds, "alone_p50_ms": done.p50_ms}


def streams(subject: Service, seconds: int = 2) -> Figures:
    before = subject.cpu_s()
    done = load.run_wrk(subject.port, chat.STREAM, len(chat.STREAM_REPLY), connections=CONNECTIONS, seconds=seconds)
    return {"stream_cpu_ms": _spent(subject, before) / done.requests * 1e3}


def translated(subject: Service, seconds: int = 2) -> Figures:
    """Measure the same stream through the translated APIs, which only the gateway has."""
    figures: Figures = {}
    for name, (path, body, last) in chat.TRANSLATED.items() if subject.name == "gateway" else ():
        size = load.check_translated(subject.port, path, body, last)
        before = subject.cpu_s()
        done = load.run_wrk(subject.port, body, size, connections=CONNECTIONS, seconds=seconds, path=path)
        figures[f"{name}_cpu_ms"] = _spent(subject, before) / done.requests * 1e3
    return figures


def paced(subject: Service) -> Figures:
    before = subject.cpu_s()
    tokens = load.run_paced(subject.port, **PACED)
    return {"paced_cpu_us": _spent(subject, before) / tokens * 1e6, "rss_mb": subject.rss_mb()}


def _spent(subject: Service, before: float) -> float:
    time.sleep(subject.settle_s)
    return subject.cpu_s() - before


def warm_up(subject: Service) -> Figures:
    """Check the subject's answers, load it for two seconds, and forget the figures."""
    load.check_answers(subject.port)
    blocking(subject, seconds=1)
    streams(subject, seconds=1)
    return {}


def measure(names: list[str], how_often: int, test_core: int, load_core: int) -> report.Rounds:
    """Start the subjects and measure them in turn, so that other load on the machine affects them alike."""
    rounds: report.Rounds = {name: defaultdict(list) for name in names}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        mock = stack.enter_context(service.mock(load_core))
        running = {"direct": mock}
        if "nginx" in names:
            running["nginx"] = stack.enter_context(service.nginx(test_core, mock.port, scratch))
        if "gateway" in names:
            running["gateway"] = stack.enter_context(service.gateway(test_core, mock.port, scratch))

        def turn(step: Callable[[Service], Figures]) -> None:
            for name in names:
                mock.pin(test_core if name == "direct" else load_core)
                for figure, value in step(running[name]).items():
                    rounds[name][figure].append(value)

        print("warm-up", file=sys.stderr)
        turn(warm_up)
        for number in range(how_often):
            print(f"round {number + 1} of {how_often}", file=sys.stderr)
            for step in (blocking, alone, streams, translated, paced):
                turn(step)
        for name in names:
            load.check_answers(running[name].port)
    return rounds


def cores() -> tuple[int, int]:
    """Return a core for the load, on which this process stays, and a core for the subjects. Exits with a message if
    there are not two cores, or if tools are missing."""
    os.environ["PATH"] += ":/usr/sbin"  # Debian installs nginx here, which is not in every user's PATH
    if missing := [tool for tool in ("nginx", "wrk") if not shutil.which(tool)]:
        sys.exit(f"bench: {' and '.join(missing)} not found. On Debian: apt-get install nginx-light wrk")
    load_core, test_core = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
    if load_core == test_core:
        sys.exit("bench: needs two cores, one for the service under test and one for the load.")
    os.sched_setaffinity(0, {load_core})  # this process's core, which wrk inherits
    return load_core, test_core


def main() -> None:
    """Measure, print the table, and write the JSON. Exits 1 with a message if the run is invalid."""
    parser = argparse.ArgumentParser(prog="python -m bench.quick", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure of every round to FILE")
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=SUBJECTS, help="all, unless told otherwise")
    parser.add_argument("--rounds", type=int, choices=range(1, 10), default=ROUNDS, help="how often to measure each")
    arguments = parser.parse_args()
    load_core, test_core = cores()
    for number in SIGNALS:
        signal.signal(number, _give_up)
    signal.alarm(GIVE_UP_S)
    try:
        rounds = measure(arguments.subjects, arguments.rounds, test_core, load_core)
    except (BenchError, OSError, HTTPException, subprocess.SubprocessError) as exc:
        sys.exit(f"bench: {type(exc).__name__}: {exc}")
    print(report.table(rounds))
    if arguments.json:
        arguments.json.write_text(json.dumps(report.as_json(rounds), indent=2) + "\n")


def _give_up(number: int, _frame: object) -> NoReturn:
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)  # a second Ctrl-C must not stop the stopping of the services
    sys.exit(f"bench: gave up at {signal.Signals(number).name}; a run may take {GIVE_UP_S} s")


if __name__ == "__main__":
    main()
