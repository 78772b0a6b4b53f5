"""The official anthropic package and the Messages API, over sockets, in each engine's dialect."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from tests.support.faces import END, script
from tests.support.fakes.dialects import ENGINES
from tests.support.processes import KEY, FakeEngine, GatewayProcess, wait_for
from tests.support.tool_streams import CITY, calls

WEATHER: Any = {"name": "weather", "description": "Tell the weather.", "input_schema": CITY}


@pytest.fixture(scope="module")
def client(before_all: GatewayProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=before_all.url, api_key=KEY, max_retries=0) as client:
        yield client


def said(text: str) -> Any:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("engine", ENGINES)
def test_text_blocking_and_streamed(client: anthropic.Anthropic, engine: str) -> None:
    whole = client.messages.create(model=engine, max_tokens=99, messages=said("Hello"), system="Be brief.")
    assert [it.text for it in whole.content] == ["one two three"]
    assert (whole.stop_reason, whole.usage.output_tokens, whole.model) == ("end_turn", 3, engine)
    assert whole._request_id
    events = list(client.messages.create(model=engine, max_tokens=99, messages=said("Hello"), stream=True))
    assert [events[0].type, events[-1].type] == ["message_start", "message_stop"]
    assert "".join(it.delta.text for it in events if it.type == "content_block_delta") == "one two three"


@pytest.mark.parametrize("engine", ENGINES)
def test_the_stream_helper_adds_up_the_answer(client: anthropic.Anthropic, engine: str) -> None:
    with client.messages.stream(model=engine, max_tokens=99, messages=said("Hello")) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == "one two three"
    assert final.usage.input_tokens > 0
    assert final.usage.output_tokens == 3


@pytest.mark.parametrize("engine", ENGINES)
def test_a_tools_use_and_its_result(client: anthropic.Anthropic, fakes: dict[str, FakeEngine], engine: str) -> None:
    asked = said(calls('{"ci', 'ty":"Rome"}'))
    with client.messages.stream(model=engine, max_tokens=99, messages=asked, tools=[WEATHER]) as stream:
        first = stream.get_final_message()
    (use,) = first.content
    assert (first.stop_reason, use.name, use.input) == ("tool_use", "weather", {"city": "Rome"})
    result: Any = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "sunny"}]}
    turns = [*said("Weather?"), {"role": "assistant", "content": [use.to_dict()]}, result]
    fakes[engine].set()
    second = client.messages.create(model=engine, max_tokens=99, messages=turns, tools=[WEATHER])
    assert second.content[0].text == "one two three"
    (got,) = fakes[engine].asked("/v1/chat/completions")
    assert [it["role"] for it in got["body"]["messages"]] == ["user", "assistant", "tool"]
    assert got["body"]["messages"][2]["content"] == "sunny"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_tools_use_comes_back_with_all_digits(
    client: anthropic.Anthropic, fakes: dict[str, FakeEngine], engine: str
) -> None:
    """The answer has the digits that the engine wrote, and the client sends them back."""
    big = 10**24 + 1
    asked = said(calls(f'{{"city":{big}}}'))
    with client.messages.stream(model=engine, max_tokens=99, messages=asked, tools=[WEATHER]) as stream:
        (use,) = stream.get_final_message().content
    assert use.input == {"city": big}
    result: Any = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "sunny"}]}
    turns = [*said("Weather?"), {"role": "assistant", "content": [use.to_dict()]}, result]
    fakes[engine].set()
    client.messages.create(model=engine, max_tokens=99, messages=turns, tools=[WEATHER])
    (got,) = fakes[engine].asked("/v1/chat/completions")
    (call,) = got["body"]["messages"][1]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"city": big}


@pytest.mark.parametrize("stream", [False, True])
def test_the_tool_runner_goes_on_without_a_thread(client: anthropic.Anthropic, stream: bool) -> None:
    asked: list[str] = []

    @anthropic.beta_tool
    def weather(city: str) -> str:
        """Tell the weather."""
        asked.append(city)
        return "sunny"

    says = said(script(["says", {"calls": [["weather", ['{"city":"Rome"}']]]}]))
    runner: Any = client.beta.messages.tool_runner(
        model="vllm", max_tokens=99, messages=says, tools=[weather], stream=stream
    )
    turns = [it.get_final_message() if stream else it for it in runner]
    assert [it.stop_reason for it in turns] == ["tool_use", "end_turn"]
    assert asked == ["Rome"]


def test_a_thread_is_refused_as_the_package_knows_it(client: anthropic.Anthropic) -> None:
    thread = client.beta.messages.thread(model="vllm", max_tokens=9, messages=said("Hello"))
    with pytest.raises(anthropic.types.ThreadUnsupportedRequestError, match="keeps no conversations"):
        thread.send()


def test_thinking_is_a_block_of_its_own(client: anthropic.Anthropic) -> None:
    thought = {"choices": [{"index": 0, "delta": {"reasoning_content": "Hm."}, "finish_reason": None}]}
    asked = said(script(["role"], ["event", thought], ["token", "Yes"], *END))
    thinking: Any = {"type": "adaptive"}
    with client.messages.stream(model="vllm", max_tokens=99, messages=asked, thinking=thinking) as stream:
        final = stream.get_final_message()
    assert [it.type for it in final.content] == ["thinking", "text"]
    assert final.content[0].thinking == "Hm."


def test_errors_are_the_packages_exceptions(client: anthropic.Anthropic, before_all: GatewayProcess) -> None:
    wrong = anthropic.Anthropic(base_url=before_all.url, api_key="wrong", max_retries=0)
    with wrong, pytest.raises(anthropic.AuthenticationError):
        wrong.messages.create(model="vllm", max_tokens=9, messages=said("Hello"))
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(model="nope", max_tokens=9, messages=said("Hello"))
    assert missing.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.messages.create(model="vllm", max_tokens=0, messages=said("Hello"))
    with pytest.raises(anthropic.InternalServerError) as dead:
        client.messages.create(
            model="vllm", max_tokens=9, messages=said(script(["json", [503, {"error": {"message": "x"}}]])), stream=True
        )
    assert (dead.value.status_code, dead.value.body["error"]["type"]) == (503, "overloaded_error")


def test_a_stream_that_breaks_raises(client: anthropic.Anthropic) -> None:
    asked = said(script(["role"], ["token", "x"], ["close"]))
    stream = client.messages.create(model="vllm", max_tokens=9, messages=asked, stream=True)
    with pytest.raises(anthropic.APIStatusError) as broken:
        list(stream)
    assert broken.value.body["error"]["type"] == "api_error"


def test_models_are_listed(client: anthropic.Anthropic) -> None:
    assert "vllm" in [it.id for it in client.models.list()]


def test_errors_about_models_have_anthropics_form(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.AuthenticationError) as unknown_key:
        list(client.with_options(api_key="sk-unknown").models.list())
    with pytest.raises(anthropic.NotFoundError) as unknown_model:
        client.models.retrieve("no/such:model")
    for raised, kind in ((unknown_key, "authentication_error"), (unknown_model, "not_found_error")):
        assert isinstance(raised.value.body, dict)
        assert (raised.value.body["type"], raised.value.body["error"]["type"]) == ("error", kind)
        assert raised.value.request_id == raised.value.body["request_id"]


def test_tokens_are_counted(client: anthropic.Anthropic) -> None:
    assert client.messages.count_tokens(model="vllm", messages=said("one two")).input_tokens == 3


def test_a_client_that_leaves_stops_the_engine(
    client: anthropic.Anthropic, fakes: dict[str, FakeEngine], mark: str
) -> None:
    asked = said(script(["role"], ["token", mark], ["gate", mark]))

    def states() -> list[str]:
        return [it["state"] for it in fakes["vllm"].seen() if mark in str(it["body"]["messages"])]

    with client.messages.stream(model="vllm", max_tokens=9, messages=asked) as stream:
        next(iter(stream.text_stream))
        assert states() == ["running"]
    wait_for(lambda: states() == ["hung_up"])
