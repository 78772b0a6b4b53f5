"""Metrics: what each worker counts, and every name there is. `scrape` gives it out.

| Prometheus                          | labels    | OpenTelemetry GenAI (status: development)                   |
|-------------------------------------|-----------|-------------------------------------------------------------|
| stack_requests_total                | outcome   | gen_ai.operation.name, gen_ai.request.model, error.type     |
| stack_requests_in_flight            |           |                                                             |
| stack_request_duration_seconds      |           | gen_ai.server.request.duration                              |
| stack_time_to_first_token_seconds   |           | gen_ai.server.time_to_first_token                           |
| stack_time_per_output_token_seconds |           | gen_ai.server.time_per_output_token                         |
| stack_tokens_total                  | direction | gen_ai.client.token.usage, gen_ai.token.type                |
| stack_broken_streams_total          |           | answers that ended with an error after they had begun       |

each by kind (chat, completion, embedding), model (the route's name) and arm (of a split, else empty); and

| stack_http_requests_total     | status          | any request, one per `request` line of the log |
| stack_retries_total           | upstream        | asked the same engine again                    |
| stack_fallbacks_total         | route           | asked another one                              |
| stack_resumes_total           | route, outcome  | an answer broke off: whether it went on        |
| stack_upstream_workers        | upstream, state | how many workers see the engine in that state  |
| stack_slots                   | upstream        | requests that the engine works on at a time    |
| stack_slots_used              | upstream        | how many of them are taken                     |
| stack_queue_depth             | upstream        | requests that wait for one                     |
| stack_queue_wait_seconds      | upstream        | how long those waited that had to              |
| stack_queue_rejections_total  | upstream, reason | not let in: full, share, deadline; timeout    |
| stack_log_lines_dropped_total |                 |                                                |
| stack_usage_dropped_total     |                 | requests whose usage could not be written down |

Label values come from closed sets: outcomes are ours, models those that routing knows, statuses are classes. A caller's
words never become a label. A client that left is `stack_requests_total{outcome="client_left"}`.

Nothing is written per chunk: once when an exchange begins, once when it ends. Labelled children are kept, because
looking them up costs as much as counting.
"""

from collections.abc import Iterable
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from gateway.breaker import State
from gateway.errors import StackError
from gateway.exchange import Ending

STATES: tuple[State, ...] = get_args(State)
MAX_SERIES = 200  # of kind, model and arm; an engine that lists more has the rest counted as OTHER
OTHER = "other"
UNKNOWN = ""  # the model of a request that was refused before it was looked up

# Bucket boundaries as the OpenTelemetry conventions advise, in seconds.
DURATION = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)


class Metrics:
    """One worker's counters. Where their values live was settled before this is made (scrape.Board.take)."""

    def __init__(self, models: Iterable[str]) -> None:
        own = CollectorRegistry()  # not the library's global one
        which = ("kind", "model", "arm")
        self.requests = Counter(
            "stack_requests",
            "Requests by outcome (gen_ai.operation.name, error.type).",
            (*which, "outcome"),
            registry=own,
        )
        self.in_flight = Gauge(
            "stack_requests_in_flight", "Requests being answered.", which, registry=own, multiprocess_mode="livesum"
        )
        self.duration = Histogram(
            "stack_request_duration_seconds", "gen_ai.server.request.duration", which, registry=own, buckets=DURATION
        )
        self.first_token = Histogram(
            "stack_time_to_first_token_seconds",
            "gen_ai.server.time_to_first_token, of streams.",
            which,
            registry=own,
            buckets=FIRST_TOKEN,
        )
        self.per_token = Histogram(
            "stack_time_per_output_token_seconds",
            "gen_ai.server.time_per_output_token, of streams, after the first.",
            which,
            registry=own,
            buckets=PER_TOKEN,
        )
        self.tokens = Counter(
            "stack_tokens",
            "Tokens (gen_ai.client.token.usage, gen_ai.token.type).",
            (*which, "direction"),
            registry=own,
        )
        self.broken = Counter(
            "stack_broken_streams", "Streams that began and ended with an error event.", which, registry=own
        )
        self._retries = Counter("stack_retries", "Requests sent to an engine again.", ("upstream",), registry=own)
        self._fallbacks = Counter("stack_fallbacks", "Requests handed on to a fallback.", ("route",), registry=own)
        self._resumes = Counter(
            "stack_resumes", "Answers that broke off: resumed, failed, abandoned.", ("route", "outcome"), registry=own
        )
        self._states = Gauge(
            "stack_upstream_workers",
            "Workers that see the engine in this state.",
            ("upstream", "state"),
            registry=own,
            multiprocess_mode="livesum",
        )
        self._slots = Gauge(
            "stack_slots",
            "Requests that the engine works on at a time.",
            ("upstream",),
            registry=own,
            multiprocess_mode="livemax",
        )
        self._slots_used, self._depth = (
            Gauge(name, text, ("upstream",), registry=own, multiprocess_mode="livesum")
            for name, text in (
                ("stack_slots_used", "How many of the engine's slots are taken."),
                ("stack_queue_depth", "Requests that wait for a slot."),
            )
        )
        self._waits = Histogram(
            "stack_queue_wait_seconds",
            "How long requests waited for a slot that had to.",
            ("upstream",),
            registry=own,
            buckets=FIRST_TOKEN,
        )
        self._turned_away = Counter(
            "stack_queue_rejections",
            "Requests without a slot: queue full, key's share full, deadline can't be met, timeout ran out.",
            ("upstream", "reason"),
            registry=own,
        )
        self._usage_dropped = Counter(
            "stack_usage_dropped", "Requests whose usage could not be written down.", registry=own
        )
        self._dropped = Counter(
            "stack_log_lines_dropped", "Log lines dropped because their reader was too slow.", registry=own
        )
        http = Counter("stack_http_requests", "Responses by class of status; 499: left.", ("status",), registry=own)
        self._classes = {name: http.labels(name) for name in ("2xx", "3xx", "4xx", "499", "5xx")}
        self._series: dict[tuple[str, str, str | None], _Series] = {}
        for model in models:
            self._of("chat", model, None)  # a series that is there from the start shows its first increase

    def started(self, kind: str, model: str, arm: str | None) -> None:
        """An exchange with an engine begins. `finished` must follow, exactly once."""
        self._of(kind, model, arm).in_flight.inc()

    def finished(self, ending: Ending) -> None:
        """It is over."""
        it = ending.exchange
        series = self._of(it.kind, ending.route, ending.arm)
        series.in_flight.dec()
        series.outcome(ending.outcome).inc()
        series.duration.observe(ending.ended - it.started)
        if ending.tokens_in > 0:
            series.tokens_in.inc(ending.tokens_in)
        if ending.tokens_out > 0:
            series.tokens_out.inc(ending.tokens_out)
        if ending.first_token_at is not None:
            series.first_token.observe(ending.first_token_at - it.started)
            if ending.tokens_out > 1:
                series.per_token.observe((ending.ended - ending.first_token_at) / (ending.tokens_out - 1))
        if ending.broken:
            series.broken.inc()

    def refused(self, kind: str, error: StackError) -> None:
        """A request to a relayed route ended before it became an exchange."""
        self._of(kind, UNKNOWN, None).outcome(error.outcome).inc()

    def responded(self, status: int) -> None:
        """Any request is over."""
        self._classes["499" if status == 499 else f"{status // 100}xx"].inc()

    def retried(self, upstream: str) -> None:
        """A request is sent to that upstream again."""
        self._retries.labels(upstream).inc()

    def fell_back(self, route: str) -> None:
        """A request goes to a fallback of that route."""
        self._fallbacks.labels(route).inc()

    def resumed(self, route: str, outcome: Literal["resumed", "failed", "abandoned"]) -> None:
        """An answer broke off, and another engine went on with it; or none did, or it was not waited for."""
        self._resumes.labels(route, outcome).inc()

    def upstream_state(self, name: str, state: State) -> None:
        """This worker sees that upstream so from now on."""
        for each in STATES:
            self._states.labels(name, each).set(each == state)

    def slots(self, upstream: str, slots: int, used: int, waiting: int) -> None:
        """The engine's slots, and how many requests of this worker's have one or wait for one."""
        self._slots.labels(upstream).set(slots)
        self._slots_used.labels(upstream).set(used)
        self._depth.labels(upstream).set(waiting)

    def queued(self, upstream: str, seconds: float) -> None:
        """A request waited for so long, and now has a slot or has given up."""
        self._waits.labels(upstream).observe(seconds)

    def turned_away(self, upstream: str, reason: str) -> None:
        """A request can't have a slot."""
        self._turned_away.labels(upstream, reason).inc()

    def usage_dropped(self, count: int) -> None:
        """Any thread may say so."""
        self._usage_dropped.inc(count)

    def log_line_dropped(self) -> None:
        """Any thread may say so."""
        self._dropped.inc()

    def _of(self, kind: str, model: str, arm: str | None) -> "_Series":
        series = self._series.get((kind, model, arm))
        if series is None:
            if len(self._series) >= MAX_SERIES and model != OTHER:
                return self._of(kind, OTHER, None)
            series = self._series[kind, model, arm] = _Series(self, kind, model, arm or "")
        return series


class _Series:
    """The labelled children of one kind, model and arm, made when first used."""

    def __init__(self, metrics: Metrics, kind: str, model: str, arm: str) -> None:
        self._labels = labels = kind, model, arm
        self._requests = metrics.requests
        self._outcomes: dict[str, Counter] = {}
        if model == UNKNOWN:
            return  # refused requests have an outcome and nothing else
        self.in_flight = metrics.in_flight.labels(*labels)
        self.duration = metrics.duration.labels(*labels)
        self.first_token = metrics.first_token.labels(*labels)
        self.per_token = metrics.per_token.labels(*labels)
        self.tokens_in = metrics.tokens.labels(*labels, "input")
        self.tokens_out = metrics.tokens.labels(*labels, "output")
        self.broken = metrics.broken.labels(*labels)

    def outcome(self, name: str) -> Counter:
        counter = self._outcomes.get(name)
        if counter is None:
            counter = self._outcomes[name] = self._requests.labels(*self._labels, name)
        return counter
