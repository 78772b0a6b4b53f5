"""Faults of connections to the engine, and of an engine that says nothing or breaks off (1 to 13)."""

from tests.support.faults.callers import sees_pings
from tests.support.faults.outcome import BROKEN, FAILED, SILENT, UNREACHABLE, WHOLE, cut, error
from tests.support.faults.row import Fault, both
from tests.support.faults.scripts import ANSWER, EMPTY, FINISH, HALF, SECOND, START, VOID, http

# Words in a model's name. "folded": the engine is llama.cpp's, whose blocking answers are asked for as streams.
# "impatient": half a second each for the first token and for silence later. "brief": half a second for everything.
# "spare": a second engine is there.
# number, fault; streaming and blocking: the outcome, and what the engine does
FAULTS = [
    Fault(1, "engine refuses connections", **both(UNREACHABLE, []), model="refusing", by="refusing"),
    Fault(1, "engine refuses connections, another is there", **both(WHOLE, []), model="refusing, spare", by="spare"),
    Fault(2, "engine's name does not resolve", **both(UNREACHABLE, []), model="nowhere"),
    Fault(4, "connect black hole", **both(error(504, SILENT), []), model="hole"),
    Fault(5, "accepts, never answers", streaming=(error(504, SILENT), [["hang"]]), model="impatient", tries=1),
    # A blocking answer may take all the time there is in the end.
    Fault(5, "accepts, never answers", blocking=(error(504, SILENT), [["hang"]]), model="brief", tries=1),
    Fault(
        5,
        "accepts, never answers; folded",
        blocking=(error(504, SILENT), [["hang"]]),
        model="folded, impatient",
        tries=1,
    ),
    Fault(
        5,
        "accepts, never answers, another is there",
        streaming=(WHOLE, [["hang"]]),
        model="impatient, spare",
        by="spare",
    ),
    Fault(5, "never answers; pings were sent", streaming=(cut(SILENT), [["hang"]]), model="patient"),
    Fault(
        5,
        "never answers; pings were sent, another is there",
        streaming=(WHOLE, [["hang"]]),
        model="patient, spare",
        by="spare",
    ),
    Fault(6, "reset before headers", **both(error(502, FAILED), [["reset"]]), tries=2),
    Fault(6, "closed before headers", **both(error(502, FAILED), [["close"]]), tries=2),
    Fault(6, "reset before headers, another is there", **both(WHOLE, [["reset"]]), model="spare", by="spare"),
    Fault(6, "closed before headers, another is there", **both(WHOLE, [["close"]]), model="spare", by="spare"),
    Fault(
        7,
        "stale keep-alive connection",
        streaming=(WHOLE, [["stale"], *START, *FINISH, ["end"]]),
        blocking=(WHOLE, [["stale"], http(ANSWER)]),
        times=6,
    ),
    Fault(
        8,
        "200, then reset mid-stream",
        streaming=(cut(BROKEN), [*START, ["reset"]]),
        blocking=(error(502, BROKEN), [*HALF, ["reset"]]),
    ),
    Fault(8, "200, then reset; folded", blocking=(error(502, BROKEN), [*START, ["reset"]]), model="folded"),
    Fault(
        8,
        "200, then reset mid-stream, another is there",
        streaming=(cut(BROKEN), [*START, ["reset"]]),
        blocking=(WHOLE, [*HALF, ["reset"]]),
        model="spare",
    ),
    Fault(
        9,
        "terminal chunk missing",
        streaming=(cut(BROKEN), [*START, ["close"]]),
        blocking=(error(502, BROKEN), [*HALF, ["close"]]),
    ),
    Fault(9, "body shorter than its length", blocking=(error(502, BROKEN), [http(ANSWER, length=999), ["close"]])),
    Fault(
        9,
        "terminal chunk missing, the answer is whole",
        streaming=(WHOLE, [*START, ["finish", "stop"], ["close"]]),
        blocking=(WHOLE, [["raw", f"HTTP/1.1 200 OK\r\n\r\n{ANSWER}"], ["close"]]),
    ),
    Fault(
        10,
        "clean EOF, no finish_reason",
        streaming=(cut(BROKEN), [*START, ["end"]]),
        blocking=(error(502, FAILED), [*HALF, ["end"]]),
    ),
    Fault(10, "clean EOF, no finish_reason; folded", blocking=(error(502, BROKEN), [*START, ["end"]]), model="folded"),
    Fault(10, "[DONE], no finish_reason", streaming=(cut(BROKEN), [*START, ["done"], ["end"]])),
    Fault(10, "one of two choices never finishes", streaming=(cut(BROKEN), [*START, SECOND, *FINISH, ["end"]])),
    Fault(10, "finished, no [DONE]", streaming=(WHOLE, [*START, ["finish", "stop"], ["end"]])),
    Fault(
        10,
        "clean EOF before any event",
        streaming=(error(502, BROKEN), [["text", ": ping\n\n"], ["end"]]),
        blocking=(error(502, FAILED), [["head", [200, {}]], ["end"]]),
    ),
    Fault(
        10, "clean EOF before any event, another is there", **both(WHOLE, [EMPTY, ["end"]]), model="spare", by="spare"
    ),
    Fault(11, "empty delta, then EOF (Ollama)", streaming=(cut(BROKEN), [*START, VOID, ["end"]])),
    Fault(11, "empty delta, then EOF; folded", blocking=(error(502, BROKEN), [*START, VOID, ["end"]]), model="folded"),
    Fault(
        12,
        "stall mid-stream",
        streaming=(cut(SILENT), [*START, ["hang"]]),
        blocking=(error(504, SILENT), [*HALF, ["hang"]]),
        model="impatient",
    ),
    Fault(
        12,
        "stall mid-stream, as long as all may take",
        streaming=(cut(SILENT), [*START, ["hang"]]),
        blocking=(error(504, SILENT), [*HALF, ["hang"]]),
        model="brief",
    ),
    Fault(12, "stall mid-stream; folded", blocking=(error(504, SILENT), [*START, ["hang"]]), model="folded, impatient"),
    Fault(
        13,
        "slow prefill, healthy: pings",
        streaming=(WHOLE, [["gate", "prefill"], *START, *FINISH, ["end"]]),
        caller=sees_pings,
    ),
    Fault(13, "slow prefill, healthy", blocking=(WHOLE, [["pause", 1], http(ANSWER)]), model="impatient"),
]
