"""The official openai package and the Responses API, over sockets, in each engine's dialect."""

from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest

from tests.support.faces import END, script
from tests.support.fakes.dialects import ENGINES
from tests.support.processes import KEY, FakeEngine, GatewayProcess, wait_for
from tests.support.tool_streams import CITY, calls

WEATHER: Any = {"type": "function", "name": "weather", "parameters": CITY, "strict": False}


@pytest.fixture(scope="module")
def client(before_all: GatewayProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=before_all.url + "/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.mark.parametrize("engine", ENGINES)
def test_text_blocking_and_streamed(client: openai.OpenAI, engine: str) -> None:
    whole = client.responses.create(model=engine, input="Hello", instructions="Be brief.")
    assert (whole.output_text, whole.status, whole.usage.output_tokens) == ("one two three", "completed", 3)
    assert whole.model == engine
    events = list(client.responses.create(model=engine, input="Hello", stream=True))
    assert [it.sequence_number for it in events] == list(range(len(events)))
    assert "".join(it.delta for it in events if it.type == "response.output_text.delta") == "one two three"
    assert events[-1].response.output_text == "one two three"


@pytest.mark.parametrize("engine", ENGINES)
def test_the_stream_helper_adds_up_the_answer(client: openai.OpenAI, engine: str) -> None:
    with client.responses.stream(model=engine, input="Hello") as stream:
        kinds = [it.type for it in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert final.output_text == "one two three"
    assert final.usage.total_tokens == final.usage.input_tokens + final.usage.output_tokens > 3


@pytest.mark.parametrize("engine", ENGINES)
def test_a_tools_call_and_its_output(client: openai.OpenAI, fakes: dict[str, FakeEngine], engine: str) -> None:
    with client.responses.stream(model=engine, input=calls('{"ci', 'ty":"Rome"}'), tools=[WEATHER]) as stream:
        for _ in stream:
            pass
        first = stream.get_final_response()
    (call,) = first.output
    assert (call.type, call.name, call.arguments) == ("function_call", "weather", '{"city":"Rome"}')
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    asked: Any = [{"role": "user", "content": "Weather?"}, call.to_dict(), output]
    fakes[engine].set()
    assert client.responses.create(model=engine, input=asked, tools=[WEATHER]).output_text == "one two three"
    (got,) = fakes[engine].asked("/v1/chat/completions")
    assert [it["role"] for it in got["body"]["messages"]] == ["user", "assistant", "tool"]
    assert got["body"]["messages"][2] | {"role": "tool"} == got["body"]["messages"][2]
    assert got["body"]["tools"][0]["function"]["name"] == "weather"


class City(pydantic.BaseModel):
    city: str


@pytest.mark.parametrize("engine", ENGINES)
def test_an_answer_is_parsed_into_a_model(client: openai.OpenAI, fakes: dict[str, FakeEngine], engine: str) -> None:
    fakes[engine].set()
    said = script(["role"], ["token", '{"city":'], ["token", '"Rome"}'], *END)
    with client.responses.stream(model=engine, input=said, text_format=City) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_parsed == City(city="Rome")
    (got,) = fakes[engine].asked("/v1/chat/completions")
    schema = got["body"]["response_format"]["json_schema"]
    assert schema["schema"]["properties"].keys() == {"city"}
    with pytest.raises(pydantic.ValidationError):  # "one two three" is no JSON: the request itself was fine
        client.responses.parse(model=engine, input="Hello", text_format=City)


def test_an_answer_that_its_limit_cut_is_incomplete(client: openai.OpenAI) -> None:
    said = script(["role"], ["token", "one"], ["finish", "length"], *END[1:])
    with client.responses.stream(model="vllm", input=said, max_output_tokens=1) as stream:
        last = list(stream)[-1]
    assert last.type == "response.incomplete"
    assert last.response.incomplete_details.reason == "max_output_tokens"


def test_errors_are_the_packages_exceptions(client: openai.OpenAI, before_all: GatewayProcess) -> None:
    wrong = openai.OpenAI(base_url=before_all.url + "/v1", api_key="wrong", max_retries=0)
    with wrong, pytest.raises(openai.AuthenticationError):
        wrong.responses.create(model="vllm", input="Hello")
    with pytest.raises(openai.NotFoundError) as missing:
        client.responses.create(model="nope", input="Hello")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.responses.create(model="vllm", input="Hello", max_output_tokens=0)
    assert bad.value.param == "max_output_tokens"
    with pytest.raises(openai.BadRequestError) as stored:
        client.responses.create(model="vllm", input="Hello", store=True)
    assert stored.value.param == "store"


def test_a_stream_that_breaks_raises(client: openai.OpenAI) -> None:
    stream = client.responses.create(model="vllm", input=script(["role"], ["token", "x"], ["close"]), stream=True)
    got: list[Any] = []
    with pytest.raises(openai.APIError) as broken:
        got.extend(stream)
    assert got[-1].delta == "x"
    assert "broke" in broken.value.message


def test_tokens_are_counted(client: openai.OpenAI) -> None:
    assert client.responses.input_tokens.count(model="vllm", input="one two").input_tokens == 3


def test_a_client_that_leaves_stops_the_engine(client: openai.OpenAI, fakes: dict[str, FakeEngine], mark: str) -> None:
    said = script(["role"], ["token", mark], ["gate", mark])

    def states() -> list[str]:
        return [it["state"] for it in fakes["vllm"].seen() if mark in str(it["body"]["messages"])]

    with client.responses.create(model="vllm", input=said, stream=True) as stream:
        next(it for it in stream if it.type == "response.output_text.delta")
        assert states() == ["running"]
    wait_for(lambda: states() == ["hung_up"])
