"""Relay: one exchange with the engines, from its slot in a queue to the last byte: which engine answers, and which one
next if that fails.

An Attempt asks one engine. The Watch ends the exchange early when the client disconnects, a timeout passes or the
gateway stops. The Delivery knows what the client has got, and the Record writes down how it went.

Before the first data event an error keeps its status. After it the head is out, and an answer whose engine fails is
continued by another (gateway.relay.resume). One that can't be finished ends with an error event and a cut connection,
without `[DONE]`: some clients take any stream with a clean end for a success, whatever its last event said.

This file is long because it holds the whole course of one exchange, which is read from top to bottom.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from starlette.types import Send

from gateway import logs
from gateway.errors import (
    ClientLeft,
    ContextExceeded,
    Draining,
    EngineError,
    EngineFull,
    EngineRefused,
    EngineSilent,
    EngineUnavailable,
    EngineUnreachable,
    InternalError,
    StackError,
)
from gateway.exchange import Exchange, Running
from gateway.keys.known import Key
from gateway.limits.rules import Headers, Lease
from gateway.relay.answer import Answer
from gateway.relay.attempt import Attempt
from gateway.relay.client import Client
from gateway.relay.delivery import Delivery, Phase
from gateway.relay.outage import Outage
from gateway.relay.record import Record
from gateway.relay.resume.search import Search
from gateway.relay.services import Services
from gateway.relay.suspects import BARRED, suspected
from gateway.relay.trail import Trail
from gateway.relay.turns import Turns
from gateway.relay.watch import Watch
from gateway.routing.retry import backoff, blames_the_engine, worthwhile
from gateway.routing.routes import Route, Target
from gateway.traces.trace import Trace
from gateway.translation.face import Writer
from gateway.upstream.client import Upstream

Keep = Callable[[], Awaitable[object]]  # stores an answer
log = logging.getLogger("stack")


class Relay:
    """One exchange, and its lease's end. `run` it once: it answers the client, or raises a StackError if nothing was
    sent yet. With a `writer`, the answer goes out in the form of another API. `keep` is awaited once the writer has the
    whole answer, before its last bytes are sent. With a `trail`, another worker can go on with the answer."""

    def __init__(
        self,
        exchange: Exchange,
        route: Route,
        key: Key,
        lease: Lease,
        services: Services,
        writer: Writer | None = None,
        keep: Keep | None = None,
        trail: Trail | None = None,
        trace: Trace | None = None,
    ) -> None:
        self.key = key  # as it was when the request came
        self.exchange = exchange
        self._lease = lease
        self._trail = trail
        self._route = route
        self._services = services
        self._visit = services.admission.visit(exchange)
        self._answer = Answer(exchange, route, writer, trail)
        self._record = Record(self._answer, self._visit, lease, services, keep, trail, trace)  # it holds the lease
        tells = lease.headers, self._record.answered, self._record.text
        self._delivery = Delivery(self._answer, self._visit, *tells, begun=trail is not None and trail.begun)
        self._watch = Watch(exchange, route.patience, self._delivery)
        self._tried = self._answer.tried
        self._unasked: list[Target] = []  # of these, those for which it only waits with others
        self._killed: set[Upstream] = set()  # engines that died at it
        self._busy: Upstream | None = None  # the engine that is working on it
        self._away: tuple[StackError, Target] | None = None  # the last target that could not answer, and why
        self._unfit: list[Target] = []  # targets that refused it for their own limits, while one before them is away
        self._outage = Outage(exchange, route, services.progress, self._visit, self._killed)
        self._turns = Turns(exchange, self._visit, services)

    @property
    def standing(self) -> Headers:
        """Return the headers that show what is left for its key."""
        return self._lease.headers()

    @property
    def models(self) -> set[str]:
        """Return the models that it may ask, by their engines' own names."""
        return {target.model for tier in self._route.tiers for target in tier}

    @property
    def at_work(self) -> bool:
        """Whether an engine is working on it, or is about to."""
        return bool(self._visit.engine) and not self._outage.waits

    @property
    def wanted(self) -> bool:
        """Whether a client whose secret is valid reads the answer, if several may: not only the one who asked first."""
        return self._trail is not None and self._trail.wanted()

    def running(self) -> Running:
        """Return its state."""
        return self._record.running()

    def halt(self, reason: StackError) -> None:
        """End it for that reason, unless it is already ending."""
        self._watch.halt(reason)

    def cut(self) -> None:
        """End the stream with an error event, because the gateway is about to stop."""
        self.halt(Draining("The gateway is stopping; the answer is not complete."))

    async def run(self, client: Client, send: Send) -> bool:
        """Answer the client. Returns whether the answer is complete. Raises StackError if it ended before anything was
        sent."""
        delivery = self._delivery
        error: StackError | None = None
        try:
            error = await self._try(client, send)
        except BaseException:
            error = InternalError("The request was cancelled: a bug, or the server was stopped.")
            raise
        finally:
            try:
                self._watch.end()  # nothing may cancel from now on
                await delivery.close()
            finally:
                # What ends the sending of an answer that was whole and charged is no failure of it.
                failed = None if delivery.phase == Phase.WHOLE else error
                self._record.ended(failed, begun=delivery.phase != Phase.NOTHING)
        if error is not None and not isinstance(error, ClientLeft):
            if delivery.phase == Phase.NOTHING:
                raise error
            await delivery.farewell(error)
        return error is None

    async def fail(self, error: StackError) -> None:
        """Send the client of a streamed request a stream with only the error. `run` has raised, and nothing
        was sent."""
        await self._delivery.fail(error)

    def copied(self, send: Send) -> Send:
        """Return the way to send an error instead of an answer, so that it is captured as an answer is."""
        return self._delivery.copied(send)

    def sent(self) -> None:
        """Note that everything is sent. `run` is over."""
        self._record.sent()

    async def _try(self, client: Client, send: Send) -> StackError | None:
        """Answer the client. Returns why that failed, unless it is a bug before anything was sent."""
        try:
            self._delivery.open(client, send)
            self._record.begins()
            self._watch.begin(client)
            await self._ask()
        except asyncio.CancelledError:
            if halted := self._watch.caught():
                return halted
            raise  # not cancelled by this relay
        except StackError as exc:
            return exc
        except Exception:
            if self._delivery.phase == Phase.NOTHING:
                raise
            log.exception("a bug in the gateway")
            return InternalError("The gateway had an internal error. Its log has the details.")
        return None

    # -- which engine answers -----------------------------------------------------------------------------------------

    async def _ask(self) -> None:
        """Ask one engine after another until one answers. Raises the last StackError."""
        if (wait := self._services.suspects.barred(self.exchange)) > 0:
            raise suspected(wait)
        target = await self._first()
        try:
            while target is not None:
                self._tried.append(target)
                try:
                    await self._attempt(target)
                except StackError as exc:
                    await self._blame(self._tried[-1].upstream, exc)
                    search = self._answer.breaks(exc, sent=self._delivery.phase >= Phase.EVENTS)
                    target = await (self._resume(search, exc) if search else self._next(exc))
                else:
                    return
        finally:
            self._visit.leave()

    async def _first(self) -> Target | None:
        """Whom to ask first. Of an answer whose worker died: who goes on with it; None: it is finished."""
        if (search := self._answer.search) is not None:
            self._record.engages()
            return await self._resume(search, None)
        self._services.budget.request()
        return self._route.pick(self._tried, patient=self._outage.allowed)

    async def _attempt(self, target: Target) -> None:
        """Make one attempt at one engine with a slot, and note what that says about the engine's health."""
        upstream = target.upstream
        self._watch.begun = False
        if self._visit.engine != upstream.name:  # otherwise the request kept its slot
            self._visit.leave()
            await self._visit.enter(upstream, target.model, resumes=self._answer.search is not None)
            if (other := self._instead(target)) is not None:
                self._record.retries(EngineUnavailable("The breaker of this engine has opened."), other, same=False)
                self._tried[-1] = other  # the first one was not asked
                return await self._attempt(other)
        if self._outage.allowed and (absence := upstream.absence) is not None:
            self._unasked.append(target)
            raise absence  # the request waits with the others, and does not connect in vain
        self._occupy(upstream)
        trial = upstream.breaker.began()
        try:
            lines = await self._begin(target)
            await Attempt(target, self._answer, self._delivery, self._watch, self._services, lines).run()
        except asyncio.CancelledError:
            if (silence := self._watch.caught_silence()) is None:
                upstream.breaker.gave_up(trial=trial)
                self._answer.left(target, self._watch.quiet_since)
                raise
            upstream.breaker.failed(silence.message, silent=True)
            self._answer.failed()
            self._visit.leave()
            raise silence from None
        except StackError as exc:
            self._answer.failed()
            if isinstance(exc, EngineFull):
                self._visit.turned_back(teaches=self.exchange.inputs == 1)
            if blames_the_engine(exc):
                upstream.breaker.failed(exc.message, silent=isinstance(exc, EngineSilent))
            else:
                upstream.breaker.gave_up(trial=trial)  # if the engine answered, `generate` has noted it
            if not self._outage.keeps_slot(exc):
                self._visit.leave()
            raise
        except BaseException:
            upstream.breaker.gave_up(trial=trial)
            raise
        finally:
            self._record.ends_attempt()
            self._idle()

    def _occupy(self, upstream: Upstream) -> None:
        """Note that this engine is working on it."""
        upstream.outstanding += 1
        self._busy = upstream
        self._delivery.handed = self._hand_over

    def _idle(self) -> None:
        """Note that no engine is working on it."""
        self._watch.waits_no_more()
        self._delivery.handed = None  # it refers to this relay, which must be freed with its request
        if self._busy is not None:
            self._busy.outstanding -= 1
            self._busy = None

    def _hand_over(self) -> None:
        """End the attempt, and give back what the request has of its engine: all that is left is to send a blocking
        answer."""
        self._record.ends_attempt()
        self._idle()
        self._visit.leave()

    def _instead(self, target: Target) -> Target | None:
        """Return a target to ask instead of this one, if its breaker opened while the request waited for its slot."""
        if self._answer.search is not None or target.upstream.breaker.allows():
            return None
        return self._route.fresh(self._tried)

    async def _begin(self, target: Target) -> str:
        """Note that an attempt begins, and have the engine load the model if it has to. Returns the attempt's lines for
        the head of its request. A load is the engine's work, and has the timeout of a first token."""
        lines = self._record.attempts(target)
        if self._visit.model:
            this = self._answer.tries[-1]
            this.working_since = time.monotonic()
            self._watch.waits()
            await self._visit.load(target.upstream, target.model)
            self._watch.waits_no_more()
            this.heard(time.monotonic())
        return lines

    async def _blame(self, upstream: Upstream, error: StackError) -> None:
        """Find out whether the engine died of this request. Raises EngineFailed if that is possible (suspects.py)."""
        it = self.exchange
        suspects, tokens = self._services.suspects, self._answer.counted
        if await suspects.suspect(upstream, it, error, tokens=tokens, killed=self._killed):
            logs.event("engine_killer_suspected", {"request_id": it.request_id, "engine": upstream.name}, "warning")
            raise suspected(BARRED) from error

    async def _next(self, error: StackError) -> Target:
        """Return the target to ask after this failure, when it is time. Raises a StackError if there is none."""
        error = self._put_down(error)
        try:
            return await self._retry(error)
        except EngineError as exc:
            if self._delivery.phase >= Phase.EVENTS:
                raise
            return await (self._queue_again(exc) if isinstance(exc, EngineFull) else self._wait(exc))

    def _put_down(self, error: StackError) -> StackError:
        """Return what the request failed of: the trouble of an engine rather than the limits of its fallback. Those
        would be a final answer to the client, although that engine may soon be able to answer."""
        target = self._tried[-1]
        if not (isinstance(error, ContextExceeded) or (isinstance(error, EngineRefused) and error.unable)):
            if isinstance(error, EngineError):
                self._away = error, target
            return error
        tiers = self._route.tiers
        rank = next((number for number, tier in enumerate(tiers) if target in tier), 0)
        before = [it for tier in tiers[:rank] for it in tier if it not in self._unfit]
        if self._away is None and (shut := next((it for it in before if not it.upstream.breaker.allows()), None)):
            self._away = EngineUnreachable("The engine is unreachable."), shut
        if self._away is None or self._away[1] not in before:
            return error
        self._unfit.append(target)
        return self._away[0]

    def _failed_at(self, error: StackError) -> Target:
        """Return the target that had this error."""
        return self._away[1] if self._away and self._away[0] is error else self._tried[-1]

    async def _wait(self, error: EngineError) -> Target:
        """Return the first target that is back, if all engines are down. Raises the error otherwise."""
        self._watch.begun = False  # so that the client gets pings
        target = await self._outage.target(error, self._failed_at(error).upstream, self._unfit)
        self._answer.begin_anew()
        self._record.hands_on("waited", error, target)
        for it in self._unasked:
            self._tried.remove(it)
        self._unasked.clear()
        return target

    async def _queue_again(self, error: EngineFull) -> Target:
        """Put a request that a full engine rejected back into the queue. Returns the target to ask then. Raises what
        ends it if it may not wait."""
        full = self._failed_at(error)
        pause = self._turns.again(error)
        self._answer.begin_anew()
        self._record.hands_on("queued_again", error, full)
        await self._visit.pause(pause)
        self._tried.remove(full)  # it was not really asked
        return full

    async def _retry(self, error: StackError) -> Target:
        """Return the target to ask after this failure, when it is time. Raises the error again if there is none."""
        services = self._services
        attempts = len(self._tried) - len(self._unasked)
        if self._delivery.phase >= Phase.EVENTS or attempts >= services.retries.attempts:
            raise error
        try:
            target = self._route.pick(self._tried)
        except EngineUnavailable:
            raise error from error.__cause__
        if target in self._unfit:
            raise error
        same = any(target.upstream is it.upstream for it in self._tried)
        if same and self._outage.covers(error, self._failed_at(error).upstream):
            raise error  # the request waits until that engine is back
        if target.upstream in self._killed or not worthwhile(error, same_engine=same) or not services.budget.take():
            raise error
        self._answer.begin_anew()
        self._record.retries(error, target, same=same)
        if same:
            await asyncio.sleep(backoff(len(self._tried) + 1, services.retries))
            # Meanwhile another request may be the trial of a half-open breaker
            if not target.upstream.breaker.allows():
                raise error
        return target

    async def _resume(self, search: Search, error: StackError | None) -> Target | None:
        """Who goes on with the answer, once somebody can; None: it is finished. Raises what broke it off if nobody.
        `error` is what the engine failed with that was asked last; None: it was this worker's predecessor that died."""
        self._watch.begun = False  # the client gets pings again
        if error is not None:
            search.failed(self._tried[-1].upstream, error)
        end, whole = self._answer.complete()
        if end:
            self._record.resumed("resumed")
            await self._delivery.forward(end, last=whole)
        target = None if whole else await (self._answer.search or search).target()
        if target is None and not whole:
            self._record.resumed("failed")
            return await self._next(search.error)  # possible if the client has received nothing
        self._record.hands_on("resume", search.error, target, way=search.said)
        return target
