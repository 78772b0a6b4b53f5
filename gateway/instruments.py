"""Instruments: the counters, gauges and histograms of one worker. `metrics` writes into them."""

from bisect import bisect_left
from functools import partial
from typing import Literal

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge

# Bucket boundaries in seconds, as the OpenTelemetry conventions advise, and further ones up to the defaults of
# LLM_TIMEOUT, and of LLM_FIRST_TOKEN_TIMEOUT and STACK_QUEUE_TIMEOUT.
DURATION = (
    *(0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92),
    *(163.84, 327.68, 655.36),
)
FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10),
    *(20, 40, 80, 160, 320),
)
OWN = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)
PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)


class Histogram(prometheus_client.Histogram):
    """As the library's, which tries one bucket after the other, and so takes three times as long."""

    def observe(self, amount: float, exemplar: dict[str, str] | None = None) -> None:  # noqa: ARG002  as the library's
        """Count `amount` in its bucket. The files of several processes have no place for an exemplar."""
        self._sum.inc(amount)
        self._buckets[bisect_left(self._upper_bounds, amount)].inc(1)


class Exchanges:
    """What is counted of each exchange, by kind, API, model and arm."""

    def __init__(self, registry: CollectorRegistry) -> None:
        which = ("kind", "api", "model", "arm")
        counter, histogram = partial(Counter, registry=registry), partial(Histogram, registry=registry)
        self.requests = counter(
            "stack_requests", "Requests by outcome (gen_ai.operation.name, error.type).", (*which, "outcome")
        )
        self.in_flight = gauge("stack_requests_in_flight", "Requests in progress.", which, registry)
        self.duration = histogram(
            "stack_request_duration_seconds", "gen_ai.server.request.duration", which, buckets=DURATION
        )
        self.first_token = histogram(
            "stack_time_to_first_token_seconds",
            "gen_ai.server.time_to_first_token, of streams.",
            which,
            buckets=FIRST_TOKEN,
        )
        self.per_token = histogram(
            "stack_time_per_output_token_seconds",
            "gen_ai.server.time_per_output_token, of streams, after the first.",
            which,
            buckets=PER_TOKEN,
        )
        self.tokens = counter(
            "stack_tokens", "Tokens (gen_ai.client.token.usage, gen_ai.token.type).", (*which, "direction")
        )
        self.documents = counter("stack_documents", "Documents that were ranked.", which)
        self.seconds = counter("stack_audio_seconds", "Seconds of sound that were transcribed.", which)
        self.characters = counter("stack_spoken_characters", "Characters that were spoken.", which)
        self.own = histogram(
            "stack_gateway_seconds",
            "The gateway's own part of the duration of answers of one attempt: without queues and engines.",
            ("api",),
            buckets=OWN,
        )
        self.broken = counter(
            "stack_broken_streams", "Streams that began, and ended with an error event and a broken connection.", which
        )


class Engines:
    """What is counted of each engine and route."""

    def __init__(self, registry: CollectorRegistry) -> None:
        counter, of_it = partial(Counter, registry=registry), ("upstream",)
        self.retries = counter("stack_retries", "Retries at the same engine.", of_it)
        self.fallbacks = counter("stack_fallbacks", "Requests sent to another engine.", ("route",))
        self.resumes = counter(
            "stack_resumes",
            "Answers that broke off, by outcome: resumed, failed, abandoned.",
            ("route", "outcome"),
        )
        self.states = gauge(
            "stack_upstream_workers",
            "Workers whose breaker for the engine is in this state.",
            ("upstream", "state"),
            registry,
        )
        self.slots = gauge(
            "stack_slots", "Requests that the engine works on at a time.", of_it, registry, over_workers="livemax"
        )
        self.slots_used = gauge("stack_slots_used", "How many of the engine's slots are taken.", of_it, registry)
        self.depth = gauge("stack_queue_depth", "Requests that wait for a slot.", of_it, registry)
        duration = partial(Histogram, labelnames=of_it, registry=registry)
        self.worked = duration(
            "stack_engine_seconds",
            "How long an engine took for an attempt, from the question to the end of its answer.",
            buckets=DURATION,
        )
        self.loads = duration(
            "stack_model_load_seconds",
            "How long an engine took to load a model, or to wake.",
            buckets=DURATION,
        )
        self.waits = duration(
            "stack_queue_wait_seconds", "How long requests waited for a slot, if they had to wait.", buckets=FIRST_TOKEN
        )
        self.turned_away = counter(
            "stack_queue_rejections",
            "Requests that got no slot, by reason: queue full, key's share full, deadline cannot be met, timeout.",
            ("upstream", "reason"),
        )


class Operators:
    """What is counted for operators: refusals by limit, what is lost, and how the store is."""

    def __init__(self, registry: CollectorRegistry) -> None:
        counter = partial(Counter, registry=registry)
        self.limited = counter(
            "stack_limit_rejections", "Requests refused because their key has reached a limit.", ("limit",)
        )
        self.near = gauge(
            "stack_keys_near_quota",
            "Keys that have used that share of a quota of the running day or month, or more.",
            ("quota", "percent"),
            registry,
            over_workers="livemax",
        )
        self.store_trouble = gauge(
            "stack_store_trouble_workers", "Workers that cannot save usage in the store at the moment.", (), registry
        )
        self.usage_dropped = counter("stack_usage_dropped", "Requests whose usage could not be recorded.")
        self.lines_dropped = counter(
            "stack_log_lines_dropped", "Log lines that were dropped because they were read too slowly."
        )
        self.spans_dropped = counter("stack_spans_dropped", "Spans that no collector took.")
        self.responses = counter(
            "stack_http_requests",
            "Responses by class of status; 499: the client disconnected. A stream that failed after its head is a 2xx: "
            "stack_requests has its outcome.",
            ("status",),
        )


def gauge(
    name: str,
    text: str,
    labels: tuple[str, ...],
    registry: CollectorRegistry,
    over_workers: Literal["livesum", "livemax"] = "livesum",
) -> Gauge:
    """Make a gauge whose values of all workers are added up, or of which the largest counts."""
    return Gauge(name, text, labels, registry=registry, multiprocess_mode=over_workers)
