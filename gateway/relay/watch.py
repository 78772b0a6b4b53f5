"""Watch: the timeouts and the disconnect of one exchange. Everything that ends an exchange early calls `halt`.

The usual design (await the engine in the endpoint, then return a StreamingResponse) notices no disconnect until the
engine's headers arrive. Measured: an engine generated for 4.0 s although the client had disconnected after 0.3 s. Here
the client is watched from the start.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any, cast

from gateway.errors import AnswerTooLong, ClientLeft, EngineSilent, StackError
from gateway.exchange import Exchange
from gateway.relay.client import Client
from gateway.relay.delivery import Delivery, Phase
from gateway.routing.routes import Patience


class Watch:
    """Watch one exchange. `begin` it in the task that answers, and `end` it there. `now` is the clock, in seconds."""

    def __init__(
        self, exchange: Exchange, patience: Patience, delivery: Delivery, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.stopped: StackError | None = None  # why the task is cancelled
        self.begun = False  # the last engine asked has begun to answer
        self.quiet_since: float | None = None  # since when the gateway waits for the engine; None: it does not
        self._stream = exchange.stream
        self._started = exchange.started
        self._patience = patience
        self._delivery = delivery
        self._now = now
        self._pinged_at = exchange.started
        self._ended = False
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, client: Client) -> None:
        """Watch the clock and the client from now on. There is one timer per exchange, not one per chunk."""
        self._task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._loop = asyncio.get_running_loop()
        self._client = client
        self._timer = self._loop.call_later(self._patience.shortest, self.tick)
        client.watch(self._hung_up)

    def end(self) -> None:
        """Stop watching. Nothing may end the exchange early from now on."""
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()
            self._client.watch(None)

    def waits(self) -> None:
        """Note that the gateway waits for the engine from now on."""
        self.quiet_since = self._now()

    def waits_no_more(self) -> None:
        """Note that the gateway no longer waits for the engine: it has answered, or the client is slow."""
        self.quiet_since = None

    def halt(self, reason: StackError) -> None:
        """End the exchange for that reason, unless it is already ending. The silence of one engine may not be its end,
        and so any other reason comes before that."""
        if self._ended or self._delivery.phase == Phase.WHOLE:
            return
        if self.stopped is None:
            self.stopped = reason
            self._task.cancel()
        elif isinstance(self.stopped, EngineSilent):
            self.stopped = reason

    def caught(self) -> StackError | None:
        """Return why the task was cancelled, and clear the cancellation; None if it was not cancelled here."""
        if self.stopped is not None:
            self._task.uncancel()
        return self.stopped

    def caught_silence(self) -> EngineSilent | None:
        """Return the engine's silence if that is why the task was cancelled; the exchange can then be halted again.
        Otherwise None."""
        silence = self.stopped
        if not isinstance(silence, EngineSilent):
            return None
        self.stopped = None
        self._task.uncancel()
        return silence

    def tick(self) -> None:
        """Check the timeouts, and set the timer for the next one."""
        now, patience = self._now(), self._patience
        due = self._started + patience.total
        if now >= due:
            self.halt(AnswerTooLong(f"The answer took longer than {patience.total:g} seconds."))
            return
        if self.quiet_since is not None:
            limit = patience.idle if self.begun else patience.first_token
            if now >= self.quiet_since + limit:
                self.quiet_since = None
                self.halt(EngineSilent(f"The engine sent nothing for {limit:g} seconds."))
            else:
                due = min(due, self.quiet_since + limit)
        if self._stream and not self.begun:
            if now >= self._pinged_at + patience.hold:
                self._pinged_at = now
                self._delivery.ping()
            due = min(due, self._pinged_at + patience.hold)
        self._timer = self._loop.call_later(min(due - now, patience.shortest), self.tick)

    def _hung_up(self) -> None:
        self.halt(ClientLeft("The client disconnected."))
