"""Attempt: one try at one engine, from the request to the last byte of its answer.

In the middle of a stream, bytes are passed on as they come, without waking the exchange's task: see `_pump`.
"""

import secrets
import time
from collections.abc import Awaitable

import orjson

from gateway.dialects.dialect import Way
from gateway.dialects.thoughts import Tags
from gateway.errors import EngineError, StackError
from gateway.exchange import Exchange
from gateway.relay.answer import Answer
from gateway.relay.delivery import JSON, Delivery, Phase
from gateway.relay.rounds import Rounds
from gateway.relay.services import Services
from gateway.relay.sounds import PLAIN, as_text, sound_of
from gateway.relay.tap import EngineFault
from gateway.relay.watch import Watch
from gateway.routing.routes import Target
from gateway.upstream.client import Reply
from gateway.upstream.engine_errors import fault
from gateway.upstream.generate import Headers, continue_raw, generate

# Bytes of memory that a folded answer holds for each byte of its events with log probabilities. Measured: 4.3 and 4.6
# with twenty of them for each token, in llama.cpp's and Ollama's form, and 0.03 for events of plain text.
PARSED = 5
_PROBABILITY = b'prob":'  # in the events of each token with one: `logprob`, or llama.cpp's `prob`


class Attempt:
    """One try at one engine, for which the request has a slot. `run` it once. It is the engine's Asker."""

    def __init__(
        self, target: Target, answer: Answer, delivery: Delivery, watch: Watch, services: Services, lines: str
    ) -> None:
        self._target = target
        self._answer = answer
        self._delivery = delivery
        self._try = answer.tries[-1]
        self._watch = watch
        self._services = services
        self._lines = lines
        self._client = delivery.client
        self._flows = False  # the answer is in its middle, so `_pump` may pass bytes on
        self._fed: bytes | EngineError | None = None  # what the reader returned for data that the task must handle

    def run(self) -> Awaitable[None]:
        """Ask the engine and pass its whole answer on. Raises StackError."""
        rounds = self._answer.begins(self._target)
        return self._once() if rounds is None else self._rounds(rounds)

    def _once(self) -> Awaitable[None]:
        if self._answer.exchange.endpoint.sounds:
            return self._play()
        return self._stream() if self._answer.streams(self._target) else self._block()

    async def _rounds(self, rounds: Rounds) -> None:
        """Ask the engine as often as the answer needs, all in one slot."""
        while True:
            self._watch.begun = self._flows = False
            self._fed = None
            try:
                await self._once()
            except StackError as exc:
                if not rounds.again(exc, self._answer.told):
                    raise
                self._answer.search = None
            else:
                if not self._answer.next():
                    return
                rounds = self._answer.rounds or rounds

    # -- Asker --------------------------------------------------------------------------------------------------------

    def ignored(self, headers: Headers) -> None:
        """See Asker.ignored."""
        rounds = self._answer.rounds
        self._delivery.ignored = headers if rounds is None else [*headers, *rounds.headers]

    def checks(self) -> None:
        """See Asker.checks."""
        self._answer.read = True

    def asked(self) -> None:
        """See Asker.asked."""
        self._try.working_since = time.monotonic()

    def new_id(self) -> str:
        """See Asker.new_id. The id is random, because a request could otherwise use another one's id and end it at the
        engine."""
        self._answer.asked = True
        self._answer.engine_id = self._try.engine_id = secrets.token_hex(16)
        return self._answer.engine_id

    def lines(self) -> str:
        """See Asker.lines."""
        return self._lines

    async def rest(self, reply: Reply, most: int) -> bytes:
        """See Asker.rest. The idle timeout covers the rest, however long the engine took to begin."""
        self._watch.begun = True
        charge = self._answer.exchange.charge
        body = await reply.read(most, waits=self._watch.waits, holds=charge.add_answer if charge is not None else None)
        self._watch.waits_no_more()
        return body

    # -- the ways of answering ----------------------------------------------------------------------------------------

    async def _block(self) -> None:
        """Wait for the whole answer and pass it on."""
        answer, target = self._answer, self._target
        answer.hidden_since = time.monotonic()
        with await self._post(answer.ask_whole(target), stream=False) as reply:
            body = await self.rest(reply, self._services.max_answer)
        self._try.heard(time.monotonic())
        try:
            whole = orjson.loads(body)
        except orjson.JSONDecodeError:
            whole = None
        if not isinstance(whole, dict):
            raise EngineError("The engine's answer is not a JSON object.")
        if whole.get("error"):
            raise fault(target.upstream.dialect, whole["error"])
        answer.hidden_since = None
        whole, changed = answer.takes_whole(target, whole)
        if not answer.ends_here:
            return
        text = as_text(answer.exchange, whole)
        body = self._delivery.written(body, whole, changed=changed) if text is None else text
        del whole  # it takes several times as much memory as its text, and the client may take its time
        if self._services.traces is None or not self._services.traces.content:
            answer.whole = {}
        await self._delivery.reply(body, JSON if text is None else PLAIN)

    async def _play(self) -> None:
        """Pass a sound on in pieces as they come. One that breaks off is cut, as a stream is."""
        answer, watch = self._answer, self._watch
        with await self._post(answer.exchange, stream=False) as reply:
            watch.begun = True
            kind = sound_of(reply.content_type)
            while True:
                watch.waits()
                data = await reply.next()
                watch.waits_no_more()
                if not data:
                    break
                await self._delivery.play(data, kind)
            self._try.heard(time.monotonic())
            if self._delivery.phase < Phase.EVENTS:
                raise EngineError("The engine's answer has no data.")
            answer.amount = len(answer.exchange.fields["input"])
            await self._delivery.play(b"", kind, last=True)

    async def _stream(self) -> None:
        """Pass the engine's events on as they come, or their sum if the client waits for a blocking answer
        (relay.fold). If another engine began the answer, this one continues it."""
        upstream = self._target.upstream
        self._answer.hidden_since = None  # of an attempt before this one
        tags = await self._tags()
        exchange, reader, raw = self._answer.ask(self._target, await self._way(), tags)
        self._reader = reader
        self._watch.waits()
        with await self._post(exchange, stream=True, raw=raw) as reply:
            if self._answer.fold is None and not self._delivery.copies:
                reply.pump(self._pump)
            try:
                await self._pass_on(reply)
            except EngineError as exc:
                self._heard()
                if reader.held:
                    await self._delivery.forward(reader.held, last=False)
                if isinstance(exc, EngineFault):
                    raise fault(upstream.dialect, exc.error) from exc
                raise
            await reply.finish()

    async def _tags(self) -> Tags | None:
        """Return what stands around the reasoning of the engine's model, if the engine goes on with that."""
        target, search = self._target, self._answer.search
        if search is None or search.way != "thought" or not search.part.content.tokens:
            return None
        self._watch.waits()
        return await self._services.continuations.tags(target.upstream, target.model, search.part.exchange)

    async def _way(self) -> Way:
        """Return the way in which the engine continues the text so far, if there is any."""
        target, answer = self._target, self._answer
        if not answer.doubts(target):
            return "message"
        self._watch.waits()
        same = answer.began(target)
        return await self._services.continuations.way(target.upstream, target.model, answer.exchange, same=same)

    def _post(self, exchange: Exchange, *, stream: bool, raw: str | None = None) -> Awaitable[Reply]:
        if raw is not None:
            connect = self._answer.route.patience.connect
            return continue_raw(self._target.upstream, exchange, self._target.model, raw, connect, self)
        return generate(
            self._target.upstream,
            exchange,
            self._target.model,
            stream=stream,
            contexts=self._services.contexts,
            connect_timeout=self._answer.route.patience.connect,
            asker=self,
        )

    # -- a stream -----------------------------------------------------------------------------------------------------

    async def _pass_on(self, reply: Reply) -> None:
        answer, delivery, reader = self._answer, self._delivery, self._reader
        while data := await self._read(reply):
            if answer.fold is not None:
                self._fold(data)
            sound = self._feed(data)
            if reader.done:
                self._try.heard(time.monotonic())
            self._heard()
            if sound or (reader.done and answer.ends_here):
                await delivery.forward(sound, last=reader.done and answer.ends_here)
            if reader.done:
                return
            self._flows = answer.first_token_at is not None and self._watch.begun and delivery.phase == Phase.EVENTS
        sound = reader.end()  # the engine finished without its last event
        if sound or answer.ends_here:
            await delivery.forward(sound, last=answer.ends_here)

    def _pump(self, data: bytes) -> bool:
        """Handle bytes of a stream while the task waits for them. In the middle of a stream they are passed on here.
        Returns whether that was possible: the task handles the beginning, the end and errors."""
        if not self._flows or not self._client.takes:
            return False
        self._watch.waits()  # bytes have arrived, so the idle timeout stops until the task has handled them
        reader = self._reader
        try:
            sound = reader.feed(data)
        except EngineError as exc:
            self._fed = exc
            return False
        if reader.done:
            self._fed = sound
            return False
        if sound:
            self._client.push(sound)
        return True

    def _feed(self, data: bytes) -> bytes:
        """Return what the reader makes of the data, or what `_pump` already made of it."""
        fed, self._fed = self._fed, None
        if isinstance(fed, EngineError):
            raise fed
        return self._reader.feed(data) if fed is None else fed

    async def _read(self, reply: Reply) -> bytes:
        if self._watch.begun:
            self._watch.waits()
        try:
            return await reply.next()
        except EngineError:
            if self._reader.content.complete or (self._reader is self._answer.reader and self._answer.said):
                return b""
            raise

    def _heard(self) -> None:
        if not self._reader.started:
            if self._reader.skipping:
                self._watch.waits()  # the engine is not silent
            return
        if not self._watch.begun:
            self._watch.begun = True
            if self._answer.takes(self._target, self._reader):
                self._services.metrics.resumed(self._answer.route.name, "resumed")
        self._watch.waits_no_more()  # the client, not the engine, may be slow now
        if self._answer.first_token_at is None and self._reader.content.any:
            self._answer.first_token_at = time.monotonic()

    def _fold(self, data: bytes) -> None:
        """Count the bytes of a stream that is folded, and hold what becomes of them. Raises EngineError if they are too
        many."""
        self._answer.folded_bytes += len(data)
        if self._answer.folded_bytes > self._services.max_answer:
            raise EngineError(f"The engine's answer is larger than {self._services.max_answer} bytes.")
        charge = self._answer.exchange.charge
        if charge is not None:
            charge.add_answer(len(data) * (PARSED if _PROBABILITY in data else 1))
