"""Rounds: what one engine is asked in turn for one answer: once for each of `n` choices if it makes one at a time, and
once more if a tool call that was demanded did not come.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any, NamedTuple

from gateway.dialects.dialect import Dialect
from gateway.errors import EngineDisobeyed, EngineUnsupported, StackError
from gateway.exchange import Exchange, Usage
from gateway.forced_tools.guard import Guard
from gateway.forced_tools.plan import Plan, plan
from gateway.headers import FORCED_TOOLS
from gateway.limits.estimates import seen
from gateway.relay import echo
from gateway.relay.content import Content, Contents, content_of
from gateway.relay.resume.part import alone
from gateway.relay.round_writer import RoundWriter
from gateway.translation.face import Writer

_HEAD = ("id", "object", "created", "model", "system_fingerprint")


class Rounds:
    """One answer's rounds. `exchange` is what is asked now. Feed each chunk to `edit`, or a blocking answer to `count`
    and `take`; then call `next`, or `again` after an error."""

    def __init__(
        self, exchange: Exchange, demanded: Plan | None, turns: Sequence[int] = (), before: "Begun | None" = None
    ) -> None:
        """`turns` are the indices of the choices that are made one by one; if there are none, all are made at once.
        `before`: an engine has begun the answer, and broke off."""
        self._whole = exchange
        self._plan = demanded
        self._turns = tuple(turns)
        self._number = 0  # of the turn
        self._repaired = False  # this choice is made anew
        self._repairs = 0
        self._before = Usage(0, before.tokens + before.discarded if before else 0)  # what earlier rounds took
        self._written = 0  # tokens of the blocking rounds so far, by their texts
        self._head: dict[str, Any] = before.head if before else {}
        self._roles: set[Any] = set(before.roles) if before else set()  # choices whose role the client has
        self._answer: dict[str, Any] = {}  # of blocking rounds so far
        self.content = before.content if before else Contents(1) if turns else content_of(exchange.choices)
        self._guard: Guard | None = None
        self._kept: Guard | None = None
        # What engines made, as it came.
        self.made = before.made if before else Contents(1) if turns else content_of(exchange.choices)
        self._discarded = before.discarded if before else 0  # tokens of answers that `made` has no longer
        self._begin()
        if before:
            self._guard = before.guard or self._guard
            self._kept = before.guard  # one for all the turns, because it knows how each choice has begun

    @property
    def last(self) -> bool:
        """Whether the answer is whole after this round."""
        return self._number >= len(self._turns) - 1

    @property
    def head(self) -> dict[str, Any]:
        """The fields that every chunk of the answer has, as far as they are known."""
        return self._head

    @property
    def demands(self) -> bool:
        """Whether a call is demanded."""
        return self._plan is not None and self._plan.demand.must_call

    @property
    def index(self) -> int:
        """The index of the choice that is made now."""
        return self._turns[self._number] if self._turns else 0

    @property
    def tokens(self) -> int:
        """The tokens of all rounds so far, whatever the client got of them: as engines counted those of the rounds
        before, if they did, and at least as many as were seen."""
        (events, characters), (events_before, characters_before) = echo.made(self.made, self._whole), self._start
        this = seen(events - events_before, characters - characters_before)
        return max(self._before.tokens_out + this, self._discarded + seen(events, characters))

    @property
    def alone(self) -> bool:
        """Whether one choice is made now."""
        return bool(self._turns) or self._whole.choices == 1

    def rest(self, head: dict[str, Any]) -> "Rounds":
        """Return the rounds by which the rest of this answer is made, choice by choice."""
        if self.alone:
            return self
        return Rounds(
            self._whole,
            self._plan,
            unfinished(self._whole, self.content),
            begun(self.content, head, self.made, self._guard)._replace(discarded=self._before.tokens_out),
        )

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """The header that says that a call was forced here."""
        if self._plan is None or self._plan.way != "schema":
            return []
        loose = b",no-pattern" if self._plan.loosens else b""
        return [(FORCED_TOOLS, b"schema%b%b" % (loose, b",repaired" if self._repairs else b""))]

    def edit(self, chunk: dict[str, Any]) -> None:
        """Make a chunk of this round one of the answer. Raises EngineDisobeyed if the client has a part of a call that
        is wrong."""
        if self._head:
            chunk |= self._head
        else:
            self._head = {name: chunk[name] for name in _HEAD if name in chunk}
        for choice in chunk.get("choices") or ():
            if isinstance(choice, dict):
                self._place(choice)
                self.made.add(choice)
        self.count(chunk)
        if self._guard is not None:
            self._guard.edit(chunk)
            if self._guard.failure and self._guard.sent and self._whole.stream:
                raise self._guard.error()
        for choice in chunk.get("choices") or ():
            if isinstance(choice, dict) and "role" in (choice.get("delta") or ()):
                self._roles.add(choice.get("index"))

    def count(self, answer: dict[str, Any]) -> None:
        """Make the usage of a blocking answer, or of a chunk, that of all rounds so far. Zeros say nothing."""
        before, usage = self._before, Usage.of(answer.get("usage"))
        if usage is None or not (before.tokens_in or before.tokens_out) or not (usage.tokens_in or usage.tokens_out):
            return
        answer["usage"] = self.together(usage).as_object()

    def together(self, usage: Usage) -> Usage:
        """Return the usage of all rounds so far, where this is that of the last one."""
        before = self._before
        return Usage(before.tokens_in + usage.tokens_in, before.tokens_out + usage.tokens_out, usage.cached)

    def wrote(self, tokens: int) -> int:
        """Add the tokens that a blocking round's text has. Returns those of all rounds so far."""
        self._written += tokens
        return self._written

    def take(self, answer: dict[str, Any]) -> dict[str, Any]:
        """Return a blocking answer with the choices of all rounds so far. Raises EngineDisobeyed."""
        choices = answer.get("choices")
        choices = [it for it in choices if isinstance(it, dict)] if isinstance(choices, list) else []
        if self._guard is not None:
            _guard_whole(self._guard, choices)
            if self._guard.failure:
                raise self._guard.error()
        if self._turns:
            choices = [it | {"index": self.index} for it in choices[:1]]
        before = self._answer.get("choices", [])
        self._answer = answer | {name: it for name, it in self._answer.items() if name in _HEAD}
        self._answer["choices"] = [*before, *choices]
        return self._answer

    def writer(self, inner: Writer) -> Writer:
        """Return a writer of this round's part of an answer."""
        return RoundWriter(inner, self)

    def check(self) -> None:
        """Raise EngineDisobeyed if the round's answer is wrong."""
        if self.failed and self._guard is not None:
            raise self._guard.error()

    @property
    def failed(self) -> bool:
        """Whether the round's answer is known to be wrong."""
        return self._guard is not None and bool(self._guard.failure)

    def next(self, usage: Usage | None) -> bool:
        """Begin the next round. `usage` is that of all so far, if it is known. Returns whether there is one."""
        if self.last:
            return False
        self._number += 1
        self._repaired = False
        made = usage.tokens_out if usage else max(self.tokens, self._written)
        self._before = replace(self._before, tokens_out=max(made, self._before.tokens_out))  # a prompt is counted once
        self._begin()
        return True

    def again(self, error: StackError, usage: Usage | None) -> bool:
        """Begin a round that makes this choice anew, if this error is a reason for that. `usage` is that of all rounds
        so far. Returns whether there is one: once for each choice, and not if the client has a part of a wrong call."""
        if self._plan is None or self._guard is None:
            return False
        if isinstance(error, EngineUnsupported):  # the engine is not set up for tools
            if self._plan.way == "schema" or error.param != "tools" or not self._plan.demand.must_call:
                return False
            self._plan = self._plan.by_schema()
        elif isinstance(error, EngineDisobeyed):
            if self._repaired or (self._guard.sent and self._whole.stream):
                return False
            self._repaired = True
            self._repairs += 1
            self._before = usage or replace(self._before, tokens_out=max(self.tokens, self._written))
            self._plan = self._plan.by_schema(self._guard.failure, self._guard.wrong)
        else:
            return False
        self.content.reopen(self.index if self._turns else None)
        self._kept = None
        if self._turns:
            self.made.reopen(self.index)
        else:
            self._discarded += seen(*echo.made(self.made, self._whole))
            self.made = content_of(self._whole.choices)
        self._begin()
        return True

    def _begin(self) -> None:
        exchange = self._whole if self._plan is None else self._whole.having(self._plan.fields(self._whole.fields))
        if self._turns:
            exchange = alone(exchange, self.index)
            self.content.expect(len(self.content.finished) + 1)
        self.exchange = exchange
        self._start = echo.made(self.made, self._whole)
        if self._kept is None:
            self._guard = None if self._plan is None else self._plan.guard()

    def _place(self, choice: dict[str, Any]) -> None:
        if self._turns:
            choice["index"] = self.index
        delta = choice.get("delta")
        if isinstance(delta, dict) and choice.get("index") in self._roles:
            delta.pop("role", None)


class Begun(NamedTuple):
    """What has come of an answer whose engine broke off: for the client, and `made` as the engine had it. `tokens` are
    those of the choices that are whole, and `discarded` those of answers that were made again."""

    content: Content
    made: Content
    head: dict[str, Any]
    guard: Guard | None
    roles: frozenset[int]
    tokens: int
    discarded: int = 0


def begun(content: Content, head: dict[str, Any], made: Content | None = None, guard: Guard | None = None) -> Begun:
    """Return what has come of an answer of several choices."""
    made = made or deepcopy(content)  # from here on the two are told of separately
    roles = frozenset(it for it in content.indices if content.part(it).any)
    return Begun(content, made, head, guard, roles, sum(made.part(it).tokens for it in content.finished))


def unfinished(exchange: Exchange, content: Content) -> list[int]:
    """Return the indices of the choices that are not whole."""
    return [it for it in range(exchange.choices) if it not in content.finished]


def rounds(exchange: Exchange, dialect: Dialect) -> Rounds | None:
    """Return the rounds by which an engine of this dialect answers; None if it is asked once and its answer is left
    alone. Raises BadRequest for a demand that it cannot meet."""
    fields = exchange.fields
    if exchange.choices == 1 and not fields.get("tools"):
        return None
    ways = dialect.endpoints.get(exchange.kind)
    single = exchange.choices > 1 and ways is not None and ways.parameters.get("n") == "by the gateway"
    demanded = plan(exchange.kind, fields, dialect)
    if not single and demanded is None:
        return None
    return Rounds(exchange, demanded, range(exchange.choices) if single else ())


def _guard_whole(guard: Guard, choices: list[dict[str, Any]]) -> None:
    """Have a guard see to the choices of a blocking answer."""
    for index, choice in enumerate(choices):
        message = choice.get("message")
        if not isinstance(message, dict):
            continue
        for number, call in enumerate(message.get("tool_calls") or ()):
            if isinstance(call, dict):
                call["index"] = number
        reason = choice.get("finish_reason") or "stop"
        told: dict[str, Any] = {
            "index": index,
            "delta": message,
            "finish_reason": reason,
            "logprobs": choice.get("logprobs"),
        }
        guard.edit({"choices": [told]})
        message = {"content": None} | told["delta"]
        for call in message.get("tool_calls") or ():
            call.pop("index", None)
        choice |= {"message": message, "finish_reason": told["finish_reason"]}
        if "logprobs" in choice:
            choice["logprobs"] = told["logprobs"]
