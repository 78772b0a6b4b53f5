"""A demanded tool call is made, or the answer is an error, whatever the engine makes of the demand."""

import asyncio
import random
from collections import Counter
from typing import Any

import httpx
import pytest

from tests.support.fakes.dialects import ENGINES
from tests.support.long import LONG
from tests.support.processes import AUTH, JSON, MESSAGES, GatewayProcess
from tests.support.tool_apis import TOOL_APIS, ToolApi
from tests.support.tool_demands import BEGINS_AS_ARGUMENTS, DEMANDS, GOOD, NAMED, NOTHING_PASSED, RIGHT, WRONG

MIXED = random.Random(1).sample(range(1000), 1000)
# For each dialect, over all APIs. In a short run, each has other ones of the thousand.
REQUESTS = {it: MIXED if LONG else MIXED[number::4] for number, it in enumerate(ENGINES)}
AT_ONCE = 16


def plan(number: int) -> tuple[str, dict[str, Any], str, list[dict[str, Any]], bool, str]:
    """The request of this number: every first answer with every demand, both ways, over every API, repaired and not."""
    rest, which = divmod(number, len(WRONG | RIGHT))
    rest, kind = divmod(rest, len(TOOL_APIS))
    demand, stream = divmod(rest, 2)
    name, stubborn = list(WRONG | RIGHT)[which], number % 7 == 0
    tries = [(WRONG | RIGHT)[name], WRONG["prose"] if stubborn else GOOD]
    asked = list(DEMANDS.values())[demand % len(DEMANDS)]
    return name, asked, "stubborn" if stubborn else "repairs", tries, bool(stream), list(TOOL_APIS)[kind]


async def ask_all(gateway: GatewayProcess, engine: str) -> Counter[tuple[str, bool, str]]:
    """Return how many of each API, streamed or not, came to which end."""
    gate, counts = asyncio.Semaphore(AT_ONCE), Counter[tuple[str, bool, str]]()
    async with httpx.AsyncClient(base_url=gateway.url, headers=AUTH | JSON, timeout=60) as client:

        async def one(number: int) -> None:
            name, demand, second, tries, stream, kind = plan(number)
            api = TOOL_APIS[kind]
            async with gate:
                answer = await read(client, api, api.body(engine, f"{engine}-{number}", tries, demand, stream=stream))
            where = f"{kind}, {name}, {demand}, {second}, stream {stream}: {answer.text}"
            try:
                came = api.verdict(answer, demand, stream=stream)
            except Exception as exc:
                raise AssertionError(where) from exc
            begun = demand["tool_choice"] == NAMED and (name in BEGINS_AS_ARGUMENTS or name in RIGHT)
            if second == "repairs" and (not stream or (name in NOTHING_PASSED | RIGHT.keys() and not begun)):
                assert came == "called", where
            if second == "stubborn" and name in WRONG:
                assert came == "failed", where
            counts[kind, stream, came] += 1

        async with asyncio.TaskGroup() as group:
            for number in REQUESTS[engine]:
                group.create_task(one(number))
    return counts


async def read(client: httpx.AsyncClient, api: ToolApi, sent: dict[str, Any]) -> httpx.Response:
    """The whole answer, or as much of it as came."""
    content, cut = b"", False
    async with client.stream("POST", api.path, json=sent) as answer:
        try:
            async for part in answer.aiter_raw():
                content += part
        except httpx.RemoteProtocolError:
            cut = True
    return httpx.Response(answer.status_code, headers=answer.headers, content=content, extensions={"cut": cut})


@pytest.mark.parametrize("engine", ENGINES)
def test_of_many_demands_none_is_missed_in_silence(before_all: GatewayProcess, engine: str) -> None:
    counts = asyncio.run(ask_all(before_all, engine))
    print(engine, dict(counts))
    assert counts.total() == len(REQUESTS[engine])
    for api in TOOL_APIS:
        for stream in (False, True):
            assert counts[api, stream, "called"] > counts[api, stream, "failed"] > 0


def again(levels: int) -> dict[str, Any]:
    """Definitions that each apply the next one twice, and tell which members of a value are evaluated."""
    more = {f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(levels)}
    parts = {name: it | {"unevaluatedProperties": False} for name, it in more.items()}
    return {"properties": {"x": {"$ref": "#/$defs/a0"}}, "$defs": parts | {f"a{levels}": {"type": "object"}}}


def chain(length: int) -> dict[str, Any]:
    parts = {f"a{n}": {"$ref": f"#/$defs/a{n + 1}"} for n in range(length)}
    return {"unevaluatedItems": False, "$ref": "#/$defs/a0", "$defs": parts | {f"a{length}": {}}}


HOSTILE: dict[str, list[dict[str, Any]]] = {
    "compiled again and again": [again(13)],
    "below a name that is a pattern": [
        {"patternProperties": {"^x": {"$ref": "#/$defs/a0"}}, "$defs": again(13)["$defs"]}
    ],
    "a long chain of references": [chain(900)],
    "more of it than the stack has": [chain(4000)],
    "a long name above many parts": [{"properties": {"a" * 100_000: {"allOf": [{}] * 4000}}}],
    "many tools": [again(7) for _ in range(100)],
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("strict", [False, True])
def test_a_schema_that_takes_too_long_to_compile_is_refused(
    before_all: GatewayProcess, name: str, strict: bool
) -> None:
    """A schema of 1.4 kB stopped a worker for 19 s, and one of 250 kB killed it."""
    functions = [{"name": f"f{n}", "parameters": it, "strict": strict} for n, it in enumerate(HOSTILE[name])]
    sent = {"model": "vllm", "messages": MESSAGES, "tools": [{"type": "function", "function": it} for it in functions]}
    workers = before_all.workers()
    with before_all.client() as client:
        answer = client.post("/v1/chat/completions", json=sent if strict else sent | {"tool_choice": "required"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"].partition(".")[2]) == (400, "function.parameters")
    assert "too long to be compiled" in error["message"] or "refers to more than 1000" in error["message"]
    assert before_all.workers() == workers
