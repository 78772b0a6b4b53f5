"""Turns: measure several services in turn on one core, so that a change of the machine's speed meets all of them
alike."""

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from bench import chat, quick, service
from bench.service import Service

TOKENS = len(chat.TOKENS)  # tokens of the stream
LOADS = {"blocking": quick.blocking, "stream": quick.streams}

# Yields the services to measure. The arguments are their core, the port of the mock engine, and an empty directory.
Subjects = Callable[[int, int, Path], Iterator[AbstractContextManager[Service]]]


def measure(rounds: int, subjects: Subjects) -> dict[str, dict[str, list[float]]]:
    """Return the CPU time in µs for each answer: by load, then by the service's name, one for each round."""
    load_core, test_core = quick.cores()
    found: dict[str, dict[str, list[float]]] = {load: defaultdict(list) for load in LOADS}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        mock = stack.enter_context(service.mock(load_core))
        running = [stack.enter_context(it) for it in subjects(test_core, mock.port, scratch)]
        for number in range(rounds + 1):
            for load, step in LOADS.items():
                for subject in running[:: 1 if number % 2 else -1]:
                    cpu_ms = step(subject, seconds=1)[f"{load}_cpu_ms"]
                    if number:  # the first round warms up
                        found[load][subject.name].append(cpu_ms * 1e3)
    return found
