"""Limits and quotas of a key hold for the translated APIs, and are told as each API's clients read them."""

import datetime as dt
from collections.abc import Iterator

import anthropic
import httpx
import openai
import pytest

from tests.support.faces import APIS, MESSAGES_API, Api
from tests.support.processes import KEY, FakeEngine, GatewayProcess, running_gateway

BOTH = pytest.mark.parametrize("api", APIS.values(), ids=APIS)
LEFT = {"responses": "x-ratelimit-remaining-requests", "messages": "anthropic-ratelimit-requests-remaining"}


@pytest.fixture
def limited(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """Three requests a minute, and 1000 tokens."""
    limits = {"STACK_LIMIT_REQUESTS_PER_MINUTE": "3", "STACK_LIMIT_TOKENS_PER_MINUTE": "1000", "STACK_WORKERS": "1"}
    with running_gateway(tmp_path_factory.mktemp("limited") / "log", engine.url, **limits) as gateway:
        yield gateway


@BOTH
def test_requests_and_counts_share_the_limit_of_requests(limited: GatewayProcess, api: Api) -> None:
    with limited.client() as client:
        count = client.post(api.counts, json={it: value for it, value in api.body().items() if it != "max_tokens"})
        whole = client.post(api.path, json=api.body())
        client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}], "max_tokens": 9})
        refused = client.post(api.path, json=api.body())
    assert (count.status_code, whole.status_code, refused.status_code) == (200, 200, 429)
    assert (count.headers[LEFT[api.name]], whole.headers[LEFT[api.name]]) == ("2", "1")
    assert api.error(refused.json())[0] == "rate_limit_error"
    assert 0 < int(refused.headers["retry-after"]) <= 20
    assert refused.headers[LEFT[api.name]] == "0"
    assert count.headers["x-ratelimit-remaining-tokens"] == "1000"  # a count costs none


def test_anthropics_headers_tell_when_a_limit_is_whole_again(limited: GatewayProcess) -> None:
    now = dt.datetime.now(dt.UTC)
    with limited.client() as client:
        told = client.post("/v1/messages", json=MESSAGES_API.body()).headers
    assert told["anthropic-ratelimit-requests-limit"] == "3"
    reset = dt.datetime.fromisoformat(told["anthropic-ratelimit-requests-reset"])
    assert 0 < (reset - now).total_seconds() < 65
    assert told["anthropic-ratelimit-tokens-limit"] == "1000"


def test_the_packages_raise_their_rate_limit_errors(limited: GatewayProcess) -> None:
    with (
        anthropic.Anthropic(base_url=limited.url, api_key=KEY, max_retries=0) as first,
        openai.OpenAI(base_url=limited.url + "/v1", api_key=KEY, max_retries=0) as second,
    ):
        for _ in range(3):
            first.messages.create(model="fake-model", max_tokens=9, messages=[{"role": "user", "content": "x"}])
        with pytest.raises(anthropic.RateLimitError) as one:
            first.messages.create(model="fake-model", max_tokens=9, messages=[{"role": "user", "content": "x"}])
        with pytest.raises(openai.RateLimitError) as other:
            second.responses.create(model="fake-model", input="x", stream=True)
    first_wait, second_wait = (int(it.value.response.headers["retry-after"]) for it in (one, other))
    assert first_wait - 5 <= second_wait <= first_wait, "both are told when the same minute ends"


def test_a_key_with_a_usual_limit_of_tokens_serves_a_client_that_asks_for_the_longest_answers(
    engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Claude Code sends 32,000 or 128,000 with every request. What it does not use comes back."""
    log = tmp_path_factory.mktemp("usual") / "log"
    limits = {"STACK_LIMIT_TOKENS_PER_MINUTE": "10000", "STACK_WORKERS": "1"}
    with running_gateway(log, engine.url, **limits) as gateway, gateway.client() as client:
        answers = [client.post("/v1/messages", json=MESSAGES_API.body(max_tokens=most)) for most in (32_000, 128_000)]
        answers += [client.post("/v1/messages", json=MESSAGES_API.body(max_tokens=32_000)) for _ in range(3)]
    assert [it.status_code for it in answers] == [200] * 5


def test_a_spent_quota_is_told_so_that_clients_stop(
    engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory
) -> None:
    log = tmp_path_factory.mktemp("quota") / "log"
    with running_gateway(log, engine.url, STACK_LIMIT_TOKENS_PER_DAY="5") as gateway, gateway.client() as client:
        client.post("/v1/messages", json=MESSAGES_API.body())

        def refused(api: Api) -> httpx.Response:
            return client.post(api.path, json=api.body())

        answers = {name: refused(api) for name, api in APIS.items()}
    assert {it.status_code for it in answers.values()} == {429}
    assert {it.headers["x-should-retry"] for it in answers.values()} == {"false"}
    assert answers["messages"].json()["error"]["type"] == "billing_error"
    assert answers["responses"].json()["error"]["code"] == "insufficient_quota"
