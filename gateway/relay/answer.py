"""Answer: what there is of one answer, begun by one engine and maybe continued by others.

This file is long because all of an answer's state is changed here and nowhere else.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from gateway.dialects.dialect import Dialect, Way
from gateway.dialects.thoughts import Tags
from gateway.errors import EngineRefused, StackError
from gateway.exchange import Exchange, Try, Usage
from gateway.limits.estimates import LONGEST, TYPICAL, seen, written
from gateway.relay import echo
from gateway.relay.content import reasons
from gateway.relay.fold import Fold, foldable, remove_beginning, repeated, streamable
from gateway.relay.reader import Reader
from gateway.relay.resume.handover import Handover, hand_over
from gateway.relay.resume.part import seeded, stops
from gateway.relay.resume.seam import Seam
from gateway.relay.resume.search import Search, part_of, possible
from gateway.relay.round_writer import plain_writer
from gateway.relay.rounds import Rounds, begun, rounds, unfinished
from gateway.relay.shape import settle_all
from gateway.relay.sounds import heard
from gateway.relay.tally import Tally, count, counting
from gateway.relay.tap import Tap
from gateway.relay.trail import Noting, Past, Trail, lost
from gateway.routing.routes import Route, Target
from gateway.translation.face import Writer


class Asked(NamedTuple):
    """What a target is asked, and the reader of the stream that it answers with. `raw`: the text that it goes on with
    behind the prompt, if it does so."""

    exchange: Exchange
    reader: Reader
    raw: str | None = None


class Answer:
    """The state of the answer to one exchange. After `breaks`, `search` is the search for an engine that continues the
    answer. With a `writer`, the answer is written in the form of another API. With a `trail`, another worker can
    continue the answer if this one dies, and this one continues what an earlier worker has left."""

    def __init__(
        self, exchange: Exchange, route: Route, writer: Writer | None = None, trail: Trail | None = None
    ) -> None:
        self._trail = trail
        self.exchange = exchange
        self.route = route
        self.writer = writer if writer is None or trail is None else Noting(writer, trail)
        self.tried: list[Target] = []  # the last one is asked now
        self.tries: list[Try] = []  # how that went; of one that had no slot yet there is none
        self.asked = False  # an engine got the request
        self.read = False  # an engine has read the prompt for a check, or begun to
        self.engine_id = ""  # the id that the engine which was asked last knows the request by
        self.first_token_at: float | None = None
        self.folded_bytes = 0  # of streams that are passed on as a whole
        self._forget()
        if trail is not None and trail.past is not None:
            self._go_on(trail.past)

    def begin_anew(self) -> None:
        """Forget everything that has come, because another attempt begins the answer again."""
        self._forget()
        if self._trail is not None:
            self._trail.reader = None
            self._trail.note({"anew": True})

    def _forget(self) -> None:
        self._first: Target | None = None  # who began it
        self.reader: Reader | None = None  # of the stream of whoever began to answer last
        self.search: Search | None = None
        self.resumes = 0
        self.rounds: Rounds | None = None  # of the engine that is asked now, if it is asked more than once
        self.fold: Fold | None = None  # adds it up, where the client waits for the whole
        self.whole: dict[str, Any] = {}  # a blocking answer
        self.usage: Usage | None = None
        self.tokens = 0  # as many as were seen: what was made, where the engine doesn't get to say
        self.finish_reason: str | None = None
        self.amount: float | None = None  # of the endpoint's unit that is no token
        self._broke_off: StackError | None = None  # why it was resumed
        self.hidden_since: float | None = None  # since when an engine makes an answer of which nothing is seen
        self.hidden_most = LONGEST  # tokens of a choice that it can have made since then

    def _go_on(self, past: Past) -> None:
        """Take over what an earlier worker has left, if an engine can go on with it. There is a `search` then."""
        if past.first is None or not past.sound:
            return
        asked, self.exchange = self.exchange, past.exchange()
        self._first, self.reader, self.fold, self.resumes = past.first, past.reader, past.fold, past.resumes
        if self.breaks(lost(), sent=past.started) is None:
            self.exchange = asked
            self._forget()
            return
        self.tried.append(past.first)
        if self.fold is not None and self._trail is not None:
            self.fold.note, self.fold.exact = self._trail.chunk, past.first.upstream.dialect.whole_streams

    def failed(self) -> None:
        """Note that the engine that was asked last did not answer: what it may have done unseen is not charged."""
        self.asked = self.read = False
        self.hidden_since = None

    def left(self, target: Target, quiet_since: float | None) -> None:
        """Note that this target's work on the answer ends early. It may have made more since then than it has sent."""
        if self.hidden_since is None and (most := self._hidden(target.upstream.dialect)):
            self.hidden_since, self.hidden_most = quiet_since, most

    def _hidden(self, dialect: Dialect) -> int:
        """Return how many tokens of a choice such an engine may hold back while its stream is silent: a tool call,
        reasoning that the request does not want, or text that may become a stop sequence."""
        fields = self.exchange.fields
        thinks = fields.get("include_reasoning") is False and dialect.sampling.get("include_reasoning") == "taken"
        if thinks or (dialect.hides_calls and fields.get("tools")):
            return LONGEST
        counts = "continuous_usage_stats" in dialect.counts  # with each token, also while it holds text back
        return 0 if counts else max(map(len, stops(fields)), default=0) // TYPICAL

    @property
    def engine(self) -> str | None:
        """The name of the engine that was asked last."""
        return self.tried[-1].upstream.name if self.tried else None

    def begins(self, target: Target) -> Rounds | None:
        """Note that this target is asked now. Returns the rounds by which it answers; None if one unchanged request
        suffices. Raises BadRequest."""
        if self.search is None:
            self.rounds = rounds(self._repeatable(target.upstream.dialect), target.upstream.dialect)
        return self.rounds

    def next(self) -> bool:
        """Begin the next round. Returns whether there is one. If the answer was resumed, the next choice is resumed
        too. Raises the error that broke the answer off if there is no way to do that."""
        ways = self.rounds
        if ways is None or not ways.next(self.told):
            return False
        if self._broke_off is not None and self._first is not None and self.reader is not None:
            search = self._search(self._broke_off, self._first, self.reader, follows=True)
            if search.hopeless:
                raise self._broke_off
            self.search = search
        return True

    @property
    def told(self) -> Usage | None:
        """The tokens of all rounds so far, as engines counted them."""
        return self.reader.usage if self.reader is not None else self.usage

    @property
    def ends_here(self) -> bool:
        """Whether the answer is whole when the engine asked now has answered."""
        return self.rounds is None or self.rounds.last

    @property
    def said(self) -> bool:
        """Whether everything has come that the engine asked now was asked for; only its goodbye may be missing."""
        if self.reader is None:
            return False
        ways, content = self.rounds, self.reader.content
        return content.complete or (ways is not None and ways.alone and ways.index in content.finished)

    def streams(self, target: Target) -> bool:
        """Return whether this target is asked for a stream. It is if the caller wants one, if the engine would not
        notice a disconnect during a blocking request, or if the answer can be continued when the engine dies."""
        it, dialect = self._asked, target.upstream.dialect
        if it.stream or not it.endpoint.streams:
            return it.stream
        if dialect.deaf:
            return foldable(it.fields)
        goes_on = self.search is not None and self.fold is not None
        resumes = it.resume and self.route.resume.most > 0 and self.rounds is None
        return goes_on or (dialect.whole_streams and resumes)

    def doubts(self, target: Target) -> bool:
        """Return whether it has to be found out in which way this target goes on with the text so far."""
        search = self.search
        return search is not None and search.continues and target.upstream.dialect.doubtful

    def began(self, target: Target) -> bool:
        """Return whether the same model on such an engine began the answer."""
        first = self.search.first if self.search else None
        return first is not None and (first.model, first.upstream.dialect) == (target.model, target.upstream.dialect)

    def ask(self, target: Target, way: Way = "message", tags: Tags | None = None) -> Asked:
        """Return what to ask of this target for a stream. `way` is how it continues the text so far, if it does. `tags`
        stand around the reasoning of its model, if it continues that."""
        dialect, ways = target.upstream.dialect, self.rounds
        if self.search is not None:
            search, first = self.search, self.search.first.upstream.dialect
            handover = hand_over(search.part, first, dialect, way if search.continues else search.way, tags)
            seam = self._sewn(search, target, handover)
            return Asked(seam.handover.exchange, seam, seam.handover.raw)
        self.fold = None
        exchange = self._asked if ways is not None else self._repeatable(dialect)
        if not exchange.stream:
            note = self._trail.chunk if self._trail is not None else None
            self.fold = Fold(repeated(exchange), note)
            self.fold.exact = dialect.whole_streams
            exchange = exchange if self.fold.exact else exchange.having(streamable(exchange.fields))
        tap = Tap(
            hide_usage=not self.ends_here or (exchange.stream and not exchange.wants_usage and self.writer is None),
            every_usage=exchange.wants_every_usage,
            cuts_usage=ways is None and "continuous_usage_stats" in dialect.counts,
            tally=Tally(exchange.choices, exchange.prompts, each=dialect.counts_each),
            choices=exchange.choices,
            content=ways.content if ways is not None else None,
            edit=self._edit(),
            writer=self._tap_writer(exchange),
        )
        return Asked(exchange, tap)

    @property
    def _asked(self) -> Exchange:
        return self.exchange if self.rounds is None else self.rounds.exchange

    def _edit(self) -> Callable[[dict[str, Any]], None] | None:
        """What is done to each chunk before anything is learned of it."""
        ways, fold = self.rounds, self.fold
        if ways is None:
            return fold.add if fold is not None else None
        if fold is None:
            return ways.edit

        def both(chunk: dict[str, Any]) -> None:
            ways.edit(chunk)
            fold.add(chunk)

        return both

    def _tap_writer(self, exchange: Exchange) -> Writer | None:
        writer = self.writer if exchange.stream else None
        return writer if self.rounds is None else self.rounds.writer(plain_writer(writer))

    def ask_whole(self, target: Target) -> Exchange:
        """Return what to ask of this target for a blocking answer."""
        return counting(self._asked) if self._counts_one(target) else self._asked

    def takes_whole(self, target: Target, answer: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        """Take the blocking answer of this target. Returns the answer for the client, and whether it was changed,
        because it was settled, because of its rounds or to report the usage of all choices. Raises EngineError if it is
        malformed, and EngineDisobeyed."""
        if self.exchange.endpoint.unit == "seconds":
            self.amount = heard(self.exchange, answer)
            return answer, False
        settled = self.exchange.endpoint.generates and settle_all(answer)
        if self.exchange.origin is not None and target.upstream.dialect.repeats:
            remove_beginning(answer, self._asked.fields["messages"])
        one, ways = self._counts_one(target), self.rounds
        if one:
            count(answer, self.exchange, self.exchange.prompts)
        if ways is not None:
            ways.count(answer)
        usage = self.usage = Usage.of(answer.get("usage"))
        self.tokens = written(echo.made_whole(answer, self.exchange), usage)
        if ways is not None:
            self.tokens = ways.wrote(self.tokens)
            answer = ways.take(answer)
        self.whole = answer
        choices = answer.get("choices")
        if isinstance(choices, list):
            self.finish_reason = reasons(it.get("finish_reason") for it in choices if isinstance(it, dict))
        return answer, settled or one or ways is not None

    def folded(self, fold: Fold) -> dict[str, Any]:
        """Return the sum of a stream whose caller waits for the whole."""
        return fold.answer(self.reader.usage if self.reader else None)

    def _counts_one(self, target: Target) -> bool:
        it = self.exchange
        return target.upstream.dialect.counts_each and it.choices > 1 and it.endpoint.generates

    def takes(self, target: Target, reader: Reader) -> bool:
        """Note that this target has begun to answer. Returns whether it continues what another one began."""
        search, self.search = self.search, None
        self._first, self.reader = search.first if search else target, reader
        resumed = search is not None and search.part.resumed
        self.resumes += resumed
        if self._trail is not None:
            self._trail.reader = reader
            first = self._first
            seed = {} if search else {"request_id": self.exchange.request_id}  # which a seed of ours is made of
            told = {"engine": first.upstream.name, "model": first.model, "resumes": self.resumes}
            self._trail.note({**told, **seed})
        return resumed

    @property
    def messages(self) -> list[dict[str, Any]]:
        """What its choices say, each as a message, as far as it is kept."""
        if self.reader is not None:
            content = self.reader.content
            return [content.part(number).message() for number in range(self.exchange.choices)]
        choices = self.whole.get("choices")
        choices = [it for it in choices if isinstance(it, dict)] if isinstance(choices, list) else []
        found = (it.get("message") or {"content": it.get("text")} for it in choices)
        return [it for it in found if isinstance(it, dict)]

    @property
    def counted(self) -> int:
        """The tokens that have come of it in events, as far as they can be seen."""
        if self.reader is None:
            return 0
        made = self.rounds.made.tokens if self.rounds is not None else 0
        return max(made, self.reader.content.tokens)

    def learn(self) -> None:
        """Update the tokens, the usage and the finish_reason from the stream so far. The tokens are those that engines
        made, whatever the rounds passed on of them."""
        if reader := self.reader:
            self.usage, self.finish_reason = reader.usage, reader.content.finish_reason
            content = reader.content
            told = reader.made if reader.made > content.tokens else 0  # by the engine; otherwise these are the events
            made = self.rounds.tokens if self.rounds is not None else 0
            self.tokens = max(told, seen(*echo.made(content, self.exchange)), made)

    def breaks(self, error: StackError, *, sent: bool) -> Search | None:
        """Note that an attempt ended with this error. Returns the search for an engine that continues the answer; None
        if there is nothing to continue, or no way to do it. `sent`: the client has a part of the answer."""
        first, reader = self._first, self.reader
        if not first or not reader or self.resumes >= self.route.resume.most:
            return self.search
        if self.search is not None and (self.search.part.resumed or error.status < 500):
            return self.search
        made = reader.content if self.rounds is None else self.rounds.made
        if not (sent or made.tokens) or not possible(self.exchange, reader.content, error) or not made.kept:
            return self.search
        if self.exchange.choices > 1:
            self._apart(first.upstream.dialect, reader)
        self._broke_off = error
        search = self._search(error, first, reader, follows=False)
        # Where the client has nothing, another try costs no more than an answer that has to be made anew.
        free = not sent and self.rounds is not None and self.rounds.demands
        self.search = None if search.hopeless or (free and search.way == "anew") else search
        return self.search

    def _apart(self, dialect: Dialect, reader: Reader) -> None:
        """Have the choices that are not whole made one by one."""
        if self.rounds is not None:
            self.rounds = self.rounds.rest(reader.head)
            while self.rounds.index in reader.content.finished and self.rounds.next(self.told):
                pass  # this choice is whole
        else:
            whole, content = self._repeatable(dialect), reader.content
            self.rounds = Rounds(whole, None, unfinished(whole, content), begun(content, reader.head))

    def _search(self, error: StackError, first: Target, reader: Reader, *, follows: bool) -> Search:
        """Return the search for an engine that goes on with the choice which is made now."""
        part = part_of(self._repeatable(first.upstream.dialect), reader, self.rounds, resumed=not follows)
        return Search(error, self.route, first, part)

    def _repeatable(self, dialect: Dialect) -> Exchange:
        return seeded(self.exchange) if dialect.seeds and self.route.resume.most else self.exchange

    def complete(self) -> tuple[bytes, bool]:
        """Return the ends of the choices that are next and of which nothing is left, and whether all is whole then."""
        out: list[bytes] = []
        while self.search is not None:
            search = self.search
            handover = self._handed_over(search, "message" if search.continues else search.way)
            if handover is None or (handover.left and handover.ends is None):
                return b"".join(out), False
            seam = self._sewn(search, search.first, handover)
            out.append(seam.close(handover.ends or "length"))
            self.takes(search.first, seam)
            if not self.next():
                return b"".join(out), True
        return b"".join(out), False

    def _handed_over(self, search: Search, way: Way) -> Handover | None:
        first = search.first.upstream.dialect
        try:
            return hand_over(search.part, first, first, way)
        except EngineRefused:
            return None

    def _sewn(self, search: Search, target: Target, handover: Handover) -> Seam:
        dialect, reader = target.upstream.dialect, self.reader
        if reader is None:
            raise EngineRefused("No engine has begun this answer.", status=400)
        add, writer = (self.fold.add, None) if self.fold else (None, self.writer)
        if self.fold and not self.fold.exact:
            handover = replace(handover, exchange=handover.exchange.having(streamable(handover.exchange.fields)))
        chats = self.exchange.endpoint.chats
        raw = dialect.raw if handover.raw is not None else None
        reads = raw.reads(chats=chats, closes=handover.closes) if raw is not None else None
        number = self.resumes + 1 if search.part.resumed else 0
        options: dict[str, Any] = {"add": add, "writer": writer, "rounds": self.rounds, "reads": reads}
        return Seam(reader, search.part, handover, number, **options)


def way(past: Past) -> Literal["on", "from nothing", "elsewhere"]:
    """Return how to complete an answer whose worker died. `on`: an engine continues it. `from nothing`: it is made
    again, because no client has a part of it. `elsewhere`: it is made again as a separate answer, because a client may
    have a part of the old one."""
    if Answer(past.asked, past.route, None, Trail(lambda _: None, past)).search is not None:
        return "on"
    return "from nothing" if past.empty else "elsewhere"
