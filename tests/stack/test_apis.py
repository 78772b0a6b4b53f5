"""The Responses and Messages APIs against a real model: the official packages, and nothing else."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pydantic
import pytest

from tests.support.processes import KEY, wait_for
from tests.support.stack import Stack

MODEL = "SmolLM2-135M-Instruct"
QUESTION = "Count from 1 to 5."
GREEDY = {"temperature": 0}  # the package has no such parameter any more
CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}


class City(pydantic.BaseModel):
    city: str


@pytest.fixture
def claude(stack: Stack) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=stack.url, api_key=KEY, max_retries=0, timeout=200) as client:
        yield client


def said(text: str) -> Any:
    return [{"role": "user", "content": text}]


def read_by(message: anthropic.types.Message) -> int:
    """All tokens of a message's prompt: Anthropic tells those that were in the cache apart."""
    return message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0)


def test_a_response_is_the_same_blocking_and_streamed(client: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "input": QUESTION, "temperature": 0, "max_output_tokens": 30}
    whole = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        events = list(stream)
    final = events[-1].response  # the helper's own final response is for those that are complete
    text = "".join(it.delta for it in events if it.type == "response.output_text.delta")
    assert final.incomplete_details.reason == "max_output_tokens"
    assert text == final.output_text == whole.output_text != ""
    assert final.usage.output_tokens == 30
    assert final.usage.input_tokens == client.responses.input_tokens.count(model=MODEL, input=QUESTION).input_tokens


def test_a_message_is_the_same_blocking_and_streamed(claude: anthropic.Anthropic) -> None:
    asked: Any = {"model": MODEL, "messages": said(QUESTION), "max_tokens": 30, "extra_body": GREEDY}
    whole = claude.messages.create(**asked)
    with claude.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == whole.content[0].text != ""
    assert final.usage.output_tokens == 30
    counted = claude.messages.count_tokens(model=MODEL, messages=said(QUESTION)).input_tokens
    assert read_by(final) == counted


def test_all_three_apis_give_the_model_the_same_prompt(client: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    chat = client.chat.completions.create(model=MODEL, messages=said(QUESTION), temperature=0, max_tokens=20)
    response = client.responses.create(model=MODEL, input=QUESTION, temperature=0, max_output_tokens=20)
    message = claude.messages.create(model=MODEL, messages=said(QUESTION), max_tokens=20, extra_body=GREEDY)
    text = chat.choices[0].message.content
    assert text == response.output_text == message.content[0].text
    assert chat.usage is not None
    assert chat.usage.prompt_tokens == response.usage.input_tokens == read_by(message)


def test_an_answer_is_parsed_into_a_model(client: openai.OpenAI) -> None:
    asked = "Name a city, as JSON."
    parsed = client.responses.parse(model=MODEL, input=asked, text_format=City, max_output_tokens=60)
    assert isinstance(parsed.output_parsed, City)


def test_a_tools_round_trip(client: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    tool: Any = {"type": "function", "name": "weather", "parameters": CITY, "strict": False}
    turns: Any = [
        {"role": "user", "content": "Weather in Rome?"},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city":"Rome"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
    ]
    answer = client.responses.create(model=MODEL, input=turns, tools=[tool], temperature=0, max_output_tokens=20)
    assert answer.status in ("completed", "incomplete")
    assert answer.output
    use = {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Rome"}}
    result = {"type": "tool_result", "tool_use_id": "c1", "content": "sunny"}
    messages: Any = [
        *said("Weather in Rome?"),
        {"role": "assistant", "content": [use]},
        {"role": "user", "content": [result]},
    ]
    named: Any = [{"name": "weather", "input_schema": CITY}]
    message = claude.messages.create(model=MODEL, messages=messages, tools=named, max_tokens=20)
    assert message.stop_reason in ("end_turn", "max_tokens", "tool_use")


def test_the_models_own_call_makes_a_round_trip_over_responses(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "name": "weather", "parameters": CITY, "strict": False}
    turns: Any = [{"role": "user", "content": "Weather in Rome?"}]
    asked: Any = {"model": MODEL, "tools": [tool], "temperature": 0, "max_output_tokens": 60}
    demand: Any = {"tool_choice": "required", "parallel_tool_calls": False}
    with client.responses.stream(input=turns, **demand, **asked) as stream:
        kinds = [it.type for it in stream]
        first = stream.get_final_response()
    assert {"response.function_call_arguments.delta", "response.function_call_arguments.done"} <= set(kinds)
    (call,) = first.output
    assert (call.type, call.name) == ("function_call", "weather")
    assert isinstance(json.loads(call.arguments)["city"], str)
    turns += [call.to_dict(), {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
    second = client.responses.create(input=turns, **asked)
    assert second.status in ("completed", "incomplete")
    assert second.output_text


def test_the_models_own_call_makes_a_round_trip_over_messages(claude: anthropic.Anthropic) -> None:
    turns = said("Weather in Rome?")
    asked: Any = {"model": MODEL, "max_tokens": 60, "extra_body": GREEDY}
    asked["tools"] = [{"name": "weather", "input_schema": CITY}]
    with claude.messages.stream(messages=turns, tool_choice={"type": "tool", "name": "weather"}, **asked) as stream:
        first = stream.get_final_message()
    (use,) = first.content
    assert (first.stop_reason, use.type, use.name) == ("tool_use", "tool_use", "weather")
    assert isinstance(use.input["city"], str)
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "sunny"}
    turns += [{"role": "assistant", "content": [use.to_dict()]}, {"role": "user", "content": [result]}]
    second = claude.messages.create(messages=turns, **asked)
    assert second.content[0].text


def test_errors_are_the_packages_exceptions(client: openai.OpenAI, claude: anthropic.Anthropic, stack: Stack) -> None:
    picture: Any = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}
    with pytest.raises(openai.BadRequestError) as image:
        client.responses.create(model=MODEL, input=[{"role": "user", "content": [picture]}])
    assert image.value.param == "input"
    source = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
    with pytest.raises(anthropic.BadRequestError, match="takes only text"):
        claude.messages.create(
            model=MODEL, messages=[{"role": "user", "content": [{"type": "image", "source": source}]}], max_tokens=9
        )
    with pytest.raises(openai.BadRequestError) as long:
        client.responses.create(model=MODEL, input="word " * 20_000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        claude.messages.create(model=MODEL, messages=said("word " * 20_000), max_tokens=9)
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="nope", messages=said("x"), max_tokens=9)
    with (
        anthropic.Anthropic(base_url=stack.url, api_key="wrong", max_retries=0) as wrong,
        pytest.raises(anthropic.AuthenticationError),
    ):
        wrong.messages.create(model=MODEL, messages=said("x"), max_tokens=9)


def test_a_client_that_leaves_is_a_client_that_left(
    client: openai.OpenAI, claude: anthropic.Anthropic, stack: Stack
) -> None:
    asked: Any = {"model": MODEL, "messages": said("Tell a very long story."), "max_tokens": 2000}
    with claude.messages.stream(**asked) as stream:
        next(iter(stream.text_stream))
        left = {"messages": stream.response.headers["request-id"]}
    asked = {"model": MODEL, "input": "Tell a very long story.", "max_output_tokens": 2000}
    with client.responses.create(stream=True, **asked) as events:
        next(it for it in events if it.type == "response.output_text.delta")
        left["responses"] = events.response.headers["x-request-id"]

    def line(request_id: str) -> str:
        log = stack.container("gateway").logs().decode()
        return next((it for it in log.splitlines() if request_id in it and '"outcome"' in it), "")

    for api, request_id in left.items():
        assert '"outcome":"client_left"' in wait_for(lambda it=request_id: line(it))  # type: ignore[misc]
        assert f'"api":"{api}"' in line(request_id)
