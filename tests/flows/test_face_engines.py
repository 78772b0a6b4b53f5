"""What the translated APIs make of the three engines: counts, efforts that a model does not take, and limits that are
too long."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support import judges
from tests.support.faces import APIS, MESSAGES_API, RESPONSES, Api, events, script, text_of
from tests.support.fakes.dialects import ENGINES
from tests.support.processes import FakeEngine, GatewayProcess
from tests.support.tool_streams import CITY, alternating, calls_at_0

CHAT = "/v1/chat/completions"
BOTH = pytest.mark.parametrize("api", APIS.values(), ids=APIS)


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


# -- reasoning --------------------------------------------------------------------------------------------------------

THOUGHT: dict[str, dict[str, Any]] = {
    "responses": {
        "input": [
            {"role": "user", "content": "x"},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "y"},
        ]
    },
    "messages": {
        "messages": [
            {"role": "user", "content": "x"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": "s"},
                    {"type": "tool_use", "id": "c", "name": "f", "input": {}},
                ],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "y"}]},
        ]
    },
}


@BOTH
@pytest.mark.parametrize("engine", ENGINES)
def test_reasoning_in_a_conversation_reaches_the_engine(
    http: httpx.Client, fakes: dict[str, FakeEngine], api: Api, engine: str
) -> None:
    fakes[engine].set()
    answer = http.post(api.path, json=api.body(model=engine) | THOUGHT[api.name])
    assert answer.status_code == 200, answer.text
    (_, message, _) = asked(fakes[engine])[-1]["messages"]
    assert message["reasoning" if engine == "ollama" else "reasoning_content"] == "Hm."
    assert message["tool_calls"][0]["function"]["name"] == "f"


@pytest.mark.parametrize("refused_first", [False, True])
def test_a_refusal_and_a_text_around_a_call_both_reach_the_engine(
    http: httpx.Client, fakes: dict[str, FakeEngine], refused_first: bool
) -> None:
    said: list[dict[str, Any]] = [
        {"role": "assistant", "content": "A"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
    ]
    parts = [{"type": "text", "text": "A"}, {"type": "refusal", "refusal": "no"}]
    order = slice(None, None, -1 if refused_first else 1)
    before, after = said[order]
    call, output = THOUGHT["responses"]["input"][2:]
    fakes["vllm"].set()
    answer = http.post(RESPONSES.path, json=RESPONSES.body(model="vllm") | {"input": [before, call, after, output]})
    assert answer.status_code == 200, answer.text
    assert asked(fakes["vllm"])[-1]["messages"][0]["content"] == parts[order]


# -- calls ------------------------------------------------------------------------------------------------------------

WEATHER: dict[str, dict[str, Any]] = {
    "responses": {"tools": [{"type": "function", "name": "weather", "strict": False, "parameters": CITY}]},
    "messages": {"tools": [{"name": "weather", "input_schema": CITY}]},
}
DEMAND: dict[str, dict[str, Any]] = {
    "responses": {"tool_choice": "required"},
    "messages": {"tool_choice": {"type": "any"}},
}


@BOTH
@pytest.mark.parametrize("demanded", [False, True])
def test_calls_that_all_have_the_index_0_are_told_apart(http: httpx.Client, api: Api, demanded: bool) -> None:
    more = WEATHER[api.name] | (DEMAND[api.name] if demanded else {})
    answer = http.post(api.path, json=api.body(script(*calls_at_0()), model="vllm", stream=True, **more))
    told = events(answer.text)
    said = judges.message_stream(told) if api is MESSAGES_API else judges.response_stream(told)
    assert said.calls == (("weather", {"city": "Oslo"}), ("weather", {"city": "Rome"})), answer.text


@BOTH
def test_calls_whose_pieces_alternate_are_each_told_once_and_whole(http: httpx.Client, api: Api) -> None:
    answer = http.post(api.path, json=api.body(script(*alternating()), model="vllm", stream=True, **WEATHER[api.name]))
    told = events(answer.text)
    said = judges.message_stream(told) if api is MESSAGES_API else judges.response_stream(told)
    assert said.calls == (("weather", {"city": "Oslo"}), ("weather", {"city": "Rome"})), answer.text
    assert text_of(told).endswith("Hm. Hm. Hm. "), answer.text


# -- a beginning of the answer ----------------------------------------------------------------------------------------

STOP = {"responses": {"stop": ["x"]}, "messages": {"stop_sequences": ["x"]}}


@BOTH
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_holds_what_follows_its_beginning_and_all_of_that(
    http: httpx.Client, fakes: dict[str, FakeEngine], api: Api, engine: str, stream: bool
) -> None:
    """llama.cpp repeats the beginning in a blocking answer. With `stop`, it is not asked for a stream instead."""
    turns = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "one"}]
    fakes[engine].set()
    for more in ({}, STOP[api.name]):
        asks = {"messages" if api is MESSAGES_API else "input": turns, "stream": stream}
        answer = http.post(api.path, json=api.body(model=engine, **more) | asks)
        told = answer.json() if not stream else {}
        whole = told.get("content") or told.get("output", [{"content": None}])[0]["content"]
        assert (text_of(events(answer.text)) if stream else whole[0]["text"]) == "one two three", answer.text
    continues = [(it.get("continue_final_message"), it.get("add_generation_prompt")) for it in asked(fakes[engine])]
    assert continues == [(True, False) if (api.name, engine) == ("messages", "vllm") else (None, None)] * 2


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
