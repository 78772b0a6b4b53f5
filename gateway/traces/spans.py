"""Spans: what is told of a request: one span for it, and one for each wait, attempt and resume within it.

They are made at its end, from the times that were noted on the way. So a token costs nothing, and neither does a
request that is not sampled.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Self

from gateway.exchange import Ending, Try
from gateway.traces import names, otlp
from gateway.traces.attributes import Reached, named, of_attempt, of_engine, of_exchange, of_request
from gateway.traces.content import said, written
from gateway.traces.export import Exporter
from gateway.traces.otlp import attribute, constant
from gateway.traces.trace import Trace, new_span, taken

MAX_PATH = 256  # characters, as in the log
LEFT = "client_left"  # an outcome that is nobody's failure
_OF_WAITS = {"queue": names.QUEUE, "outage": names.OUTAGE, "pause": names.PAUSE}


class Traces:
    """One worker's. Use it with `async with`."""

    def __init__(self, exporter: Exporter, share: float, engines: Mapping[str, Reached], *, content: bool) -> None:
        """`share` of the traces that begin here are sampled: 0 to 1. `content`: prompts and answers are told too."""
        self.content = content
        self._exporter = exporter
        self._share = share
        self._engines = {name: of_engine(name, it) for name, it in engines.items()}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.to_thread(self._exporter.close)

    def begin(self, headers: Sequence[tuple[bytes, bytes]], started: float) -> Trace:
        """Return the place of a request that came at `started` (time.monotonic())."""
        return taken(headers, self._share, started)

    def responded(
        self, trace: Trace, method: str, path: str, route: str | None, request_id: str, status: int, error: str
    ) -> None:
        """Write the span of a request whose response is over, and whose answer is over too, or will be. `route` is its
        path as one of a closed set. `error` is the outcome of a refused request, otherwise empty."""
        if not trace.sampled:
            return
        if trace.held:  # until then nobody knows its tokens and its outcome
            trace.late = partial(self.responded, trace, method, path, route, request_id, status, error)
            return
        error = trace.error or error
        attributes = [
            of_request(method, route or ""),
            constant(names.PATH, path) if path == route else otlp.text(names.PATH, path[:MAX_PATH]),
            constant(names.STATUS, status),
            otlp.text(names.REQUEST_ID, request_id),
            *trace.about,
        ]
        if error:
            attributes.append(constant(names.ERROR, error))
        clock = _clock()
        span = otlp.span(
            trace=trace.trace,
            id=trace.span,
            parent=trace.parent,
            remote=bool(trace.parent),
            state=trace.state,
            name=f"{method} {route}" if route else method,
            kind="server",
            began=_at(clock, trace.started),
            ended=_at(clock, time.monotonic()),
            attributes=attributes,
            failed=status >= 500 or bool(trace.error and trace.error != LEFT),
        )
        self._exporter.add(span)

    def answered(self, trace: Trace, ending: Ending, *, broken: bool, answer: Sequence[dict[str, Any]]) -> None:
        """Write the spans of an exchange that is over, and whose `trace` is sampled. `broken`: the answer broke off and
        no engine continued it. `answer` holds a message of each choice, if `content` is on."""
        clock = _clock()
        trace.about = self._about(ending, answer)
        trace.error = "" if ending.error is None else ending.outcome
        resumes = (
            _resumes(ending, broken=broken) if ending.resumes or broken or any(it.resume for it in ending.tries) else []
        )
        for resume in resumes:
            attributes = [attribute(names.RESUMES, resume.number)]
            failed = resume.failed
            self._add(
                trace, clock, trace.span, resume.span, names.RESUME, resume.began, resume.ended, attributes, failed
            )
        for wait in ending.waits:
            about = [constant(names.ENGINE, wait.engine)] if wait.engine else []
            parent = _within(resumes, wait.began, trace.span)
            self._add(
                trace, clock, parent, new_span(), _OF_WAITS[wait.what], wait.began, wait.ended, about, failed=False
            )
        for it in ending.tries:
            self._tell(trace, clock, _within(resumes, it.began, trace.span), it, ending)

    def _add(
        self,
        trace: Trace,
        clock: int,
        parent: bytes,
        span: bytes,
        name: str,
        began: float,
        ended: float,
        attributes: Sequence[bytes],
        failed: bool,
    ) -> None:
        self._exporter.add(
            otlp.span(
                trace=trace.trace,
                id=span,
                parent=parent,
                state=trace.state,
                name=name,
                kind="internal",
                began=_at(clock, began),
                ended=_at(clock, ended),
                attributes=attributes,
                failed=failed,
            )
        )

    def _tell(self, trace: Trace, clock: int, parent: bytes, it: Try, ending: Ending) -> None:
        """Tell of one attempt."""
        ended = ending.ended if it.ended is None else it.ended
        error = it.error
        if not error and ending.error is not None and it is ending.tries[-1]:
            error = ending.outcome  # it was cancelled
        attributes = [self._engines[it.engine], of_attempt(it.model, ending.exchange)]
        if it.engine_id:
            attributes.append(otlp.text(names.ENGINE_REQUEST_ID, it.engine_id))
        if error:
            attributes.append(constant(names.ERROR, error))
        first, event = ending.first_token_at, b""
        if first is not None and it.began <= first <= ended:
            event = otlp.event(names.FIRST_TOKEN, _at(clock, first))
            attributes.append(otlp.seconds(names.FIRST_CHUNK, first - it.began))
        self._exporter.add(
            otlp.span(
                trace=trace.trace,
                id=it.span,
                parent=parent,
                state=trace.state,
                name=named(ending.exchange.kind, it.model),
                kind="client",
                began=_at(clock, it.began),
                ended=_at(clock, ended),
                attributes=attributes,
                events=event,
                failed=bool(error) and error != LEFT,
            )
        )

    def _about(self, ending: Ending, answer: Sequence[dict[str, Any]]) -> list[bytes]:
        """What the span of the request says of an exchange."""
        it, usage = ending.exchange, ending.usage
        about = [
            of_exchange(
                it.kind, it.api, ending.route, ending.arm or "", it.key_id, it.stream, ending.finish_reason or ""
            )
        ]
        if tokens := ending.tokens_in:
            about.append(constant(names.TOKENS_IN, tokens))
        if tokens := ending.tokens_out:
            about.append(constant(names.TOKENS_OUT, tokens))
        if usage is not None and usage.cached:
            about.append(constant(names.TOKENS_CACHED, usage.cached))
        if len(ending.tries) != 1:
            about.append(constant(names.ATTEMPTS, len(ending.tries)))
        if ending.resumes:
            about.append(constant(names.RESUMES, ending.resumes))
        if self.content:
            about.append(attribute(names.INPUT, said(it.fields)))
            about += [attribute(names.OUTPUT, written(answer, ending.finish_reason))] if answer else []
        return about


class _Resume(NamedTuple):
    """From the moment an answer broke off to the end of what continued it. Times are time.monotonic()'s."""

    number: int
    span: bytes
    began: float
    ended: float
    failed: bool


def _resumes(ending: Ending, *, broken: bool) -> list[_Resume]:
    """The resumes of an answer. Attempts that follow each other with the same number belong to one."""
    found: list[_Resume] = []
    before: Try | None = None
    for it in ending.tries:
        if it.resume:
            ended, failed = ending.ended if it.ended is None else it.ended, bool(it.error)
            if before is not None and before.resume == it.resume:
                found[-1] = found[-1]._replace(ended=ended, failed=failed)
            else:  # nothing is before it if another worker began the answer
                began = it.began if before is None or before.ended is None else before.ended
                found.append(_Resume(it.resume, new_span(), began, ended, failed))
        before = it
    number = ending.resumes + 1
    if broken and found and found[-1].number == number:
        found[-1] = found[-1]._replace(ended=ending.ended, failed=True)
    elif broken and before is not None:
        found.append(_Resume(number, new_span(), before.ended or ending.ended, ending.ended, failed=True))
    return found


def _within(resumes: Sequence[_Resume], began: float, otherwise: bytes) -> bytes:
    """The span of the resume in which something began."""
    for it in reversed(resumes):
        if it.began <= began <= it.ended:
            return it.span
    return otherwise


def _clock() -> int:
    """What time.monotonic()'s nanoseconds lack to nanoseconds since 1970."""
    return time.time_ns() - time.monotonic_ns()


def _at(clock: int, seconds: float) -> int:
    return clock + int(seconds * 1e9)
