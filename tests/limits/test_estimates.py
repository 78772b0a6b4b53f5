"""Estimates of a request's tokens: assumed at first, then learned from the engine's reports."""

import time
from dataclasses import replace
from typing import Any

import pytest

from gateway.endpoints import ENDPOINTS, Endpoint, Kind
from gateway.exchange import Ending, Exchange, Usage
from gateway.limits.estimates import LONGEST, MEDIA, TELLING, Estimates, seen, written


def exchange(kind: Kind = "chat", choices: int = 1, key: str = "k", **fields: Any) -> Exchange:
    return Exchange(
        request_id="r",
        kind=kind,
        key_id=key,
        stream=False,
        wants_usage=False,
        size=1,
        choices=choices,
        fields=fields,
        prompt=None,
        resume=True,
        started=time.monotonic(),
    )


def said(size: int) -> list[dict[str, str]]:
    """Messages with so many bytes of text in all."""
    return [{"role": "user", "content": "x" * (size - 30)}]


def learn(
    estimates: Estimates, it: Exchange, tokens_in: int, tokens_out: int, reason: str = "stop", **more: Any
) -> None:
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
        finish_reason=reason,
        resumes=0,
        ended=it.started + 2,
    )
    estimates.learn(replace(ending, **more), estimates.of(it, "model"))


def test_estimates_come_near_to_what_was_seen() -> None:
    estimates = Estimates()
    first = estimates.of(exchange(messages=said(4000)), "model")
    assert (first.size, first.prompt, first.answer) == (4000, 1000, 256)
    for _ in range(50):
        learn(estimates, exchange(messages=said(4000)), 800, 1000)
    learned = estimates.of(exchange(messages=said(8000)), "model")
    assert (learned.prompt, learned.answer, round(estimates.seconds("k"))) == (1600, 1000, 2)
    for _ in range(200):
        learn(estimates, exchange(messages=said(4000), choices=2), 1200, 800)
    assert 2380 <= estimates.of(exchange(messages=said(8000)), "model").prompt <= 2400
    assert 800 <= estimates.of(exchange(messages=said(8000), choices=2), "model").answer <= 820
    other = estimates.of(exchange(messages=said(4000)), "another")
    assert (other.prompt, other.answer) == (1000, 256)


@pytest.mark.parametrize("endpoint", [it for it in ENDPOINTS.values() if it.metered], ids=lambda it: it.kind)
def test_each_field_that_a_row_names_counts(endpoint: Endpoint) -> None:
    estimates = Estimates()
    for name in (endpoint.content, *endpoint.rendered):
        assert estimates.of(exchange(endpoint.kind, **{name: "x" * 4000}), "model").prompt == 1000, name


def test_a_query_counts_with_each_document() -> None:
    it = exchange("rerank", query="x" * 400, documents=["a"] * 100)
    assert Estimates().of(replace(it, size=100), "model").size == 400 * 100 + len('"a",' * 100) + 1


def test_one_key_teaches_nothing_about_another() -> None:
    estimates = Estimates()
    for _ in range(100):
        learn(estimates, exchange(messages=said(50_000)), 50_000, 4000)
    other = estimates.of(exchange(messages=said(4000), key="other"), "model")
    assert (other.prompt, other.answer, estimates.seconds("other")) == (1000, 256, 1.0)


def test_no_traffic_teaches_a_price_of_nothing() -> None:
    estimates = Estimates()
    for _ in range(300):
        learn(estimates, exchange(messages=said(50_000)), 1, 1)
    found = estimates.of(exchange(messages=said(8000)), "model")
    assert (found.prompt, found.answer) == (1000, 256), "an eighth of a token for each byte; an answer as at first"


def test_an_answer_that_its_limit_cut_off_teaches_no_length() -> None:
    estimates = Estimates()
    for _ in range(100):
        learn(estimates, exchange(messages=said(100), max_tokens=2000), 25, 2000, "length")
    assert estimates.of(exchange(messages=said(100)), "model").answer == 256


def test_a_limit_that_every_request_of_a_client_has_does_not_reserve_a_whole_minute() -> None:
    """Claude Code sends 32,000 or 128,000 to any model, and its answers have some hundred tokens."""
    estimates = Estimates()
    for most in (32_000, 128_000, 2**31 - 1):
        assert estimates.of(exchange(max_tokens=most), "model").answer == TELLING
    assert estimates.of(exchange(max_tokens=32_000, choices=2), "model").answer == 2 * TELLING
    for _ in range(100):
        learn(estimates, exchange(messages=said(100), max_tokens=32_000), 25, 20_000)
    assert 19_000 < estimates.of(exchange(max_tokens=32_000), "model").answer <= 20_000
    for _ in range(100):
        learn(estimates, exchange(messages=said(100)), 25, 200_000)
    assert estimates.of(exchange(max_tokens=2**31 - 1), "model").answer == LONGEST


def test_a_blocking_answer_that_nobody_saw_may_cost_the_whole_limit() -> None:
    estimates = Estimates()
    it = exchange(messages=said(100), max_tokens=32_000)
    assert estimates.unseen(it, estimates.of(it, "model"), "model", 0.1) == 32_000


def test_what_is_set_aside_is_the_requests_own_limit_for_each_choice() -> None:
    estimates = Estimates()
    assert estimates.of(exchange(max_tokens=10), "model").answer == 10
    assert estimates.of(exchange(max_tokens=4000), "model").answer == 4000
    assert estimates.of(exchange(max_completion_tokens=7, choices=3), "model").answer == 21
    assert estimates.of(exchange(min_tokens=3000), "model").answer == 3000
    assert estimates.of(exchange("embedding", input="one", max_tokens=10), "model").answer == 0


@pytest.mark.parametrize(
    ("fields", "least", "most"),
    [
        ({"prompt": list(range(5000))}, 5000, 5010),
        ({"prompt": [[1, 2, 3], [4, 5]]}, 5, 8),
        ({"input": ["x" * 4000] * 3}, 3000, 3010),
        ({"prompt": [1, 2, "x" * 4000]}, 1000, 1010),
        ({"prompt": "", "suffix": "x" * 4000}, 1000, 1010),
        ({"messages": said(100), "tools": [{"type": "function", "function": {"name": "x" * 4000}}]}, 1000, 1100),
        ({"messages": said(100), "tools": [{"x" * 4000: 1}]}, 1000, 1100),
        (
            {"messages": said(100), "response_format": {"type": "json_schema", "json_schema": {"a": "x" * 4000}}},
            1000,
            1100,
        ),
        ({"messages": said(100), "documents": [{"text": "x" * 4000}]}, 1000, 1100),
        ({"messages": [{"role": "user", "content": "\u3042" * 4000}]}, 3000, 3100),
        ({"messages": [{"role": "user", "content": [{"text": "x" * 400_000}]}]}, 100_000, 100_100),
        ({"messages": said(100), "metadata": {"a": "x" * 400_000}, "user": "x" * 400_000}, 25, 25),
    ],
)
def test_all_that_templates_render_counts_and_nothing_else(fields: dict[str, Any], least: int, most: int) -> None:
    kind: Kind = "chat" if "messages" in fields else "completion"
    assert least <= Estimates().of(exchange(kind, **fields), "model").prompt <= most


def test_an_image_counts_as_some_text_and_not_as_its_base64() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 1_000_000}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "x" * 400}, image]}, {"role": "user"}]
    found = Estimates().of(exchange(messages=messages), "model")
    assert 400 + MEDIA < found.size < 1000 + 3 * MEDIA


def test_what_nobody_saw_costs_what_was_set_aside_or_what_the_engine_can_have_made() -> None:
    estimates = Estimates()
    limited, free = exchange(messages=said(100), max_tokens=4000, choices=2), exchange(messages=said(100))
    assert estimates.unseen(limited, estimates.of(limited, "model"), "model", 0.1) == 8000
    assert estimates.unseen(free, estimates.of(free, "model"), "model", 0.1) == 256
    learn(estimates, exchange(messages=said(100)), 25, 200)  # in two seconds
    assert estimates.unseen(limited, estimates.of(limited, "model"), "model", 3.0) == 1200
    assert estimates.unseen(limited, estimates.of(limited, "model"), "model", 3000.0) == 8000
    assert estimates.unseen(free, estimates.of(free, "model"), "model", 30.0) == 6000
    assert estimates.unseen(limited, estimates.of(limited, "model"), "another", 3.0, streamed=True) == 1200
    texts = exchange("embedding", input="one")
    assert estimates.unseen(texts, estimates.of(texts, "model"), "model", 30.0) == 0


@pytest.mark.parametrize("more", [{"counted": 20_000}, {"usage": Usage(25, 20_000), "resumes": 1}])
def test_neither_counted_words_nor_a_resumed_answer_teach_how_fast_an_engine_is(more: dict[str, Any]) -> None:
    """An answer with `echo` has all words of its prompt. The first part of a resumed one may be of another worker."""
    estimates = Estimates()
    learn(estimates, exchange("completion", prompt="a " * 20_000, echo=True, max_tokens=1), 25, 1, "length", **more)
    free = exchange(messages=said(100), key="another")
    assert estimates.unseen(free, estimates.of(free, "model"), "model", 30.0) == 256


def test_what_nobody_saw_of_an_answer_without_a_limit_is_no_more_than_the_longest_answer() -> None:
    estimates = Estimates()
    learn(estimates, exchange(messages=said(100)), 25, 80_000)
    free = exchange(messages=said(100), choices=2)
    assert estimates.unseen(free, estimates.of(free, "model"), "model", 30.0) == 2 * LONGEST


def test_an_event_with_a_long_text_is_more_than_a_token() -> None:
    assert seen(10, 45) == 10
    assert seen(1, 4000) == 1000
    assert seen(0, 0) == 0


def test_a_whole_answer_has_a_token_for_each_word_at_least() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": "it"}'}}
    message = {"role": "assistant", "content": "one two three", "tool_calls": [call], "reasoning": "well then"}
    answer = {"choices": [{"message": message}, {"text": "four five"}, None, {"message": 3}]}
    assert written(answer, Usage(1, 1)) == 3 + 1 + 2 + 2 + 2
    assert written({"choices": [{"text": "x" * 400}]}, None) == 100
    assert written({"choices": "no list"}, None) == written({}, Usage(1, 1)) == 0
