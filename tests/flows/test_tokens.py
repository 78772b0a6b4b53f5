"""What was made is told and written down: of every choice, once, and to clients that asked. Each engine tells its usage
in its own way; the scripts here are their recorded streams, cut short."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tests.support.processes import MESSAGES, FakeEngine, GatewayProcess, events, fake_engine, running_gateway

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
CONFIG = """
engines:
  ollama: {{dialect: ollama, slots: 64, base_url: '{url}'}}
  vllm: {{dialect: vllm, base_url: '{url}'}}
  llamacpp: {{dialect: llamacpp, slots: 64, base_url: '{url}'}}
models:
  ollama: {{targets: [{{engine: ollama, model: m}}]}}
  vllm: {{targets: [{{engine: vllm, model: m}}]}}
  llamacpp: {{targets: [{{engine: llamacpp, model: m}}]}}
default_model: vllm
breaker: {{failures: 1000}}
"""
HEAD = {"id": "c-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}


@dataclass
class Setting:
    gateway: GatewayProcess
    client: httpx.Client
    engine: FakeEngine


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    directory = tmp_path_factory.mktemp("tokens")
    with fake_engine() as engine:
        file = directory / "stack.yaml"
        file.write_text(CONFIG.format(url=engine.url))
        settings = {"STACK_CONFIG": str(file), "STACK_WORKERS": "1"}
        with running_gateway(directory / "log", engine.url, **settings) as gateway, gateway.client() as client:
            yield Setting(gateway, client, engine)


def usage(read: int, made: int, **more: Any) -> dict[str, Any]:
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made} | more


def chat(index: int, text: str | None = None, reason: str | None = None, **more: Any) -> list[Any]:
    delta = {} if text is None else {"content": text}
    return ["event", HEAD | {"choices": [{"index": index, "delta": delta, "finish_reason": reason}]} | more]


def completion(index: int, text: str = "", reason: str | None = None, **more: Any) -> list[Any]:
    return ["event", HEAD | {"choices": [{"index": index, "text": text, "finish_reason": reason}]} | more]


def told(read: int, made: int, **more: Any) -> list[Any]:
    return ["event", HEAD | {"choices": [], "usage": usage(read, made)} | more]


END: list[Any] = [["done"], ["end"]]
TIMINGS = {"timings": {"predicted_n": 3}}
ZEROS = {"usage": usage(0, 0)}
# The engine, the path, what is asked for, what the engine sends, and what was used in truth.
STREAMS: dict[str, tuple[str, str, dict[str, Any], list[Any], dict[str, Any]]] = {
    "one choice of llama.cpp": (
        "llamacpp",
        CHAT,
        {},
        [chat(0, "a"), chat(0, None, "stop"), told(5, 2, **TIMINGS), *END],
        usage(5, 2),
    ),
    "three choices of llama.cpp": (
        "llamacpp",
        CHAT,
        {"n": 3},
        [
            *[chat(index, "a") for index in (1, 0, 2)],
            chat(1, None, "stop"),
            told(5, 2, **TIMINGS),
            chat(0, None, "length"),
            told(5, 7, **TIMINGS),
            chat(2, None, "stop"),
            told(5, 4, **TIMINGS),
            *END,
        ],
        usage(5, 13),
    ),
    "a completion of llama.cpp, which tells it with the reason": (
        "llamacpp",
        COMPLETION,
        {"prompt": "x"},
        [completion(0, "a"), completion(0, "", "length", usage=usage(4, 1), **TIMINGS), *END],
        usage(4, 1),
    ),
    "two prompts of two choices each, of llama.cpp": (
        "llamacpp",
        COMPLETION,
        {"prompt": ["long", "x"], "n": 2},
        [
            ["text", "data: null\n\n"],
            *[completion(index, "a") for index in (1, 2, 0, 3)],
            *[completion(i, "", "length", usage=usage(4 if i < 2 else 1, 2 + i), **TIMINGS) for i in (1, 2, 0, 3)],
            *END,
        ],
        usage(5, 14),
    ),
    "a completion of Ollama, with zeros in every chunk": (
        "ollama",
        COMPLETION,
        {"prompt": "x"},
        [
            completion(0, "a", **ZEROS),
            completion(0, "b", **ZEROS),
            completion(0, "", "stop", **ZEROS),
            told(9, 2),
            *END,
        ],
        usage(9, 2),
    ),
    "merged events of vLLM": (
        "vllm",
        CHAT,
        {},
        [
            chat(0, "", usage=usage(5, 0)),
            chat(0, "a b c", usage=usage(5, 3)),
            chat(0, "", "stop", usage=usage(5, 4)),
            told(5, 4),
            *END,
        ],
        usage(5, 4),
    ),
    "two choices of vLLM": (
        "vllm",
        CHAT,
        {"n": 2},
        [
            chat(0, "a", usage=usage(5, 1)),
            chat(1, "b c", usage=usage(5, 2)),
            chat(0, "", "stop", usage=usage(5, 3)),
            chat(1, "", "stop", usage=usage(5, 4)),
            told(5, 7),
            *END,
        ],
        usage(5, 7),
    ),
    "vLLM without a last word": (
        "vllm",
        CHAT,
        {},
        [chat(0, "a b", usage=usage(5, 2)), chat(0, "", "stop", usage=usage(5, 3)), ["end"]],
        usage(5, 3),
    ),
}


def ask(at: Setting, model: str, path: str, script: list[Any], **fields: Any) -> httpx.Response:
    body = {"model": model, "user": uuid4().hex, "script": script} | ({"messages": MESSAGES} if path == CHAT else {})
    return at.client.post(path, json=body | fields)


def line_of(at: Setting, answer: httpx.Response) -> dict[str, Any]:
    """Its `…_finished` line."""
    return at.gateway.lines(answer.headers["x-request-id"])[-2]


@pytest.mark.parametrize("case", STREAMS)
@pytest.mark.parametrize("asked", [True, False], ids=["asked for", "not asked for"])
def test_a_stream_tells_the_usage_of_all_choices_once_and_only_if_asked(at: Setting, case: str, asked: bool) -> None:
    model, path, fields, script, used = STREAMS[case]
    options = {"stream_options": {"include_usage": True}} if asked else {}
    answer = ask(at, model, path, script, stream=True, **fields, **options)
    *chunks, done = events(answer.text)
    assert done == "[DONE]"
    told = [chunk for chunk in chunks if chunk.get("usage")]
    assert [(it["choices"], it["usage"]) for it in told] == ([([], used)] if asked else [])
    assert chunks[-1] is told[-1] if asked else all(it["choices"] for it in chunks)
    line = line_of(at, answer)
    assert (line["tokens_in"], line["tokens_out"]) == (used["prompt_tokens"], used["completion_tokens"])


def test_a_stream_of_choices_names_each_reason_once_in_its_log_line(at: Setting) -> None:
    model, path, fields, script, _ = STREAMS["three choices of llama.cpp"]
    assert line_of(at, ask(at, model, path, script, stream=True, **fields))["finish_reason"] == "length,stop"


def test_usage_in_every_chunk_is_for_those_who_ask_for_it(at: Setting) -> None:
    model, path, _, script, _ = STREAMS["merged events of vLLM"]
    options = {"include_usage": True, "continuous_usage_stats": True}
    answer = ask(at, model, path, script, stream=True, stream_options=options)
    assert [chunk["usage"]["completion_tokens"] for chunk in events(answer.text)[:-1]] == [0, 3, 4, 4]


AWKWARD = ',"usage":{"prompt_tokens":1}}'


@pytest.mark.parametrize("details", [{}, {"prompt_tokens_details": {"cached_tokens": 3}}, {"x": '"}}'}, {"x": "}\\{"}])
@pytest.mark.parametrize("last", [True, False])
def test_usage_is_taken_out_of_a_chunk_and_nothing_else(at: Setting, details: dict[str, Any], last: bool) -> None:
    choice = {"index": 0, "delta": {"content": AWKWARD}, "finish_reason": None}
    chunk: dict[str, Any] = HEAD | ({} if last else {"usage": usage(5, 1, **details)}) | {"choices": [choice]}
    chunk |= {"usage": usage(5, 1, **details)}  # where it stands already, if it does
    answer = ask(at, "vllm", CHAT, [["event", chunk], chat(0, "", "stop"), *END], stream=True)
    del chunk["usage"]
    assert events(answer.text)[0] == chunk


def test_of_a_client_that_leaves_what_was_made_is_written_down(at: Setting) -> None:
    """vLLM reports tokens in every chunk. llama.cpp reports those of choices that ended, and all events are counted."""
    merged = [chat(0, "a b c d e", usage=usage(5, 5)), ["hang"]]
    parted = [chat(0, "a"), chat(1, "b"), chat(0, None, "stop"), told(5, 9), chat(1, "c"), ["hang"]]
    for model, script, fields, made in (("vllm", merged, {}, 5), ("llamacpp", parted, {"n": 2}, 9)):
        last = "e" if model == "vllm" else "c"
        body = {"model": model, "messages": MESSAGES, "stream": True, "script": script} | fields
        with at.client.stream("POST", CHAT, json=body) as answer:
            lines = answer.iter_lines()
            assert any(f'{last}"' in line for line in lines)
        line = line_of(at, answer)
        assert (line["outcome"], line["tokens_out"]) == ("client_left", made)


def whole(choices: list[dict[str, Any]], told: dict[str, Any]) -> list[Any]:
    kind = {"object": "text_completion" if "text" in choices[0] else "chat.completion"}
    return [["json", [200, HEAD | kind | {"choices": choices, "usage": told} | TIMINGS]]]


def message(index: int, tokens: int, reason: str) -> dict[str, Any]:
    logprobs = {"content": [{"token": "a"}] * tokens}
    said = {"role": "assistant", "content": "a" * tokens}
    return {"index": index, "message": said, "finish_reason": reason, "logprobs": logprobs}


def test_a_blocking_answer_that_llama_cpp_gives_itself_tells_the_usage_of_all_choices(at: Setting) -> None:
    """llama.cpp reports the tokens of the first choice. Those of the others are counted by log probabilities, which the
    client does not see."""
    script = whole([message(0, 3, "stop"), message(1, 5, "length"), message(2, 1, "stop")], usage(5, 3))
    asked = {"n": 3, "response_format": {"type": "json_object"}, "user": uuid4().hex}
    answer = ask(at, "llamacpp", CHAT, script, **asked)
    body = answer.json()
    assert body["usage"] == usage(5, 9)
    assert "timings" not in body
    assert not any("logprobs" in choice for choice in body["choices"])
    line = line_of(at, answer)
    assert (line["tokens_out"], line["finish_reason"]) == (9, "stop,length")
    assert at.engine.seen(asked["user"])[0]["body"]["n_probs"] == 1
    answer = ask(at, "llamacpp", CHAT, script, logprobs=True, **asked)
    assert all(len(choice["logprobs"]["content"]) for choice in answer.json()["choices"])
    assert answer.json()["usage"] == usage(5, 9)


def test_a_blocking_answer_made_of_a_stream_has_the_usage_of_all_choices(at: Setting) -> None:
    for case in ("three choices of llama.cpp", "two prompts of two choices each, of llama.cpp"):
        model, path, fields, script, used = STREAMS[case]
        answer = ask(at, model, path, script, **fields)
        assert answer.json()["usage"] == used
        assert "timings" not in answer.json()
        assert line_of(at, answer)["tokens_out"] == used["completion_tokens"]


FOLDS: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({}, True),
    "text": ({"response_format": {"type": "text"}}, True),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}, True),
    "no stop sequence": ({"stop": []}, True),
    "an empty stop sequence": ({"stop": ""}, True),
    "empty stop sequences": ({"stop": ["", ""]}, True),
    "a stop sequence after an empty one": ({"stop": ["", "x"]}, False),
    "a stop sequence": ({"stop": "x"}, False),
    "stop sequences": ({"stop": ["x", "y"]}, False),
    "JSON": ({"response_format": {"type": "json_object"}}, False),
    "a schema": ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}}, False),
    "llama.cpp's schema": ({"json_schema": {}}, False),
}


@pytest.mark.parametrize("case", FOLDS)
def test_a_blocking_call_is_streamed_where_the_stream_has_all_of_the_answer(at: Setting, case: str) -> None:
    fields, folds = FOLDS[case]
    mark = uuid4().hex
    answer = at.client.post(CHAT, json={"model": "llamacpp", "messages": MESSAGES, "user": mark} | fields)
    assert answer.json()["choices"][0]["message"]["content"] == "one two three"
    assert at.engine.seen(mark)[0]["body"].get("stream", False) == folds


CALL = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def test_a_blocking_answer_made_of_a_stream_has_empty_text_or_null_beside_a_call(at: Setting) -> None:
    for delta, content in (({}, ""), ({"content": None}, ""), ({"tool_calls": [CALL]}, None)):
        chunk = HEAD | {"choices": [{"index": 0, "delta": {"role": "assistant"} | delta, "finish_reason": None}]}
        answer = ask(at, "llamacpp", CHAT, [["event", chunk], chat(0, None, "stop"), told(5, 1), *END])
        assert answer.json()["choices"][0]["message"]["content"] == content, json.dumps(delta)
