"""Endings: how the gateway tells each of its errors to the clients of each API, and what clients were seen to do then.

tests/recordings/clients/faults.jsonl has what six programs and four packages did after faults (2026-11-28).
`reaction` finds the recorded fault that looks like an ending to a client, and says what that client did.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

import orjson

from gateway import errors
from gateway.api import faces
from gateway.errors import StackError
from gateway.relay.writer import OPENAI
from gateway.translation import messages, responses
from tests.support.processes import ROOT

LONG = "prompt is too long"


@dataclass(frozen=True)
class Ending:
    """What a client gets. `status` None: it is in the midst of a stream, and the connection is cut after it. `code` is
    what the client decides by: OpenAI's code, Anthropic's type, or the code of `response.failed`."""

    status: int | None
    code: str | None = None
    waits: bool = False  # it names a time to come back
    final: bool = False  # x-should-retry: false
    long: bool = False  # its words say that the prompt is too long

    def __str__(self) -> str:
        flags = [name for name in ("waits", "final", "long") if getattr(self, name)]
        return " ".join([str(self.status or "stream"), self.code or "-", *flags])


ERRORS: dict[str, StackError] = {
    type(it).__name__: it
    for it in (
        errors.BadRequest("'x' is wrong.", param="x"),
        errors.ContextExceeded("This model's context is 8 tokens.", param="messages", tokens=9, limit=8),
        errors.InvalidKey("Incorrect API key provided."),
        errors.InvalidUser("The front end did not say who its user is."),
        errors.ModelNotFound("The model 'x' does not exist here."),
        errors.NotFound("There is nothing here."),
        errors.MethodNotAllowed("Use POST.", allow="POST"),
        errors.RequestTimeout("The request did not arrive in time."),
        errors.IdempotencyConflict("This key was used for another request."),
        errors.TooLarge("The body is larger than 9 bytes."),
        errors.UnsupportedEncoding("Send the body with Content-Encoding gzip or zstd."),
        errors.UnsupportedMediaType("Send the body as JSON."),
        errors.HeadersTooLarge("The headers are too large."),
        errors.RateLimited("This key is limited. Retry after the time in Retry-After.", 2.0, {}),
        errors.QueueShareFull("This key has its maximum number of requests waiting.", 2.0),
        errors.QuotaSpent("This key has used its tokens of the day.", {}),
        errors.InternalError("The gateway had an internal error."),
        errors.EngineError("The engine's answer cannot be used."),
        errors.EngineUnauthorized("The engine refuses the gateway's own credentials."),
        errors.EngineRefused("It is wrong.", status=422, code="x"),
        errors.EngineUnsupported("The engine cannot do that."),
        errors.EngineLost("The connection to the engine broke.", code="engine_broken_stream"),
        errors.EngineDied("The engine died."),
        errors.EngineFailed("The engine died while it worked on this request."),
        errors.EngineDisobeyed("The model did not make the call."),
        errors.EngineUnavailable("The engine is away."),
        errors.EngineUnreachable("The engine is unreachable."),
        errors.EngineOverloaded("The engine is overloaded. Try again shortly."),
        errors.EngineFull("The engine is full. Try again shortly."),
        errors.QueueFull("The queue is full.", 2.0),
        errors.QueueTimeout("The engine cannot begin in time.", 2.0),
        errors.EngineAsleep("The engine sleeps."),
        errors.LoadFailed("The engine could not load this model. Try again later."),
        errors.ModelLoading("The model is being loaded."),
        errors.EngineTimeout("The engine took too long to answer."),
        errors.EngineSilent("The engine was silent for too long."),
        errors.AnswerTooLong("The answer took longer than 600 seconds."),
        errors.GatewayBusy("The gateway has no memory for another request now. Try again shortly."),
        errors.PromptFailed("The operator's prompt cannot be rendered."),
        errors.StoreUnavailable("The database of keys is unreachable."),
        errors.Draining("The gateway is stopping."),
        errors.Exhausted("The gateway has its maximum number of open connections. Try again shortly."),
    )
}
# Time does not help: the same request gets the same error until somebody changes something.
HOPELESS = frozenset(
    """BadRequest ContextExceeded InvalidKey InvalidUser ModelNotFound NotFound MethodNotAllowed IdempotencyConflict
    TooLarge UnsupportedEncoding UnsupportedMediaType HeadersTooLarge QuotaSpent EngineUnauthorized EngineRefused
    EngineUnsupported EngineFailed EngineDisobeyed AnswerTooLong PromptFailed""".split()  # noqa: SIM905
)
# Those that can end an answer which has begun.
LATE = ("InvalidKey", "InternalError", "Draining", *(it for it in ERRORS if it.startswith(("Engine", "Answer"))))
PATHS = {"chat": "/v1/chat/completions", "responses": "/v1/responses", "messages": "/v1/messages"}


def before(error: StackError, api: str, *, codex: bool = False) -> Ending:
    """The ending of a request of which nothing was answered. Codex accepts nothing but events."""
    path = PATHS[api]
    accept = b"text/event-stream" if codex else b"application/json"
    scope = {"path": path, "method": "POST", "headers": [(b"accept", accept)], "request_id": "r"}
    if (events := faces.failing(error, scope)) is not None:
        return _failed(events)
    told = faces.refusal(error, scope)
    headers = {name.decode(): value for name, value in told.headers}
    return of_response(told.status, headers, told.body)


def of_response(status: int, headers: Any, body: bytes) -> Ending:
    """The ending that is a whole response, whose headers can be asked with `get`."""
    said = orjson.loads(body)
    error = said["error"]
    code = error["type"] if "request_id" in said else error["code"]
    final = headers.get("x-should-retry") in ("false", b"false")
    return Ending(status, code, "retry-after" in headers, final, LONG in error["message"].lower())


def within(error: StackError, api: str) -> Ending:
    """The ending of a stream that has begun."""
    if api == "chat":
        return of_events(OPENAI.failed(error), api)
    read = messages.read if api == "messages" else responses.read
    body = {"model": "m", "stream": True} | (
        {"max_tokens": 9, "messages": [{"role": "user", "content": "x"}]} if api == "messages" else {"input": "x"}
    )
    writer = read(body, request_id="r", now=1).writer
    return of_events(writer.head() + writer.failed(error), api)


def of_events(events: bytes, api: str) -> Ending:
    """The ending that is the last event of a stream."""
    if api == "responses":
        return _failed(events)
    error = orjson.loads(events.rstrip().rpartition(b"data: ")[2])["error"]
    return Ending(None, error["type"] if api == "messages" else error["code"])


def _failed(events: bytes) -> Ending:
    """Of a stream of Responses. It has both events: Codex reads the second, LangChain the first."""
    kinds = re.findall(rb"^event: (.*)$", events, re.MULTILINE)
    assert kinds[-2:] == [b"error", b"response.failed"]
    error = orjson.loads(events.rstrip().rpartition(b"data: ")[2])["response"]["error"]
    return Ending(None, error["code"], waits="try again in" in error["message"])


# -- what clients did -------------------------------------------------------------------------------------------------

# Which API each one speaks here, and how its recordings name it.
CLIENTS = {
    "codex": ("responses", "codex-0.171.0"),
    "claude": ("messages", "claude-code-2.1.332"),
    "opencode": ("chat", "opencode-1.18.33"),
    "pi": ("chat", "pi-0.73.1"),
    "qwen": ("chat", "qwen-code-0.24.4"),
    "continue": ("chat", "continue-cli-1.5.47"),
    "openai": ("chat", "openai chat stream"),
    "responses": ("responses", "openai responses stream"),
    "anthropic": ("messages", "anthropic stream"),
    "ai": ("chat", "ai compatible"),
}
# They obey `x-should-retry: false`: Claude Code was seen to, of the packages their source says so.
OBEDIENT = ("claude", "openai", "responses", "anthropic")
RECORDED = [json.loads(line) for line in (ROOT / "tests/recordings/clients/faults.jsonl").read_text().splitlines()]


@dataclass(frozen=True)
class Fault:
    """One recorded fault, and what the client did: its requests, and whether it kept to the time it was told."""

    looks: Ending
    always: bool  # the fault was the answer to every request; otherwise a second one got an answer
    requests: int
    kept: bool

    def __str__(self) -> str:
        """So many requests; with "+" more than two were not tried, with "w" it waited as told before each."""
        more = "" if self.always or self.requests == 1 else "+"
        return f"{self.requests}{more}{'w' if self.kept and self.requests > 1 else ''}"


def _fault(row: dict[str, Any]) -> Fault | None:
    kind, _, rest = row["answers"][0].partition(":")
    options = dict(it.partition("=")[::2] for it in rest.split(","))
    words = options.get("msg", "").replace("_", " ")
    if "requests" not in row or row["requests"] is None or kind not in ("http", "text"):
        return None
    told = re.search(r"try again in ([\d.]+)s", words)
    wait = float(options.get("retry-after") or (told[1] if told else 0))
    gaps = row.get("seconds_between")
    kept = wait > 0 and (min(gaps, default=0) >= 0.6 * wait if gaps is not None else row["ms"] >= 900 * wait)
    code = next((options[it] for it in ("code", "type", "failed", "errfail", "error") if it in options), None)
    status = int(options["status"]) if kind == "http" else None
    final = options.get("should-retry") == "false"
    looks = Ending(status, code, wait > 0, final, LONG in words.lower())
    return Fault(looks, len(row["answers"]) == 1, row["requests"], kept)


def recorded(client: str) -> list[Fault]:
    """The faults that were tried with a client, in their order."""
    name = CLIENTS[client][1]
    return [it for row in RECORDED if row["client"] == name and (it := _fault(row)) is not None]


def reaction(client: str, ending: Ending) -> str:
    """What the client did after the recorded fault that looks most like this ending, as Fault writes it. A status that
    was not tried is taken for the nearest one that was."""
    if ending.final and client in OBEDIENT:
        return "1"
    faults = recorded(client)
    tried = {it.looks.status for it in faults}
    status = ending.status if ending.status in tried else _near(ending.status, tried)
    alike = [it for it in faults if it.looks.status == status]
    return str(max(alike, key=lambda it: _likeness(it, ending)))


def _near(status: int | None, tried: set[int | None]) -> int | None:
    assert status is not None
    same = [it for it in tried if it is not None and it // 100 == status // 100 and it not in (400, 429)]
    # 401 and 404 have meanings of their own to clients. Of the others 403 stands for "the request is at fault".
    return next(it for it in (403, 500, min(same)) if it in same)


def _likeness(fault: Fault, ending: Ending) -> tuple[bool, bool, bool, bool, bool]:
    looks = fault.looks
    return (
        looks.waits == ending.waits,
        looks.code == ending.code,
        looks.long == ending.long,
        fault.always,
        looks.code is None or looks.code in ("server_error", "not_found"),  # rather than one that is special
    )
