"""A prompt that is too long comes back as 400 with both numbers, from each engine; one that fits is never refused. The
fakes count a word as a token, and one more for each message; they read 1000, or as many as a test says."""

import base64
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.fakes.dialects import ENGINES
from tests.support.processes import (
    AUTH,
    FakeEngine,
    GatewayProcess,
    events,
    fake_engine,
    free_port,
    running_gateway,
    wait_for,
)

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
BOTH = pytest.mark.parametrize("stream", [False, True])


@pytest.fixture(scope="module")
def http(before_all: GatewayProcess) -> Iterator[httpx.Client]:
    with before_all.client() as client:
        yield client


@pytest.fixture(autouse=True)
def as_ever(fakes: dict[str, FakeEngine]) -> None:
    """Reset the engines. A test that changes more than refusals uses a model of its own, because the gateway remembers
    what an engine reported."""
    for fake in fakes.values():
        fake.set(context=1000, numbers=True, counts=True, clips=True, slow=0)
    fakes["ollama"].set(loaded=True, system="")


def user(words: int) -> dict[str, str]:
    return {"role": "user", "content": "a " * words}


def too_long(http: httpx.Client, model: str, words: int, **more: Any) -> httpx.Response:
    return http.post(CHAT, json={"model": model, "messages": [user(words)], **more})


def said(answer: httpx.Response) -> dict[str, Any]:
    """Return the error of an answer, which must be the one for a prompt that is too long."""
    error: dict[str, Any] = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (
        400,
        "invalid_request_error",
        "context_length_exceeded",
    )
    return error


def told(limit: int, field: str, tokens: int) -> str:
    return f"This model's maximum context length is {limit} tokens. However, your {field} resulted in {tokens} tokens."


@BOTH
@pytest.mark.parametrize("engine", ENGINES)
def test_a_prompt_that_is_too_long_is_refused_with_both_numbers(http: httpx.Client, engine: str, stream: bool) -> None:
    error = said(too_long(http, engine, 1500, stream=stream))
    assert error["param"] == "messages"
    assert error["message"].startswith(told(1000, "messages", 1501))


@BOTH
@pytest.mark.parametrize("engine", ENGINES)
def test_a_completion_that_is_too_long_is_refused_with_both_numbers(
    http: httpx.Client, engine: str, stream: bool
) -> None:
    error = said(http.post(COMPLETIONS, json={"model": engine, "prompt": "a " * 1500, "stream": stream}))
    assert error["param"] == "prompt"
    assert error["message"].startswith(told(1000, "prompt", 1500))


@pytest.mark.parametrize(("engine", "limit"), [("ollama", 1000), ("vllm", 1000), ("llamacpp", 512)])
def test_an_embedding_that_is_too_long_is_refused_with_both_numbers(
    http: httpx.Client, engine: str, limit: int
) -> None:
    """llama.cpp's limit is that of a batch, and it answers with a 500."""
    error = said(http.post(EMBEDDINGS, json={"model": engine, "input": "a " * 1500}))
    assert error["param"] == "input"
    assert error["message"].startswith(told(limit, "input", 1500))


@BOTH
@pytest.mark.parametrize("engine", ENGINES)
def test_a_prompt_that_just_fits_passes(
    http: httpx.Client, fakes: dict[str, FakeEngine], engine: str, stream: bool
) -> None:
    """The prompt has twice as many bytes as the context has tokens. llama.cpp keeps one token for the answer."""
    words = 998 if engine == "llamacpp" else 999
    answer = too_long(http, engine, words, stream=stream)
    assert answer.status_code == 200
    if stream:
        assert events(answer.text)[-1] == "[DONE]"
    assert len(fakes[engine].asked(CHAT)) == 1
    assert said(too_long(http, engine, words + 1, stream=stream))


# -- Ollama, which would cut ------------------------------------------------------------------------------------------


def test_a_short_prompt_is_not_checked_at_the_engine(http: httpx.Client, fakes: dict[str, FakeEngine]) -> None:
    assert too_long(http, "ollama", 10).status_code == 200
    assert fakes["ollama"].asked("/api/chat") == []


def test_a_prompt_that_might_not_fit_is_checked_first(http: httpx.Client, fakes: dict[str, FakeEngine]) -> None:
    answer = too_long(http, "ollama", 900, seed=7)
    assert answer.json()["usage"]["prompt_tokens"] == 901
    (shown,) = fakes["ollama"].asked("/api/chat")
    assert shown["body"] == {
        "model": "fake-model",
        "stream": False,
        "truncate": False,
        "options": {"num_predict": 1},
        "messages": [user(900) | {"tool_calls": [], "tool_name": "", "thinking": ""}],
        "tools": [],
    }


@BOTH
def test_old_messages_are_not_dropped(http: httpx.Client, fakes: dict[str, FakeEngine], stream: bool) -> None:
    """Each message fits by itself. Ollama would leave out the first one and answer."""
    messages = [user(600), {"role": "assistant", "content": "b " * 300}, user(300)]
    error = said(http.post(CHAT, json={"model": "ollama", "messages": messages, "stream": stream}))
    assert error["message"].startswith(told(1000, "messages", 1203))
    assert fakes["ollama"].asked(CHAT) == []


def test_the_check_sends_a_conversation_in_ollamas_own_form(http: httpx.Client, fakes: dict[str, FakeEngine]) -> None:
    image = base64.b64encode(b"\xff\xd8\xff").decode()
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    parts = [
        {"type": "text", "text": "a " * 700},
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{image}"}},
    ]
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    body = {"model": "ollama", "messages": messages, "tools": [tool], "reasoning_effort": "none"}
    assert http.post(CHAT, json=body).status_code == 200
    shown = fakes["ollama"].asked("/api/chat")[0]["body"]
    assert (shown["tools"], shown["think"]) == ([tool], False)
    function = {"name": "weather", "arguments": {"city": "Paris"}}
    assert [{name: value for name, value in it.items() if value} for it in shown["messages"]] == [
        {"role": "user", "content": "a " * 700},
        {"role": "user", "images": [image]},
        {"role": "assistant", "tool_calls": [{"function": function}]},
        {"role": "tool", "content": "sunny", "tool_name": "weather"},
    ]


EFFORTS: list[tuple[dict[str, Any], Any]] = [
    ({}, None),
    ({"reasoning_effort": "low"}, "low"),
    ({"reasoning_effort": "minimal"}, "low"),
    ({"reasoning_effort": "xhigh"}, "max"),
    ({"reasoning": {"effort": "none"}}, False),
    ({"reasoning": {"effort": "high"}, "reasoning_effort": "none"}, "high"),
]


@pytest.mark.parametrize(("fields", "think"), EFFORTS)
def test_the_check_lets_the_model_think_as_much_as_the_request_does(
    http: httpx.Client, fakes: dict[str, FakeEngine], fields: dict[str, Any], think: Any
) -> None:
    assert too_long(http, "ollama", 900, **fields).status_code == 200
    assert fakes["ollama"].asked("/api/chat")[0]["body"].get("think") == think


CALL: dict[str, Any] = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
SOUND = {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}
CUT: dict[str, list[dict[str, Any]]] = {
    "a sound": [{"role": "user", "content": [{"type": "text", "text": "a"}, SOUND]}],
    "a call without an id": [{"role": "assistant", "content": "x", "tool_calls": [CALL]}, user(1) | {"role": "tool"}],
    "no part": [{"role": "user", "content": []}],
}


@pytest.mark.parametrize("messages", CUT.values(), ids=CUT)
def test_a_conversation_of_any_form_that_ollama_takes_is_checked(
    http: httpx.Client, fakes: dict[str, FakeEngine], messages: list[dict[str, Any]]
) -> None:
    assert said(http.post(CHAT, json={"model": "ollama", "messages": [*messages, user(1500)]}))
    assert fakes["ollama"].asked(CHAT) == []


@pytest.mark.parametrize("content", [[{"type": "input_audio"}], [{"type": "text"}], [{"type": "image_url"}]])
def test_a_long_conversation_that_cannot_be_checked_is_refused(
    http: httpx.Client, fakes: dict[str, FakeEngine], content: Any
) -> None:
    messages = [user(900), {"role": "user", "content": content}]
    answer = http.post(CHAT, json={"model": "ollama", "messages": messages})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
    assert fakes["ollama"].asked(CHAT) == []


def test_only_the_long_inputs_of_an_embedding_are_checked(http: httpx.Client, fakes: dict[str, FakeEngine]) -> None:
    texts = ["a " * 300, "a " * 900, "a"]
    assert http.post(EMBEDDINGS, json={"model": "ollama", "input": texts}).status_code == 200
    (shown,) = fakes["ollama"].asked("/api/embed")
    assert shown["body"] == {"model": "fake-model", "stream": False, "truncate": False, "input": ["a " * 900]}


def test_the_models_own_system_prompt_counts(http: httpx.Client, fakes: dict[str, FakeEngine]) -> None:
    """The system prompt of a Modelfile: behind it, even a short request does not fit."""
    fakes["ollama"].set(system="b " * 950)
    assert said(too_long(http, "own-system", 60))["message"].startswith(told(1000, "messages", 1011))
    assert too_long(http, "own-system", 49).status_code == 200


def test_a_model_that_is_not_loaded_is_loaded_for_the_check(http: httpx.Client, fakes: dict[str, FakeEngine]) -> None:
    fakes["ollama"].set(loaded=False)
    assert too_long(http, "unloaded", 1).status_code == 200
    assert [it["body"] for it in fakes["ollama"].asked("/api/chat")] == [{"model": "unloaded", "stream": False}]


@pytest.mark.parametrize("state", [{"sizes": False}, {"remote": True}])
def test_a_window_that_nobody_tells_is_no_reason_to_read_a_prompt_twice(tmp_path: Path, state: dict[str, Any]) -> None:
    with (
        fake_engine(dialect="ollama") as engine,
        running_gateway(tmp_path / "log", engine.url, LLM_BACKEND="ollama") as gateway,
        gateway.client() as http,
    ):
        engine.set(**state)
        assert too_long(http, "fake-model", 30).status_code == 200
        assert not any("messages" in it["body"] for it in engine.asked("/api/chat"))


def test_a_context_that_has_become_smaller_is_noticed(http: httpx.Client, fakes: dict[str, FakeEngine]) -> None:
    """An engine is restarted with other settings. The gateway notices within seconds, although the prompt is short."""
    assert too_long(http, "small", 230).status_code == 200
    fakes["ollama"].set(context=200)
    answer = wait_for(lambda: (it := too_long(http, "small", 230)).status_code == 400 and it, deadline=5 * 5.0)
    assert said(answer)["message"].startswith(told(200, "messages", 231))


def test_the_context_is_remembered_while_the_engine_is_unreachable(tmp_path: Path) -> None:
    """Only the engine's absence is reported, and a prompt that is too long is still refused."""
    port = free_port()
    url, settings = f"http://127.0.0.1:{port}", {"LLM_BACKEND": "ollama", "STACK_WORKERS": "1"}
    with running_gateway(tmp_path / "log", url, **settings) as gateway, gateway.client() as http:
        with fake_engine(port, "ollama"):
            assert too_long(http, "fake-model", 1).status_code == 200
        gone = too_long(http, "fake-model", 1500)
        assert (gone.status_code, gone.json()["error"]["code"]) == (503, "engine_unavailable")
        with fake_engine(port, "ollama"):
            again = wait_for(lambda: (it := too_long(http, "fake-model", 1500)).status_code < 500 and it)
            assert said(again)["message"].startswith(told(1000, "messages", 1501))


FULL = (503, {"error": "server busy, please try again.  maximum pending requests exceeded"})
DIED = (500, {"error": "llama runner process has terminated: exit status 2"})
BROKEN = (500, {"error": "something is wrong"})
UNSURE = [
    ("fake-model", {"loaded": False, "fails": {"load": FULL}}, (503, "server_is_overloaded")),
    ("small", {"loaded": False, "fails": {"load": BROKEN}}, (503, "model_unavailable")),
    ("own-system", {"fails": {"count": FULL}}, (503, "server_is_overloaded")),
    ("own-system", {"fails": {"count": BROKEN}}, (502, "engine_error")),
    ("own-system", {"fails": {"count": DIED}}, (502, "engine_failed")),
    ("unloaded", {"loaded": False, "stays": False}, (400, "context_length_exceeded")),  # as by OLLAMA_KEEP_ALIVE=0
]


@pytest.mark.parametrize(("model", "state", "error"), UNSURE)
def test_a_prompt_that_cannot_be_checked_is_not_sent(
    tmp_path: Path, model: str, state: dict[str, Any], error: tuple[int, str]
) -> None:
    with (
        fake_engine(dialect="ollama") as engine,
        running_gateway(tmp_path / "log", engine.url, LLM_BACKEND="ollama") as gateway,
        gateway.client() as http,
    ):
        engine.set(**state)
        body = {"model": model, "messages": [user(1500)]}
        answer = http.post(CHAT, json=body, headers={"x-stack-queue-timeout": "0"})
        assert (answer.status_code, answer.json()["error"]["code"]) == error
        engine.set(fails={}, stays=True)
        if error[1] not in ("model_unavailable", "engine_failed"):  # after which the model, or the request, is barred
            assert said(too_long(http, model, 1500))["message"].startswith(told(1000, "messages", 1501))
        assert engine.asked(CHAT) == []


def test_an_ollama_that_reports_no_numbers_is_refused_without_them(
    http: httpx.Client, fakes: dict[str, FakeEngine]
) -> None:
    """Ollama before 0.30."""
    fakes["ollama"].set(numbers=False)
    assert (
        "1000 tokens. However, your messages resulted in more than 1000 tokens."
        in said(too_long(http, "ollama", 1500))["message"]
    )


def test_a_client_that_disconnects_ends_the_check(before_all: GatewayProcess, fakes: dict[str, FakeEngine]) -> None:
    """The check of the prompt ends with its client."""
    fakes["ollama"].set(slow=60)
    body = {"model": "ollama", "messages": [user(900)]}
    headers = AUTH | {"x-request-id": "leaves-meanwhile"}

    def leave() -> None:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(before_all.url + CHAT, json=body, headers=headers, timeout=1)

    thread = threading.Thread(target=leave)
    thread.start()
    lines = before_all.lines("leaves-meanwhile")
    thread.join()
    assert [line.get("outcome") for line in lines if line["msg"] == "chat_finished"] == ["client_left"]
    assert fakes["ollama"].asked(CHAT) == []


# -- vLLM and llama.cpp, which refuse by themselves --------------------------------------------------------------------


def test_without_a_tokenizer_vllms_own_message_is_passed_on(http: httpx.Client, fakes: dict[str, FakeEngine]) -> None:
    fakes["vllm"].set(counts=False)
    message = said(too_long(http, "vllm", 1500))["message"]
    assert "maximum context length is 1000 tokens" in message
    assert "at least 1001 input tokens" in message


def test_a_prompt_that_fits_without_its_answer_keeps_vllms_message(
    http: httpx.Client, fakes: dict[str, FakeEngine]
) -> None:
    """vLLM 0.30 refuses it. Since 0.32 it answers with as many tokens as there is room for."""
    assert http.post(CHAT, json={"model": "vllm", "messages": [user(500)], "max_tokens": 600}).status_code == 200
    fakes["vllm"].set(clips=False)
    message = said(too_long(http, "vllm", 500, max_tokens=600))["message"]
    assert "you requested 600 output tokens" in message


def test_a_prompt_that_is_many_times_too_long_is_not_counted(http: httpx.Client, fakes: dict[str, FakeEngine]) -> None:
    """The number is not worth the work."""
    assert "at least 1001 input tokens" in said(too_long(http, "vllm", 50_000))["message"]
    assert fakes["vllm"].asked("/tokenize") == []


def test_numbers_that_llamacpp_leaves_out_are_asked_for(http: httpx.Client, fakes: dict[str, FakeEngine]) -> None:
    fakes["llamacpp"].set(numbers=False)
    assert said(too_long(http, "llamacpp", 1500))["message"].startswith(told(1000, "messages", 1501))
    body = {"model": "llamacpp", "prompt": "a " * 1500}
    assert said(http.post(COMPLETIONS, json=body))["message"].startswith(told(1000, "prompt", 1500))
    fakes["llamacpp"].set(counts=False)
    assert "resulted in more than 1000 tokens" in said(too_long(http, "llamacpp", 1500))["message"]


NESTED = '{"error":{"code":400,"message":"request (9 tokens) exceeds the available context size (8 tokens)","type":'
SHAPES: dict[str, Any] = {
    "llama.cpp": {"code": 400, "message": "x (9 tokens) y (8 tokens)", "type": "exceed_context_size_error"},
    "Ollama, an envelope within": {
        "message": NESTED + '"exceed_context_size_error"}}',
        "type": "invalid_request_error",
    },
    "Ollama, its own": NESTED + '"exceed_context_size_error"}}',
    "Ollama on a Mac": {"message": "input length (9 tokens) exceeds the model's maximum context length (8 tokens)"},
    "vLLM": {"message": "This model's maximum context length is 8 tokens. However …", "code": 400},
    "vLLM, in characters": {
        "message": "This model's maximum context length is 8 tokens. However, your prompt contains 100148 characters "
        "(more than 648 characters, which is the upper bound for 8 input tokens). Please reduce the length …",
        "code": 400,
    },
    "vLLM, older": {"message": "You passed 9 input tokens … the model's context length is only 8 tokens", "code": 400},
}


@BOTH
@pytest.mark.parametrize("shape", SHAPES)
def test_every_form_of_a_context_error_becomes_the_same_error(http: httpx.Client, shape: str, stream: bool) -> None:
    """As a refusal, and as a stream's first event; some of these have no status there."""
    error = SHAPES[shape]
    if stream and isinstance(error, dict):
        script = [["event", {"error": error | {"code": 400}}]]
    else:
        script = [["json", [400, {"error": error}]]]
    answer = too_long(http, "vllm", 1, stream=True, script=script)
    assert "8 tokens" in said(answer)["message"]


@pytest.mark.parametrize("counts", [True, False])
def test_a_prompt_of_all_tokens_leaves_none_for_an_answer(
    http: httpx.Client, fakes: dict[str, FakeEngine], counts: bool
) -> None:
    """vLLM then reports max_tokens, although the request has none; llama.cpp and Ollama report equal numbers."""
    fakes["vllm"].set(counts=counts)
    message = "max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)"
    script = [["json", [400, {"error": {"message": message, "code": 400}}]]]
    answer = too_long(http, "vllm", 999, stream=True, script=script)
    if counts:
        assert said(answer)["message"].startswith(told(1000, "messages", 1000))
    else:
        assert "1000 tokens. However, your messages resulted in at least 1000 tokens." in said(answer)["message"]
    assert said(too_long(http, "llamacpp", 999))["message"].startswith(told(1000, "messages", 1000))


def test_what_vllm_tells_in_characters_is_told_in_tokens(http: httpx.Client) -> None:
    shape = SHAPES["vLLM, in characters"]
    script = [["json", [400, {"error": shape}]]]
    message = said(too_long(http, "vllm", 900, stream=True, script=script))["message"]
    assert "However, your messages resulted in more than 8 tokens." in message
    assert "characters" not in message
