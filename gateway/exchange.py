"""Exchange: the facts of one request, which are fixed once it is understood; its tokens (Usage); and how it ended
(Ending).

The file is long because it has all that is known of a request, each fact with its unit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeGuard

import orjson

from gateway import multipart
from gateway.byte_budget import Charge
from gateway.endpoints import ENDPOINTS, Api, Endpoint, Kind
from gateway.errors import AnswerTooLong, BadRequest, ClientLeft, Level, StackError, level_of

MOST = 1 << 40  # tokens; a larger number from an engine is taken for an error


@dataclass(frozen=True, slots=True)
class Origin:
    """What a translated request was before it became a chat completion.

    `ignored` names the fields that its translation left out. `advice` names the fields of the chat completion that the
    engine may be asked without. `names` has the caller's name of each field of the chat completion that has another.
    `yields`: an engine that refuses the form of the messages or tools may be asked in another form.
    """

    api: Api
    ignored: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    yields: bool = True


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request on its way to an engine. It is complete and checked, and never changes."""

    request_id: str
    kind: Kind
    key_id: str  # names the key in logs, and does not reveal it
    stream: bool
    wants_usage: bool  # the caller asked for a usage chunk; the gateway asks the engine for one in any case
    size: int  # messages, prompts or inputs in the request
    choices: int  # answers asked for
    resume: bool  # the caller allows another engine to continue the answer
    fields: dict[str, Any]  # the body
    started: float  # time.monotonic(), seconds
    prompt: str | None = None  # the names and versions of the operator's prompts in it
    priority: int = 1  # the weight of its key in a queue
    queue_timeout: float = 0.0  # seconds for which it may wait in queues
    mark: int = 0  # a digest of its body, which recognises the request when it is sent again
    charge: Charge | None = None  # the memory that it holds
    origin: Origin | None = None  # None: the request is not translated
    owner: str = ""  # of its key, when the request came
    user: str = ""  # the pseudonym of the key's user (keys.users); empty: the key does not tell its users apart

    @property
    def account(self) -> str:
        """Whose it is: see keys.known.Key.account."""
        return f"{self.key_id}/{self.user}" if self.user else self.key_id

    @property
    def endpoint(self) -> Endpoint:
        """The properties of all requests of its kind."""
        return ENDPOINTS[self.kind]

    @property
    def api(self) -> Api:
        """The API that its caller used."""
        return self.endpoint.api if self.origin is None else self.origin.api

    @property
    def wants_every_usage(self) -> bool:
        """Whether the caller asked for usage in every chunk, which vLLM offers."""
        options = self.fields.get("stream_options") or {}
        return self.wants_usage and options.get("continuous_usage_stats") is True

    @property
    def prefilled(self) -> bool:
        """Whether its last message is the beginning of the answer, as the Messages API has it."""
        if self.api != "messages":
            return False
        last = self.fields["messages"][-1]
        return last["role"] == "assistant" and not last.get("tool_calls") and bool(last["content"].strip())

    @property
    def prompts(self) -> int:
        """The number of prompts that are answered: 1 for a chat."""
        return self.size if self.endpoint.counted == "prompts" else 1

    def having(self, fields: dict[str, Any]) -> "Exchange":
        """Return the same exchange with another body."""
        return replace(self, fields=fields)

    @property
    def inputs(self) -> int:
        """The number of pieces of work that it is for an engine."""
        return self.size if self.endpoint.counted == "inputs" else self.choices

    @property
    def many(self) -> tuple[str, str, str]:
        """The field that makes the request several pieces of work, their name, and advice if they are too many."""
        endpoint = self.endpoint
        if endpoint.counted == "inputs":
            return endpoint.content, "inputs", "Send fewer inputs."
        if endpoint.counted == "prompts" and self.size > 1:
            return endpoint.content, "answers (prompts times `n`)", "Send fewer prompts, or a smaller `n`."
        return "n", "answers", "Send a smaller `n`."

    def encode(self, model: str, fields: dict[str, Any], stream: dict[str, Any] | None = None) -> bytes:
        """Return the body for an engine as JSON: its `fields` (from upstream.parameters), with the engine's own name
        for the model. With `stream`, it asks for a stream with these options, which make the engine count its tokens.

        Raises BadRequest if the body is nested more than about 250 levels deep, because orjson cannot write that.
        """
        fields = fields | {"model": model}
        if self.endpoint.form:
            return multipart.write(fields)
        if stream is not None:
            options = fields.get("stream_options") or {}
            fields |= {"stream": True, "stream_options": options | stream}
        try:
            return orjson.dumps(fields)
        except TypeError:
            raise BadRequest("The body is nested too deeply.") from None


@dataclass(frozen=True, slots=True)
class Usage:
    """The tokens that an engine counted. `cached` is the part of `tokens_in` that came from its prefix cache."""

    tokens_in: int
    tokens_out: int
    cached: int = 0

    @classmethod
    def of(cls, value: object) -> "Usage | None":
        """Read OpenAI's `usage` object; None if it is malformed."""
        if not isinstance(value, dict):
            return None
        tokens_in, tokens_out = value.get("prompt_tokens"), value.get("completion_tokens", 0)
        if not _counts(tokens_in) or not _counts(tokens_out):
            return None
        details = value.get("prompt_tokens_details")
        cached = details.get("cached_tokens") if isinstance(details, dict) else None
        return cls(tokens_in, tokens_out, cached if _counts(cached) else 0)

    def as_object(self) -> dict[str, Any]:
        """Return OpenAI's `usage` object."""
        read, made = self.tokens_in, self.tokens_out
        told: dict[str, Any] = {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}
        return told | {"prompt_tokens_details": {"cached_tokens": self.cached}} if self.cached else told


def wasteful(error: StackError | None) -> bool:
    """Return whether a request with this error is charged for the engine's work: its client did not wait for the
    answer, or asked for one that takes too long."""
    return isinstance(error, ClientLeft | AnswerTooLong)


def _counts(value: object) -> TypeGuard[int]:
    """Return whether the value can be a count of tokens."""
    return type(value) is int and 0 <= value < MOST


@dataclass(frozen=True, slots=True)
class Running:
    """The state of a running exchange."""

    row: str | None  # its id in the usage rows; None: it has no row
    request_id: str
    key_id: str
    model: str  # the route's name
    engine: str | None  # the engine that is asked
    kind: Kind
    stream: bool
    seconds: float  # since the request came
    generating: float | None  # seconds since its first token; None: there is none yet, or it cannot be seen
    tokens: int  # so far
    position: int | None = None  # its position in the queue of its engine, from 1; None: it has none
    waits: Literal["queue", "load", "outage", "pause"] | None = None  # what for (see Wait); None: it is being answered


class Wait(NamedTuple):
    """A time in which a request waited and no engine worked on it. Times are time.monotonic()'s, in seconds."""

    what: Literal[
        "queue", "outage", "pause"
    ]  # for a slot; for an engine that is down; before it waits for a slot again
    engine: str  # empty: any
    began: float
    ended: float


@dataclass(slots=True)
class Try:
    """One attempt, as it goes. Times are time.monotonic()'s, in seconds."""

    engine: str
    model: str  # by the engine's own name
    began: float
    resume: int = 0  # the number of the resume that it is for; 0: it is for none
    span: bytes = b""  # its id in a trace; empty: it has none
    engine_id: str = ""  # what the engine knows the request by
    working_since: float | None = None  # the engine is at work on it
    worked: float = 0.0  # seconds that the engine took
    ended: float | None = None
    error: str = ""  # the outcome, if it gave no whole answer; an exception would keep the request in memory

    def heard(self, now: float) -> None:
        """Note that the engine has sent everything. `now` is time.monotonic()."""
        if self.working_since is not None:
            self.worked += now - self.working_since
            self.working_since = None

    def ends(self, now: float, error: str) -> None:
        """Note that the attempt is over, unless it is. `error` is its outcome, empty if it gave a whole answer."""
        self.heard(now)
        if self.ended is None:
            self.ended, self.error = now, error


@dataclass(frozen=True, slots=True)
class Ending:
    """How an exchange ended, for its log line, the metrics and the usage. Times are those of time.monotonic()."""

    exchange: Exchange
    route: str  # the model's configured name
    arm: str | None  # the arm of a split
    engine: str | None  # the last engine asked
    attempts: int
    resumes: int  # how often another engine continued the answer
    error: StackError | None  # None: the answer is complete
    begun: bool  # the client has received a part of the answer, or all of it
    usage: Usage | None  # None: the engine reported none
    estimated: int  # estimated tokens of the prompt, used if the engine reported none
    counted: int  # tokens of the answer that the gateway saw, or that the engine may have made unseen
    first_token_at: float | None  # only for streams
    finish_reason: str | None  # of all choices, cut to a bounded length: the client's own is not cut
    ended: float
    amount: float | None = None  # of the endpoint's unit that is no token; None: it has none, or nobody said
    queued_ms: int = 0  # milliseconds that it waited for slots
    asked: bool = True  # an engine got the request, or read the prompt for a check
    engine_id: str = ""  # the id that the last engine asked has for it
    tries: Sequence[Try] = ()
    waits: Sequence[Wait] = ()

    @property
    def outcome(self) -> str:
        """The outcome: "finished", or one word of a closed set for an error."""
        return "finished" if self.error is None else self.error.outcome

    @property
    def broken(self) -> bool:
        """Whether the client, still connected, got an error in the middle of its answer."""
        return self.begun and self.error is not None and self.error.outcome != "client_left"

    @property
    def level(self) -> Level:
        """The level of its log line."""
        if self.broken and self.counted:
            return "error"  # the client has a part of an answer
        return "info" if self.error is None else level_of(self.error.status)

    @property
    def tokens_in(self) -> int:
        """The tokens of the prompt, as the engine counted them. If the engine reported none, the estimate counts if the
        engine has read the prompt, as far as is known. A client that disconnects before its answer, or whose answer
        takes too long, is charged for the prompt. A client that gets another error pays nothing."""
        if self.usage is not None and self.usage.tokens_in:
            return self.usage.tokens_in
        return self.estimated if self.counted or self.error is None or (wasteful(self.error) and self.asked) else 0

    @property
    def tokens_out(self) -> int:
        """The tokens of the answer, as the engine counted them, and never fewer than the gateway saw."""
        return max(self.usage.tokens_out, self.counted) if self.usage else self.counted

    @property
    def exact(self) -> bool:
        """Whether both numbers are the engine's own count."""
        usage = self.usage
        return usage is not None and (usage.tokens_in, usage.tokens_out) == (self.tokens_in, self.tokens_out)

    def fields(self) -> dict[str, Any]:
        """Return the fields of its log line."""
        it, error = self.exchange, self.error
        fields: dict[str, Any] = {
            "request_id": it.request_id,
            "key": it.key_id,
            **({"user": it.user} if it.user else {}),
            "api": it.api,
            "model": self.route,
            "engine": self.engine,
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
        }
        if self.amount is not None:
            fields[it.endpoint.unit] = self.amount
        if it.stream:
            first = self.first_token_at
            fields["ttft_ms"] = round((first - it.started) * 1000, 1) if first is not None else None
        if self.queued_ms:
            fields["queued_ms"] = self.queued_ms
        if self.engine_id:
            fields["engine_request_id"] = self.engine_id
        fields["finish_reason"] = self.finish_reason
        fields["outcome"] = self.outcome
        if error is not None and error.__cause__ is not None:
            fields["cause"] = f"{type(error.__cause__).__name__}: {error.__cause__}"[:200]
        if self.arm is not None:
            fields["arm"] = self.arm
        if self.attempts > 1:
            fields["attempts"] = self.attempts
        if self.resumes:
            fields["resumes"] = self.resumes
        return fields
