"""What the translated APIs make of the three engines: counts, efforts that a model does not take, limits that are too
long, and what real clients sent."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import orjson
import pytest

from gateway.translation.messages.conversation import BILLING
from tests.support.faces import APIS, MESSAGES_API, RESPONSES, Api, events
from tests.support.fakes.dialects import ENGINES
from tests.support.message_recordings import HERE
from tests.support.message_recordings import REQUESTS as MESSAGES_SENT
from tests.support.processes import FakeEngine, GatewayProcess, post

CHAT = "/v1/chat/completions"
BOTH = pytest.mark.parametrize("api", APIS.values(), ids=APIS)
RESPONSES_SENT = {
    f"{it['client']}: {it['what']}": it["body"]
    for it in map(orjson.loads, (HERE / "responses-requests.jsonl").read_bytes().splitlines())
}
# What the gateway keeps is somebody else's.
NEEDS_STATE = "openai-node-7.59.0: 28-responses-previous-response-id-of-nothing"


@pytest.fixture(scope="module")
def http(before_all: GatewayProcess) -> Iterator[httpx.Client]:
    with before_all.client() as client:
        yield client


def asked(fake: FakeEngine) -> list[dict[str, Any]]:
    return [it["body"] for it in fake.asked(CHAT)]


# -- counts -----------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("engine", ["vllm", "llamacpp"])
def test_an_engine_counts_the_tokens(http: httpx.Client, fakes: dict[str, FakeEngine], api: Api, engine: str) -> None:
    fakes[engine].set(counts=True, context=1000)
    answer = http.post(api.counts, json=api.body("one two three four", model=engine))
    assert answer.headers["x-stack-counted-by"] == "engine"
    assert answer.json()["input_tokens"] == 5  # the message itself is one to the fake
    assert asked(fakes[engine]) == []


@BOTH
@pytest.mark.parametrize("engine", ["vllm", "llamacpp"])
def test_a_count_that_the_engine_does_not_give_is_an_estimate(
    http: httpx.Client, fakes: dict[str, FakeEngine], api: Api, engine: str
) -> None:
    fakes[engine].set(counts=False)
    answer = http.post(api.counts, json=api.body("x" * 400, model=engine))
    assert (answer.status_code, answer.headers["x-stack-counted-by"]) == (200, "estimate")
    fakes[engine].set(counts=True)


@BOTH
def test_ollama_does_not_work_through_a_prompt_to_count_it(
    http: httpx.Client, fakes: dict[str, FakeEngine], api: Api
) -> None:
    fakes["ollama"].set()
    answer = http.post(api.counts, json=api.body("x" * 400, model="ollama"))
    assert (answer.status_code, answer.headers["x-stack-counted-by"]) == (200, "estimate")
    assert fakes["ollama"].asked("/api/chat") == []


def test_a_prompt_that_is_far_too_long_is_not_handed_to_the_engine_to_be_counted(
    http: httpx.Client, fakes: dict[str, FakeEngine]
) -> None:
    fakes["vllm"].set(context=100)
    answer = http.post(MESSAGES_API.counts, json=MESSAGES_API.body("x" * 400_000, model="vllm"))
    assert answer.headers["x-stack-counted-by"] == "estimate"
    assert fakes["vllm"].asked("/tokenize") == []
    fakes["vllm"].set(context=1000)


@BOTH
def test_a_large_body_is_read_beside_the_event_loop_and_answered(
    http: httpx.Client, fakes: dict[str, FakeEngine], api: Api
) -> None:
    fakes["llamacpp"].set(context=10_000_000)
    words = "word " * 300_000
    answer = http.post(api.path, json=api.body(words, model="llamacpp"))
    assert answer.status_code == 200
    assert words in str(asked(fakes["llamacpp"])[-1]["messages"])
    fakes["llamacpp"].set(context=1000)


# -- wishes -----------------------------------------------------------------------------------------------------------

EFFORT: dict[str, dict[str, Any]] = {
    "responses": {"reasoning": {"effort": "high"}},
    "messages": {"output_config": {"effort": "high"}},
}
NAMED = {"responses": "reasoning.effort", "messages": "output_config.effort"}


@BOTH
def test_a_model_that_does_not_think_is_asked_without_an_effort(
    http: httpx.Client, fakes: dict[str, FakeEngine], api: Api
) -> None:
    """Claude Code sends one to every model. Once the engine has refused it, it is left out beforehand."""
    model = {"responses": "small", "messages": "own-system"}[api.name]  # each learns by itself
    fakes["ollama"].set(thinks=False)
    answers = [http.post(api.path, json=api.body(model=model, **EFFORT[api.name])) for _ in range(2)]
    efforts = ["reasoning_effort" in it for it in asked(fakes["ollama"])]
    fakes["ollama"].set(thinks=True)
    assert [it.status_code for it in answers] == [200, 200]
    assert [it.headers["x-stack-ignored-params"] for it in answers] == [NAMED[api.name]] * 2
    assert efforts == [True, False, False]


def test_an_effort_that_an_engine_does_not_know_is_left_out_and_others_are_not(
    http: httpx.Client, fakes: dict[str, FakeEngine]
) -> None:
    fakes["ollama"].set(thinks=True, efforts=["low", "medium", "high", "none"])  # as those before 0.32 had it
    for effort in ("xhigh", "low"):
        answer = http.post("/v1/messages", json=MESSAGES_API.body(model="ollama", output_config={"effort": effort}))
        assert answer.status_code == 200
    assert [it.get("reasoning_effort") for it in asked(fakes["ollama"])] == ["xhigh", None, "low"]


@BOTH
def test_strict_mode_leaves_no_effort_out(http: httpx.Client, fakes: dict[str, FakeEngine], api: Api) -> None:
    fakes["ollama"].set(thinks=False)
    body = api.body(model="unloaded", **EFFORT[api.name])
    answer = http.post(api.path, json=body, headers={"x-stack-strict": "true"})
    fakes["ollama"].set(thinks=True)
    assert answer.status_code == 400
    assert NAMED[api.name] in answer.text


def test_a_chat_completions_effort_is_its_callers_own_matter(http: httpx.Client, fakes: dict[str, FakeEngine]) -> None:
    fakes["ollama"].set(thinks=False)
    body = {"model": "small", "messages": [{"role": "user", "content": "x"}], "reasoning_effort": "medium"}
    answer = http.post(CHAT, json=body)
    fakes["ollama"].set(thinks=True)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "reasoning_effort")


LONG: dict[str, list[int | None]] = {"vllm": [None], "ollama": [1000], "llamacpp": [128_000]}


@BOTH
@pytest.mark.parametrize("engine", ENGINES)
def test_a_limit_beyond_the_context_is_no_reason_for_a_refusal(
    http: httpx.Client, fakes: dict[str, FakeEngine], api: Api, engine: str
) -> None:
    fakes[engine].set(context=1000)
    answer = http.post(api.path, json=api.body(model=engine, **{api.limit: 128_000}))
    assert answer.status_code == 200, answer.text
    told = [it.get("max_tokens", it.get("max_completion_tokens")) for it in asked(fakes[engine])]
    assert told == LONG[engine]


def test_a_limit_that_does_not_fit_behind_the_prompt_is_left_out_when_the_engine_says_so(
    http: httpx.Client, fakes: dict[str, FakeEngine]
) -> None:
    fakes["vllm"].set(context=1000, clips=False)  # as before 0.31
    answer = http.post("/v1/messages", json=MESSAGES_API.body("word " * 500, model="vllm", max_tokens=900))
    assert answer.status_code == 200
    assert [it.get("max_tokens") for it in asked(fakes["vllm"])] == [900, None]


@BOTH
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_is_refused_in_words_that_clients_know(
    http: httpx.Client, fakes: dict[str, FakeEngine], api: Api, engine: str, stream: bool
) -> None:
    fakes[engine].set(context=1000, counts=True)
    answer = http.post(api.path, json=api.body("word " * 1200, model=engine, stream=stream))
    assert answer.status_code == 400
    if api is MESSAGES_API:
        assert answer.json()["error"]["message"].startswith("prompt is too long: 1201 tokens > 1000")
    else:
        assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == ("context_length_exceeded", "input")


# -- what real clients sent -------------------------------------------------------------------------------------------


def replay(http: httpx.Client, fake: FakeEngine, path: str, body: dict[str, Any], engine: str) -> dict[str, Any]:
    """What the engine got of a recorded request, which must be answered whole. The engine answers with text: it
    fails if it had to call a tool."""
    fake.set(context=200_000, thinks=True)
    choice = body.get("tool_choice") or "auto"
    if (choice["type"] if isinstance(choice, dict) else choice) not in ("auto", "none"):
        answer = http.post(path, json=body | {"model": engine, "stream": False})
        status = 400 if path == "/v1/responses" else 502  # Codex would ask again and again for a 5xx
        assert (answer.status_code, "did not make the tool call" in answer.text) == (status, True), answer.text
        return asked(fake)[-1]
    answer = post(http, path, json=body | {"model": engine})
    assert answer.status_code == 200, answer.text
    if body.get("stream"):
        last = events(answer.text)[-1]
        assert last["type"] in ("response.completed", "message_stop")
        assert last.get("response", {"output": [1]})["output"]
    else:
        told = answer.json()
        assert told.get("status", "completed") == "completed"
        assert told.get("output") or told.get("content")
    return asked(fake)[-1]


def grows(before: Any, after: Any) -> bool:
    return isinstance(before, list) and isinstance(after, list) and before == after[: len(before)] != after


def unmarked(value: Any) -> Any:
    """Return a body without `cache_control`, whose place changes from turn to turn."""
    if isinstance(value, dict):
        return {name: unmarked(it) for name, it in value.items() if name != "cache_control"}
    return [unmarked(it) for it in value] if isinstance(value, list) else value


def system_of(body: dict[str, Any]) -> Any:
    """Return what stands before a conversation, without Claude Code's first block, which differs in each."""
    system = unmarked(body.get("system") or body.get("instructions"))
    return [it for it in system if BILLING not in it["text"]] if isinstance(system, list) else system


def assert_prefixes(sent: list[tuple[Any, Any, dict[str, Any]]]) -> int:
    """Check that a conversation reaches the engine as the beginning of each one that continues it. Returns
    how many do."""
    found = 0
    for system, content, got in sent:
        for other, longer, more in sent:
            if system == other and grows(content, longer):
                count = len(got["messages"])
                assert json.dumps(more["messages"][:count]) == json.dumps(got["messages"])
                found += 1
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_every_recorded_request_for_responses_is_answered(
    http: httpx.Client, fakes: dict[str, FakeEngine], engine: str
) -> None:
    sent = []
    for name, body in RESPONSES_SENT.items():
        if name != NEEDS_STATE:
            got = replay(http, fakes[engine], RESPONSES.path, body, engine)
            sent.append((system_of(body), body["input"], got))
    assert assert_prefixes(sent) > 5


@pytest.mark.parametrize("engine", ENGINES)
def test_every_recorded_request_for_messages_is_answered(
    http: httpx.Client, fakes: dict[str, FakeEngine], engine: str
) -> None:
    sent = []
    for it in MESSAGES_SENT.values():
        body = it["body"]
        if it["path"].endswith("count_tokens"):
            counted = http.post(it["path"], json=body | {"model": engine})
            assert counted.json()["input_tokens"] > 0
        else:
            got = replay(http, fakes[engine], MESSAGES_API.path, body, engine)
            sent.append((system_of(body), unmarked(body["messages"]), got))
    assert assert_prefixes(sent) > 5


def test_a_response_that_continues_an_unknown_one_is_refused(http: httpx.Client) -> None:
    answer = http.post("/v1/responses", json=RESPONSES_SENT[NEEDS_STATE] | {"model": "vllm"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "previous_response_id")
