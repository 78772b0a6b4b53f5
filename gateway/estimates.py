"""Estimates: what a request will take, before its engine says: learned from the answers before it, by this worker.

The prompt's tokens come from the size of its body, by a running ratio of the two; the answer's are a running mean, or
the request's own limit, where that is less. Both are kept for each kind of request and route. Until something was
learned, four bytes make a token, and an answer has 256.
"""

from dataclasses import dataclass

from gateway.exchange import Ending, Exchange, Kind

FADING = 1 / 32  # the weight of the newest answer; of the first ones it is more
MAX_ROUTES = 1024
MEDIA = 4096  # bytes that an image or the like counts as: its base64 says little of its tokens


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a request will take."""

    size: int  # bytes of text in its body
    prompt: int = 0  # tokens
    answer: int = 0
    seconds: float = 1.0

    @property
    def tokens(self) -> int:
        return self.prompt + self.answer


class _Means:
    __slots__ = ("answer", "count", "ratio", "seconds")

    def __init__(self) -> None:
        self.count = 0
        self.ratio = 0.25  # tokens of the prompt to a byte of the body
        self.answer = 256.0  # tokens of one answer
        self.seconds = 1.0


class Estimates:
    """What one worker has learned."""

    def __init__(self) -> None:
        self._means: dict[tuple[Kind, str], _Means] = {}

    def of(self, exchange: Exchange, route: str, size: int) -> Estimate:
        """Of a request to that route; `size` is its body's in bytes."""
        body = exchange.fields
        means = self._means.get((exchange.kind, route)) or _Means()
        size = max(1, size - _media(body.get("messages")))
        answer = means.answer if exchange.kind != "embedding" else 0.0
        for limit in (body.get("max_completion_tokens"), body.get("max_tokens")):
            if type(limit) is int and 0 < limit < answer:
                answer = limit
        return Estimate(size, round(size * means.ratio) or 1, round(answer * exchange.choices), means.seconds)

    def learn(self, ending: Ending, estimate: Estimate) -> None:
        """From a request that is over. Only a whole answer tells how long answers are."""
        if ending.usage is None or ending.error is not None:
            return
        it = ending.exchange
        means = self._means.get((it.kind, ending.route))
        if means is None:
            if len(self._means) >= MAX_ROUTES:
                return
            means = self._means[it.kind, ending.route] = _Means()
        means.count += 1
        weight = max(FADING, 1 / means.count)
        means.ratio += weight * (ending.usage.tokens_in / estimate.size - means.ratio)
        means.answer += weight * (ending.usage.tokens_out / max(1, it.choices) - means.answer)
        means.seconds += weight * (ending.ended - it.started - means.seconds)


def _media(messages: object) -> int:
    """How many bytes more than they count as the images, sounds and files in messages are."""
    more = 0
    for message in messages if type(messages) is list else ():
        content = message.get("content") if type(message) is dict else None
        for part in content if type(content) is list else ():
            if type(part) is dict and part.get("type") not in ("text", "input_text", "refusal"):
                more += max(0, _length(part) - MEDIA)
    return more


def _length(value: object) -> int:
    """Characters in the strings of a part of a message."""
    if type(value) is str:
        return len(value)
    return sum(map(_length, value.values())) if type(value) is dict else 0
