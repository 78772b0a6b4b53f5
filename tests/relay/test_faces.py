"""A relay with the writers of the translated APIs: whole streams, pings before them, and answers that break off."""

import re
from typing import Any

import orjson
import pytest

from gateway.errors import EngineLost
from gateway.keys.known import Key
from gateway.relay.relay import Relay
from gateway.translation import messages, responses
from tests.support.relays import ANSWER, Books, Client, CountedLease, Engine, Reply, chunk, exchange, route, rules

pytestmark = pytest.mark.anyio
ASKED: dict[str, tuple[Any, dict[str, Any]]] = {
    "responses": (responses.read, {"model": "m", "input": "Hello", "stream": True}),
    "messages": (
        messages.read,
        {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 9, "stream": True},
    ),
}
WHOLE = {
    "responses": ("response.created", "response.in_progress", "response.completed"),
    "messages": ("message_start", "ping", "message_stop"),
}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def answered(face: str, *replies: Reply) -> tuple[Client, CountedLease]:
    read, body = ASKED[face]
    client, lease = Client(), CountedLease()
    engines = [Engine([reply], name=f"engine-{number}") for number, reply in enumerate(replies)]
    writer = read(body, request_id="r1", now=0).writer
    await Relay(exchange(), route(*engines), Key("key"), lease, rules(Books()), writer).run(client, client.send)
    return client, lease


def events(client: Client) -> list[dict[str, Any]]:
    """The events' data, where each is named as its type says, and comments stand between them."""
    found = []
    for block in re.sub(rb"^:.*\n", b"", client.body, flags=re.MULTILINE).split(b"\n\n")[:-1]:
        name, data = block.split(b"\n")
        found.append(orjson.loads(data.removeprefix(b"data: ")))
        assert name == b"event: " + found[-1]["type"].encode()
    return found


def text(told: list[dict[str, Any]]) -> str:
    deltas = (it["delta"] for it in told if it["type"] in ("response.output_text.delta", "content_block_delta"))
    return "".join(it if isinstance(it, str) else it["text"] for it in deltas)


@pytest.mark.parametrize("face", ASKED)
async def test_a_stream_is_told_in_the_form_of_its_api_with_its_usage(face: str) -> None:
    client, lease = await answered(face, Reply(ANSWER.copy()))
    told = events(client)
    first, second, last = WHOLE[face]
    assert [it["type"] for it in (*told[:2], told[-1])] == [first, second, last]
    assert (text(told), client.whole, lease.settled) == ("Hello there", True, [5])
    numbers = [it["sequence_number"] for it in told if "sequence_number" in it]
    assert numbers == list(range(len(numbers))), "the head was written before the first event"
    usages = [it["usage"] for it in (*told, *(it.get("response", {}) for it in told)) if it.get("usage")]
    assert usages[-1]["output_tokens"] == 2


@pytest.mark.parametrize("face", ASKED)
async def test_an_answer_that_another_engine_went_on_with_is_told_as_one(face: str) -> None:
    lost = EngineLost("The connection to the engine broke.", code="engine_broken_stream")
    rest = [chunk(" there"), chunk(reason="stop"), b"data: [DONE]\n\n"]
    client, _ = await answered(face, Reply([chunk("Hello")], lost), Reply(rest))
    told = events(client)
    assert (text(told), told[-1]["type"], client.whole) == ("Hello there", WHOLE[face][2], True)
    assert sum(it["type"] == WHOLE[face][0] for it in told) == 1


@pytest.mark.parametrize(("face", "last"), [("responses", "response.failed"), ("messages", "error")])
async def test_an_answer_that_breaks_off_ends_as_its_api_has_it_and_is_cut(face: str, last: str) -> None:
    lost = EngineLost("The connection to the engine broke.", code="engine_broken_stream")
    client, _ = await answered(face, Reply([chunk("Hello")], lost))
    told = events(client)
    assert (text(told), told[-1]["type"]) == ("Hello", last)
    assert (client.whole, client.was_cut) == (False, True)
