"""Clients as users have them: the official openai package, the gateway's own LLM, and `python -m gateway.cli.chat`."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from typing import Any

import openai
import pytest

from gateway.llm import LLM, LLMConfig, LLMError, config_from_env
from tests.support.processes import KEY, MESSAGES, PROXIED, ROOT, FakeEngine, GatewayProcess, environment, fake_engine


@pytest.fixture
def client(gateway: GatewayProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=gateway.url + "/v1", api_key=KEY, max_retries=0)


def test_openai_blocking_and_streaming(client: openai.OpenAI) -> None:
    messages: Any = MESSAGES
    answer = client.chat.completions.create(model="llama3.1:8b", messages=messages)
    assert answer.choices[0].message.content == "one two three"
    stream = client.chat.completions.create(model="llama3.1:8b", messages=messages, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "one two three"
    assert "llama3.1:8b" in [model.id for model in client.models.list()]
    assert client.models.retrieve("org/name:tag").id == "org/name:tag"
    assert client.embeddings.create(model="fake-model", input="x", encoding_format="float").data[0].embedding == [
        0.5,
        -0.25,
    ]


def test_openai_raises_the_right_errors(client: openai.OpenAI, gateway: GatewayProcess) -> None:
    messages: Any = MESSAGES
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=gateway.url + "/v1", api_key="wrong").models.list()
    with pytest.raises(openai.NotFoundError) as not_found:
        client.chat.completions.create(model="nope", messages=messages)
    assert not_found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="fake-model", messages=[])
    assert bad.value.param == "messages"
    broken = {"script": [["role"], ["token", "x"], ["close"]]}
    with pytest.raises(openai.APIError) as cut:  # not a clean end, which it would take for success
        list(client.chat.completions.create(model="fake-model", messages=messages, stream=True, extra_body=broken))
    assert cut.value.code == "engine_broken_stream"


def test_llm_against_the_gateway_and_the_engine_itself(gateway: GatewayProcess, engine: FakeEngine) -> None:
    for base_url in (gateway.url + "/v1", engine.url + "/v1"):
        with LLM(LLMConfig(base_url, "fake-model", timeout=30, api_key=KEY)) as llm:
            answer = llm.chat(MESSAGES, max_tokens=5, seed=1)
            assert answer["choices"][0]["message"]["content"] == "one two three"
            assert (
                engine.seen()[-1]["body"] | {"messages": MESSAGES, "temperature": 0.7, "max_tokens": 5, "seed": 1}
                == (engine.seen()[-1]["body"])
            )
            assert asyncio.run(collect(llm)) == "one two three"
            assert asyncio.run(collect(llm)) == "one two three"  # also in a second event loop


async def collect(llm: LLM, **kwargs: Any) -> str:
    chunks = [chunk async for chunk in llm.astream(MESSAGES, **kwargs)]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


def test_llm_says_what_went_wrong(gateway: GatewayProcess, engine: FakeEngine) -> None:
    with LLM(LLMConfig(gateway.url + "/v1", "nope", timeout=30, api_key=KEY)) as llm:
        with pytest.raises(LLMError, match="does not exist here") as error:
            llm.chat(MESSAGES)
        assert (error.value.status, error.value.code) == (404, "model_not_found")
        with pytest.raises(LLMError, match="does not exist here"):
            asyncio.run(collect(llm))
    with LLM(LLMConfig(engine.url + "/v1", "fake-model", timeout=30)) as direct:
        with pytest.raises(LLMError, match="before the answer was complete"):
            asyncio.run(collect(direct, script=[["role"], ["token", "x"], ["end"]]))
        with pytest.raises(LLMError, match="connection broke"):
            asyncio.run(collect(direct, script=[["role"], ["token", "x"], ["close"]]))
        with pytest.raises(LLMError, match="out of memory"):
            asyncio.run(collect(direct, script=[["event", {"error": "out of memory"}], ["end"]]))
    with (
        LLM(LLMConfig("http://127.0.0.1:1/v1", "m", timeout=1)) as nobody,
        pytest.raises(LLMError, match="is unreachable"),
    ):
        nobody.chat(MESSAGES)


def test_config_from_env(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("LLM_"):
            monkeypatch.delenv(name)
    assert config_from_env() == LLMConfig("http://127.0.0.1:11434/v1", "llama3.1:8b", 600.0, None)
    monkeypatch.setenv("LLM_BACKEND", "vllm")
    assert config_from_env() == LLMConfig("http://127.0.0.1:8000/v1", "meta-llama/Llama-3.1-8B-Instruct", 600.0, None)
    monkeypatch.setenv("LLM_BASE_URL", "http://127.0.0.1:9000/")
    monkeypatch.setenv("LLM_MODEL", "m")
    monkeypatch.setenv("LLM_TIMEOUT", "5")
    monkeypatch.setenv("LLM_API_KEY", "k")
    assert config_from_env() == LLMConfig("http://127.0.0.1:9000/v1", "m", 5.0, "k")
    with LLM() as llm:
        assert llm.config == config_from_env()
    assert "k'" not in repr(config_from_env())


def chat(gateway_port: int, *arguments: str, key: str = KEY, **more: str) -> subprocess.CompletedProcess[str]:
    env = environment("http://127.0.0.1:1", STACK_BIND=f"127.0.0.1:{gateway_port}", STACK_API_KEYS=key, **more)
    command = [sys.executable, "-m", "gateway.cli.chat", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_the_chat_command_asks_no_proxy(gateway: GatewayProcess) -> None:
    done = chat(gateway.port, "Hi", **PROXIED)
    assert (done.returncode, done.stdout) == (0, "one two three\n"), done.stderr


def test_the_chat_command_streams_an_answer(gateway: GatewayProcess) -> None:
    done = chat(gateway.port, "Say", "something")
    assert (done.returncode, done.stdout) == (0, "one two three\n"), done.stderr
    wrong = chat(gateway.port, "Hi", key="wrong-key")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("Incorrect API key provided")
    with fake_engine() as nothing:
        nothing.process.kill()
    gone = chat(int(nothing.url.rpartition(":")[2]), "Hi")
    assert gone.returncode == 1
    assert "is unreachable" in gone.stderr
    assert "Traceback" not in gone.stderr


@pytest.mark.parametrize("how", ["Ctrl-C", "the end of its input"])
def test_the_chat_command_ends_quietly_when_its_caller_goes_and_on_a_terminal_without_unicode(
    gateway: GatewayProcess, engine: FakeEngine, mark: str, how: str
) -> None:
    script = json.dumps([["role"], ["token", "h\u00e9"], ["gate", mark]])
    env = environment("http://127.0.0.1:1", STACK_BIND=f"127.0.0.1:{gateway.port}") | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "gateway.cli.chat", "--until-eof", "script:" + script]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=env, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None
        assert process.stdout.read(5) == rb"h\xe9"
        if how == "Ctrl-C":
            process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    engine.release(mark)
    assert (process.returncode, said) == (130, b"")
