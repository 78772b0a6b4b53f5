"""Row: one fault that a single request meets, and what is expected of it."""

from dataclasses import dataclass
from typing import Any

from tests.support.faults.callers import Caller, reads
from tests.support.faults.outcome import Outcome
from tests.support.faults.scripts import Script


@dataclass(frozen=True)
class Fault:
    """A row. `script` is what the engine does in a stream, `blocking` in a blocking answer: outcome, script."""

    number: int
    what: str
    streaming: tuple[Outcome, Script] | None = None
    blocking: tuple[Outcome, Script] | None = None
    model: str = "fake-model"
    caller: Caller = reads
    times: int = 1  # one after the other
    tries: int | None = None  # times the engine is asked
    by: str | None = None  # the engine asked last, as the log says
    tokens: int | None = None  # that came out, as the log says
    passes: str | None = None  # the caller gets exactly this
    bounded: bool = False  # the workers' memory stays where it was


def both(outcome: Outcome, script: Script) -> dict[str, Any]:
    return {"streaming": (outcome, script), "blocking": (outcome, script)}
