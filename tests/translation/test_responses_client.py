"""Responses answers as the official client takes them, its own stream helpers included. It reads what the writer wrote;
between the two stands only httpx's transport."""

from collections.abc import Callable
from typing import Any

import httpx
import openai
import orjson
import pytest
from pydantic import BaseModel

from gateway.errors import BadRequest, EngineLost
from gateway.translation.responses import Asked, envelope, read, status_of
from tests.support.responses_answers import call, chunk

USAGE = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
TOOLS: Any = [
    {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}, "strict": False},
    {"type": "web_search"},
]


class Person(BaseModel):
    name: str
    age: int


def _client(chunks: list[dict[str, Any]], fail: Callable[[Asked], bytes] | None = None) -> openai.OpenAI:
    """A client of a gateway whose engine answers with these chunks."""

    def answer(request: httpx.Request) -> httpx.Response:
        try:
            asked = read(orjson.loads(request.content), request_id="r1", now=1700000000)
        except BadRequest as error:
            return httpx.Response(status_of(error), content=envelope(error)[0])
        writer = asked.writer
        if asked.stream:
            stream = writer.head() + writer.waiting() + b"".join(map(writer.chunk, chunks))
            stream += fail(asked) if fail else writer.end()
            return httpx.Response(200, content=stream, headers={"content-type": "text/event-stream"})
        text = "".join(it["choices"][0]["delta"].get("content", "") for it in chunks if it["choices"])
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        whole = writer.whole({"choices": [choice], "usage": USAGE})
        return httpx.Response(200, content=orjson.dumps(whole), headers={"content-type": "application/json"})

    http = httpx.Client(transport=httpx.MockTransport(answer))
    return openai.OpenAI(api_key="k", base_url="http://gateway/v1", http_client=http, max_retries=0)


TEXT = [
    chunk(reasoning="Hm."),
    chunk(content="Hel"),
    chunk(content="lo"),
    chunk("stop"),
    {"choices": [], "usage": USAGE},
]


def test_a_blocking_answer_has_its_text_and_usage() -> None:
    with _client(TEXT) as client:
        response = client.responses.create(model="m", input="Hi")
    assert response.output_text == "Hello"
    assert response.usage is not None
    assert response.usage.total_tokens == 18


def test_the_stream_helper_ends_with_the_whole_response() -> None:
    with _client(TEXT) as client, client.responses.stream(model="m", input="Hi", tools=TOOLS) as stream:
        deltas = [it.delta for it in stream if it.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert deltas == ["Hel", "lo"]
    assert final.output_text == "Hello"
    assert final.status == "completed"


def test_the_stream_helper_takes_text_and_two_calls() -> None:
    chunks = [
        chunk(content="Let me look."),
        call(0, "weather", "{}", "a"),
        call(1, "weather", "", "b"),
        chunk("tool_calls"),
    ]
    with _client(chunks) as client, client.responses.stream(model="m", input="Hi", tools=TOOLS) as stream:
        final = stream.get_final_response()
    assert [it.type for it in final.output] == ["message", "function_call", "function_call"]


def test_a_parsed_answer_is_the_model_that_was_asked_for() -> None:
    with _client([chunk(content='{"name": "Tom", "age": 9}')]) as client:
        response = client.responses.parse(model="m", input="Hi", text_format=Person)
    assert response.output_parsed == Person(name="Tom", age=9)


def test_a_broken_stream_is_an_exception_with_the_gateways_words() -> None:
    broken = _client([chunk(content="Hel")], lambda it: it.writer.failed(EngineLost("The engine was lost.")))
    with broken as client, pytest.raises(openai.APIError, match="The engine was lost"):
        for _ in client.responses.create(model="m", input="Hi", stream=True):
            pass


def test_a_wrong_field_is_a_bad_request_that_names_it() -> None:
    with _client([]) as client, pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="m", input="Hi", background=True)
    assert caught.value.param == "background"
