"""Faults of what an engine says: errors, malformed frames, odd framing, statuses (14 to 22)."""

from tests.support.faults.callers import is_let_go_at_once
from tests.support.faults.outcome import BROKEN, FAILED, OVERLOADED, REFUSED, WHOLE, cut, error
from tests.support.faults.row import Fault, both
from tests.support.faults.scripts import (
    ANSWER,
    CHOICE,
    EMPTY,
    ENDLESS,
    FINISH,
    LAST,
    LOADING,
    ODD,
    PARTS,
    START,
    fault,
    http,
    pieces,
    says,
)

# number, fault; streaming and blocking: the outcome, and what the engine does
FAULTS = [
    Fault(
        14,
        "error as the first event",
        streaming=(OVERLOADED, [fault({"message": "busy", "code": 503}), ["hang"]]),
        blocking=(OVERLOADED, says(200, {"error": {"message": "busy", "code": 503}})),
    ),
    Fault(
        14,
        "error as the first event, another is there",
        streaming=(WHOLE, [fault("CUDA died"), ["hang"]]),
        blocking=(WHOLE, says(200, {"error": "CUDA died"})),
        model="spare",
        by="spare",
    ),
    Fault(
        14,
        "prompt too long",
        **both(
            error(400, "context_length_exceeded"),
            says(400, {"error": {"code": 400, "message": "too long", "type": "exceed_context_size_error"}}),
        ),
        tries=1,
    ),
    Fault(
        15,
        "in-band error as object",
        streaming=(cut(FAILED), [*START, fault({"message": "CUDA died", "type": "x"}), ["hang"]]),
        blocking=(error(502, FAILED), says(200, {"error": {"message": "CUDA died", "type": "x"}})),
    ),
    Fault(
        15,
        "in-band error as string",
        streaming=(cut(FAILED), [*START, fault("CUDA died"), ["end"]]),
        blocking=(error(502, FAILED), says(200, {"error": "CUDA died"})),
    ),
    Fault(
        15,
        "in-band error with integer code",
        streaming=(cut("server_is_overloaded"), [*START, fault({"message": "CUDA", "code": 429}), ["done"], ["end"]]),
        blocking=(OVERLOADED, says(200, {"error": {"message": "CUDA died", "code": 429}})),
    ),
    Fault(
        16,
        "malformed JSON frame",
        streaming=(cut(BROKEN), [*START, ["text", 'data: {"choices": [\n\n'], ["hang"]]),
        blocking=(error(502, FAILED), [http('{"choices": [')]),
    ),
    Fault(16, "malformed first frame", streaming=(error(502, BROKEN), [["text", "data: {]\n\n"], ["hang"]])),
    Fault(
        16,
        "a content that is a list",
        streaming=(cut(BROKEN), [*START, PARTS, ["hang"]]),
        blocking=(error(502, BROKEN), says(200, {"choices": [CHOICE | {"message": {"content": [{"text": "hi"}]}}]})),
    ),
    Fault(16, "a content that is a list; folded", blocking=(error(502, BROKEN), [PARTS, *FINISH]), model="folded"),
    Fault(16, "a content that is a list, another is there", streaming=(WHOLE, [PARTS]), model="spare", by="spare"),
    Fault(16, "a frame cut in half", streaming=(cut(BROKEN), [*START, ["text", 'data: {"choices"'], ["close"]])),
    Fault(
        16,
        "invalid UTF-8",
        streaming=(cut(BROKEN), [*START, ["hex", b'data: {"x": "\xff"}\n\n'.hex()], ["hang"]]),
        blocking=(error(502, FAILED), [EMPTY, ["hex", b'{"x": "\xff"}'.hex()], ["end"]]),
    ),
    *(
        Fault(17, name + how, streaming=(WHOLE, pieces(text, size)), passes=f"data: {LAST}\n\ndata: [DONE]\n\n")
        for name, text in ODD.items()
        for size, how in ((1000, ""), (1, ", one byte at a time"))
    ),
    Fault(17, "UTF-8 split across chunks", blocking=(WHOLE, [EMPTY, *pieces(ANSWER, 1)]), passes=ANSWER),
    Fault(18, "an event of many MB without a newline", streaming=(cut(BROKEN), ENDLESS), bounded=True),
    Fault(
        18,
        "an event of many MB without a newline; folded",
        blocking=(error(502, BROKEN), ENDLESS),
        model="folded",
        bounded=True,
    ),
    Fault(
        18,
        "a blocking answer of more than 256 MiB",
        blocking=(error(502, FAILED), [EMPTY, ["text", '{"x":"'], ["flood", 280_000_000], ["hang"]]),
    ),
    Fault(
        19,
        "no content-type",
        streaming=(WHOLE, [EMPTY, *START, *FINISH, ["end"]]),
        blocking=(WHOLE, [http(ANSWER, headers="")]),
    ),
    Fault(
        19,
        "JSON to stream=true, a stream to stream=false",
        streaming=(error(502, BROKEN), [http(ANSWER)]),
        blocking=(error(502, FAILED), [*START, *FINISH, ["end"]]),
    ),
    Fault(
        20,
        "compressed engine body",  # which was not asked for
        **both(error(502, FAILED), [http("12345", headers="content-encoding: gzip\r\n"), ["close"]]),
    ),
    Fault(21, "engine says 401", **both(error(502, "engine_unauthorized"), says(401, {"error": "CUDA"})), tries=1),
    Fault(21, "engine says 404", **both(error(404, "model_not_found"), says(404, {"error": "none"})), tries=1),
    Fault(21, "engine says 429", **both(OVERLOADED, says(429, {"error": "CUDA"})), tries=1),
    Fault(21, "engine says 503", **both(OVERLOADED, says(503, {"error": "CUDA"})), tries=1),
    Fault(21, "engine says 503, loading", **both(error(503, "model_loading"), LOADING), tries=1),
    Fault(21, "engine says 422", **both(REFUSED, says(422, {"error": {"message": "m", "code": "x"}})), tries=1),
    Fault(21, "engine says 500", **both(error(502, FAILED), says(500, {"error": {"message": "CUDA"}})), tries=2),
    *(
        Fault(21, f"engine says {script[0][1][0]}, another is there", **both(WHOLE, script), model="spare", by="spare")
        for script in (says(401, {}), says(429, {}), says(500, {}), says(503, {}), LOADING)
    ),
    *(
        Fault(
            21, f"engine says {status}, another is there", **both(outcome, says(status, {})), model="spare", by="engine"
        )
        for status, outcome in ((400, error(400, None, "engine_refused")), (404, error(404, "model_not_found")))
    ),
    Fault(
        21,
        "HTML",
        **both(error(502, FAILED), [["raw", "HTTP/1.1 502 X\r\ncontent-length: 17\r\n\r\n<html>CUDA</html>"]]),
    ),
    Fault(21, "not HTTP", **both(error(502, FAILED), [["raw", "SSH-2.0-OpenSSH_9.2\r\n"], ["close"]])),
    Fault(
        22,
        "bytes after [DONE], the socket stays open",
        streaming=(WHOLE, [*START, *FINISH, ["text", "data: late\n\n"], ["hang"]]),
        blocking=(WHOLE, [http(ANSWER), ["raw", "HTTP/1.1 200 OK\r\n\r\n"], ["hang"]]),
    ),
    Fault(
        22,
        "the socket stays open after [DONE]",
        streaming=(WHOLE, [*START, *FINISH, ["hang"]]),
        caller=is_let_go_at_once,
    ),
    Fault(
        22, "bytes after [DONE]; folded", blocking=(WHOLE, [*START, *FINISH, ["text", "x"], ["hang"]]), model="folded"
    ),
]
