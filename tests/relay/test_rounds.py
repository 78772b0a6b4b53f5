"""An answer that takes several rounds at one engine is one answer, with one slot, one head and one end."""

from typing import Any

import orjson
import pytest

from gateway.dialects import DIALECTS
from gateway.errors import EngineLost, EngineRefused
from gateway.keys.known import Key
from gateway.relay.relay import Relay
from gateway.translation.face import Writer
from tests.support.relays import (
    ANSWER,
    DONE,
    Books,
    Client,
    CountedLease,
    Engine,
    Reply,
    chunk,
    exchange,
    route,
    rules,
)

pytestmark = pytest.mark.anyio
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]
CALL = '{"name": "f", "arguments": {"city": "Oslo"}}'
TOLD = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":20,"total_tokens":23}}\n\n'
END = [chunk(reason="stop"), TOLD, DONE]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Scene:
    def __init__(self, *engines: Engine, choices: int = 1, writer: Writer | None = None, **fields: Any) -> None:
        self.client, self.lease, self.books = Client(), CountedLease(), Books()
        asked = exchange(**fields)
        if choices > 1:
            asked = exchange(**fields, n=choices)
            object.__setattr__(asked, "choices", choices)
        self.relay = Relay(asked, route(*engines), Key("key", "key"), self.lease, rules(self.books), writer)

    async def run(self) -> bool:
        return await self.relay.run(self.client, self.client.send)


def ollama(*replies: Any) -> Engine:
    return Engine([Reply(it) if isinstance(it, list) else it for it in replies], dialect=DIALECTS["ollama"])


def calls(*pieces: str) -> list[bytes]:
    return [chunk(it) for it in pieces] + END


async def test_a_request_without_tools_has_the_engines_own_bytes() -> None:
    scene = Scene(ollama(ANSWER.copy()))
    assert await scene.run()
    assert scene.client.body == chunk("Hello") + chunk(" there") + chunk(reason="stop") + DONE


async def test_the_second_round_is_charged_with_the_first() -> None:
    scene = Scene(ollama(calls("No."), calls(CALL)), tools=TOOLS, tool_choice="required")
    assert await scene.run()
    assert scene.lease.settled == [46]
    assert scene.books.told.count("started") == 2, "one request in the metrics, and one in the usage"
    assert b'"arguments":"{\\"city\\": \\"Oslo\\"}"' in scene.client.body
    assert scene.client.headers[b"x-stack-forced-tools"] == b"schema,repaired"


async def test_an_engine_that_breaks_before_the_call_is_replaced() -> None:
    broken = Reply([chunk("Let me"), chunk(" see")], EngineLost("The connection broke.", code="engine_broken_stream"))
    scene = Scene(ollama(broken), ollama(calls(CALL)), tools=TOOLS, tool_choice="required")
    assert await scene.run()
    assert b'"city' in scene.client.body or b'\\"city' in scene.client.body


async def test_a_refusal_is_the_requests_own_and_no_reason_for_another_round() -> None:
    engine = ollama(EngineRefused("No.", status=400), calls(CALL))
    scene = Scene(engine, tools=TOOLS, tool_choice="required")
    with pytest.raises(EngineRefused):
        await scene.run()
    assert len(engine.asked) == 1


async def test_a_text_that_breaks_off_is_resumed_and_still_has_one_call_at_most() -> None:
    lost = Reply([chunk("Let me"), chunk(" see")], EngineLost("It broke.", code="engine_broken_stream"))
    pieces = [{"index": it, "id": f"c{it}", "function": {"name": "f", "arguments": "{}"}} for it in (0, 1)]
    told = {"index": 0, "delta": {"tool_calls": pieces}, "finish_reason": "tool_calls"}
    rest = [b"data: %b\n\n" % orjson.dumps({"choices": [told]}), DONE]
    engines = [Engine([lost], "a"), Engine([Reply(rest)], "b")]
    scene = Scene(*engines, tools=TOOLS, parallel_tool_calls=False)
    assert await scene.run()
    assert b": resumed 1" in scene.client.body
    assert scene.client.body.count(b'"c0"') == 1
    assert b'"c1"' not in scene.client.body


async def test_a_choice_that_fails_cuts_the_stream() -> None:
    scene = Scene(ollama(calls("One"), EngineRefused("Tired.", status=400)), choices=2)
    assert not await scene.run()
    assert scene.client.was_cut
    assert b"Tired." in scene.client.body
    assert DONE not in scene.client.body


async def test_the_rounds_of_another_api_are_one_answer_in_its_form() -> None:
    class Names:
        """A Writer of the calls' names."""

        def head(self) -> bytes:
            return b"HEAD "

        def waiting(self) -> bytes:
            return b""

        def chunk(self, chunk: dict[str, Any]) -> bytes:
            told = [it for choice in chunk["choices"] for it in choice["delta"].get("tool_calls", ())]
            return b"".join(it["function"].get("name", "").encode() for it in told) + b"."

        def end(self) -> bytes:
            return b" END"

        def failed(self, error: Any) -> bytes:
            return str(error).encode()

        def whole(self, completion: dict[str, Any]) -> dict[str, Any]:
            return completion

    scene = Scene(ollama(calls("No."), calls(CALL)), writer=Names(), tools=TOOLS, tool_choice="required")
    assert await scene.run()
    assert scene.client.body == b"HEAD f... END"
