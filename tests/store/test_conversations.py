"""Conversations over the Responses API whose past the gateway has stored: the official package, in both databases."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.command import Command
from tests.support.faces import END, script
from tests.support.processes import KEY, FakeEngine, GatewayProcess, running_gateway

SECOND = "sk-second-0123456789abcdef"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Any = {"type": "function", "name": "weather", "parameters": CITY, "strict": False}


@pytest.fixture(scope="module")
def gateway(
    engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory, lasting_settings: dict[str, str]
) -> Iterator[GatewayProcess]:
    """With two workers: a response is found by the one that did not make it."""
    log = tmp_path_factory.mktemp("conversations") / "log"
    settings = lasting_settings | {"STACK_RESPONSES_DAYS": "2", "STACK_MAX_BODY_BYTES": "200000"}
    with running_gateway(log, engine.url, **settings) as gateway:
        yield gateway


def official(gateway: GatewayProcess, key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(base_url=gateway.url + "/v1", api_key=key, max_retries=0)


@pytest.fixture
def client(gateway: GatewayProcess) -> Iterator[openai.OpenAI]:
    with official(gateway) as client:
        yield client


def said(engine: FakeEngine, mark: str) -> list[tuple[str, Any]]:
    """The messages of the last request that begins with the mark."""
    found = [it["body"]["messages"] for it in engine.seen() if mark in str(it["body"].get("messages"))]
    return [(it["role"], it.get("content")) for it in found[-1]]


def test_a_conversation_goes_on_by_its_last_response(client: openai.OpenAI, engine: FakeEngine, mark: str) -> None:
    first = client.responses.create(model="fake-model", input=mark, instructions="Be brief.")
    assert first.model_dump()["store"] is True
    for _ in range(10):  # streamed, and asked again at once
        with client.responses.create(
            model="fake-model", input="And then?", previous_response_id=first.id, stream=True
        ) as stream:
            last = next(it for it in stream if it.type == "response.completed")
        third = client.responses.create(model="fake-model", input="Why?", previous_response_id=last.response.id)
        assert (third.output_text, third.previous_response_id) == ("one two three", last.response.id)
    assert said(engine, mark) == [  # without the instructions of a response before, as OpenAI has it
        ("user", mark),
        ("assistant", "one two three"),
        ("user", "And then?"),
        ("assistant", "one two three"),
        ("user", "Why?"),
    ]
    counted = client.responses.input_tokens.count(model="fake-model", input="Why?", previous_response_id=third.id)
    alone = client.responses.input_tokens.count(model="fake-model", input="Why?")
    assert counted.input_tokens > alone.input_tokens


def test_a_tools_output_follows_the_stored_call(client: openai.OpenAI, engine: FakeEngine, mark: str) -> None:
    function = {"name": "weather", "arguments": '{"city":"Rome"}'}
    call = {"index": 0, "id": "call_1", "type": "function", "function": function}
    told = ["event", {"choices": [{"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": None}]}]
    asks = script(["role"], told, ["finish", "tool_calls"], *END[1:])
    with client.responses.stream(model="fake-model", input=asks, tools=[WEATHER]) as stream:
        for _ in stream:
            pass
        first = stream.get_final_response()
    output: Any = [{"type": "function_call_output", "call_id": first.output[0].call_id, "output": mark}]
    client.responses.create(model="fake-model", input=output, tools=[WEATHER], previous_response_id=first.id)
    messages = [it["body"]["messages"] for it in engine.seen() if mark in str(it["body"].get("messages"))][-1]
    assert [it["role"] for it in messages] == ["user", "assistant", "tool"]
    assert messages[1]["tool_calls"][0]["function"] == function
    assert messages[2] == {"role": "tool", "tool_call_id": "call_1", "content": mark}


@pytest.mark.parametrize("form", [{"type": "item_reference"}, {}])
def test_an_item_is_found_by_its_reference(
    client: openai.OpenAI, engine: FakeEngine, mark: str, form: dict[str, str]
) -> None:
    first = client.responses.create(model="fake-model", input=mark)
    asked: Any = [
        {"role": "user", "content": mark},
        {**form, "id": first.output[0].id},
        {"role": "user", "content": "Go on."},
    ]
    client.responses.create(model="fake-model", input=asked)
    assert said(engine, mark) == [("user", mark), ("assistant", "one two three"), ("user", "Go on.")]
    asked[1]["id"] = "msg_nobody_0"
    with pytest.raises(openai.BadRequestError) as unknown:
        client.responses.create(model="fake-model", input=asked)
    assert unknown.value.param == "input[1].id"


def references(item_ids: Iterable[str]) -> Any:
    return [{"type": "item_reference", "id": it} for it in item_ids]


def test_the_responses_to_whose_items_a_request_refers_are_bounded(client: openai.OpenAI) -> None:
    made = [client.responses.create(model="fake-model", input="x" * 90_000).output[0].id for _ in range(3)]
    client.responses.create(model="fake-model", input=references(made[:2]))
    for ids, status in [
        (made, 413),  # together they are larger than a body may be
        ([f"msg_{number}_0" for number in range(1001)], 413),
        ([made[0], made[0]], 400),  # the item would be sent twice
    ]:
        with pytest.raises(openai.APIStatusError) as refused:
            client.responses.create(model="fake-model", input=references(ids))
        assert (refused.value.status_code, refused.value.body["param"]) == (status, "input")


def test_the_package_reads_pages_and_deletes(client: openai.OpenAI, mark: str) -> None:
    asked: Any = [{"role": "user", "content": f"{mark} {number}"} for number in range(30)]
    made = client.responses.create(model="fake-model", input=asked, metadata={"a": "b"})
    assert client.responses.retrieve(made.id) == made
    items = list(client.responses.input_items.list(made.id, order="asc", limit=7))  # it asks for page after page
    assert [it.content[0].text for it in items] == [f"{mark} {number}" for number in range(30)]
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)
    with pytest.raises(openai.BadRequestError) as gone:
        client.responses.create(model="fake-model", input="x", previous_response_id=made.id)
    assert (gone.value.param, gone.value.code) == ("previous_response_id", "previous_response_not_found")


def test_what_is_not_to_be_stored_and_what_fails_is_not_found(client: openai.OpenAI) -> None:
    made = client.responses.create(model="fake-model", input="Hello", store=False)
    assert made.model_dump()["store"] is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)
    stream = client.responses.create(model="fake-model", input=script(["role"], ["token", "x"], ["close"]), stream=True)
    ids = []
    with pytest.raises(openai.APIError):
        ids.extend(it.response.id for it in stream if it.type == "response.created")
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(ids[0])


def test_a_cut_answer_is_stored_as_it_is(client: openai.OpenAI) -> None:
    asks = script(["role"], ["token", "one"], ["finish", "length"], *END[1:])
    with client.responses.stream(model="fake-model", input=asks) as stream:
        last = list(stream)[-1]
    found = client.responses.retrieve(last.response.id)
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert found.output_text == "one"


def test_another_key_finds_nothing(client: openai.OpenAI, gateway: GatewayProcess) -> None:
    made = client.responses.create(model="fake-model", input="Hello")
    with official(gateway, SECOND) as other:
        for call in (other.responses.retrieve, other.responses.delete, other.responses.input_items.list):
            with pytest.raises(openai.NotFoundError):
                call(made.id)
        with pytest.raises(openai.BadRequestError):
            other.responses.create(model="fake-model", input="x", previous_response_id=made.id)
    assert client.responses.retrieve(made.id).id == made.id


def test_one_request_id_for_all_requests_makes_different_responses(gateway: GatewayProcess) -> None:
    with official(gateway).with_options(default_headers={"x-request-id": "session-1"}) as client:
        first = client.responses.create(model="fake-model", input="one?")
        second = client.responses.create(model="fake-model", input="two?", previous_response_id=first.id)
        assert client.responses.retrieve(second.id).previous_response_id == first.id != second.id


def test_a_conversation_outlives_the_gateway(
    engine: FakeEngine, tmp_path: Path, store_settings: dict[str, str], mark: str
) -> None:
    settings = store_settings | {"STACK_RESPONSES_DAYS": "2"}
    stack = Command(**settings)
    made: dict[str, Any] = {}
    for turn in range(2):
        with running_gateway(tmp_path / f"log{turn}", engine.url, **settings) as gateway:
            made = made or stack.json("keys", "create", "talker")
            with official(gateway, made["secret"]) as client:
                asked: Any = {"previous_response_id": made["last"]} if turn else {}
                made["last"] = client.responses.create(model="fake-model", input=f"{mark} {turn}", **asked).id
    answer = ("assistant", "one two three")
    assert said(engine, mark) == [("user", f"{mark} 0"), answer, ("user", f"{mark} 1")]
    assert mark not in (tmp_path / "log0").read_text() + (tmp_path / "log1").read_text()


def test_switched_off_it_is_a_400_that_names_the_setting(engine: FakeEngine, tmp_path: Path) -> None:
    with running_gateway(tmp_path / "log", engine.url, STACK_WORKERS="1") as gateway, official(gateway) as client:
        made = client.responses.create(model="fake-model", input="Hello")
        assert made.model_dump()["store"] is False
        for asked in ({"store": True}, {"previous_response_id": made.id}):
            with pytest.raises(openai.BadRequestError, match="STACK_RESPONSES_DAYS") as refused:
                client.responses.create(model="fake-model", input="Hello", **asked)
            assert refused.value.param in asked
        with pytest.raises(openai.NotFoundError, match="STACK_RESPONSES_DAYS"):
            client.responses.retrieve(made.id)
