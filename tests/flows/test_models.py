"""What /v1/models reports about each model to the clients of both APIs, as far as the engines report it."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from anthropic.types import ModelInfo

from tests.support.processes import AUTH, KEY, FakeEngine, GatewayProcess, fake_engine, running_gateway, wait_for

CONFIG = """
engines:
  one: {{dialect: llamacpp, slots: 4, base_url: "{one}"}}
  two: {{dialect: llamacpp, slots: 4, base_url: "{two}"}}
  other: {{dialect: vllm, base_url: "{other}"}}
models:
  pair:
    targets: [{{engine: one, model: m}}, {{engine: two, model: m}}]
    fallbacks: [{{engine: other, model: fake-model}}]
    aliases: [nickname]
  large: {{targets: [{{engine: other, model: fake-model}}]}}
  unknown: {{targets: [{{engine: other, model: not-there}}]}}
  trial: {{split: {{arms: [{{name: a, model: pair, weight: 1}}, {{name: b, model: large, weight: 1}}]}}}}
default_model: pair
"""


def listed(gateway: GatewayProcess) -> dict[str, dict[str, Any]]:
    with gateway.client() as client:
        return {it["id"]: it for it in client.get("/v1/models").json()["data"]}


@pytest.fixture(scope="module")
def at_first(before_all: GatewayProcess) -> dict[str, dict[str, Any]]:
    """The list when all models are loaded. The engines are asked again after some seconds."""
    return listed(before_all)


def test_each_engine_tells_what_it_can(before_all: GatewayProcess, at_first: dict[str, dict[str, Any]]) -> None:
    models = at_first
    for name, facts in {
        "ollama": (1000, 8192, ["chat", "thinking", "tools"], True),
        "vllm": (1000, None, None, True),
        "llamacpp": (1000, 8192, ["chat", "tools"], True),
    }.items():
        it = models[name]
        told = it.get("context_length"), it.get("max_context_length"), it.get("capabilities"), it.get("loaded")
        assert told == facts, name
        assert it["max_model_len"] == it["max_input_tokens"] == 1000
        with before_all.client() as client:
            assert client.get(f"/v1/models/{name}").json() == it
    assert models["dead-ollama-then-vllm"]["context_length"] == 1000  # nothing is known of the dead one


@pytest.fixture
def engines() -> Iterator[dict[str, FakeEngine]]:
    with (
        fake_engine(dialect="llamacpp") as one,
        fake_engine(dialect="llamacpp") as two,
        fake_engine(dialect="vllm") as other,
    ):
        yield {"one": one, "two": two, "other": other}


@pytest.fixture
def gateway(engines: dict[str, FakeEngine], tmp_path: Path) -> Iterator[GatewayProcess]:
    file = tmp_path / "stack.yaml"
    file.write_text(CONFIG.format(**{name: it.url for name, it in engines.items()}))
    with running_gateway(tmp_path / "log", engines["one"].url, STACK_CONFIG=str(file), STACK_WORKERS="1") as gateway:
        yield gateway


def test_replicas_and_splits_promise_only_what_all_of_them_hold(
    gateway: GatewayProcess, engines: dict[str, FakeEngine]
) -> None:
    engines["one"].set(context=700, vision=True)
    engines["other"].set(context=500)
    models = listed(gateway)
    assert (models["pair"]["context_length"], models["pair"]["capabilities"]) == (700, ["chat", "tools"])
    assert models["nickname"] == models["pair"] | {"id": "nickname", "display_name": "nickname", "parent": "pair"}
    assert models["large"]["context_length"] == models["trial"]["context_length"] == 500
    assert "context_length" not in models["unknown"]


def test_a_silent_engine_does_not_delay_the_list(gateway: GatewayProcess, engines: dict[str, FakeEngine]) -> None:
    engines["one"].set(slow=4)
    for limit in (1.5, 0.4, 0.4):  # it is waited for once, half a second
        since = time.monotonic()
        models = listed(gateway)
        assert time.monotonic() - since < limit
    assert models["large"]["context_length"] == 1000
    assert models["pair"]["context_length"] == 1000  # told by its other replica
    engines["one"].process.kill()
    engines["two"].process.kill()
    assert set(listed(gateway)) == {"pair", "nickname", "large", "unknown", "trial"}


def test_the_engines_are_asked_once_in_some_seconds(gateway: GatewayProcess, engines: dict[str, FakeEngine]) -> None:
    engines["other"].set(context=1000)  # forgets what it was asked
    for _ in range(20):
        listed(gateway)
    assert len(engines["other"].asked("/v1/models")) <= 2


def test_a_model_that_is_no_longer_loaded_keeps_its_context(
    before_all: GatewayProcess, fakes: dict[str, FakeEngine], at_first: dict[str, dict[str, Any]]
) -> None:
    """It comes after tests of other gateways, so that most of the seconds until the engine is asked again are over."""
    assert at_first["ollama"]["loaded"] is True
    fakes["ollama"].set(loaded=False)
    try:
        wait_for(lambda: listed(before_all)["ollama"]["loaded"] is False)
        assert listed(before_all)["ollama"]["context_length"] == 1000  # as it was when it was loaded
    finally:
        fakes["ollama"].set(loaded=True)


def test_one_object_satisfies_both_official_clients(before_all: GatewayProcess) -> None:
    with openai.OpenAI(base_url=before_all.url + "/v1", api_key=KEY) as client:
        ours = {it.id: it for it in client.models.list()}
    with anthropic.Anthropic(base_url=before_all.url, auth_token=KEY) as client:
        theirs = {it.id: it for it in client.models.list(limit=3)}  # in pages
        one = client.models.retrieve("ollama")
        with pytest.raises(anthropic.BadRequestError):
            client.models.list(limit=3, after_id="nobody")
    assert list(ours) == list(theirs)
    assert ours["ollama"].model_dump()["capabilities"] == ["chat", "thinking", "tools"]
    for it in (one, *theirs.values()):
        ModelInfo.model_validate(it.model_dump(exclude_unset=True))
    assert (one.type, one.display_name, one.max_input_tokens) == ("model", "ollama", 1000)
    assert one.created_at.timestamp() == ours["ollama"].created


def test_the_list_tells_where_it_ends(before_all: GatewayProcess) -> None:
    answer = httpx.get(before_all.url + "/v1/models", headers=AUTH).json()
    ids = [it["id"] for it in answer["data"]]
    assert (answer["object"], answer["first_id"], answer["last_id"]) == ("list", ids[0], ids[-1])
    assert answer["has_more"] is False
