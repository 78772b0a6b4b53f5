"""Estimates: predict the tokens of a request before the engine reports them, and count them if the engine never does.

A prompt's tokens follow from its text, and not from the bytes of the body: white space between JSON's tokens, and
fields that no chat template renders, are not part of a prompt. The ratio of tokens to bytes is a running mean of
earlier answers. The tokens of an answer are the request's own limit, if that is no more than people ask for in
earnest, or a running mean.

Both means are kept for each key by itself, so that no caller's traffic changes another's estimate. Both have a minimum,
so that no caller can teach a price of zero. At first a token has four bytes, and an answer has 256 tokens.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson

from gateway.endpoints import ENDPOINTS, Kind
from gateway.errors import BadRequest
from gateway.exchange import Ending, Exchange, Usage
from gateway.limits.lengths import limit

FADING = 1 / 32  # the least weight of the newest answer; the first answers weigh more
MAX_LEARNED = 8192  # keys, with their kinds of request and routes, whose means are kept: about 4 MB
MAX_ROUTES = 1024
ANSWER = 256  # the least number of tokens that are reserved for an answer without a limit
# Tokens beyond which a request's limit is no sign of the answer's length. So many are set aside then, or the key's mean
# if it is more. Claude Code sends 32,000 with each request, to any model.
TELLING = 8192
LONGEST = 131_072  # the most tokens that are reserved for one answer; after the death of a worker they stay charged
LEAST, MOST = 1 / 8, 1.0  # the bounds of tokens per byte of text; a prompt of words is between them
MEDIA, MEDIA_SHARE = 4096, 128  # bytes that an image, sound or file counts as, plus one for each MEDIA_SHARE of its own
TYPICAL, RUN = 4, 8  # characters per token; a text of more than RUN characters has more than one token
ASSUMED = 100.0  # tokens per second of an engine that is silent in a stream, if no answer has shown its speed
ENOUGH = 16  # tokens of an answer that show how fast its engine is

# The fields that templates write into a prompt. `tools` and schemas are written as JSON.
_RENDERED = frozenset(name for it in ENDPOINTS.values() for name in (it.content, *it.rendered))
_LISTS = frozenset(it.content for it in ENDPOINTS.values() if not it.chats)  # may hold tokens
_MEDIA = ("image_url", "video_url", "audio_url", "file_url", "input_audio", "file")

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Estimate:
    """The tokens that a request is expected to take, which are reserved for it."""

    size: int  # bytes of text in its prompt
    prompt: int = 0  # tokens
    answer: int = 0  # tokens of all its choices
    exact: int = 0  # tokens of the prompt that came as tokens
    most: int | None = None  # tokens that all choices may have by the request's own limit; None: it has none

    @property
    def tokens(self) -> int:
        return self.prompt + self.answer


NOTHING = Estimate(0)


class _Means:
    __slots__ = ("answer", "count", "ratio")

    def __init__(self) -> None:
        self.count = 0
        self.ratio = 0.25  # tokens of the prompt per byte of its text
        self.answer = float(ANSWER)  # tokens of one answer


class Estimates:
    """Learn and hold the means of one worker."""

    def __init__(self) -> None:
        self._means: OrderedDict[tuple[str, Kind, str], _Means] = OrderedDict()
        self._seconds: OrderedDict[str, float] = OrderedDict()  # the mean duration of a key's requests
        self._speeds: dict[str, float] = {}  # the highest speed of an answer by route, in tokens per second

    def of(self, exchange: Exchange, route: str) -> Estimate:
        """Estimate a request to that route. Raises BadRequest if it is nested too deeply."""
        body = exchange.fields
        if not exchange.endpoint.metered:
            return NOTHING
        means = self._means.get((exchange.key_id, exchange.kind, route)) or _Means()
        size, exact = _prompt(exchange)
        prompt = exact + round(size * means.ratio) or 1
        if not exchange.endpoint.generates:
            return Estimate(size, prompt, exact=exact)
        most = limit(body)
        mean = max(ANSWER, round(means.answer), _least(body))
        expected = mean if most is None else min(most, max(TELLING, mean))
        answer = min(expected, LONGEST) * exchange.choices
        return Estimate(size, prompt, answer, exact, None if most is None else min(most, LONGEST) * exchange.choices)

    def seconds(self, key_id: str) -> float:
        """Return how many seconds a key's requests take, as far as that is known."""
        return self._seconds.get(key_id, 1.0)

    def learn(self, ending: Ending, estimate: Estimate) -> None:
        """Learn from a request that has ended. Only a complete answer that no limit cut shows how long answers are.

        A speed holds for all keys. It is therefore learned by the engine's own count, because a text may repeat words
        of the prompt, and only of an answer that was not resumed, because its first part may be of another worker."""
        it, usage = ending.exchange, ending.usage
        if usage is None or ending.error is not None:
            return
        means = self._of(it.key_id, it.kind, ending.route)
        means.count += 1
        weight = max(FADING, 1 / means.count)
        if usage.tokens_in and estimate.size:
            ratio = (usage.tokens_in - estimate.exact) / estimate.size
            means.ratio += weight * (min(max(ratio, LEAST), MOST) - means.ratio)
        seconds = ending.ended - it.started
        _keep(self._seconds, it.key_id, self.seconds(it.key_id) + weight * (seconds - self.seconds(it.key_id)))
        if not it.endpoint.generates:
            return
        made = ending.tokens_out / max(1, it.choices)
        if ending.finish_reason != "length":
            means.answer += weight * (made - means.answer)
        reported, working = usage.tokens_out / max(1, it.choices), seconds - ending.queued_ms / 1000
        if reported < ENOUGH or working <= 0 or ending.resumes:
            return
        if ending.route in self._speeds or len(self._speeds) < MAX_ROUTES:
            self._speeds[ending.route] = max(self._speeds.get(ending.route, 0.0), reported / working)

    def unseen(
        self, exchange: Exchange, estimate: Estimate, route: str, seconds: float, *, streamed: bool = False
    ) -> int:
        """Return how many tokens an engine can have made in that many seconds of an answer that the gateway did not
        see.

        If no answer of this route has shown the engine's speed, the result is the request's own limit, or else the
        reserved tokens. Of a `streamed` answer most was seen, so the speed is then taken to be ASSUMED. If the speed is
        known, the result is the number of tokens at twice that speed, and at most the request's own limit, or else
        LONGEST for each choice."""
        speed, most = self._speeds.get(route, ASSUMED if streamed else None), estimate.most
        if speed is None or not exchange.endpoint.generates:
            return estimate.answer if most is None else most
        made = round(2 * speed * seconds) * exchange.choices
        return min(made, LONGEST * exchange.choices if most is None else most)

    def _of(self, *name: *tuple[str, Kind, str]) -> _Means:
        means = self._means.get(name) or _Means()
        _keep(self._means, name, means)
        return means


def _keep(learned: OrderedDict[K, V], name: K, value: V) -> None:
    """Keep a learned mean, and forget the one that was used longest ago."""
    learned[name] = value
    learned.move_to_end(name)
    if len(learned) > MAX_LEARNED:
        learned.popitem(last=False)


def seen(events: int, characters: int) -> int:
    """Return the number of tokens in the part of an answer that was seen: one for each event with content, or more if
    their texts are too long for that."""
    return events if characters <= RUN * events else characters // TYPICAL


def written(answer: dict[str, Any], usage: Usage | None) -> int:
    """Return the least number of tokens that a complete answer can have by its text, because no token spans two words.
    Without the engine's own count, return about as many as the answer has."""
    texts: list[str] = []
    choices = answer.get("choices")
    for choice in choices if type(choices) is list else ():
        if type(choice) is dict:
            _collect(choice.get("text"), texts)
            _collect(choice.get("message"), texts)
    words = sum(len(text.split()) for text in texts)
    if usage is not None:
        return words
    return max(words, sum(len(text.encode(errors="replace")) for text in texts) // TYPICAL)


def _collect(value: object, texts: list[str]) -> None:
    """Add the strings of a message to `texts`, including those in tool calls."""
    if type(value) is str:
        texts.append(value)
    elif type(value) is dict:
        for name, inner in value.items():
            if name not in ("role", "id", "type"):
                _collect(inner, texts)
    elif type(value) is list:
        for inner in value:
            _collect(inner, texts)


def _prompt(exchange: Exchange) -> tuple[int, int]:
    """Return the bytes of text in a prompt, and the number of its tokens that were sent as tokens."""
    body, repeated = exchange.fields, exchange.endpoint.repeated
    size = exact = 0
    for name in _RENDERED & body.keys():
        value = body[name]
        if value is None:
            continue
        if type(value) is list and name in _LISTS:
            found = [_tokens(it) for it in value]
            exact += sum(found)
            value = [it for it, tokens in zip(value, found, strict=True) if not tokens]
        try:
            length = len(value.encode()) if type(value) is str else len(orjson.dumps(value))
        except TypeError:
            raise BadRequest("The body is nested too deeply.") from None
        size += length * exchange.inputs if name in repeated else length
    return size - _media(body.get("messages")), exact


def _tokens(value: object) -> int:
    """Return the number of tokens in an entry of a prompt's list: 1 for a number, the length of a list of numbers,
    otherwise 0."""
    if type(value) is int:
        return 1
    return len(value) if type(value) is list and all(type(it) is int for it in value) else 0


def _least(body: dict[str, Any]) -> int:
    """Return the least number of tokens that the request demands of its answer (vLLM's min_tokens)."""
    value = body.get("min_tokens")
    return value if type(value) is int else 0


def _media(messages: object) -> int:
    """Return by how many bytes the images, sounds and files in messages are larger than they count."""
    more = 0
    for message in messages if type(messages) is list else ():
        content = message.get("content") if type(message) is dict else None
        for part in content if type(content) is list else ():
            if type(part) is dict:
                for name in _MEDIA:
                    length = _length(part.get(name))
                    more += max(0, length - MEDIA - length // MEDIA_SHARE)
    return more


def _length(value: object) -> int:
    """Return the characters in a part of a message that holds media."""
    if type(value) is str:
        return len(value)
    return sum(map(_length, value.values())) if type(value) is dict else 0
