"""Exchange: the facts of one request, fixed once it is understood. Usage: its tokens. Ending: how it went."""

from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

import orjson

from gateway.errors import BadRequest, ClientLeft, StackError

MOST = 1 << 40  # what an engine says beyond that, it doesn't mean

Kind = Literal["chat", "completion", "embedding"]

CONTENT: dict[Kind, str] = {"chat": "messages", "completion": "prompt", "embedding": "input"}  # where the prompt is


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request on its way to an engine. It is whole and checked; nothing here changes any more."""

    request_id: str
    kind: Kind
    key_id: str  # names the key in logs without giving it away
    stream: bool
    wants_usage: bool  # the caller asked for a usage chunk; the gateway asks the engine for one in any case
    size: int  # messages, prompts or inputs in the request
    choices: int  # answers asked for
    resume: bool  # it may be continued elsewhere, as far as the caller is concerned
    fields: dict[str, Any]  # the body
    started: float  # time.monotonic(), seconds
    prompt: str | None = None  # the operator's prompts in it, by name and version
    priority: int = 1  # its key's weight in a queue
    queue_timeout: float = 0.0  # seconds that it may wait in queues
    mark: int = 0  # of its body: when it is sent again it has the same

    def encode(self, model: str, fields: dict[str, Any], *, stream: bool) -> bytes:
        """The body for an engine: `fields` as it takes them (gateway.parameters), under its own name for the model, and
        with its count of tokens asked for.

        Raises BadRequest where it is nested more than some 250 levels deep, which is all that orjson writes.
        """
        fields = fields | {"model": model}
        if stream:
            options = fields.get("stream_options") or {}
            fields |= {"stream": True, "stream_options": options | {"include_usage": True}}
        try:
            return orjson.dumps(fields)
        except TypeError:
            raise BadRequest("The body is nested too deeply.") from None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens as the engine counted them. `cached` are those of `tokens_in` that it had in its prefix cache."""

    tokens_in: int
    tokens_out: int
    cached: int = 0

    @classmethod
    def of(cls, value: object) -> "Usage | None":
        """Read OpenAI's `usage` object; None where it isn't one."""
        if not isinstance(value, dict):
            return None
        tokens_in, tokens_out = value.get("prompt_tokens"), value.get("completion_tokens", 0)
        if not _counts(tokens_in) or not _counts(tokens_out):
            return None
        details = value.get("prompt_tokens_details")
        cached = details.get("cached_tokens") if isinstance(details, dict) else None
        return cls(tokens_in, tokens_out, cached if _counts(cached) else 0)


def _counts(value: object) -> TypeGuard[int]:
    """Whether it can be a count of tokens."""
    return type(value) is int and 0 <= value < MOST


@dataclass(frozen=True, slots=True)
class Running:
    """An exchange as it stands."""

    row: str | None  # the id it has in the usage
    request_id: str
    key_id: str
    model: str  # the route's name
    engine: str | None  # the one that is asked
    kind: Kind
    stream: bool
    seconds: float  # since it came
    generating: float | None  # seconds since its first token; None: there is none yet, or nobody can see
    tokens: int  # so far
    position: int | None = None  # in the queue of its engine, from 1; None: it doesn't wait there


@dataclass(frozen=True, slots=True)
class Ending:
    """How an exchange went: what its log line, the metrics and the usage say. Times are time.monotonic()'s."""

    exchange: Exchange
    route: str  # the model's name here
    arm: str | None  # of a split
    engine: str | None  # the last one asked
    attempts: int
    resumes: int  # how often another engine went on with the answer
    error: StackError | None  # None: it finished
    begun: bool  # the client got a part of the answer, or all of it
    usage: Usage | None  # None: the engine didn't get to say
    estimated: int  # tokens of the prompt, for as long as the engine hasn't said
    counted: int  # pieces of content that came, at least one token each; of a whole answer that hides them, a guess
    first_token_at: float | None  # of a stream
    finish_reason: str | None
    ended: float
    queued_ms: int = 0  # it waited for slots
    asked: bool = True  # an engine got the request

    @property
    def outcome(self) -> str:
        """In one word of a closed set."""
        return "finished" if self.error is None else self.error.outcome

    @property
    def broken(self) -> bool:
        """Whether the client, still there, was told in the midst of its answer."""
        return self.begun and self.error is not None and self.error.outcome != "client_left"

    @property
    def tokens_in(self) -> int:
        """Where the engine hasn't said: the estimate, if it has read them, for all that is known. Who leaves before the
        answer has had it read them for nothing; who gets an error instead of one pays for nothing."""
        if self.usage is not None:
            return self.usage.tokens_in
        left = self.asked and (self.error is None or isinstance(self.error, ClientLeft))
        return self.estimated if self.counted or left else 0

    @property
    def tokens_out(self) -> int:
        return self.usage.tokens_out if self.usage else self.counted

    def fields(self) -> dict[str, Any]:
        """As its log line tells it."""
        it, error = self.exchange, self.error
        fields: dict[str, Any] = {
            "request_id": it.request_id,
            "key": it.key_id,
            "model": self.route,
            "engine": self.engine,
            "tokens_in": self.usage.tokens_in if self.usage else None,
            "tokens_out": self.tokens_out,
        }
        if it.stream:
            first = self.first_token_at
            fields["ttft_ms"] = round((first - it.started) * 1000, 1) if first is not None else None
        if self.queued_ms:
            fields["queued_ms"] = self.queued_ms
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
