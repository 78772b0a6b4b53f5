"""Turns: decide how often a request that full engines reject may wait again, and how long it pauses."""

from gateway.admission.visit import Visit
from gateway.errors import EngineFull, EngineRefused
from gateway.exchange import Exchange
from gateway.relay.services import Services
from gateway.routing.retry import backoff

TURNED_BACK = 32  # times that full engines may reject a request
IDLE = 2  # of these, times that an engine without any other request may


class Turns:
    """Count the rejections of one request. A request that even an idle engine rejects must not be repeated for ever."""

    def __init__(self, exchange: Exchange, visit: Visit, services: Services) -> None:
        self._exchange = exchange
        self._visit = visit
        self._services = services
        # Rejections by a full engine, and by an engine that had no other request
        self._turned_back = self._refused_idle = 0

    def again(self, error: EngineFull) -> float:
        """Count a rejection with this error. Returns the seconds to pause: 0 if the next turn comes when another
        request ends. Raises the error that ends the request if it may not wait again."""
        it, visit, services = self._exchange, self._visit, self._services
        self._turned_back += 1
        self._refused_idle += not visit.others
        if self._refused_idle == IDLE and it.inputs > 1 and services.admission.knows_all:
            name, what, advice = it.many
            raise EngineRefused(
                f"The engine cannot work on {it.inputs} {what} in one request, even when it does nothing else. "
                f"{advice}",
                status=400,
                param=name,
                code="too_many_inputs",
            ) from error
        if visit.left <= 0 or self._refused_idle == IDLE or self._turned_back == TURNED_BACK:
            raise error
        return backoff(self._turned_back + 1, services.retries) if not visit.learned or not visit.others else 0.0
