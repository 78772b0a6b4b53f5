"""Metrics: what each worker counts, and every name there is. `scrape` gives it out.

| Prometheus                          | labels    | OpenTelemetry GenAI (status: development)                   |
|-------------------------------------|-----------|-------------------------------------------------------------|
| stack_requests_total                | outcome   | gen_ai.operation.name, gen_ai.request.model, error.type     |
| stack_requests_in_flight            |           |                                                             |
| stack_request_duration_seconds      |           | gen_ai.server.request.duration                              |
| stack_time_to_first_token_seconds   |           | gen_ai.server.time_to_first_token                           |
| stack_time_per_output_token_seconds |           | gen_ai.server.time_per_output_token                         |
| stack_tokens_total                  | direction | gen_ai.client.token.usage, gen_ai.token.type                |
| stack_documents_total               |           | documents that were ranked                                  |
| stack_audio_seconds_total           |           | sound that was transcribed                                  |
| stack_spoken_characters_total       |           | text that was spoken                                        |
| stack_broken_streams_total          |           | answers that ended with an error after they had begun       |

each by kind (chat, completion, embedding, rerank, transcription, speech), api (chat_completions, completions,
embeddings, rerank, transcriptions, speech, responses, messages), model (the route's name) and arm (of a split, else
empty); and

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
| stack_limit_rejections_total  | limit           | refused because the key has reached that limit |
| stack_keys_near_quota         | quota, percent  | keys that have used so much of a quota         |
| stack_engine_seconds          | upstream        | how long the engine took for each attempt      |
| stack_model_load_seconds      | upstream        | how long it took to load a model               |
| stack_gateway_seconds         | api             | the gateway's own part of an answer's duration |
| stack_store_trouble_workers   |                 | how many workers cannot reach the store        |
| stack_log_lines_dropped_total |                 |                                                |
| stack_usage_dropped_total     |                 | requests whose usage could not be written down |
| stack_spans_dropped_total     |                 | spans that no collector took                   |

and, told at each scrape by the master (gateway.server.facts):

| stack_build_info                | version, python | 1                                             |
| stack_model_fetched_ratio       | model           | how much of the model is fetched: 0 to 1      |
| stack_model_fetch_failed        | model           | 1: it could not be fetched                    |
| stack_usage_journal_bytes       |                 | the largest file of usage that is not saved   |
| stack_usage_journal_limit_bytes |                 | its bound, beyond which usage is lost         |

Label values come from closed sets: outcomes are ours, models those that routing knows, statuses are classes. A caller's
words never become a label. A client that left is `stack_requests_total{outcome="client_left"}`. A stream that failed
after its head has gone out is a 2xx in `stack_http_requests_total`; its outcome is in `stack_requests_total`.

Nothing is written per chunk: once when an exchange begins, once when it ends. Labelled children are kept, because
looking them up costs as much as counting.
"""

from collections.abc import Iterable
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter

from gateway.endpoints import Endpoint
from gateway.errors import QuotaSpent, RateLimited, StackError
from gateway.exchange import Ending, Exchange
from gateway.instruments import Engines, Exchanges, Histogram, Operators
from gateway.upstream.breaker import State

STATES: tuple[State, ...] = get_args(State)
MAX_SERIES = 200  # of kind, API, model and arm; an engine that lists more has the rest counted as OTHER
OTHER = "other"
UNKNOWN = ""  # the model of a request that was refused before it was looked up


class Metrics:
    """The metrics of one worker. Call scrape.Board.take first, which decides where their values are stored."""

    def __init__(self, models: Iterable[str]) -> None:
        own = CollectorRegistry()  # not the library's global one
        self._exchanges, self._engines, self._operators = Exchanges(own), Engines(own), Operators(own)
        self._classes = {name: self._operators.responses.labels(name) for name in ("2xx", "3xx", "4xx", "499", "5xx")}
        self._worked: dict[str, Histogram] = {}  # by engine
        self._series: dict[tuple[str, str, str, str | None], _Series] = {}
        for model in models:
            # A series that is there from the start shows its first increase.
            self._of("chat", "chat_completions", model, None)

    def started(self, it: Exchange, model: str, arm: str | None) -> None:
        """Count the beginning of an exchange with an engine. `finished` must follow, exactly once."""
        self._of(it.kind, it.api, model, arm).in_flight.inc()

    def finished(self, ending: Ending) -> None:
        """Count the end of an exchange."""
        it = ending.exchange
        series = self._of(it.kind, it.api, ending.route, ending.arm)
        series.in_flight.dec()
        series.outcome(ending.outcome).inc()
        series.duration.observe(ending.ended - it.started)
        if ending.tokens_in > 0:
            series.tokens_in.inc(ending.tokens_in)
        if ending.tokens_out > 0:
            series.tokens_out.inc(ending.tokens_out)
        if it.endpoint.unit == "documents" and ending.error is None:
            self._exchanges.documents.labels(*series.labels).inc(it.size)
        if ending.amount is not None:
            counter = self._exchanges.seconds if it.endpoint.unit == "seconds" else self._exchanges.characters
            counter.labels(*series.labels).inc(ending.amount)
        if ending.first_token_at is not None:
            series.first_token.observe(ending.first_token_at - it.started)
            if ending.tokens_out > 1:
                series.per_token.observe((ending.ended - ending.first_token_at) / (ending.tokens_out - 1))
        if ending.broken:
            series.broken.inc()
        for each in ending.tries:
            self._at(each.engine).observe(each.worked)
        if ending.error is None and len(ending.tries) == 1:
            waited = sum(each.ended - each.began for each in ending.waits)
            series.own.observe(max(0.0, ending.ended - it.started - waited - ending.tries[0].worked))

    def refused(self, endpoint: Endpoint, error: StackError) -> None:
        """Count a request to a relayed route that was refused before it became an exchange."""
        self._of(endpoint.kind, endpoint.api, UNKNOWN, None).outcome(error.outcome).inc()
        if isinstance(error, RateLimited | QuotaSpent):
            self._operators.limited.labels(error.limit).inc()

    def responded(self, status: int) -> None:
        """Count the end of any request."""
        self._classes["499" if status == 499 else f"{status // 100}xx"].inc()

    def loaded(self, upstream: str, seconds: float) -> None:
        """Count a load of a model."""
        self._engines.loads.labels(upstream).observe(seconds)

    def retried(self, upstream: str) -> None:
        """Count a request that is sent to that upstream again."""
        self._engines.retries.labels(upstream).inc()

    def fell_back(self, route: str) -> None:
        """Count a request that goes to a fallback of that route."""
        self._engines.fallbacks.labels(route).inc()

    def resumed(self, route: str, outcome: Literal["resumed", "failed", "abandoned"]) -> None:
        """Count an answer that broke off, by its `outcome`: whether an engine continued it."""
        self._engines.resumes.labels(route, outcome).inc()

    def upstream_state(self, name: str, state: State) -> None:
        """Set the state that the upstream has in this worker."""
        for each in STATES:
            self._engines.states.labels(name, each).set(each == state)

    def slots(self, upstream: str, slots: int, used: int, waiting: int) -> None:
        """Set the number of the engine's slots, and how many requests of this worker have a slot or wait for one."""
        self._engines.slots.labels(upstream).set(slots)
        self._engines.slots_used.labels(upstream).set(used)
        self._engines.depth.labels(upstream).set(waiting)

    def queued(self, upstream: str, seconds: float) -> None:
        """Count a wait of `seconds` in the queue, which ended with a slot or without one."""
        self._engines.waits.labels(upstream).observe(seconds)

    def turned_away(self, upstream: str, reason: str) -> None:
        """Count a request that gets no slot."""
        self._engines.turned_away.labels(upstream, reason).inc()

    def near_quota(self, quota: str, percent: int, keys: int) -> None:
        """Set how many keys have used that share of a quota, as far as this worker knows."""
        self._operators.near.labels(quota, str(percent)).set(keys)

    def store_trouble(self, *, present: bool) -> None:
        """Set whether this worker is unable to save usage. Any thread may call this."""
        self._operators.store_trouble.set(present)

    def usage_dropped(self, count: int) -> None:
        """Count usage rows that were lost. Any thread may call this."""
        self._operators.usage_dropped.inc(count)

    def log_line_dropped(self) -> None:
        """Count a log line that was lost. Any thread may call this."""
        self._operators.lines_dropped.inc()

    def spans_dropped(self, count: int) -> None:
        """Count spans that were lost. Any thread may call this."""
        self._operators.spans_dropped.inc(count)

    def _at(self, engine: str) -> Histogram:
        found = self._worked.get(engine)
        if found is None:
            found = self._worked[engine] = self._engines.worked.labels(engine)
        return found

    def _of(self, kind: str, api: str, model: str, arm: str | None) -> "_Series":
        series = self._series.get((kind, api, model, arm))
        if series is None:
            if len(self._series) >= MAX_SERIES and model != OTHER:
                return self._of(kind, api, OTHER, None)
            series = self._series[kind, api, model, arm] = _Series(self._exchanges, (kind, api, model, arm or ""))
        return series


class _Series:
    """The labelled children of one kind, API, model and arm, made when first used."""

    def __init__(self, of_it: Exchanges, labels: tuple[str, str, str, str]) -> None:
        self.labels = labels
        self._requests = of_it.requests
        self._outcomes: dict[str, Counter] = {}
        if labels[2] == UNKNOWN:
            return  # refused requests have an outcome and nothing else
        self.in_flight = of_it.in_flight.labels(*labels)
        self.duration = of_it.duration.labels(*labels)
        self.first_token = of_it.first_token.labels(*labels)
        self.per_token = of_it.per_token.labels(*labels)
        self.tokens_in = of_it.tokens.labels(*labels, "input")
        self.tokens_out = of_it.tokens.labels(*labels, "output")
        self.broken = of_it.broken.labels(*labels)
        self.own = of_it.own.labels(labels[1])

    def outcome(self, name: str) -> Counter:
        counter = self._outcomes.get(name)
        if counter is None:
            counter = self._outcomes[name] = self._requests.labels(*self.labels, name)
        return counter
