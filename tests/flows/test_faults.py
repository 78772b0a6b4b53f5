"""Every fault the gateway survives, by its number, and what a caller gets: one who streams, and one who waits.

`FAULTS` are those that a single request meets. Each is brought about before the real gunicorn with two workers by
tests/fakes/engine.py, to whom the request itself says what to do (`script`), or by the caller. `EVENTS`, further down,
are those that befall everybody at once. For each of both `Scene.settle` proves the common promises: one `request` line
and one line that the exchange finished, whose outcome is what the caller saw; the same counted once in /metrics, and
nothing in flight; every connection to the engine let go.
"""

import json
import os
import re
import resource
import signal
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tests.processes import (
    AUTH,
    MESSAGES,
    NO_TLS,
    ROOT,
    FakeEngine,
    GatewayProcess,
    Samples,
    fake_engine,
    free_port,
    running_gateway,
    scrape,
    text_of,
    wait_for,
)

CHAT = "/v1/chat/completions"

# ── What a caller may get ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Outcome:
    """A status, and the code of an error. With 200 and a code, the answer had begun: it ended with an error event and
    [DONE]. `told` is what log and metrics say, where that is another word. `early`: before there was an exchange that
    could finish."""

    status: int
    code: str | None = None
    told: str | None = field(default=None, compare=False)
    early: bool = field(default=False, compare=False)

    @property
    def word(self) -> str:
        return self.told or self.code or "finished"


WHOLE = Outcome(200)
LEFT = Outcome(499, "client_left")  # the caller was gone; so it stands in the log
LOST = Outcome(0, "connection broken")  # an exception in the caller's client, and no clean end


def error(status: int, code: str | None, told: str | None = None) -> Outcome:
    """An error with a status of its own: nothing of an answer had been sent."""
    return Outcome(status, code, told)


def cut(code: str) -> Outcome:
    """What came before stands; then an error event and [DONE]."""
    return Outcome(200, code)


# ── Callers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Call(threading.Thread):
    """One request on a connection of its own, and what came of it. `id` is its request id and its mark."""

    def __init__(self, scene: "Scene", caller: "Caller", *, stream: bool, fields: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.id = uuid4().hex
        self.engine = scene.engine
        self.port = scene.gateway.port
        self.stream = stream
        self.body = json.dumps({"messages": MESSAGES, "stream": stream, "user": self.id} | fields).encode()
        self.head = (
            f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nx-request-id: {self.id}\r\n"
            f"authorization: {AUTH['authorization']}\r\ncontent-length: {len(self.body)}\r\n\r\n"
        ).encode()
        self.got = b""  # as it came
        self.text = ""  # its body, once the outcome is known
        self.blind = False  # the caller doesn't see how it ends
        self.from_port = 0
        self._caller = caller
        self._trouble: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            with socket.socket() as raw:
                raw.settimeout(60)
                self._caller(self, raw)
        except Exception as exc:  # noqa: BLE001  told to whoever asks for the outcome
            self._trouble = exc

    def open(self, raw: socket.socket) -> None:
        raw.connect(("127.0.0.1", self.port))
        self.from_port = raw.getsockname()[1]
        raw.sendall(self.head + self.body)

    def read(self, raw: socket.socket, until: bytes | None = None) -> None:
        """Read on to the end, or until `until` has come."""
        while until is None or until not in self.got:
            data = raw.recv(65536)
            if not data:
                assert until is None, f"the answer ended early: {self.got[-500:]!r}"
                return
            self.got += data

    def outcome(self) -> Outcome | None:
        """What the caller saw once all is over; None if it can't know. Every frame that came is whole and valid."""
        self.join(60)
        assert not self.is_alive(), f"it hangs: {self.got[-500:]!r}"
        if self._trouble is not None:
            if isinstance(self._trouble, OSError):
                return LOST
            raise self._trouble
        if self.blind:
            return None
        if not self.got:
            return LOST
        head, _, body = self.got.partition(b"\r\n\r\n")
        status = int(head[9:12])
        whole = self._unframed(head.lower(), body)
        if whole is None:
            return LOST
        self.text = whole.decode()
        if status != 200:
            trouble = json.loads(self.text)["error"]
            assert set(trouble) == {"message", "type", "param", "code"}
            return Outcome(status, trouble["code"])
        if not self.stream:
            assert isinstance(json.loads(self.text), dict)
            return WHOLE
        chunks = sse(self.text)
        assert chunks[-1] == "[DONE]"
        assert chunks.count("[DONE]") == 1
        if len(chunks) > 1 and "error" in chunks[-2]:
            assert set(chunks[-2]["error"]) == {"message", "type", "param", "code"}
            return Outcome(200, chunks[-2]["error"]["code"])
        return WHOLE

    def _unframed(self, head: bytes, body: bytes) -> bytes | None:
        """The body without its framing; None if it ended too early."""
        if b"transfer-encoding: chunked" in head:
            parts = []
            while body:
                size, _, rest = body.partition(b"\r\n")
                parts.append(rest[: int(size, 16)])
                if not int(size, 16):
                    return b"".join(parts)
                body = rest[int(size, 16) + 2 :]
            return None
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        return body if len(body) == length else None


def sse(text: str) -> list[Any]:
    """A stream's data, by the letter of the standard; '[DONE]' as it is."""
    found = []
    for event in re.split(r"\r\n\r\n|\n\n|\r\r", text):
        lines = [line[5:].removeprefix(" ") for line in event.splitlines() if line.startswith("data:")]
        found += ["\n".join(lines)] if lines else []
    return [it if it == "[DONE]" else json.loads(it) for it in found]


Caller = Callable[[Call, socket.socket], None]


def reads(call: Call, raw: socket.socket) -> None:
    """As callers do: send, and read to the end."""
    call.open(raw)
    call.read(raw)


def is_let_go_at_once(call: Call, raw: socket.socket) -> None:
    """A caller whose connection ends within 100 ms of [DONE]; five times that is waited."""
    call.open(raw)
    call.read(raw, b"[DONE]")
    done = time.monotonic()
    call.read(raw)
    assert time.monotonic() - done < 5 * 0.1


def leaves(at: bytes = b"", *, reset: bool = False, ahead: bytes = b"") -> Caller:
    """A caller that goes once it has read `at`, or once the engine has its request; by closing or by a reset, having
    sent `ahead` of its next request."""

    def leave(call: Call, raw: socket.socket) -> None:
        call.blind = True
        if ahead:
            call.head = call.head.replace(b"connection: close\r\n", b"")
        call.open(raw)
        raw.sendall(ahead)
        call.engine.wait_seen(call.id)
        if at:
            call.read(raw, at)
        if reset:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return leave


def leaves_while_sending(call: Call, raw: socket.socket) -> None:
    """A caller that goes in the midst of its own request."""
    call.blind = True
    raw.connect(("127.0.0.1", call.port))
    raw.sendall(call.head + call.body[:20])


def sees_pings(call: Call, raw: socket.socket) -> None:
    """A caller for whom the engine begins to answer only once two pings have come."""
    call.open(raw)
    call.read(raw, b": ping\n\n")
    call.read(raw, b": ping\n\n\r\n8\r\n: ping\n\n")
    call.engine.release("prefill")
    call.read(raw)


def never_reads(call: Call, raw: socket.socket) -> None:
    """A caller that takes next to nothing of its answer, until it is dropped."""
    call.blind = True
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    call.open(raw)
    raw.settimeout(0)
    wait_for(lambda: raw.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), message="the connection is still held")


def drips(call: Call, raw: socket.socket) -> None:
    """A caller whose body comes at some bytes a second."""
    raw.connect(("127.0.0.1", call.port))
    raw.sendall(call.head)
    raw.settimeout(0.1)
    while not call.got:
        raw.sendall(call.body[:1])
        with suppress(TimeoutError):
            call.got = raw.recv(65536)
    raw.settimeout(60)
    with suppress(ConnectionError):  # it was still sending
        call.read(raw)


# ── The gateway, and what all faults have in common ──────────────────────────────────────────────────────────────────


class Scene:
    """A gateway with two workers, its engines, and everything that is asked of it."""

    def __init__(
        self, gateway: GatewayProcess, metrics: int, clock: Path | None, engine: FakeEngine, *others: FakeEngine
    ) -> None:
        self.gateway = gateway
        self.metrics = metrics
        self.clock = clock
        self.engine = engine
        self.engines = (engine, *others)
        self.begin()

    def begin(self) -> None:
        """From here on it counts."""
        self.calls: list[tuple[Call, Outcome | None]] = []
        self.before = scrape(self.metrics)

    def ask(self, *, stream: bool, caller: Caller = reads, expected: Outcome | None = None, **fields: Any) -> Call:
        """Send a request, in the background. `expected` is for callers that don't see the outcome."""
        call = Call(self, caller, stream=stream, fields=fields)
        self.calls.append((call, expected))
        return call

    def settle(self) -> list[Outcome]:
        """Wait until all is over, prove the common promises, and return how each request ended."""
        outcomes = []
        for call, expected in self.calls:
            seen = call.outcome()
            outcome = expected if expected is not None and seen in (None, expected) else seen
            assert outcome is not None
            outcomes.append(outcome)
            if outcome != LOST and self.gateway.log_path.is_file():
                self._told_once(call, outcome)
        if self.gateway.process.poll() is None:
            self.counted(outcomes)
        for engine in self.engines:
            wait_for(lambda engine=engine: engine.running() == 0, deadline=10, message="the engine is still at work")
        return outcomes

    def _told_once(self, call: Call, outcome: Outcome) -> None:
        lines = self.gateway.lines(call.id)
        assert [line["status"] for line in lines if line["msg"] == "request"] == [outcome.status]
        finished = [line["outcome"] for line in lines if "_finished" in line["msg"]]
        assert finished == ([] if outcome.early else [outcome.word])

    def counted(self, outcomes: list[Outcome]) -> None:
        """Each in one outcome, and none in flight."""
        outcomes = [outcome for outcome in outcomes if outcome != LOST]
        expected = Counter(outcome.word for outcome in outcomes)
        after = scrape(self.metrics)
        assert self.grown(after, "stack_requests_total", "outcome") == expected
        in_flight = "stack_requests_in_flight"
        assert after.total(in_flight) == self.before.total(in_flight)
        broken = self.grown(after, "stack_broken_streams_total", "kind")
        assert broken.total() == sum(outcome.status == 200 and outcome != WHOLE for outcome in outcomes)

    def grown(self, after: Samples, name: str, label: str) -> Counter[str]:
        return Counter(after.by(name, label)) - Counter(self.before.by(name, label))


@contextmanager
def scene(log: Path, *engines: FakeEngine, **settings: str) -> Iterator[Scene]:
    clock = log.parent / "clock"
    clock.write_text(f"{0:8}")
    under = (sys.executable, "-m", "tests.fakes.clock", str(clock))
    metrics = free_port()
    settings = {"STACK_METRICS_BIND": f"127.0.0.1:{metrics}"} | settings
    with running_gateway(log, engines[0].url, under=under, **settings) as gateway:
        wait_for(lambda: scrape(metrics).total("stack_upstream_workers") >= 2, message="two workers")
        yield Scene(gateway, metrics, clock, *engines)


# ── Faults that a request meets ──────────────────────────────────────────────────────────────────────────────────────

Script = list[list[Any]]
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
CHOICE = {"index": 0, "message": {"role": "assistant", "content": "Grüße"}, "finish_reason": "stop"}
ANSWER = json.dumps({"choices": [CHOICE], "usage": USAGE}, ensure_ascii=False)
BROKEN, FAILED, SILENT = "engine_broken_stream", "engine_error", "engine_timeout"

START: Script = [["role"], ["token", "one"], ["token", " two"]]
FINISH: Script = [["finish", "stop"], ["usage"], ["done"]]
EMPTY: list[Any] = ["head", [200, {}]]
HALF: Script = [EMPTY, ["text", ANSWER[:50]]]  # of a blocking answer
VOID: list[Any] = ["event", {"choices": [{"index": 0, "delta": {}}]}]
SECOND: list[Any] = ["event", {"choices": [{"index": 1, "delta": {}}]}]
ENDLESS: Script = [*START, ["text", 'data: {"x": "'], ["flood", 100_000_000], ["hang"]]


def http(body: str, headers: str = "content-type: application/json\r\n", length: int | None = None) -> list[str]:
    length = len(body.encode()) if length is None else length
    return ["raw", f"HTTP/1.1 200 OK\r\n{headers}content-length: {length}\r\n\r\n{body}"]


def says(status: int, body: Any) -> Script:
    return [["json", [status, body]]]


def fault(value: Any) -> list[Any]:
    return ["event", {"error": value}]


def pieces(text: str, size: int) -> Script:
    data = text.encode()
    return [*(["hex", data[start : start + size].hex()] for start in range(0, len(data), size)), ["end"]]


LAST = '{"choices":[{"index":0,"delta":{"content":"ä🙂"},"finish_reason":"stop"}]}'
ODD = {
    "CRLF": f"data: {LAST}\r\n\r\ndata: [DONE]\r\n\r\n",
    "CR": f"data: {LAST}\r\rdata: [DONE]\r\r",
    "no space after the colon": f"data:{LAST}\n\ndata:[DONE]\n\n",
    "data on two lines": f"data: {LAST[:11]}\ndata: {LAST[11:]}\n\ndata: [DONE]\n\n",
    "comments and ids": f"data: {LAST.replace('stop', '')}\nid: 1\n\n: hi\n\ndata: {LAST}\n\ndata: [DONE]\n\n",
}


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


UNREACHABLE = error(503, "engine_unavailable")
OVERLOADED = error(503, "server_is_overloaded")
REFUSED = error(422, "x", told="engine_refused")
NEVER_CAME = Outcome(499, "client_left", early=True)
LOADING = says(503, {"error": {"message": "Loading model"}})
# "folded": the engine is llama.cpp's, whose blocking answers are asked for as streams. "impatient": half a second each
# for the first token and for silence later. "brief": half a second for everything. "spare": a second engine is there.
FAULTS = [
    # number, fault; streaming and blocking: the outcome, and what the engine does
    Fault(1, "engine refuses connections", **both(UNREACHABLE, []), model="refusing", by="refusing"),
    Fault(1, "engine refuses connections, another is there", **both(WHOLE, []), model="refusing, spare", by="spare"),
    Fault(2, "engine's name does not resolve", **both(UNREACHABLE, []), model="nowhere"),
    Fault(2, "engine's name can't be one", **both(UNREACHABLE, []), model="nameless"),
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
    Fault(16, "a frame cut in half", streaming=(cut(BROKEN), [*START, ["text", 'data: {"choices"'], ["close"]])),
    Fault(
        16,
        "invalid UTF-8",
        streaming=(cut(BROKEN), [*START, ["hex", b'data: {"x": "\xff"}\n\n'.hex()], ["hang"]]),
        blocking=(error(502, FAILED), [EMPTY, ["hex", b'{"x": "\xff"}'.hex()], ["end"]]),
    ),
    *(
        Fault(17, name + how, streaming=(WHOLE, pieces(text, size)), passes=text)
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
        blocking=(WHOLE, [EMPTY, ["text", '{"x":"'], ["flood", 20_000_000], ["text", '"}'], ["end"]]),  # handed over
        caller=never_reads,
        bounded=True,
    ),
    Fault(26, "slow body", **both(Outcome(408, "request_timeout", early=True), []), caller=drips, tries=0),
]

CONFIG = """
engines:
  engine: {{dialect: vllm, base_url: "{url}"}}
  folding: {{dialect: llamacpp, slots: 256, base_url: "{url}"}}
  spare: {{dialect: vllm, base_url: "{spare}"}}
  refusing: {{dialect: vllm, base_url: "http://127.0.0.1:{closed}"}}
  nowhere: {{dialect: vllm, base_url: "http://nowhere.invalid:1"}}
  nameless: {{dialect: vllm, base_url: "http://engine..local:1"}}
  hole: {{dialect: vllm, base_url: "http://127.0.0.1:{hole}"}}
models:
  fake-model: &fake {{targets: [{{engine: engine, model: fake-model}}]}}
  impatient: {{<<: *fake, timeouts: &short {{first_token: 0.5, idle: 0.5}}}}
  patient: {{<<: *fake, timeouts: {{first_token: 1.5}}}}
  brief: {{<<: *fake, timeouts: {{total: 0.5}}}}
  folded: &folded {{targets: [{{engine: folding, model: fake-model}}]}}
  "folded, impatient": {{<<: *folded, timeouts: *short}}
  refusing: &refusing {{targets: [{{engine: refusing, model: x}}]}}
  nowhere: {{targets: [{{engine: nowhere, model: x}}]}}
  nameless: {{targets: [{{engine: nameless, model: x}}]}}
  hole: {{targets: [{{engine: hole, model: x}}], timeouts: {{connect: 0.5}}}}
  "patient, spare": {{<<: *fake, fallbacks: [{{engine: spare, model: spare}}], timeouts: {{first_token: 1.5}}}}
  "spare": {{<<: *fake, fallbacks: &spare [{{engine: spare, model: spare}}]}}
  "impatient, spare": {{<<: *fake, fallbacks: *spare, timeouts: *short}}
  "refusing, spare": {{<<: *refusing, fallbacks: *spare}}
default_model: fake-model
breaker: {{failures: 1000}}
retries: {{budget: 1, backoff: 0}}
"""


@contextmanager
def black_hole() -> Iterator[int]:
    """A port that answers no SYN: its backlog is full."""
    with ExitStack() as stack:
        hole = stack.enter_context(socket.socket())
        hole.bind(("127.0.0.1", 0))
        hole.listen(0)
        for _ in range(8):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(hole.getsockname())
        yield hole.getsockname()[1]


@pytest.fixture(scope="module")
def shared(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    path = tmp_path_factory.mktemp("faults")
    with fake_engine() as spare, black_hole() as hole:
        file = path / "stack.yaml"
        file.write_text(CONFIG.format(url=engine.url, spare=spare.url, closed=free_port(), hole=hole))
        settings = {
            "STACK_CONFIG": str(file),
            "STACK_HOLD": "1",
            "STACK_LIMIT_CONCURRENT": "1",  # a lease that isn't given back has the next request refused
            "STACK_READ_TIMEOUT": "1",
            "STACK_WRITE_TIMEOUT": "1",
            "RES_OPTIONS": "timeout:1 attempts:1",
        }
        with scene(path / "log", engine, spare, **settings) as shared:
            yield shared


def reset_peak(pids: list[int]) -> None:
    for pid in pids:
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak(pids: list[int]) -> float:
    """The most memory that each had since then, added up, in MB."""
    status = [Path(f"/proc/{pid}/status").read_text() for pid in pids]
    return sum(int(text.partition("VmHWM:")[2].split()[0]) for text in status) / 1024


CASES = {
    f"{it.number} {it.what} · {'streaming' if stream else 'blocking'}": (it, stream)
    for it in FAULTS
    for stream in (True, False)
    if (it.streaming if stream else it.blocking) is not None
}


@pytest.mark.parametrize("case", CASES)
def test_fault(shared: Scene, case: str) -> None:
    fault, stream = CASES[case]
    row = fault.streaming if stream else fault.blocking
    assert row is not None
    expected, script = row
    shared.begin()
    workers = shared.gateway.workers()
    reset_peak(workers)
    memory = peak(workers)
    # Only the first engine follows the script: the spare one's model has another name.
    fields = {"model": fault.model, "script_for": {"fake-model": script}} if script else {"model": fault.model}
    for _ in range(fault.times):
        call = shared.ask(stream=stream, caller=fault.caller, expected=expected, **fields)
        call.join(60)
    assert shared.settle() == [expected] * fault.times
    assert not re.search(rb"CUDA|127\.0\.0\.1|nowhere|Errno", call.got)
    if fault.passes is not None:
        assert call.text == fault.passes
    if stream and expected.status == 200 and expected != WHOLE:
        assert text_of(sse(call.text)) == ("one two" if script[:3] == START else "")
    if fault.tries is not None:
        assert len(shared.engine.seen(call.id)) == fault.tries
    line = shared.gateway.lines(call.id)[-2:][0]
    assert fault.by in (None, line.get("engine"))
    assert fault.tokens in (None, line.get("tokens_out"))
    if fault.bounded:
        assert peak(workers) - memory < 100
    assert shared.gateway.workers() == workers


# ── Events that befall everybody ─────────────────────────────────────────────────────────────────────────────────────

Happens = Callable[[Scene], list[Outcome]]


@dataclass(frozen=True)
class Event:
    """A row: how each request under way may end, streaming and blocking. `happens` asks them, and settles."""

    number: int
    what: str
    streaming: set[Outcome]
    blocking: set[Outcome]
    happens: Happens
    log: str
    config: str
    settings: dict[str, str]


EVENTS: dict[str, Event] = {}


def event(
    number: int,
    what: str,
    *,
    streaming: set[Outcome],
    blocking: set[Outcome],
    log: str = "log",
    config: str = "",
    **settings: str,
) -> Callable[[Happens], Happens]:
    def add(happens: Happens) -> Happens:
        EVENTS[f"{number} {what}"] = Event(number, what, streaming, blocking, happens, log, config, settings)
        return happens

    return add


def under_way(here: Scene, count: int = 5) -> str:
    """So many streams in the midst of their answers, and as many blocking calls; returns the gate they wait at."""
    gate = uuid4().hex
    for _ in range(count):
        here.ask(stream=True, script=[*START, ["gate", gate], *FINISH, ["end"]])
        here.ask(stream=False, script=[["gate", gate], http(ANSWER)])
    wait_for(lambda: here.engine.running() == 2 * count)
    wait_for(lambda: all(b" two" in call.got for call, _ in here.calls if call.stream))
    return gate


def status(here: Scene, path: str) -> int:
    return httpx.get(here.gateway.url + path, verify=NO_TLS).status_code


@event(
    27,
    "SIGTERM mid-answer",
    streaming={WHOLE},
    blocking={WHOLE},
    STACK_DRAIN_DELAY="2",
    STACK_GRACE="30",
)
def sigterm(here: Scene) -> list[Outcome]:
    gate = under_way(here)
    here.gateway.process.send_signal(signal.SIGTERM)
    wait_for(lambda: status(here, "/readyz") == 503)  # for the drain delay, and requests are still served
    assert here.ask(stream=False).outcome() == WHOLE

    def refused() -> bool:
        try:
            status(here, "/livez")
        except httpx.TransportError:
            return True
        return False

    wait_for(refused)
    here.engine.release(gate)
    assert here.gateway.process.wait(30) == 0
    assert here.gateway.log()[-1]["msg"] == "Shutting down: Master"  # the last lines are written
    return here.settle()


@event(
    27,
    "SIGTERM mid-answer, the grace is over",
    streaming={cut("draining")},
    blocking={error(503, "draining")},
    STACK_GRACE="1",
)
def end_of_grace(here: Scene) -> list[Outcome]:
    under_way(here)
    assert here.gateway.stop() == 0
    return here.settle()


def kill_a_worker(here: Scene, number: int) -> list[Outcome]:
    """Just its own requests are lost. The key may have ten at a time: those that were lost count no more."""
    gate = under_way(here)
    (victim, _) = before = here.gateway.workers()
    its = sockets_of(victim)
    lost = [socket_to(here.gateway.port, call.from_port) in its for call, _ in here.calls]
    os.kill(victim, number)
    wait_for(lambda: len(here.gateway.workers()) == 2 and victim not in here.gateway.workers())
    here.engine.release(gate)
    assert [call.outcome() for call, _ in here.calls] == [LOST if it else WHOLE for it in lost]
    assert before[1] in here.gateway.workers()
    wait_for(lambda: scrape(here.metrics).total("stack_requests_in_flight") == 0)
    here.engine.release(under_way(here))
    return here.settle()


def sockets_of(pid: int) -> set[str]:
    return {str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()}


def socket_to(port: int, from_port: int) -> str:
    """The one at `port` whose other end is at `from_port`, as a process's descriptors name it."""
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines())
    ends = f":{port:04X}", f":{from_port:04X}"
    return next(f"socket:[{row[9]}]" for row in rows if (row[1][-5:], row[2][-5:]) == ends)


@event(28, "SIGKILL of a worker", streaming={WHOLE, LOST}, blocking={WHOLE, LOST}, STACK_LIMIT_CONCURRENT="10")
def sigkill(here: Scene) -> list[Outcome]:
    return kill_a_worker(here, signal.SIGKILL)


@event(28, "SIGSEGV of a worker", streaming={WHOLE, LOST}, blocking={WHOLE, LOST}, STACK_LIMIT_CONCURRENT="10")
def sigsegv(here: Scene) -> list[Outcome]:
    return kill_a_worker(here, signal.SIGSEGV)


@event(
    29,
    "engine killed for memory",
    streaming={cut(BROKEN), UNREACHABLE, WHOLE},
    blocking={UNREACHABLE, error(502, FAILED), WHOLE},
)
def engine_killed(here: Scene) -> list[Outcome]:
    under_way(here)
    here.engine.process.kill()
    here.engine.process.wait()
    assert WHOLE not in {call.outcome() for call, _ in here.calls}
    for stream in (True, False):
        assert here.ask(stream=stream).outcome() == UNREACHABLE
    wait_for(lambda: status(here, "/readyz") == 503)
    assert status(here, "/livez") == 200
    with fake_engine(int(here.engine.url.rpartition(":")[2])) as engine:
        here.engines = (engine,)
        wait_for(lambda: status(here, "/readyz") == 200)
        for stream in (True, False):
            assert here.ask(stream=stream).outcome() == WHOLE
        return here.settle()


@event(
    31,
    "log pipe blocked",
    streaming={WHOLE},
    blocking={WHOLE},
    log="pipe",
    STACK_LOG_LEVEL="DEBUG",
    STACK_LOG_CONTENT="true",
)
def log_blocked(here: Scene) -> list[Outcome]:
    """Nobody reads the log until the end. The pipe holds 64 KiB, and each worker's buffer 4 MiB."""
    for _ in range(20):
        for stream in (True, False):
            here.ask(stream=stream, messages=[{"role": "user", "content": "x" * 1_000_000}])
    outcomes = here.settle()
    dropped = scrape(here.metrics).total("stack_log_lines_dropped_total")
    assert dropped > 0
    with here.gateway.log_path.open("rb") as pipe:
        told = 0
        while told < dropped:  # whole lines only
            line = json.loads(pipe.readline())
            told += line["count"] if line["msg"] == "log_lines_dropped" else 0
        assert told == dropped
        here.gateway.process.terminate()
        while line["msg"] != "Shutting down: Master":
            line = json.loads(pipe.readline())
        assert here.gateway.process.wait(30) == 0
    return outcomes


@event(31, "disk full", streaming={WHOLE}, blocking={WHOLE}, log="/dev/full")
def log_full(here: Scene) -> list[Outcome]:
    for _ in range(5):
        for stream in (True, False):
            here.ask(stream=stream)
    outcomes = here.settle()
    wait_for(lambda: scrape(here.metrics).total("stack_log_lines_dropped_total") >= 3 * len(outcomes))
    assert here.gateway.stop() == 0
    return outcomes


@event(
    32,
    "clock jumps an hour",
    streaming={WHOLE, error(504, SILENT)},
    blocking={WHOLE},
    LLM_FIRST_TOKEN_TIMEOUT="1",
    STACK_LIMIT_REQUESTS_PER_MINUTE="60",
)
def clock_jumps(here: Scene) -> list[Outcome]:
    """Forth, and two back. What is under way goes on, what is due is due as ever, and a minute's limit flows back by
    one a second."""
    began = time.monotonic()
    gate = under_way(here)
    workers = here.gateway.workers()
    for jump in (3600, -3600):
        with here.clock.open("r+") as file:
            file.write(f"{jump:8}")
        assert here.ask(stream=True, script=[["hang"]]).outcome() == error(504, SILENT)
        wait_for(lambda now=jump: abs(here.gateway.log()[-1]["ts"] / 1000 - time.time() - now) < 600)
        call = here.ask(stream=False)
        assert call.outcome() == WHOLE
        left = int(call.got.partition(b"x-ratelimit-remaining-requests: ")[2].split(b"\r\n")[0])
        assert left <= 60 - len(here.calls) + time.monotonic() - began
        assert here.engine.running() == 10
    here.engine.release(gate)
    assert here.gateway.workers() == workers
    return here.settle()


@event(33, "ten times the load it can serve", streaming={WHOLE, OVERLOADED}, blocking={WHOLE, OVERLOADED})
def overload(here: Scene) -> list[Outcome]:
    """The engine works on eight requests at a time and refuses the rest."""
    for _ in range(40):
        here.ask(stream=True, script=[["slots", 8], ["pause", 0.5], *START, *FINISH, ["end"]])
        here.ask(stream=False, script=[["slots", 8], ["pause", 0.5], http(ANSWER)])
    outcomes = here.settle()
    assert outcomes.count(WHOLE) >= 8
    return outcomes


@event(34, "retry storm", streaming={error(502, FAILED)}, blocking={error(502, FAILED)})
def retry_storm(here: Scene) -> list[Outcome]:
    """An engine that fails every request: retries add a fifth of them, and ten in reserve."""
    for _ in range(10):
        calls = [here.ask(stream=stream, script=says(500, {})) for stream in (True, False) for _ in range(10)]
        for call in calls:
            call.join()
    outcomes = here.settle()
    asked = sum(len(here.engine.seen(call.id)) for call, _ in here.calls)
    assert 200 < asked <= 200 + 10 + 200 * 0.2
    return outcomes


FLAPPING = """
engines: {{engine: {{dialect: vllm, base_url: "{url}"}}}}
models: {{fake-model: {{targets: [{{engine: engine, model: fake-model}}], timeouts: {{first_token: 0.5}}}}}}
default_model: fake-model
breaker: {{failures: 1, open_for: 60, probe_every: 0.2}}
"""


@event(
    35,
    "flapping engine",
    streaming={error(504, SILENT), UNREACHABLE},
    blocking={UNREACHABLE, WHOLE},
    config=FLAPPING,
)
def flapping(here: Scene) -> list[Outcome]:
    """It is silent, and its health probes succeed all the while: one request at a time has to show each worker whether
    it answers."""

    def workers(state: str) -> float:
        return scrape(here.metrics).total("stack_upstream_workers", state=state)

    def ask_both(**fields: Any) -> list[Call]:
        """So many at once that neither is left out."""
        return [here.ask(**fields) for _ in range(20)]

    def both_half_open() -> bool:
        if workers("closed"):
            for call in ask_both(stream=True, script=[["hang"]]):
                call.join(60)
        return workers("half-open") == 2

    def both_closed() -> bool:
        for call in ask_both(stream=False, script=gated):
            call.join(60)
        return workers("closed") == 2

    wait_for(both_half_open, deadline=60)
    gated = [["gate", "trial"], http(ANSWER)]
    calls = ask_both(stream=False, script=gated)
    wait_for(lambda: sum(call.is_alive() for call in calls) == here.engine.running() > 0)
    assert here.engine.running() <= 2
    here.engine.release("trial")
    wait_for(both_closed, deadline=60)
    assert all(here.ask(stream=False).outcome() == WHOLE for _ in range(10))
    return here.settle()


@event(36, "file descriptors exhausted", streaming={WHOLE}, blocking={WHOLE, OVERLOADED}, STACK_READ_TIMEOUT="60")
def descriptors(here: Scene) -> list[Outcome]:
    """What is under way goes on; what needs a new connection to the engine is told so; and all is well again after."""
    gate = under_way(here)
    workers = here.gateway.workers()
    exhausted = threading.Event()

    def connects_in_time(call: Call, raw: socket.socket) -> None:
        raw.connect(("127.0.0.1", call.port))
        exhausted.wait(60)
        raw.sendall(call.head + call.body)
        call.read(raw)

    before, most = sum(map(descriptors_of, workers)), 100
    calls = [here.ask(stream=False, caller=connects_in_time) for _ in range(20)]
    wait_for(lambda: sum(map(descriptors_of, workers)) >= before + 20)
    for pid in workers:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, most))
    with ExitStack() as held:

        def both_exhausted() -> bool:
            held.enter_context(socket.create_connection(("127.0.0.1", here.gateway.port)))
            return min(map(descriptors_of, workers)) >= most - 4

        wait_for(both_exhausted)
        exhausted.set()
        assert OVERLOADED in {call.outcome() for call in calls}
    # Until then libuv accepts whoever comes and hangs up, to get rid of them.
    wait_for(lambda: max(map(descriptors_of, workers)) < most - 16)
    here.engine.release(gate)
    for stream in (True, False) * 5:
        wait_for(lambda stream=stream: here.ask(stream=stream).outcome() == WHOLE)
    assert here.gateway.workers() == workers
    assert len(here.gateway.log()) < 1000
    assert not any(line["msg"] == "engine_state" for line in here.gateway.log())  # it was not the engine's fault
    return here.settle()


def descriptors_of(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


@pytest.mark.parametrize("name", EVENTS)
def test_event(tmp_path: Path, name: str) -> None:
    event = EVENTS[name]
    log = tmp_path / event.log
    with ExitStack() as stack:
        if event.log == "pipe":
            os.mkfifo(log)
            stack.callback(os.close, os.open(log, os.O_RDWR))  # so that opening one end doesn't wait for the other
        engine = stack.enter_context(fake_engine())
        config = tmp_path / "stack.yaml"
        config.write_text(event.config.format(url=engine.url))
        settings = event.settings | ({"STACK_CONFIG": str(config)} if event.config else {})
        here = stack.enter_context(scene(log, engine, **settings))
        outcomes = event.happens(here)
    for stream, expected in ((True, event.streaming), (False, event.blocking)):
        seen = {outcome for (call, _), outcome in zip(here.calls, outcomes, strict=True) if call.stream == stream}
        assert seen
        assert seen <= expected


# ── The list is complete ─────────────────────────────────────────────────────────────────────────────────────────────

# What needs containers, an engine with a model, or a table of its own.
ELSEWHERE = [
    (2, "tests/stack/test_faults.py::test_an_engine_gone_and_back_with_another_address"),  # recovers unaided
    (2, "tests/flows/test_names.py::test_names_that_are_being_looked_up_hold_up_no_other"),
    (3, "tests/stack/test_faults.py::test_an_engine_gone_and_back_with_another_address"),
    (8, "tests/stack/test_faults.py::test_ten_streams_under_a_fault"),
    (12, "tests/stack/test_faults.py::test_a_disconnected_engine_leaves_no_client_hanging"),
    (17, "tests/test_sse_properties.py::test_a_sound_stream_passes_whole_however_it_is_cut"),
    (26, "tests/flows/test_attacks.py::test_slow_ones_are_closed_and_others_served"),
    (27, "tests/stack/test_restarts.py::test_sigterm_during_a_stream_loses_nothing"),
    (28, "tests/store/test_usage.py::test_nothing_is_lost_or_doubled_or_held_for_ever_by_kills"),
    (30, "tests/store/test_keys.py::test_a_locked_store_is_said_to_be_so_and_keys_go_on"),
    (30, "tests/store/test_keys.py::test_known_keys_outlive_the_database"),
    (30, "tests/store/test_keys.py::test_a_gateway_starts_without_its_database_and_finds_it_later"),
    (30, "tests/store/test_faults.py::test_a_server_that_stands_still_is_not_waited_for"),
    (30, "tests/store/test_faults.py::test_a_file_that_is_gone_and_back"),
    (30, "tests/store/test_usage.py::test_with_a_full_disk_requests_go_on_and_what_is_lost_is_counted"),
    (30, "tests/store/test_usage.py::test_with_a_read_only_disk_nothing_is_lost"),
]


def test_every_fault_of_the_list_has_a_case() -> None:
    cases = {it.number for it in FAULTS} | {it.number for it in EVENTS.values()}
    assert cases | {number for number, _ in ELSEWHERE} == set(range(1, 37))
    for _, place in ELSEWHERE:
        file, _, name = place.partition("::")
        assert f"def {name}(" in (ROOT / file).read_text(), place
