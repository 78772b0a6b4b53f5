"""A demanded tool call is made, or the answer is an error, whatever the engine makes of the demand."""

import asyncio
from collections import Counter
from typing import Any

import httpx
import pytest

from tests.support.fakes.dialects import ENGINES
from tests.support.processes import AUTH, JSON, GatewayProcess
from tests.support.tool_demands import (
    BEGINS_AS_ARGUMENTS,
    DEMANDS,
    GOOD,
    NAMED,
    NOTHING_PASSED,
    RIGHT,
    WRONG,
    body,
    verdict,
)

REQUESTS = 1000  # for each dialect
AT_ONCE = 16


def plan(number: int) -> tuple[str, dict[str, Any], str, list[dict[str, Any]], bool]:
    """The request of this number: every first answer with every demand, both ways, repaired and not."""
    named = list(WRONG | RIGHT)
    name = named[number % len(named)]
    demand = list(DEMANDS.values())[number // len(named) % len(DEMANDS)]
    stream, stubborn = bool(number // (len(named) * len(DEMANDS)) % 2), number % 7 == 0
    first = (WRONG | RIGHT)[name]
    second = WRONG["prose"] if stubborn else GOOD
    return name, demand, "stubborn" if stubborn else "repairs", [first, second], stream


async def ask_all(gateway: GatewayProcess, engine: str) -> Counter[str]:
    gate, counts = asyncio.Semaphore(AT_ONCE), Counter[str]()
    async with httpx.AsyncClient(base_url=gateway.url, headers=AUTH | JSON, timeout=60) as client:

        async def one(number: int) -> None:
            name, demand, second, tries, stream = plan(number)
            async with gate:
                sent = body(engine, f"{engine}-{number}", *tries, stream=stream, **demand)
                answer = await read(client, sent)
            came = verdict(answer, demand, stream=stream)
            where = f"{name}, {demand}, {second}, stream {stream}: {answer.text}"
            begun = demand["tool_choice"] == NAMED and (name in BEGINS_AS_ARGUMENTS or name in RIGHT)
            if second == "repairs" and (not stream or (name in NOTHING_PASSED | RIGHT.keys() and not begun)):
                assert came == "called", where
            if second == "stubborn" and name in WRONG:
                assert came == "failed", where
            counts[came] += 1

        async with asyncio.TaskGroup() as group:
            for number in range(REQUESTS):
                group.create_task(one(number))
    return counts


async def read(client: httpx.AsyncClient, sent: dict[str, Any]) -> httpx.Response:
    """The whole answer, or as much of it as came."""
    content, cut = b"", False
    async with client.stream("POST", "/v1/chat/completions", json=sent) as answer:
        try:
            async for part in answer.aiter_raw():
                content += part
        except httpx.RemoteProtocolError:
            cut = True
    return httpx.Response(answer.status_code, headers=answer.headers, content=content, extensions={"cut": cut})


@pytest.mark.parametrize("engine", ENGINES)
def test_of_a_thousand_demands_none_is_missed_in_silence(before_all: GatewayProcess, engine: str) -> None:
    counts = asyncio.run(ask_all(before_all, engine))
    print(engine, dict(counts))
    assert counts.total() == REQUESTS
    assert counts["called"] > REQUESTS // 2
