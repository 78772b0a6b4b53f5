"""What a request is estimated to take: guessed at first, learned from what its engine said."""

import time
from typing import Any

from gateway.estimates import MEDIA, Estimates
from gateway.exchange import Ending, Exchange, Kind, Usage


def exchange(kind: Kind = "chat", choices: int = 1, **fields: Any) -> Exchange:
    return Exchange(
        request_id="r",
        kind=kind,
        key_id="k",
        stream=False,
        wants_usage=False,
        size=1,
        choices=choices,
        fields=fields,
        prompt=None,
        resume=True,
        started=time.monotonic(),
    )


def learn(estimates: Estimates, size: int, tokens_in: int, tokens_out: int, choices: int = 1) -> None:
    it = exchange(choices=choices)
    ending = Ending(
        exchange=it,
        route="model",
        arm=None,
        engine="engine",
        attempts=1,
        error=None,
        begun=True,
        usage=Usage(tokens_in, tokens_out),
        estimated=0,
        counted=0,
        first_token_at=None,
        finish_reason="stop",
        resumes=0,
        ended=it.started + 2,
    )
    estimates.learn(ending, estimates.of(it, "model", size))


def test_estimates_come_near_to_what_was_seen() -> None:
    estimates = Estimates()
    first = estimates.of(exchange(), "model", 4000)
    assert (first.prompt, first.answer) == (1000, 256)
    for _ in range(50):
        learn(estimates, 4000, 800, 100)
    learned = estimates.of(exchange(), "model", 8000)
    assert (learned.prompt, learned.answer, round(learned.seconds)) == (1600, 100, 2)
    for _ in range(200):
        learn(estimates, 4000, 1200, 40, choices=2)
    assert 2380 <= estimates.of(exchange(), "model", 8000).prompt <= 2400
    assert 40 <= estimates.of(exchange(choices=2), "model", 8000).answer <= 44
    other = estimates.of(exchange(), "another", 4000)
    assert (other.prompt, other.answer) == (1000, 256)


def test_a_limit_of_the_requests_own_counts_where_it_is_less() -> None:
    estimates = Estimates()
    assert estimates.of(exchange(max_tokens=10), "model", 40).answer == 10
    assert estimates.of(exchange(max_completion_tokens=7, max_tokens=10, choices=3), "model", 40).answer == 21
    assert estimates.of(exchange(max_tokens=1_000_000), "model", 40).answer == 256
    for odd in ("ten", -1, 0, True, None, 1.5):
        assert estimates.of(exchange(max_tokens=odd), "model", 40).answer == 256
    assert estimates.of(exchange("embedding"), "model", 40).answer == 0


def test_an_image_is_no_text() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 1_000_000}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "x" * 400}, image]}, {"role": "user"}]
    found = Estimates().of(exchange(messages=messages), "model", 1_000_600)
    assert 400 < found.size < 1000 + MEDIA
