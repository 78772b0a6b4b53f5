"""Record: write the log lines, the usage and the metrics of one exchange, and settle its lease."""

import contextlib
import logging
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import orjson

from gateway import logs
from gateway.admission.visit import Visit
from gateway.errors import StackError
from gateway.exchange import Ending, Exchange, Running, Try, wasteful
from gateway.limits.rules import Lease
from gateway.recent.captures import Copy
from gateway.relay.answer import Answer
from gateway.relay.services import Services
from gateway.relay.trail import Trail
from gateway.routing.routes import Target
from gateway.shared_memory import BusyError
from gateway.traces.trace import Trace, new_span
from gateway.usage.recorder import LOST

log = logging.getLogger("stack")

_Step = Callable[[Ending], object]


class Record:
    """The record of one exchange. It holds the lease; `ended` must be called once in every case, and settles it."""

    def __init__(
        self,
        answer: Answer,
        visit: Visit,
        lease: Lease,
        services: Services,
        keep: Callable[[], Awaitable[object]] | None,
        trail: Trail | None = None,
        trace: Trace | None = None,
    ) -> None:
        self._trail = trail
        self._answer = answer
        self._keep = keep
        self._exchange: Exchange = answer.exchange
        self._visit = visit
        self._lease = lease
        self._services = services
        self._row: dict[str, Any] = {}  # its record in the journal
        self._course = services.recent.begins(self._exchange)
        self._place = trace  # which is handed on even if nothing is told of it
        self._trace = trace if trace is not None and trace.sampled else None
        self._told: Ending | None = None  # the ending that was written when the answer was complete
        self._capture = services.recent.captures.begins(self._exchange.key_id)
        self.text: list[bytes] | None = None  # what the client has received
        if services.log_content or self._capture is not None:
            self.text = [] if services.log_content else Copy()
        self._ends: list[_Step] = [self._settle]  # the steps at the end, in reverse order

    def begins(self) -> None:
        """Count that the exchange begins, and make sure that its end is counted."""
        it, services, route = self._exchange, self._services, self._answer.route
        self._ends.append(self._learn)
        if self._trace is not None:
            self._ends.append(self._tell)
        services.metrics.started(it, route.name, route.arm)
        self._ends.append(services.metrics.finished)
        self._ends.append(self._remember)

    def attempts(self, target: Target) -> str:
        """Note that this target is asked now; `ends_attempt` must follow. Returns header lines for the request."""
        answer = self._answer
        resume = answer.resumes + 1 if answer.search is not None and answer.search.part.resumed else 0
        span = new_span() if self._trace is not None else b""
        answer.tries.append(Try(target.upstream.name, target.model, time.monotonic(), resume, span))
        self.engages()
        return self._place.lines(span or self._place.span) if self._place is not None else ""

    def engages(self) -> None:
        """Write that an engine will be asked, and make sure that the end is written. Only the first call does so.
        Requests that are rejected before are only counted, because they cost nothing and may come in thousands."""
        self._course.step("asked", engine=self._answer.engine, queued_ms=self._visit.milliseconds)
        if self._row:
            return
        it, route = self._exchange, self._answer.route
        self._ends.append(self._log_end)
        past = self._trail.past if self._trail is not None else None
        if past is not None and past.row:
            self._row = past.row | {"outcome": LOST}  # it had this row, and ends otherwise
            self._note_row(self._row)
        else:
            what = it, route.name, route.arm, self._lease.estimate.prompt
            # Noted first. If this process is killed between the two, whoever continues the answer writes this row.
            self._row = self._services.recorder.started(*what, first=self._note_row)
        self._ends.append(self._write_down)
        self._log_begin()

    def _note_row(self, row: dict[str, Any]) -> None:
        if self._trail is not None:
            self._trail.note({"row": row})

    def ends_attempt(self) -> None:
        """Note that the attempt is over. Call it in a `finally`: the exception under way, if any, is why it failed."""
        error = sys.exception()
        self._answer.tries[-1].ends(time.monotonic(), error.outcome if isinstance(error, StackError) else "")

    def hands_on(self, event: str, error: StackError, target: Target | None, **more: str) -> None:
        """Log that the request goes from the last engine to `target`, or to none yet, after this error."""
        last = self._answer.tried[-1]
        names = {"from": last.upstream.name, "to": target.upstream.name if target else None}
        logs.event(event, {"request_id": self._exchange.request_id, "after": error.code, **names, **more}, "warning")
        self._course.step(event, code=error.code, engine=names["from"], to=names["to"])

    def retries(self, error: StackError, target: Target, *, same: bool) -> None:
        """Log and count that the request is retried: at an engine that was asked before, if `same`, or at a
        fallback."""
        self.hands_on("retry" if same else "fallback", error, target)
        if same:
            self._services.metrics.retried(target.upstream.name)
        else:
            self._services.metrics.fell_back(self._answer.route.name)

    def resumed(self, outcome: Literal["resumed", "failed", "abandoned"]) -> None:
        """Count the outcome of an answer that broke off."""
        self._course.step("resume_ended", outcome=outcome)
        self._services.metrics.resumed(self._answer.route.name, outcome)

    async def answered(self) -> None:
        """Write that the answer is complete, before its last bytes are sent, so that it is charged even if this process
        is killed now."""
        with contextlib.suppress(BusyError):
            self._services.suspects.clear(self._exchange)
        ending = self._told = self._ending(None, begun=True)
        self._lease.settle(ending.tokens_in + ending.tokens_out)
        self._services.recorder.finished(self._row, ending)
        if self._trail is not None:
            self._trail.note({"charged": ending.tokens_in + ending.tokens_out})
        await self._lease.known()
        if self._keep is not None:
            await self._keep()

    def ended(self, error: StackError | None, *, begun: bool) -> None:
        """Give back what the exchange holds and write how it ended. Every step is taken, even if another one raises.
        `begun`: the client has received a part of the response."""
        try:
            ending = self._told if self._told and error is None else self._ending(error, begun=begun)
        except Exception:
            log.exception("a bug in the gateway: the end of an answer could not be determined")
            ending = self._ending(error, begun=begun, unknown=True)
        steps, self._ends = self._ends, []  # the steps refer to the record, which must be freed with its request
        for step in reversed(steps):
            try:
                step(ending)
            except Exception:
                log.exception("a bug in the gateway: the end of an answer was not recorded completely")

    def sent(self) -> None:
        """Keep the bodies, if they are captured or logged. The answer is over, and the client has got its error too."""
        if self.text is None:
            return
        it, text = self._exchange, b"".join(self.text)
        if self._capture is not None:
            body = _for_log(it.fields).encode()
            self._services.recent.captures.keep(it.request_id, it.key_id, self._capture, body, text)
        if self._services.log_content and self._row:
            logs.content("output", {"request_id": it.request_id, "body": text.decode(errors="replace")})

    def running(self) -> Running:
        """Return the state of the exchange."""
        it, answer, now = self._exchange, self._answer, time.monotonic()
        first = answer.first_token_at
        return Running(
            row=self._row.get("id"),
            request_id=it.request_id,
            key_id=it.key_id,
            model=answer.route.name,
            engine=answer.engine,
            kind=it.kind,
            stream=it.stream,
            seconds=now - it.started,
            generating=now - first if first is not None else None,
            tokens=answer.reader.made if answer.reader else 0,
            position=self._visit.position,
            waits=self._visit.waits_for,
        )

    # -- the steps at the end -----------------------------------------------------------------------------------------

    def _settle(self, ending: Ending) -> None:
        search = self._answer.search
        self._lease.settle(ending.tokens_in + ending.tokens_out)
        if search is not None and ending.error is not search.error:
            self.resumed("abandoned")

    def _learn(self, ending: Ending) -> None:
        self._services.estimates.learn(ending, self._lease.estimate)

    def _remember(self, ending: Ending) -> None:
        self._course.row = self._row.get("id")
        self._services.recent.ended(self._course, ending, keep=bool(self._row) or ending.queued_ms > 0)

    def _write_down(self, ending: Ending) -> None:
        if ending is not self._told:
            self._services.recorder.finished(self._row, ending)

    def _tell(self, ending: Ending) -> None:
        traces, answer = self._services.traces, self._answer
        if self._trace is not None and traces is not None:
            broken = ending.error is not None and answer.search is not None
            traces.answered(self._trace, ending, broken=broken, answer=answer.messages if traces.content else ())

    def _log_end(self, ending: Ending) -> None:
        it = self._exchange
        name = f"{it.kind}_finished_stream" if it.stream else f"{it.kind}_finished"
        if ending.error is not None or logs.sampled(it.request_id):
            logs.event(name, ending.fields(), ending.level)

    # -- what the steps write -----------------------------------------------------------------------------------------

    def _log_begin(self) -> None:
        it = self._exchange
        fields: dict[str, Any] = {
            "request_id": it.request_id,
            "key": it.key_id,
            **({"user": it.user} if it.user else {}),
            "api": it.api,
            "model": self._answer.route.name,
            it.endpoint.logged_as: it.size,
        }
        if it.prompt is not None:
            fields["prompt"] = it.prompt
        if logs.sampled(it.request_id):
            logs.event(f"{it.kind}_started", fields | {"stream": it.stream})
        if self._services.log_content:
            logs.content("prompt", {"request_id": it.request_id, "body": _for_log(it.fields)})

    def _ending(self, error: StackError | None, *, begun: bool, unknown: bool = False) -> Ending:
        """Return how the exchange ended. `unknown`: what was made of the answer is left out."""
        it, course = self._exchange, self._answer
        answer = Answer(it, course.route) if unknown else course
        answer.learn()
        return Ending(
            exchange=it,
            route=course.route.name,
            arm=course.route.arm,
            engine=course.engine,
            attempts=len(course.tried),
            resumes=answer.resumes,
            error=error,
            begun=begun,
            usage=answer.usage,
            amount=answer.amount,
            estimated=self._lease.estimate.prompt,
            counted=self._counted(answer, error),
            first_token_at=course.first_token_at if it.stream else None,
            finish_reason=answer.finish_reason,
            ended=time.monotonic(),
            queued_ms=self._visit.milliseconds,
            asked=course.asked or course.read,
            engine_id=course.engine_id,
            tries=course.tries,
            waits=self._visit.waits,
        )

    def _counted(self, answer: Answer, error: StackError | None) -> int:
        """Return the tokens that were seen, or, if a round ended before its answer arrived, those of the rounds before
        it and those that it may have made."""
        unseen = self._unseen(error)
        if not unseen or answer.usage is None:
            return answer.tokens + unseen
        return max(answer.tokens, answer.usage.tokens_out) + unseen

    def _unseen(self, error: StackError | None) -> int:
        """Return how many tokens an engine may have made of a blocking answer, or of a round of it, that ended before
        it arrived, or held back in a stream that ended before it was sent."""
        answer = self._answer
        if answer.hidden_since is None or not answer.asked or not wasteful(error):
            return 0
        seconds, rounds = time.monotonic() - answer.hidden_since, answer.rounds
        it, streamed = self._exchange, answer.exchange.stream or answer.fold is not None
        estimate, route = self._lease.estimate, answer.route.name
        made = self._services.estimates.unseen(it, estimate, route, seconds, streamed=streamed)
        made = min(made, answer.hidden_most * it.choices)
        return made // it.choices if rounds is not None and rounds.alone else made


def _for_log(fields: dict[str, Any]) -> str:
    """Return a body as text for the log."""
    try:
        return orjson.dumps(fields, default=str).decode()
    except TypeError:  # the body is nested deeper than orjson writes, and will be refused for that
        return "(nested too deeply to be written)"
