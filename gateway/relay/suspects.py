"""Suspects: find requests that kill their engines, and decide whether another engine may get one.

A single request can kill its engine (a grammar that overflows the parser's stack, a sampling window of gigabytes).
Handed on, it kills the next one. Each death is therefore weighed as blame for its requests, and MOST is too much:

- two for a request that had no token of its answer yet, when no other such request died with it;
- one if several different requests died together without a token, and for an answer that broke off alone;
- none for an answer that broke off together with others.

Requests with the same key and body are one suspect, which is blamed once for each death: ten copies that an engine was
reading when it was restarted are not ten deaths. If one copy had a token of its answer, the suspect had one. If two
copies had, they broke off together.

A request with MOST or more is not handed on, and the same body of the same key is refused for a while, so that a
client's own retries do not kill engine after engine. A complete answer clears the suspect. All this is in memory that
the workers of a host share. Gateways on other hosts learn it from the deaths of their own engines.
"""

import hashlib
import math
import time

from gateway.errors import EngineDied, EngineEnded, EngineFailed, EngineLost, StackError
from gateway.exchange import Exchange
from gateway.shared_memory import BusyError, Region
from gateway.upstream.client import Upstream

MOST = 2
TOGETHER = 1.0  # seconds within which requests that one engine broke off belong to the same death
SETTLE = (
    # Seconds until all workers have noted their broken requests; vLLM's health, too, stays good for 0.2 s after its
    # core died
    0.25
)
# Seconds for which a suspect is refused at first; an engine that was restarted on purpose is up again by then
BARRED = 60.0
BARRED_AGAIN = 3600.0  # seconds for which a suspect is refused after another death
DEATHS = 512  # deaths of requests that are remembered; a new one replaces the oldest
SUSPECTS = 512


class Suspects:
    """The memory of suspects. The master makes it before it forks. `note`, `judge` and `clear` raise BusyError."""

    def __init__(self) -> None:
        self._region = Region(DEATHS * 40 + SUSPECTS * 40 + 16)
        view = memoryview(self._region.memory)
        at = 0

        def take(count: int) -> memoryview:
            nonlocal at
            at += 8 * count
            return view[at - 8 * count : at]

        self._whose = take(SUSPECTS).cast("Q")  # at the beginning of the memory, where `_find` searches
        self._weight, self._until, self._judged = (take(SUSPECTS).cast("d") for _ in range(3))
        self._killed = take(SUSPECTS).cast("Q")  # the engine whose death was last judged for this suspect
        self._engine, self._who, self._request = (take(DEATHS).cast("Q") for _ in range(3))
        self._when, self._tokens = (take(DEATHS).cast("d") for _ in range(2))
        self._noted, self._kept = (take(1).cast("Q") for _ in range(2))

    def barred(self, exchange: Exchange) -> float:
        """Return the seconds for which this request is refused; 0 if it is not. Needs no lock."""
        if not self._kept[0]:
            return 0.0
        place = self._find(_who(exchange))
        if place is None or self._weight[place] < MOST:
            return 0.0
        return max(0.0, self._until[place] - time.monotonic())

    def note(self, engine: str, exchange: Exchange, *, tokens: int) -> None:
        """Note that this engine broke the request off, after this number of tokens. Call it before any request is
        judged."""
        with self._region.lock:
            number = self._noted[0] % DEATHS
            self._engine[number], self._who[number] = _digest(engine), _who(exchange)
            self._request[number] = _digest(exchange.request_id)
            self._when[number], self._tokens[number] = time.monotonic(), tokens
            self._noted[0] += 1

    def judge(self, engine: str, exchange: Exchange, *, tokens: int, again: bool) -> bool:
        """Return whether the request may be handed to another engine after this engine died; if not, the request is
        barred. `again`: the request has seen this engine die before."""
        who, dead, now = _who(exchange), _digest(engine), time.monotonic()
        with self._region.lock:
            place = self._find(who)
            if place is None:
                place = self._kept[0] % SUSPECTS
                self._kept[0] += 1
                self._whose[place], self._weight[place] = who, 0.0
                self._killed[place] = 0
            judged = self._killed[place] == dead and self._judged[place] > now - SETTLE - TOGETHER
            if again or not judged:
                before: float = self._weight[place]
                self._weight[place] = before + self._blame(dead, who, now, tokens=tokens)
                self._until[place] = now + (BARRED if before < MOST else BARRED_AGAIN)
                self._killed[place], self._judged[place] = dead, now
            return self._weight[place] < MOST

    def _blame(self, engine: int, who: int, now: float, *, tokens: int) -> int:
        """Return the blame of this suspect for the engine's death just now."""
        died = self._died(engine, now)
        most = max([float(tokens), *(its for other, _, its in died if other == who)])
        copies = {request for other, request, its in died if other == who and its}
        alone = len(copies) < 2 and not any(most or not its for other, _, its in died if other != who)
        return alone + (not most)

    def clear(self, exchange: Exchange) -> None:
        """Note that the request got a complete answer."""
        if self._kept[0] and self._find(who := _who(exchange)) is not None:
            with self._region.lock:
                if (place := self._find(who)) is not None:
                    self._whose[place] = 0

    def _died(self, engine: int, now: float) -> list[tuple[int, int, float]]:
        """Return the requests that this engine broke off just now: the suspect, the request, and its number
        of tokens."""
        return [
            (self._who[number], self._request[number], self._tokens[number])
            for number in range(min(self._noted[0], DEATHS))
            if self._engine[number] == engine and self._when[number] > now - SETTLE - TOGETHER
        ]

    def _find(self, who: int) -> int | None:
        looked, first = who.to_bytes(8, "little"), 0
        while (found := self._region.memory.find(looked, first, 8 * SUSPECTS)) >= 0:
            if found % 8 == 0:
                return found // 8
            first = found + 1  # the match is made of parts of two other values
        return None

    async def suspect(
        self, upstream: Upstream, exchange: Exchange, error: StackError, *, tokens: int, killed: set[Upstream]
    ) -> bool:
        """Decide what an error after this number of tokens means. Returns whether the engine died and the request may
        be the reason. `killed`: the engines that died before while they worked on the request; this engine joins them
        if it died."""
        # The health of such an engine stays good when its model's process dies.
        broke_off = isinstance(error, EngineEnded) or (isinstance(error, EngineLost) and error.code == EngineEnded.code)
        apart = upstream.dialect.dies_apart and broke_off
        said = apart or isinstance(error, EngineDied)
        if not said and not isinstance(error, EngineLost):
            return False
        try:
            self.note(upstream.name, exchange, tokens=tokens)
            if not await upstream.died(SETTLE) and not said:
                return False
            again = upstream in killed
            killed.add(upstream)
            return not self.judge(upstream.name, exchange, tokens=tokens, again=again)
        except BusyError:
            return False


def suspected(seconds: float) -> EngineFailed:
    """Return the error of a request whose engine died. The same request is refused for so many seconds."""
    return EngineFailed(
        "The engine died while it worked on this request. The request may be the reason, so no other engine gets it."
        f" Change the request, or send it again after {math.ceil(seconds)} seconds."
    )


def _who(exchange: Exchange) -> int:
    """Return a digest that recognises the request: of its key and its body."""
    return _digest(f"{exchange.key_id} {exchange.mark}")


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") or 1
