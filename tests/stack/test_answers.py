"""What users do on the first day, against a real model: curl, the openai package, tools, schemas, embeddings."""

import json
import math
import subprocess
import sys
import time
from itertools import pairwise
from typing import Any

import httpx
import openai
import pytest

from tests.support.parameters import TOOL
from tests.support.processes import AUTH, KEY
from tests.support.stack import BUSY, QUESTION, Stack

MODEL = "SmolLM2-135M-Instruct"

# The script a reader is given: base URL and key are all that tells it from one for OpenAI's own API.
TWENTY_LINES = """
import os
from openai import OpenAI

client = OpenAI(base_url=os.environ["BASE_URL"], api_key=os.environ["API_KEY"])
question = [{"role": "user", "content": "What is 2+2?"}]

answer = client.chat.completions.create(model="llama3.1:8b", messages=question, temperature=0, max_tokens=30)
print(answer.choices[0].message.content)

stream = client.chat.completions.create(
    model="llama3.1:8b", messages=question, temperature=0, max_tokens=30, stream=True
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="")
"""


def curl(*arguments: str) -> str:
    command = ["curl", "-sS", "--max-time", "60", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_newcomers_curl_checks(stack: Stack) -> None:
    health = json.loads(curl(f"{stack.url}/health"))
    assert (health["status"], health["backend"]) == ("ok", "http://engine:8080/v1")
    url = f"{stack.url}/v1/chat/completions"
    body = json.dumps({"model": "llama3.1:8b", "messages": QUESTION})
    json_body = ("-H", "Content-Type: application/json", "-d", body)
    wrong = curl("-w", "%{http_code}", "-H", "Authorization: Bearer wrong", *json_body, url)
    assert wrong.endswith("401")
    assert '"invalid_api_key"' in wrong
    forgotten = json.loads(curl("-H", f"Authorization: Bearer {KEY}", "-d", body, url))
    assert "Content-Type: application/json" in forgotten["error"]["message"]
    right = json.loads(curl("-H", f"Authorization: Bearer {KEY}", *json_body, url))
    assert right["choices"][0]["message"]["content"]
    assert right["model"] == MODEL  # what really answered


def test_a_stream_arrives_token_by_token(stack: Stack) -> None:
    body = {"messages": QUESTION, "stream": True, "max_tokens": 60, "temperature": 0}
    with stack.client() as http, http.stream("POST", "/v1/chat/completions", json=body) as answer:
        started = time.monotonic()
        arrivals = [time.monotonic() for line in answer.iter_lines() if '"content":"' in line]
        ended = time.monotonic()
    assert len(arrivals) > 10
    gaps = [after - before for before, after in pairwise(arrivals)]
    assert sum(gap > 0.0005 for gap in gaps) >= 8  # in one burst there is none; a busy client reads several at once
    assert arrivals[-1] - arrivals[0] > 0.3 * (ended - started)  # spread over the generation


def test_a_completion_of_two_prompts_has_a_choice_for_each(stack: Stack) -> None:
    client = openai.OpenAI(base_url=stack.url + "/v1", api_key=KEY)
    asked: Any = {"model": MODEL, "prompt": ["One two three", "Hello my"], "max_tokens": 3}
    assert [it.index for it in client.completions.create(**asked).choices] == [0, 1]
    chunks = list(client.completions.create(**asked, stream=True))
    ends = {choice.index: choice.finish_reason for it in chunks for choice in it.choices if choice.finish_reason}
    assert ends == {0: "length", 1: "length"}


def test_the_twenty_line_script_runs_unchanged(stack: Stack) -> None:
    env = {"BASE_URL": stack.url + "/v1", "API_KEY": KEY, "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", TWENTY_LINES], env=env, capture_output=True, text=True, timeout=120, check=True
    )
    blocking, _, streamed = done.stdout.partition("\n")
    assert "4" in blocking
    assert streamed == blocking  # greedy: the same answer both ways


def test_stream_ends_with_reason_and_usage(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="llama3.1:8b",
            messages=QUESTION,
            max_tokens=8,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert len({chunk.id for chunk in chunks}) == 1
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert reasons == ["length"]
    usage = chunks[-1].usage
    assert chunks[-1].choices == []
    assert usage
    assert usage.completion_tokens == 8


def test_a_tools_result_in_the_messages(client: openai.OpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    messages: Any = [
        {"role": "user", "content": "What is the weather in Paris?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny, 24 degrees"},
    ]
    answer = client.chat.completions.create(model="llama3.1:8b", messages=messages, max_tokens=40, temperature=0)
    assert answer.choices[0].message.content


def test_an_answer_follows_a_json_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"sum": {"type": "integer"}, "sure": {"type": "boolean"}},
        "required": ["sum", "sure"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="llama3.1:8b",
        messages=[{"role": "user", "content": "What is 2+2? Answer in JSON."}],
        response_format={"type": "json_schema", "json_schema": {"name": "sum", "schema": schema, "strict": True}},
        max_tokens=60,
        temperature=0,
    )
    value = json.loads(answer.choices[0].message.content or "")
    assert set(value) == {"sum", "sure"}
    assert isinstance(value["sum"], int)


def test_embeddings_floats_and_base64(client: openai.OpenAI) -> None:
    texts = ["a cat sat on the mat", "a cat sat on a mat", "quarterly tax report"]
    # Without encoding_format the official client asks for base64 and decodes it.
    for options in ({}, {"encoding_format": "float"}):
        vectors = [it.embedding for it in client.embeddings.create(model=MODEL, input=texts, **options).data]  # type: ignore[call-overload]
        assert {len(vector) for vector in vectors} == {576}
        assert cosine(vectors[0], vectors[1]) > cosine(vectors[0], vectors[2])


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def test_two_choices_and_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, n=2, max_tokens=8, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1]
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=4, logprobs=True, top_logprobs=2, temperature=0
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs
    assert logprobs.content
    assert all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in logprobs.content)


def test_legacy_completions_and_models(client: openai.OpenAI) -> None:
    assert client.completions.create(model=MODEL, prompt="One, two,", max_tokens=4, temperature=0).choices[0].text
    names = {model.id for model in client.models.list()}
    assert names == {MODEL, "llama3.1:8b", "meta-llama/Llama-3.1-8B-Instruct"}
    assert client.models.retrieve("meta-llama/Llama-3.1-8B-Instruct").id == "meta-llama/Llama-3.1-8B-Instruct"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_does_not_fit_is_400(client: openai.OpenAI, stream: bool) -> None:
    messages: Any = [{"role": "user", "content": "word " * 9000}]
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model=MODEL, messages=messages, stream=stream)
    assert error.value.code == "context_length_exceeded"


ENGINES_OWN = """
import json, sys, urllib.request
for path, body in json.loads(sys.argv[1]):
    data = json.dumps(body).encode()
    url = "http://127.0.0.1:8080/v1/" + path
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    print(urllib.request.urlopen(request, timeout=60).read().decode())
"""
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["a", "b"]}
JSON = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}
PLAIN: dict[str, Any] = {"messages": QUESTION}
BEGUN = {"role": "assistant", "content": "One, two,"}
PARTS = {"role": "assistant", "content": [{"type": "text", "text": "One,"}, {"type": "text", "text": "two,"}]}
EMPTY = {"grammar": 'root ::= ""'}
BOTH = {"prompt": ["One, two,", "Red, green,"]}
# The path and the fields; each is tried at several lengths.
SAME: dict[str, tuple[str, dict[str, Any]]] = {
    name: ("chat/completions", PLAIN | fields)
    for name, fields in {
        "plain": {},
        "two choices": {"n": 2, "seed": 7},
        "logprobs": {"logprobs": True, "top_logprobs": 2},
        "a schema": JSON,
        "two choices of a schema": JSON | {"n": 2, "seed": 7},
        "a schema, logprobs": JSON | {"logprobs": True, "top_logprobs": 1},
        "JSON": {"response_format": {"type": "json_object"}},
        "tools": {"tools": [TOOL]},
        "tools, logprobs": {"tools": [TOOL], "logprobs": True},
        "tools, two logprobs": {"tools": [TOOL], "logprobs": True, "top_logprobs": 2},
        "a message begun": {"messages": [*QUESTION, BEGUN], "n": 2, "seed": 7},
        "a message begun, in parts": {"messages": [*QUESTION, PARTS]},
        "an empty message begun": {"messages": [*QUESTION, BEGUN | {"content": ""}]},
        "stop sequences": {"stop": [" 3", ", "]},
        "two choices, stop sequences": {"stop": [" 3", ", "], "n": 2, "seed": 7},
        "stopped at once": {"stop": ["1", "T", "I", "S", "C"]},
        "nothing to say": EMPTY,
    }.items()
} | {
    name: ("completions", {"prompt": "One, two,"} | fields)
    for name, fields in {
        "completion": {},
        "a completion's logprobs": {"logprobs": 2},
        "a completion's stop sequence": {"stop": [" "]},
        "a completion's schema": {"json_schema": SCHEMA},
        "a completion of nothing": EMPTY,
        "two completions": {"n": 2, "seed": 7},
        "two prompts": BOTH,
    }.items()
}
LENGTHS = (1, 2, 5, 12)


BODIES = {
    case: [(path, fields | {"temperature": 0, "max_tokens": length}) for length in LENGTHS]
    for case, (path, fields) in SAME.items()
}


@pytest.fixture(scope="module")
def own_answers(stack: Stack) -> dict[str, list[Any]]:
    """What the engine itself answers to each case, at each length."""
    asked = json.dumps([it for bodies in BODIES.values() for it in bodies])
    status, output = stack.container("engine").exec_run(["python", "-c", ENGINES_OWN, asked])
    assert status == 0, output
    answers = map(json.loads, output.decode().splitlines())
    return {case: [next(answers) for _ in bodies] for case, bodies in BODIES.items()}


@pytest.mark.parametrize("case", SAME)
def test_a_blocking_answer_is_the_engines_own_at_every_length(
    stack: Stack, own_answers: dict[str, list[Any]], case: str
) -> None:
    """llama.cpp is deaf to the hang-up of a blocking request, so the gateway asks it for a stream, if that holds all of
    the answer, and adds it up. What comes is what the engine itself would have answered, but for id, times, timings,
    and usage where there are several choices: the engine tells the first one's."""
    with stack.client() as http:
        ours = [http.post("/v1/" + path, json=body).json() for path, body in BODIES[case]]
    for mine, own in zip(ours, own_answers[case], strict=True):
        for answer in (mine, own):
            for name in ("id", "created", "timings"):
                answer.pop(name, None)
            answer["usage"].pop("prompt_tokens_details", None)  # how much of the prompt was cached
            for choice in answer["choices"]:
                for call in choice.get("message", {}).get("tool_calls") or ():
                    call.pop("id", None)
        if len(own["choices"]) > 1:
            made = mine.pop("usage")["completion_tokens"], own.pop("usage")["completion_tokens"]
            assert made[0] > made[1]
        assert mine == own


def test_a_disconnect_from_a_blocking_call_frees_the_engines_slot(stack: Stack) -> None:
    body = {"messages": [{"role": "user", "content": "Write a long story."}], "max_tokens": 3000, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(stack.url + "/v1/chat/completions", json=body, headers=AUTH, timeout=2)
    deadline = time.monotonic() + 5 * 2.0
    while stack.python("engine", BUSY) != "0":
        assert time.monotonic() < deadline


def test_a_disconnect_frees_the_engines_slot(stack: Stack) -> None:
    """A stream that its client leaves is stopped on the engine: no slot is busy any more, long before 3000 tokens."""
    body = {"messages": [{"role": "user", "content": "Write a very long story."}], "stream": True, "max_tokens": 3000}
    body |= {"ignore_eos": True}
    with stack.client() as http, http.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = answer.iter_lines()  # kept: httpx closes the response with its iterator
        assert any('"content":"' in line for line in lines)
        assert stack.python("engine", BUSY) == "1"
    deadline = time.monotonic() + 5 * 2.0
    while stack.python("engine", BUSY) != "0":
        assert time.monotonic() < deadline


def test_chat_command_in_the_container(stack: Stack) -> None:
    status, output = stack.container("gateway").exec_run(["python", "-m", "gateway.cli.chat", "What is 2+2?"])
    assert status == 0
    assert output.decode().strip()


def test_no_other_endpoint_of_the_engine_is_reachable(stack: Stack) -> None:
    with stack.client() as http:
        for path in (
            "/slots",
            "/props",
            "/metrics",
            "/tokenize",
            "/v1/../slots",
            "/cors-proxy",
            "/tools",
            "/completion",
        ):
            for method in ("GET", "POST"):
                assert http.request(method, path).status_code in (404, 405), path
    assert AUTH
