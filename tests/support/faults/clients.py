"""Faults of callers, who leave, read slowly or send slowly (23 to 26)."""

from tests.support.faults.callers import drips, leaves, leaves_while_sending, never_reads
from tests.support.faults.outcome import LEFT, NEVER_CAME, WHOLE, Outcome
from tests.support.faults.row import Fault, both
from tests.support.faults.scripts import EMPTY, FINISH, HALF, START

# number, fault; streaming and blocking: the outcome, and what the engine does
FAULTS = [
    Fault(23, "client leaves before the first byte", **both(LEFT, [["hang"]]), caller=leaves(), tries=1),
    Fault(23, "client resets before the first byte", **both(LEFT, [["hang"]]), caller=leaves(reset=True), tries=1),
    Fault(23, "client leaves while it gets pings", streaming=(LEFT, [["hang"]]), caller=leaves(b": ping"), tries=1),
    Fault(
        23,
        "client leaves, its next request sent ahead",
        **both(LEFT, [["hang"]]),
        caller=leaves(ahead=b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n"),
    ),
    Fault(23, "client leaves while it sends", **both(NEVER_CAME, []), caller=leaves_while_sending, tries=0),
    Fault(
        24,
        "client leaves mid-stream",
        streaming=(LEFT, [*START, ["hang"]]),
        caller=leaves(b" two"),
        tries=1,
        tokens=2,
    ),
    Fault(
        24,
        "client resets mid-stream",
        streaming=(LEFT, [*START, ["hang"]]),
        caller=leaves(b" two", reset=True),
        tokens=2,
    ),
    Fault(24, "client leaves mid-answer", blocking=(LEFT, [*HALF, ["hang"]]), caller=leaves(), tries=1),
    Fault(24, "client leaves mid-answer; folded", blocking=(LEFT, [*START, ["hang"]]), model="folded", caller=leaves()),
    Fault(
        24,
        "client leaves right at [DONE]",
        streaming=(WHOLE, [*START, *FINISH, ["hang"]]),
        caller=leaves(b"[DONE]"),
        tokens=3,
    ),
    Fault(
        25,
        "client that never reads",
        streaming=(LEFT, [["role"], ["tokens", [10_000, 60_000]], *FINISH, ["end"]]),
        blocking=(
            Outcome(499),
            [EMPTY, ["text", '{"choices":[],"x":"'], ["flood", 20_000_000], ["text", '"}'], ["end"]],
        ),  # finished for the engine, but not taken
        caller=never_reads,
        bounded=True,
    ),
    Fault(26, "slow body", **both(Outcome(408, "request_timeout", early=True), []), caller=drips, tries=0),
]
